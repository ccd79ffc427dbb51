// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs arbitrary programs on the memory under test, with a device behind a port and in MMIO that
//! records its accesses, and checks each exit for a missing page.

use std::fs;

use bare_guest::{Mode, PageTables, start_at};
use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuExit;

use crate::BACKINGS;
use crate::guest::{Backing, CODE_GPA, EXIT_USERFAULT, Guest, MEMORY_GPA, PAGE, PAGES, USERFAULT};

/// The device's port, and the first address of its MMIO, which no slot covers.
pub const PORT: u16 = 0x80;
pub const MMIO_GPA: u64 = 0xd000_0000;

/// End of the memory under test; no slot covers addresses from here on.
pub const END_GPA: u64 = MEMORY_GPA + (PAGES * PAGE) as u64;

/// `ud2; .ascii "kvm"`: makes KVM emulate the next instruction.
pub const EMULATE: [u8; 5] = [0x0f, 0x0b, b'k', b'v', b'm'];

/// First page of the code slot that holds page tables. These pages are present from the start.
pub const TABLES: usize = 32;
/// Flags of an entry: present, writable, and user. L1's nested page tables need the user flag.
const ENTRY: u64 = 0b111;
/// The accessed and dirty flags, which the CPU or KVM's emulation sets in an entry.
pub const ACCESSED: u64 = 1 << 5;
pub const DIRTY: u64 = 1 << 6;

/// Guest virtual address of the window that a test maps through its own page tables.
pub const WINDOW: u64 = 1 << 39;

/// The accesses that the device recorded.
#[derive(Debug, Default)]
pub struct Device {
    /// Bytes written to the port.
    pub out: Vec<u8>,
    /// Number of bytes read from the port; byte i is `port_byte(i)`.
    pub taken: usize,
    /// MMIO reads: address and length. The byte at an address is `mmio_byte(address)`.
    pub reads: Vec<(u64, usize)>,
    /// MMIO writes: address and bytes.
    pub writes: Vec<(u64, Vec<u8>)>,
}

pub fn port_byte(index: usize) -> u8 {
    (index * 7 + 1) as u8
}

pub fn mmio_byte(address: u64) -> u8 {
    (address * 5 + 3) as u8
}

/// The value of each byte of a missing page.
const UNARRIVED: u8 = 0xee;

pub fn content_byte(page: usize, offset: usize) -> u8 {
    // Never the value of a missing page's bytes.
    ((page * 31 + offset * 3) % 0xee) as u8
}

/// The reason why a program stopped.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    Halt,
    Missing(usize),
    /// A signal or `immediate_exit` ended KVM_RUN.
    Interrupted,
}

/// A guest with a device.
pub struct Machine {
    pub guest: Guest,
    pub device: Device,
    /// Content of pages that is not given by `content_byte`.
    images: Vec<(usize, Vec<u8>)>,
}

impl Machine {
    /// Creates a machine whose pages are all missing.
    pub fn new(backing: Backing) -> Option<Self> {
        let guest = Guest::new(backing, USERFAULT)?;
        for page in 0..PAGES {
            guest.memory.put(page * PAGE, &[UNARRIVED; PAGE]);
        }
        Some(Self { guest, device: Device::default(), images: Vec::new() })
    }

    /// Changes the source content of a page, from `offset` on.
    pub fn image(&mut self, page: usize, offset: usize, bytes: &[u8]) {
        let image = match self.images.iter_mut().find(|(number, _)| *number == page) {
            Some((_, image)) => image,
            None => {
                let usual = (0..PAGE).map(|i| content_byte(page, i)).collect();
                self.images.push((page, usual));
                &mut self.images.last_mut().expect("just pushed").1
            }
        };
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Returns the source content of a page.
    pub fn expected(&self, page: usize) -> Vec<u8> {
        match self.images.iter().find(|(number, _)| *number == page) {
            Some((_, image)) => image.clone(),
            None => (0..PAGE).map(|i| content_byte(page, i)).collect(),
        }
    }

    /// Returns the source content of `count` pages, for comparison with the program's result.
    pub fn arrived(&self, first: usize, count: usize) -> Vec<u8> {
        (first..first + count).flat_map(|page| self.expected(page)).collect()
    }

    pub fn memory(&self, first: usize, count: usize) -> Vec<u8> {
        self.guest.memory.get(first * PAGE, count * PAGE)
    }

    pub fn arrive(&self, page: usize) {
        self.guest.memory.put(page * PAGE, &self.expected(page));
        self.guest.bitmap.clear(page);
    }

    /// Writes a program, followed by `hlt`, to the code slot, and sets the CPU to its start.
    pub fn program(&mut self, code: &[u8], set: impl FnOnce(&mut kvm_regs)) {
        self.guest.code.put(0, code);
        self.guest.code.put(code.len(), &[0xf4]);
        self.enter(CODE_GPA, set);
    }

    pub fn enter(&mut self, rip: u64, set: impl FnOnce(&mut kvm_regs)) {
        let mut regs = start_at(rip);
        set(&mut regs);
        self.guest.vcpu.set_regs(&regs).expect("regs");
        self.device = Device::default();
    }

    /// Runs the guest until it halts or accesses a missing page; emulates the device.
    pub fn run(&mut self) -> End {
        loop {
            let device = &mut self.device;
            match self.guest.vcpu.run() {
                Ok(VcpuExit::Hlt) => return End::Halt,
                Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                    assert_eq!((flags, size), (EXIT_USERFAULT, PAGE as u64));
                    assert_eq!(gpa % PAGE as u64, 0);
                    return End::Missing((gpa - MEMORY_GPA) as usize / PAGE);
                }
                Ok(VcpuExit::IoOut(PORT, data)) => device.out.extend_from_slice(data),
                Ok(VcpuExit::IoIn(PORT, data)) => {
                    for byte in data {
                        *byte = port_byte(device.taken);
                        device.taken += 1;
                    }
                }
                Ok(VcpuExit::MmioRead(address, data)) if address >= END_GPA => {
                    device.reads.push((address, data.len()));
                    for (i, byte) in data.iter_mut().enumerate() {
                        *byte = mmio_byte(address + i as u64);
                    }
                }
                Ok(VcpuExit::MmioWrite(address, data)) if address >= END_GPA => {
                    device.writes.push((address, data.to_vec()));
                }
                Ok(other) => {
                    let other = format!("{other:?}");
                    panic!("unexpected exit {other} at {:x?}", self.guest.vcpu.get_regs());
                }
                Err(error) if error.errno() == libc::EINTR => return End::Interrupted,
                Err(error) => panic!("KVM_RUN: {error}"),
            }
        }
    }

