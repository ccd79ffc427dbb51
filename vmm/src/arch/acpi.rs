// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! ACPI tables, which tell a distribution's kernel of the processors, interrupt controllers, serial
//! port, virtio-mmio devices, generation identifier, timer, and the ways to power off and to reset.
//!
//! The machine has ACPI's fixed hardware (ACPI 6.5, section 4.8), PICs and a PIT. On a
//! "hardware-reduced" machine Linux uses neither PICs nor PIT, so that it needs an I/O APIC and
//! kvm-clock, and it resets only through EFI or the BIOS.

#![expect(
    clippy::cast_possible_truncation,
    reason = "the tables hold the layout's addresses and numbers in narrower fields, which they fit"
)]

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package,
    Path, ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use demand_memory::DemandMemory;
use vm_memory::Bytes;

use crate::arch::error::BootError;
use crate::arch::layout::{
    ACPI, ACPI_SIZE, BIOS_ENTRY, DEVICE_SIZE, GENERATION_GSI, GENERATION_ID, IO_APIC, LOCAL_APIC,
    PANIC, PANIC_SIZE, PM_TIMER, PM1_CONTROL, PM1_STATUS, RESET, RESET_VALUE, S5, SCI_GSI, SERIAL,
    SERIAL_GSI, SERIAL_SIZE, device_address, device_gsi,
};

const OEM: [u8; 6] = *b"RSTVMM";
const OEM_TABLE: [u8; 8] = *b"DEMANDPG";
const OEM_REVISION: u32 = 1;
/// Alignment of the tables, in bytes. The first table behind the root pointer lies at this offset.
const ALIGN: u64 = 64;
/// The hardware ID of virtio over MMIO in Linux (`drivers/virtio/virtio_mmio.c`).
const VIRTIO_MMIO: &str = "LNRO0005";
/// Flags of `IAPC_BOOT_ARCH` (ACPI 6.5, table 5.11): no VGA, no real-time clock. The flag for a
/// keyboard controller stays clear, because the machine's has only the reset line.
const NO_VGA: u16 = 1 << 2;
const NO_RTC: u16 = 1 << 5;
/// Latencies that declare the states C2 and C3 absent (ACPI 6.5, table 5.9).
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;
/// MADT flag: the machine also has PICs.
const PCAT_COMPAT: u32 = 1;
/// MADT: the type of an interrupt source override, and its length in bytes.
const OVERRIDE: u8 = 2;
const OVERRIDE_LEN: u8 = 10;
/// Flags of an override: active high, level-triggered.
const HIGH_LEVEL: u16 = 0b1101;

/// The code at which a processor in real mode enters the BIOS. It resets the machine through the
/// reset control register, as firmware would. Some kernels know no other way to reset; others try
/// this way last.
///
/// ```asm
/// mov al, 0x06
/// mov dx, 0xcf9
/// out dx, al
/// hlt
/// jmp short -3
/// ```
const BIOS: [u8; 9] = [0xb0, 0x06, 0xba, 0xf9, 0x0c, 0xee, 0xf4, 0xeb, 0xfd];

/// Writes the tables of a machine with `cpus` processors and `devices` virtio-mmio devices, and the
/// few bytes of BIOS code.
///
/// # Errors
///
/// If the tables do not fit, or the memory cannot be written.
pub(crate) fn write(memory: &DemandMemory, cpus: u32, devices: usize) -> Result<(), BootError> {
    let tables = tables(cpus, devices);
    if tables.len() as u64 > ACPI_SIZE {
        return Err(BootError::AcpiSize { devices, cpus, bytes: tables.len() });
    }
    memory
        .write_slice(&tables, ACPI)
        .and_then(|()| memory.write_slice(&BIOS, BIOS_ENTRY))
        .map_err(BootError::Acpi)
}

