// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sets up the first processor's registers for the boot protocol. The kernel starts the other
//! processors later.

use demand_memory::DemandMemory;
use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::arch::error::BootError;
use crate::arch::layout::{BOOT_STACK, GDT, IDT, PAGE_TABLES, PVH_START_INFO, ZERO_PAGE};
use crate::arch::loader::Entry;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The flag that is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Flags of a page table entry: present and writable.
const PRESENT_WRITABLE: u64 = 0x3;
/// Flag of a page table entry that maps a large page.
const LARGE: u64 = 1 << 7;

/// Types of segment descriptors (AMD64 Architecture Programmer's Manual, volume 2, section 4.7):
/// code, readable and accessed.
const CODE: u8 = 0xb;
/// Data, writable and accessed.
const DATA: u8 = 0x3;
/// A busy task state segment.
const TASK: u8 = 0xb;

/// Returns a flat segment; `selector` is its offset in the descriptor table.
fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// Returns the descriptor from which the processor would load `segment`.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | flags << 40
        | (limit >> 16 & 0xf) << 48
        | (segment.base >> 24 & 0xff) << 56
}

/// Sets the first processor up to start at `entry`, and writes the tables that it needs.
///
/// # Errors
///
/// If KVM or the guest memory returns an error.
pub(crate) fn set_up(vcpu: &VcpuFd, memory: &DemandMemory, entry: Entry) -> Result<(), BootError> {
    let long = matches!(entry, Entry::Linux64(_));
    let code = segment(0x10, CODE, long);
    let data = segment(0x18, DATA, false);
    let task =
        kvm_segment { limit: 0x67, selector: 0x20, type_: TASK, present: 1, ..Default::default() };
    let table = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)];
    write_words(memory, GDT, &table)?;
    write_words(memory, IDT, &[0])?;

    let mut sregs = vcpu.get_sregs().map_err(BootError::Registers)?;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    let limit = u16::try_from(size_of_val(&table) - 1).expect("the table has five entries");
    (sregs.gdt.base, sregs.gdt.limit) = (GDT.0, limit);
    (sregs.idt.base, sregs.idt.limit) = (IDT.0, 7);
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    let mut regs = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    match entry {
        Entry::Linux64(address) => {
            write_page_tables(memory)?;
            sregs.cr3 = PAGE_TABLES.0;
            sregs.cr4 |= CR4_PAE;
            sregs.cr0 |= CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
            (regs.rip, regs.rsi) = (address.0, ZERO_PAGE.0);
            (regs.rsp, regs.rbp) = (BOOT_STACK, BOOT_STACK);
        }
        Entry::Pvh(address) => (regs.rip, regs.rbx) = (address.0, PVH_START_INFO.0),
    }
    vcpu.set_sregs(&sregs).map_err(BootError::Registers)?;
    vcpu.set_regs(&regs).map_err(BootError::Registers)
}

/// Writes page tables that map the first GiB to itself with 2 MiB pages.
fn write_page_tables(memory: &DemandMemory) -> Result<(), BootError> {
    let table = |index: u64| GuestAddress(PAGE_TABLES.0 + index * 0x1000);
    write_words(memory, table(0), &[table(1).0 | PRESENT_WRITABLE])?;
    write_words(memory, table(1), &[table(2).0 | PRESENT_WRITABLE])?;
    let pages: Vec<u64> = (0..512).map(|page| page << 21 | LARGE | PRESENT_WRITABLE).collect();
    write_words(memory, table(2), &pages)
}

fn write_words(memory: &DemandMemory, at: GuestAddress, words: &[u64]) -> Result<(), BootError> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    memory.write_slice(&bytes, at).map_err(BootError::Tables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_processors() {
        assert_eq!(descriptor(&segment(0x10, CODE, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(0x10, CODE, false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(0x18, DATA, false)), 0x00cf_9300_0000_ffff);
    }
}
