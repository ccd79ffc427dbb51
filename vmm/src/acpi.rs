// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! ACPI's tables: by them a distribution's kernel finds processors, interrupt controllers, the
//! serial port, the virtio-mmio devices, the generation identifier, and the way to power off.
//!
//! The machine is "hardware-reduced" (ACPI 6.5, section 4.1): there is no legacy power management,
//! and events are interrupts of their own.

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package,
    Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use demand_memory::DemandMemory;
use vm_memory::Bytes;

use crate::error::Error;
use crate::layout::{
    ACPI, ACPI_SIZE, DEVICE_SIZE, GENERATION_GSI, GENERATION_ID, IO_APIC, LOCAL_APIC, POWER,
    SERIAL, SERIAL_GSI, SERIAL_SIZE, device_address, device_gsi,
};
use crate::power::{RESET_VALUE, S5};

const OEM: [u8; 6] = *b"RSTVMM";
const OEM_TABLE: [u8; 8] = *b"DEMANDPG";
const OEM_REVISION: u32 = 1;
/// Where the tables behind the root pointer begin to be, and what they are aligned to, in bytes.
const ALIGN: u64 = 64;
/// Virtio over MMIO, as Linux knows it (`drivers/virtio/virtio_mmio.c`).
const VIRTIO_MMIO: &str = "LNRO0005";
/// `IAPC_BOOT_ARCH` (ACPI 6.5, table 5.11): there is no VGA; there is no real-time clock.
const NO_VGA: u16 = 1 << 2;
const NO_RTC: u16 = 1 << 5;

/// Writes the tables of a machine with so many processors and virtio-mmio devices.
///
/// # Errors
///
/// If they do not fit, or the memory refuses them.
pub fn write(memory: &DemandMemory, cpus: u32, devices: usize) -> Result<(), Error> {
    let tables = tables(cpus, devices);
    if tables.len() as u64 > ACPI_SIZE {
        return Err(Error::usage(format!(
            "describe {devices} devices and {cpus} vCPUs to the guest: ACPI's tables would take \
             {} bytes of {ACPI_SIZE}; ask for fewer",
            tables.len()
        )));
    }
    memory
        .write_slice(&tables, ACPI)
        .map_err(|error| Error::failed(format!("write ACPI's tables: {error}")))
}

/// All tables, as they lie from [`ACPI`] on.
fn tables(cpus: u32, devices: usize) -> Vec<u8> {
    let mut area = Area::default();
    // The root pointer comes first and is written last: it names the others.
    area.add(&Rsdp::new(OEM, 0));
    let dsdt = area.add(&dsdt(devices));
    let fadt = area.add(&fadt(dsdt));
    let madt = area.add(&madt(cpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.add(&xsdt);
    area.replace_first(&Rsdp::new(OEM, xsdt));
    area.0
}

/// Tables one behind the other.
#[derive(Default)]
struct Area(Vec<u8>);

impl Area {
    /// Adds a table; returns its address.
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

/// A register of one byte.
fn port(address: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address.into())
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_RTC).into();
    fadt.sleep_control_reg = port(POWER);
    fadt.sleep_status_reg = port(POWER + 1);
    fadt.reset_reg = port(POWER + 2);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

fn madt(cpus: u32) -> MADT {
    let mut madt =
        MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for cpu in 0..cpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    // Its number is one that no processor has.
    madt.add_structure(IoApic::new(cpus as u8, IO_APIC, 0));
    madt
}

/// What a device uses, and its interrupt: edge-triggered, active high, its own.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn dsdt(devices: usize) -> Sdt {
    let mut body = Vec::new();
    for position in 0..devices {
        virtio_mmio(position, &mut body);
    }
    serial(&mut body);
    generation(&mut body);
    // How to switch off: what to write to the sleep control register.
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
    // Below 4 GiB, as `layout` says.
    let registers = Memory32Fixed::new(true, device_address(position) as u32, DEVICE_SIZE as u32);
    let interrupt = interrupt(device_gsi(position));
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    Device::new(
        Path::new(&name),
        vec![
            &Name::new("_HID".into(), &VIRTIO_MMIO),
            &Name::new("_UID".into(), &uid),
            // Accesses are coherent.
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

/// The generation identifier (Microsoft's "Virtual Machine Generation ID"), and the event that it
/// has changed.
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

    /// The table at a guest address, by its own length.
    fn table(all: &[u8], address: u64) -> &[u8] {
        let at = (address - ACPI.0) as usize;
        let len = u32::from_le_bytes(all[at + 4..at + 8].try_into().unwrap()) as usize;
        &all[at..at + len]
    }

    #[test]
    fn each_table_is_found_and_its_bytes_add_up_to_nothing() {
        for (cpus, devices) in [(1, 0), (4, 3), (16, 16)] {
            let all = tables(cpus, devices);
            assert!((all.len() as u64) < ACPI_SIZE, "{}", all.len());
            assert_eq!((&all[..8], sum(&all[..20]), sum(&all[..36])), (&b"RSD PTR "[..], 0, 0));
            let xsdt = table(&all, word(&all, 24));
            assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
            let (fadt, madt) = (table(&all, word(xsdt, 36)), table(&all, word(xsdt, 44)));
            assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
            assert_eq!((&madt[..4], sum(madt)), (&b"APIC"[..], 0));
            assert_eq!(madt.len(), 44 + 8 * cpus as usize + 12);
            let dsdt = table(&all, word(fadt, 140));
            assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
            let declared = dsdt.windows(8).filter(|name| *name == VIRTIO_MMIO.as_bytes()).count();
            assert_eq!(declared, devices);
        }
    }
}