/// Returns all tables, as they lie from [`ACPI`] on.
fn tables(cpus: u32, devices: usize) -> Vec<u8> {
    let mut area = Area::default();
    // The root pointer comes first but is written last, because it holds the address of the XSDT.
    area.add(&Rsdp::new(OEM, 0));
    let dsdt = area.add(&dsdt(devices));
    let facs = area.add(&FACS::new());
    let fadt = area.add(&fadt(dsdt, facs));
    let madt = area.add(&madt(cpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.add(&xsdt);
    area.replace_first(&Rsdp::new(OEM, xsdt));
    area.0
}

/// An area that holds the tables one after another.
#[derive(Default)]
struct Area(Vec<u8>);

impl Area {
    /// Adds a table and returns its guest address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.0.resize(self.0.len().next_multiple_of(ALIGN as usize), 0);
        let address = ACPI.0 + self.0.len() as u64;
        table.to_aml_bytes(&mut self.0);
        address
    }

    fn replace_first(&mut self, table: &dyn Aml) {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        self.0[..bytes.len()].copy_from_slice(&bytes);
    }
}

/// Returns the description of a register of 1, 2 or 4 bytes.
fn port(address: u16, bytes: u8) -> GAS {
    let access = match bytes {
        1 => AccessSize::ByteAccess,
        2 => AccessSize::WordAccess,
        _ => AccessSize::DwordAccess,
    };
    GAS::new(AddressSpace::SystemIo, bytes * 8, 0, access, address.into())
}

fn fadt(dsdt: u64, facs: u64) -> impl Aml {
    // Both tables lie below 4 GiB. Systems old enough to know only ACPI 1.0 read just the 32-bit
    // fields.
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_32(dsdt as u32)
        .firmware_ctrl_32(facs as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = (SCI_GSI as u16).into();
    (fadt.p_lvl2_lat, fadt.p_lvl3_lat) = (NO_C2.into(), NO_C3.into());
    (fadt.pm1a_evt_blk, fadt.pm1_evt_len) = (u32::from(PM1_STATUS).into(), 4);
    (fadt.pm1a_cnt_blk, fadt.pm1_cnt_len) = (u32::from(PM1_CONTROL).into(), 2);
    (fadt.pm_tmr_blk, fadt.pm_tmr_len) = (u32::from(PM_TIMER).into(), 4);
    fadt.x_pm1a_evt_blk = port(PM1_STATUS, 4);
    fadt.x_pm1a_cnt_blk = port(PM1_CONTROL, 2);
    fadt.x_pm_tmr_blk = port(PM_TIMER, 4);
    fadt.iapc_boot_arch = (NO_VGA | NO_RTC).into();
    fadt.reset_reg = port(RESET, 1);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// Builds the table of interrupt controllers by hand: `acpi_tables::madt` supports neither the flag
/// for PICs nor overrides.
fn madt(cpus: u32) -> Sdt {
    let mut body = Vec::new();
    for cpu in 0..cpus as u8 {
        ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled).to_aml_bytes(&mut body);
    }
    // No processor has this APIC ID.
    IoApic::new(cpus as u8, IO_APIC, 0).to_aml_bytes(&mut body);
    let (flags, gsi) = (HIGH_LEVEL.to_le_bytes(), SCI_GSI.to_le_bytes());
    // Bus 0 is ISA.
    body.extend([OVERRIDE, OVERRIDE_LEN, 0, SCI_GSI as u8]);
    body.extend(gsi.into_iter().chain(flags));
    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM, OEM_TABLE, OEM_REVISION);
    madt.append_slice(&LOCAL_APIC.to_le_bytes());
    madt.append_slice(&PCAT_COMPAT.to_le_bytes());
    madt.append_slice(&body);
    madt
}

/// Returns an interrupt resource of a device: edge-triggered, active high, not shared.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn dsdt(devices: usize) -> Sdt {
    let mut body = Vec::new();
    for position in 0..devices {
        virtio_mmio(position, &mut body);
    }
    serial(&mut body);
    panic_port(&mut body);
    generation(&mut body);
    // The sleep types that the guest writes to the control registers to power off.
    let s5 = Package::new(vec![&S5, &S5]);
    Name::new("_S5_".into(), &s5).to_aml_bytes(&mut body);
    // Revision 2: integers have 64 bits.
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table
}

