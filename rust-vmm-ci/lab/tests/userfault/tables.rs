// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of missing guest page tables that KVM walks: for emulation, and with shadow paging for
//! each fault.

use crate::guest::PAGE;
use crate::machine::{
    ACCESSED, DIRTY, MMIO_GPA, Machine, PORT, WINDOW, at, entry, entry_of, expect_input, mmio_byte,
    on_each, sum_of_first_words, used_entry,
};

/// Puts the guest into long mode with `page` mapped through three levels of page tables, each of
/// which is missing.
fn missing_tables(machine: &mut Machine, page: usize) -> [usize; 3] {
    let tables = [200, 210, 220];
    machine.image(tables[0], 0, &entry(tables[1]));
    machine.image(tables[1], 0, &entry(tables[2]));
    machine.image(tables[2], 0, &entry(page));
    machine.image(tables[2], 8, &entry(page + 1));
    machine.long_mode(at(tables[0], 0));
    tables
}

#[test]
fn page_tables_are_walked_when_present() {
    on_each(|machine| {
        let tables = missing_tables(machine, 230);
        // rep outsb, which reads memory only through KVM's walk
        machine.program(&[0xf3, 0x6e], |regs| {
            (regs.rsi, regs.rcx, regs.rdx) = (WINDOW + PAGE as u64 - 8, 16, PORT.into());
        });
        assert_eq!(machine.finish(), [200, 210, 220, 230, 231]);
        assert_eq!(machine.device.out, machine.arrived(230, 2)[PAGE - 8..][..16]);
        for (table, index) in tables.into_iter().zip([0; 3]).chain([(220, 1)]) {
            let bits = entry_of(machine, table, index) & (ACCESSED | DIRTY);
            assert_eq!(bits, ACCESSED, "table {table}");
        }
    });
}

#[test]
fn page_tables_are_walked_before_a_device_read() {
    on_each(|machine| {
        let _ = missing_tables(machine, 230);
        // rep insb
        machine.program(&[0xf3, 0x6c], |regs| {
            (regs.rdi, regs.rcx, regs.rdx) = (WINDOW + PAGE as u64 - 8, 16, PORT.into());
        });
        assert_eq!(machine.finish(), [200, 210, 220, 230, 231]);
        expect_input(machine, 230, PAGE - 8, 16);
        assert_eq!(entry_of(machine, 220, 1) & (ACCESSED | DIRTY), ACCESSED | DIRTY);
    });
    on_each(|machine| {
        let _ = missing_tables(machine, 230);
        // rep movsb from the device
        machine.program(&[0xf3, 0xa4], |regs| {
            (regs.rsi, regs.rdi, regs.rcx) = (MMIO_GPA, WINDOW + PAGE as u64 - 8, 16);
        });
        assert_eq!(machine.finish(), [200, 210, 220, 230, 231]);
        assert_eq!(machine.device.reads.len(), 16);
        let bytes: Vec<u8> = (MMIO_GPA..MMIO_GPA + 16).map(mmio_byte).collect();
        assert_eq!(machine.memory(230, 2)[PAGE - 8..][..16], bytes);
    });
}

#[test]
fn ordinary_accesses_walk_present_page_tables() {
    on_each(|machine| {
        let tables = missing_tables(machine, 230);
        // mov [rbx], eax; mov ecx, [rbx + 0x1000]
        machine.program(&[0x89, 0x03, 0x8b, 0x8b, 0x00, 0x10, 0x00, 0x00], |regs| {
            (regs.rax, regs.rbx) = (0x1234_5678, WINDOW);
        });
        assert_eq!(machine.finish(), [200, 210, 220, 230, 231]);
        assert_eq!(machine.memory(230, 1)[..4], 0x1234_5678u32.to_le_bytes());
        assert_eq!((machine.regs().rcx as u32).to_le_bytes(), machine.expected(231)[..4]);
        assert_eq!(entry_of(machine, tables[2], 0) & (ACCESSED | DIRTY), ACCESSED | DIRTY);
        assert_eq!(entry_of(machine, tables[2], 1) & (ACCESSED | DIRTY), ACCESSED);
    });
}

#[test]
fn nothing_is_mapped_ahead_of_its_page() {
    on_each(|machine| {
        let tables = missing_tables(machine, 300);
        let pages = 64;
        for index in 0..pages {
            machine.image(tables[2], index * 8, &used_entry(300 + index));
        }
        for page in tables.into_iter().chain((300..300 + pages).step_by(2)) {
            machine.arrive(page);
        }
        // The present pages first, then the missing ones, whose entries are adjacent.
        let code = [
            &[0x03, 0x03][..],                                       // add eax, [rbx]
            &[0x48, 0x81, 0xc3, 0x00, 0x20, 0x00, 0x00],             // add rbx, 0x2000
            &[0xff, 0xc9, 0x75, 0xf3],                               // dec ecx; jnz
            &[0x03, 0x02, 0x48, 0x81, 0xc2, 0x00, 0x20, 0x00, 0x00], // the same with rdx
            &[0xff, 0xce, 0x75, 0xf3],                               // and esi
        ]
        .concat();
        machine.program(&code, |regs| {
            (regs.rbx, regs.rcx) = (WINDOW, pages as u64 / 2);
            (regs.rdx, regs.rsi) = (WINDOW + PAGE as u64, pages as u64 / 2);
        });
        let missed = machine.finish();
        assert_eq!(missed, (301..300 + pages).step_by(2).collect::<Vec<_>>());
        assert_eq!(machine.regs().rax as u32, sum_of_first_words(machine, 300, pages));
    });
}

#[test]
fn page_directory_pointers_are_loaded_when_present() {
    on_each(|machine| {
        // 32-bit protected mode, about to enable PAE paging.
        machine.long_mode(at(310, 0));
        let mut sregs = machine.guest.vcpu.get_sregs().expect("sregs");
        (sregs.efer, sregs.cr0, sregs.cr3) = (0, 1 << 5 | 1, at(310, 0x20));
        (sregs.cs.l, sregs.cs.db) = (0, 1);
        machine.guest.vcpu.set_sregs(&sregs).expect("sregs");
        machine.image(310, 0x20, &(at(311, 0) | 1).to_le_bytes());
        // An identity mapping with large pages.
        for index in 0..8u64 {
            machine.image(311, index as usize * 8, &(index << 21 | 0x83).to_le_bytes());
        }
        // mov cr0, eax; mov ebx, [ebx]; outsb
        machine.program(&[0x0f, 0x22, 0xc0, 0x8b, 0x1b, 0x6e], |regs| {
            (regs.rax, regs.rbx) = (1 << 31 | 1 << 5 | 1, at(312, 0));
            (regs.rsi, regs.rdx) = (at(313, 7), PORT.into());
        });
        assert_eq!(machine.finish(), [310, 311, 312, 313]);
        assert_eq!((machine.regs().rbx as u32).to_le_bytes(), machine.expected(312)[..4]);
        assert_eq!(machine.device.out, machine.expected(313)[7..8]);
    });
}