    /// Runs the program to its end, and returns the missing pages in the order of their exits.
    /// Before a missing page is made present, the guest is resumed without it, with
    /// `immediate_exit` set, and with its registers written back, which must change nothing.
    pub fn finish(&mut self) -> Vec<usize> {
        let mut missed = Vec::new();
        loop {
            match self.run() {
                End::Halt => return missed,
                End::Missing(page) => {
                    self.expect_untouched(page);
                    assert_eq!(self.run(), End::Missing(page));
                    self.guest.vcpu.set_kvm_immediate_exit(1);
                    let end = self.run();
                    self.guest.vcpu.set_kvm_immediate_exit(0);
                    assert!(end == End::Interrupted || end == End::Missing(page), "{end:?}");
                    let regs = self.guest.vcpu.get_regs().expect("regs");
                    self.guest.vcpu.set_regs(&regs).expect("regs");
                    assert_eq!(self.run(), End::Missing(page));
                    assert_eq!(self.guest.vcpu.get_regs().expect("regs"), regs);
                    self.expect_untouched(page);
                    assert!(!missed.contains(&page), "page {page} was missed twice");
                    missed.push(page);
                    self.arrive(page);
                }
                End::Interrupted => panic!("nobody interrupted it"),
            }
        }
    }

    fn expect_untouched(&self, page: usize) {
        assert!(self.memory(page, 1).iter().all(|byte| *byte == UNARRIVED), "page {page}");
    }

    pub fn regs(&self) -> kvm_regs {
        self.guest.vcpu.get_regs().expect("regs")
    }

    /// Puts the CPU into long mode. The first GiB and the device are identity-mapped by large
    /// pages; the window is mapped by the page table at `table`, a guest address.
    pub fn long_mode(&mut self, table: u64) {
        const GIB: u64 = 1 << 30;
        let mut tables = PageTables::new(CODE_GPA + (TABLES * PAGE) as u64);
        tables.map(0..GIB, 0);
        tables.map(3 * GIB..4 * GIB, 3 * GIB);
        tables.link(1, table);
        for (offset, (_, entry)) in (TABLES * PAGE..).step_by(8).zip(tables.entries()) {
            self.guest.code.put(offset, &entry.to_le_bytes());
        }
        let mode = Mode::Long { page_tables: tables.root() };
        mode.set(&self.guest.vcpu).expect("long mode");
    }
}

/// Returns the guest address of a byte of the memory under test.
pub fn at(page: usize, offset: usize) -> u64 {
    MEMORY_GPA + (page * PAGE + offset) as u64
}

/// Returns a page table entry that maps a page of the memory under test.
pub fn entry(page: usize) -> [u8; 8] {
    (at(page, 0) | ENTRY).to_le_bytes()
}

/// Returns the same entry with the accessed and dirty flags set: KVM prefetches only entries that
/// have been used.
pub fn used_entry(page: usize) -> [u8; 8] {
    (at(page, 0) | ENTRY | ACCESSED | DIRTY).to_le_bytes()
}

/// Allows guests to force the emulation of instructions. Outside the lab it does nothing, and no
/// test creates a machine that needs it.
pub fn allow_emulate() {
    if std::env::var_os("LAB").is_some() {
        let parameter = "/sys/module/kvm/parameters/force_emulation_prefix";
        fs::write(parameter, "1").expect(parameter);
    }
}

/// Runs a test on each backing.
pub fn on_each(test: impl Fn(&mut Machine)) {
    for backing in BACKINGS {
        if let Some(mut machine) = Machine::new(backing) {
            test(&mut machine);
        }
    }
}

/// Asserts that `count` bytes from the port are at an offset, in order and once each, and that the
/// content around them is unchanged.
pub fn expect_input(machine: &Machine, page: usize, offset: usize, count: usize) {
    assert_eq!(machine.device.taken, count);
    let pages = (offset + count).div_ceil(PAGE);
    let mut expected = machine.arrived(page, pages);
    for i in 0..count {
        expected[offset + i] = port_byte(i);
    }
    assert!(machine.memory(page, pages) == expected, "memory differs");
}

/// Returns an entry of a page table in the memory under test.
pub fn entry_of(machine: &Machine, table: usize, index: usize) -> u64 {
    let bytes = machine.guest.memory.get(table * PAGE + index * 8, 8);
    u64::from_le_bytes(bytes.try_into().expect("8"))
}

/// Returns the sum of the first words of the pages.
pub fn sum_of_first_words(machine: &Machine, first: usize, count: usize) -> u32 {
    let word = |page| u32::from_le_bytes(machine.expected(page)[..4].try_into().expect("4"));
    (first..first + count).map(word).fold(0, u32::wrapping_add)
}
