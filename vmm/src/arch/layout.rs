// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fixed addresses, ports and interrupts of a Linux guest's machine.
//! [`placement`](crate::arch::placement) places the memory itself.
//!
//! A guest in a snapshot has stored these addresses, so none of them may change without a new
//! version of the snapshot format.

use demand_memory::PAGE_SIZE;
use vm_memory::GuestAddress;

/// The initial segment descriptor table.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// The initial interrupt descriptor table, which is empty.
pub const IDT: GuestAddress = GuestAddress(0x520);
/// PVH's `hvm_start_info`, followed by its list of modules and its memory map.
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// Linux's `boot_params`, the "zero page".
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// End of the initial stack.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Three page tables that map the first GiB to itself.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel's command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Space for the command line with its NUL, in bytes.
pub const COMMAND_LINE_MAX: usize = 0x1_0000;

/// End of the memory below 1 MiB that a kernel may use.
pub const LOW_END: u64 = 0x9_fc00;
/// ACPI's tables. Without the address from a boot protocol, a kernel searches for them from here on
/// (ACPI 6.5, section 5.2.5.1).
pub const ACPI: GuestAddress = GuestAddress(0xe_0000);
/// Space for the tables, in bytes.
pub const ACPI_SIZE: u64 = 0x1_0000;
/// The generation identifier, in a page that the guest regards as firmware.
pub const GENERATION_ID: GuestAddress = GuestAddress(0xf_f000);
/// The address at which a processor in real mode enters the BIOS to reset the machine.
pub const BIOS_ENTRY: GuestAddress = GuestAddress(0xf_fff0);
/// The kernel's load address. All memory from here on is the guest's.
pub const HIGH_START: GuestAddress = GuestAddress(0x10_0000);

/// The registers of the first virtio-mmio device. The other devices follow.
pub const DEVICES: u64 = 0xd000_0000;
/// Size of a device's registers, in bytes.
pub const DEVICE_SIZE: u64 = 0x1000;
/// Maximum number of devices, limited by the number of interrupts.
pub const MAX_DEVICES: usize = 16;
/// The interrupt (GSI) of the first device.
pub const DEVICE_GSI: u32 = 8;
/// The I/O APIC's registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs' registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// A page that KVM needs on Intel processors. The task state segment follows in the next three
/// pages.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// The task state segment that KVM needs on Intel processors.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// The serial port.
pub const SERIAL: u16 = 0x3f8;
/// Number of ports of the serial port.
pub const SERIAL_SIZE: u16 = 8;
/// The interrupt of the serial port.
pub const SERIAL_GSI: u32 = 4;
/// The keyboard controller, of which only the reset line exists.
pub const I8042: u16 = 0x60;
/// Number of ports of the keyboard controller.
pub const I8042_SIZE: u16 = 5;
/// The port through which a kernel reports a panic.
pub const PANIC: u16 = 0x505;
/// Number of ports of the panic device.
pub const PANIC_SIZE: u16 = 1;
/// ACPI's registers.
pub const POWER: u16 = 0x600;
/// Number of ports of ACPI's registers.
pub const POWER_SIZE: u16 = 16;
/// The sleep control register (one byte), followed by the sleep status register (one byte).
pub const SLEEP_CONTROL: u16 = POWER;
/// The reset register (one byte).
pub const RESET: u16 = POWER + 2;
/// The value that resets the machine when it is written to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of "soft off".
pub const S5: u8 = 5;
/// The status of ACPI's events (16 bits).
pub const PM1_STATUS: u16 = POWER + 4;
/// The enable bits of these events' interrupts (16 bits).
pub const PM1_ENABLE: u16 = POWER + 6;
/// The power management timer (32 bits).
pub const PM_TIMER: u16 = POWER + 8;
/// ACPI's control register (16 bits).
pub const PM1_CONTROL: u16 = POWER + 12;
/// The interrupt of ACPI's events. No device shares it, and no event ever occurs.
pub const SCI_GSI: u32 = 5;
/// PCI's configuration ports, and the reset control register.
pub const PCI: u16 = 0xcf8;
/// Number of these ports.
pub const PCI_SIZE: u16 = 8;
/// The interrupt that announces a new generation identifier.
pub const GENERATION_GSI: u32 = 6;

/// Maximum number of processors of a Linux guest.
pub const MAX_CPUS: u32 = 16;

/// Returns the address of the registers of device `position`.
pub fn device_address(position: usize) -> u64 {
    DEVICES + position as u64 * DEVICE_SIZE
}

/// Returns the interrupt of device `position`.
pub fn device_gsi(position: usize) -> u32 {
    DEVICE_GSI + u32::try_from(position).expect("there are at most `MAX_DEVICES`")
}

// An I/O APIC has 24 pins.
const _: () = assert!(DEVICE_GSI as usize + MAX_DEVICES <= 24);
const _: () = assert!(ACPI.0 + ACPI_SIZE <= GENERATION_ID.0);
const _: () = assert!(GENERATION_ID.0 + 16 <= BIOS_ENTRY.0);
const _: () = assert!(SCI_GSI < DEVICE_GSI && SCI_GSI != SERIAL_GSI && SCI_GSI != GENERATION_GSI);
const _: () = assert!(COMMAND_LINE.0 + COMMAND_LINE_MAX as u64 <= LOW_END);

/// The most bytes in a memslot: `KVM_MEM_MAX_NR_PAGES` in include/linux/kvm_host.h.
pub(crate) const MEMSLOT_MAX: u64 = ((1 << 31) - 1) * PAGE_SIZE;

/// The CPUID leaf with the numbers of address bits and of AMD processors.
pub(crate) const ADDRESS_SIZES: u32 = 0x8000_0008;
