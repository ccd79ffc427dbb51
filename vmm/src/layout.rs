// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What lies where in a Linux guest's address spaces. Memory itself is placed by
//! [`placement`](crate::placement).
//!
//! A snapshot's guest knows these addresses by heart, so none of them may change without a new
//! version of the snapshot's format.

use vm_memory::GuestAddress;

/// The segment descriptors that a processor starts with.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// The interrupt descriptor table that a processor starts with: empty.
pub const IDT: GuestAddress = GuestAddress(0x520);
/// PVH's `hvm_start_info`, its list of modules and its memory map behind it.
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// Linux's `boot_params`, the "zero page".
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Where the stack ends that a processor starts with.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Three tables that map the first GiB to itself.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel's command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Bytes that there are for a command line, with the NUL at its end.
pub const COMMAND_LINE_MAX: usize = 0x1_0000;

/// End of the memory below 1 MiB that a kernel may use for itself.
pub const LOW_END: u64 = 0x9_fc00;
/// ACPI's tables. A kernel that nobody tells looks for them from here on (ACPI 6.5, section
/// 5.2.5.1).
pub const ACPI: GuestAddress = GuestAddress(0xe_0000);
/// Bytes that the tables may take.
pub const ACPI_SIZE: u64 = 0x1_0000;
/// The generation identifier, in a page of what the guest takes for firmware.
pub const GENERATION_ID: GuestAddress = GuestAddress(0xf_f000);
/// Where a processor in real mode enters the BIOS to reset the machine.
pub const BIOS_ENTRY: GuestAddress = GuestAddress(0xf_fff0);
/// Where a kernel lies, and all memory from here on is the guest's.
pub const HIGH_START: GuestAddress = GuestAddress(0x10_0000);

/// The first virtio-mmio device; the others follow.
pub const DEVICES: u64 = 0xd000_0000;
/// Bytes of a device's registers.
pub const DEVICE_SIZE: u64 = 0x1000;
/// Devices that a machine can have: as many as there are interrupts for.
pub const MAX_DEVICES: usize = 16;
/// The interrupt (GSI) of the first device.
pub const DEVICE_GSI: u32 = 8;
/// The I/O APIC's registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs' registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// A page that KVM needs on Intel's processors; the three after it are the task state segment's.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// The task state segment that KVM needs on Intel's processors.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// The serial port.
pub const SERIAL: u16 = 0x3f8;
/// Ports of the serial port.
pub const SERIAL_SIZE: u16 = 8;
/// Its interrupt.
pub const SERIAL_GSI: u32 = 4;
/// The keyboard controller, of which there is only the reset line.
pub const I8042: u16 = 0x60;
/// Its ports.
pub const I8042_SIZE: u16 = 5;
/// The port by which a kernel tells that it has panicked.
pub const PANIC: u16 = 0x505;
/// Its ports.
pub const PANIC_SIZE: u16 = 1;
/// ACPI's registers.
pub const POWER: u16 = 0x600;
/// Their ports.
pub const POWER_SIZE: u16 = 16;
/// The sleep control register, and the sleep status register behind it, a byte each.
pub const SLEEP_CONTROL: u16 = POWER;
/// The reset register, a byte.
pub const RESET: u16 = POWER + 2;
/// The status of ACPI's events, 16 bits.
pub const PM1_STATUS: u16 = POWER + 4;
/// Which of these events interrupt, 16 bits.
pub const PM1_ENABLE: u16 = POWER + 6;
/// The power management timer, 32 bits.
pub const PM_TIMER: u16 = POWER + 8;
/// ACPI's control register, 16 bits.
pub const PM1_CONTROL: u16 = POWER + 12;
/// The interrupt of ACPI's events. It is one that no device has; none of the events ever comes.
pub const SCI_GSI: u32 = 5;
/// PCI's configuration ports, and the reset control register.
pub const PCI: u16 = 0xcf8;
/// Their number.
pub const PCI_SIZE: u16 = 8;
/// The interrupt by which the machine tells the guest of a new generation.
pub const GENERATION_GSI: u32 = 6;

/// Processors that a Linux guest can have.
pub const MAX_CPUS: u32 = 16;

/// Where the registers of device `position` are.
pub fn device_address(position: usize) -> u64 {
    DEVICES + position as u64 * DEVICE_SIZE
}

/// The interrupt of device `position`.
pub fn device_gsi(position: usize) -> u32 {
    DEVICE_GSI + position as u32
}

// An I/O APIC has 24 pins.
const _: () = assert!(DEVICE_GSI as usize + MAX_DEVICES <= 24);
const _: () = assert!(ACPI.0 + ACPI_SIZE <= GENERATION_ID.0);
const _: () = assert!(GENERATION_ID.0 + 16 <= BIOS_ENTRY.0);
const _: () = assert!(SCI_GSI < DEVICE_GSI && SCI_GSI != SERIAL_GSI && SCI_GSI != GENERATION_GSI);
const _: () = assert!(COMMAND_LINE.0 + COMMAND_LINE_MAX as u64 <= LOW_END);