fn virtio_mmio(position: usize, sink: &mut dyn AmlSink) {
    let name = format!("_SB_.V{position:03}");
    let uid = position as u64;
    // Device registers lie below 4 GiB; see `layout`.
    let registers = Memory32Fixed::new(true, device_address(position) as u32, DEVICE_SIZE as u32);
    let interrupt = interrupt(device_gsi(position));
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    Device::new(
        Path::new(&name),
        vec![
            &Name::new("_HID".into(), &VIRTIO_MMIO),
            &Name::new("_UID".into(), &uid),
            // DMA is cache-coherent.
            &Name::new("_CCA".into(), &1u8),
            &Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(sink);
}

fn serial(sink: &mut dyn AmlSink) {
    let ports = IO::new(SERIAL, SERIAL, 1, SERIAL_SIZE as u8);
    let interrupt = interrupt(SERIAL_GSI);
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(sink);
}

/// The port through which a kernel reports that it has panicked, described as in QEMU.
fn panic_port(sink: &mut dyn AmlSink) {
    let ports = IO::new(PANIC, PANIC, 1, PANIC_SIZE as u8);
    let resources = ResourceTemplate::new(vec![&ports]);
    let hid = Name::new("_HID".into(), &"QEMU0001");
    let crs = Name::new("_CRS".into(), &resources);
    Device::new("_SB_.PVPN".into(), vec![&hid, &crs]).to_aml_bytes(sink);
}

/// The generation identifier (Microsoft's "Virtual Machine Generation ID"), and the event that
/// announces a change of it.
fn generation(sink: &mut dyn AmlSink) {
    let (low, high) = (GENERATION_ID.0 as u32, (GENERATION_ID.0 >> 32) as u32);
    let address = Package::new(vec![&low, &high]);
    Device::new(
        "_SB_.VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"DMNDVGEN"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &address),
        ],
    )
    .to_aml_bytes(sink);
    let interrupt = interrupt(GENERATION_GSI);
    let resources = ResourceTemplate::new(vec![&interrupt]);
    let target = Path::new("\\_SB_.VGEN");
    let changed = Notify::new(&target, &0x80u8);
    let (argument, gsi) = (Arg(0), GENERATION_GSI);
    let is_it = Equal::new(&argument, &gsi);
    let only_then = If::new(&is_it, vec![&changed]);
    let event = Method::new("_EVT".into(), 1, true, vec![&only_then]);
    let hid = Name::new("_HID".into(), &"ACPI0013");
    let uid = Name::new("_UID".into(), &0u8);
    let crs = Name::new("_CRS".into(), &resources);
    let device = Device::new("GED_".into(), vec![&hid, &uid, &crs, &event]);
    Scope::new("_SB_".into(), vec![&device]).to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// Returns the table at a guest address, cut to the length in its header.
    fn table(all: &[u8], address: u64) -> &[u8] {
        let at = (address - ACPI.0) as usize;
        let len = u32::from_le_bytes(all[at + 4..at + 8].try_into().unwrap()) as usize;
        &all[at..at + len]
    }

    #[test]
    fn each_table_is_found_with_its_checksum() {
        for (cpus, devices) in [(1, 0), (4, 3), (16, 16)] {
            let all = tables(cpus, devices);
            assert!((all.len() as u64) < ACPI_SIZE, "{}", all.len());
            assert_eq!((&all[..8], sum(&all[..20]), sum(&all[..36])), (&b"RSD PTR "[..], 0, 0));
            let xsdt = table(&all, word(&all, 24));
            assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
            let (fadt, madt) = (table(&all, word(xsdt, 36)), table(&all, word(xsdt, 44)));
            assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
            assert_eq!((&madt[..4], sum(madt)), (&b"APIC"[..], 0));
            assert_eq!(madt.len(), 44 + 8 * cpus as usize + 12 + 10);
            assert_eq!(madt[madt.len() - 10..], [2, 10, 0, 5, 5, 0, 0, 0, 0xd, 0]);
            let dsdt = table(&all, word(fadt, 140));
            let facs = u32::from_le_bytes(fadt[36..40].try_into().unwrap());
            assert_eq!((&table(&all, facs.into())[..4], facs % 64), (&b"FACS"[..], 0));
            assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
            let declared = dsdt.windows(8).filter(|name| *name == VIRTIO_MMIO.as_bytes()).count();
            assert_eq!(declared, devices);
        }
    }
}
