// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory that KVM itself touches to emulate an instruction: a missing page
//! is an exit like any other, and nothing of the instruction is lost or done twice.

use kvm_ioctls::IoEventAddress;

use crate::BACKINGS;
use crate::guest::PAGE;
use crate::machine::{
    ACCESSED, DIRTY, EMULATE, End, MMIO_GPA, Machine, PORT, WINDOW, allow_emulate, at, entry,
    mmio_byte, port_byte,
};

/// 32-bit addresses, in 16-bit code: a prefix of each instruction.
const REP_OUTSB: [u8; 3] = [0x67, 0xf3, 0x6e];
const REP_INSB: [u8; 3] = [0x67, 0xf3, 0x6c];
const REP_INSW: [u8; 3] = [0x67, 0xf3, 0x6d];
const REP_MOVSB: [u8; 3] = [0x67, 0xf3, 0xa4];
const STD: u8 = 0xfd;

fn on_each(test: impl Fn(&mut Machine)) {
    for backing in BACKINGS {
        if let Some(mut machine) = Machine::new(backing) {
            test(&mut machine);
        }
    }
}

#[test]
fn outs_waits_for_what_it_reads() {
    on_each(|machine| {
        machine.program(&[0x67, 0x6e], |regs| {
            regs.rsi = at(3, 100);
            regs.rdx = PORT.into();
        });
        assert_eq!(machine.finish(), [3]);
        assert_eq!(machine.device.out, machine.expected(3)[100..101]);
        assert_eq!(machine.regs().rsi, at(3, 101));
    });
}

#[test]
fn rep_outs_crosses_into_missing_pages() {
    on_each(|machine| {
        machine.arrive(3);
        let count = 16 + PAGE + 16;
        machine.program(&REP_OUTSB, |regs| {
            regs.rsi = at(3, PAGE - 16);
            regs.rcx = count as u64;
            regs.rdx = PORT.into();
        });
        assert_eq!(machine.finish(), [4, 5]);
        assert_eq!(machine.device.out, machine.arrived(3, 3)[PAGE - 16..][..count]);
        assert_eq!(machine.regs().rcx, 0);
    });
}

#[test]
fn ins_takes_nothing_for_a_missing_page() {
    on_each(|machine| {
        machine.program(&REP_INSB, |regs| {
            regs.rdi = at(7, 10);
            regs.rcx = 100;
            regs.rdx = PORT.into();
        });
        assert_eq!(machine.run(), End::Missing(7));
        assert_eq!(machine.device.taken, 0);
        assert_eq!(machine.finish(), [7]);
        expect_input(machine, 7, 10, 100);
    });
}

#[test]
fn rep_ins_crosses_into_missing_pages() {
    on_each(|machine| {
        machine.arrive(7);
        let count = 100 + PAGE + 100;
        machine.program(&REP_INSB, |regs| {
            regs.rdi = at(7, PAGE - 100);
            regs.rcx = count as u64;
            regs.rdx = PORT.into();
        });
        assert_eq!(machine.finish(), [8, 9]);
        expect_input(machine, 7, PAGE - 100, count);
    });
}

#[test]
fn ins_by_words_crosses_into_a_missing_page() {
    on_each(|machine| {
        for (page, offset) in [(7, PAGE - 101), (10, PAGE - 512)] {
            machine.arrive(page);
            machine.program(&REP_INSW, |regs| {
                regs.rdi = at(page, offset);
                regs.rcx = 500;
                regs.rdx = PORT.into();
            });
            assert_eq!(machine.finish(), [page + 1]);
            expect_input(machine, page, offset, 1000);
        }
    });
}

#[test]
fn ins_backwards_crosses_into_a_missing_page() {
    on_each(|machine| {
        machine.arrive(8);
        let code = [&[STD], REP_INSB.as_slice()].concat();
        machine.program(&code, |regs| {
            regs.rdi = at(8, 19);
            regs.rcx = 60;
            regs.rdx = PORT.into();
        });
        assert_eq!(machine.finish(), [7]);
        assert_eq!(machine.device.taken, 60);
        let mut expected = machine.arrived(7, 2);
        for i in 0..60 {
            expected[PAGE + 19 - i] = port_byte(i);
        }
        assert_eq!(machine.memory(7, 2), expected);
    });
}

/// Asserts that `count` bytes of the port lie at an offset, in order and once, and
/// the content around them.
fn expect_input(machine: &Machine, page: usize, offset: usize, count: usize) {
    assert_eq!(machine.device.taken, count);
    let pages = (offset + count).div_ceil(PAGE);
    let mut expected = machine.arrived(page, pages);
    for i in 0..count {
        expected[offset + i] = port_byte(i);
    }
    assert!(machine.memory(page, pages) == expected, "memory differs");
}

#[test]
fn memcpy_fromio_crosses_into_missing_pages() {
    on_each(|machine| {
        machine.arrive(20);
        let count = 16 + PAGE + 16;
        machine.program(&REP_MOVSB, |regs| {
            regs.rsi = MMIO_GPA;
            regs.rdi = at(20, PAGE - 16);
            regs.rcx = count as u64;
        });
        assert_eq!(machine.finish(), [21, 22]);
        let addresses = MMIO_GPA..MMIO_GPA + count as u64;
        let reads: Vec<_> = addresses.clone().map(|address| (address, 1)).collect();
        assert_eq!(machine.device.reads, reads);
        let mut expected = machine.arrived(20, 3);
        for (i, address) in addresses.enumerate() {
            expected[PAGE - 16 + i] = mmio_byte(address);
        }
        assert!(machine.memory(20, 3) == expected, "memory differs");
    });
}

#[test]
fn memcpy_toio_crosses_into_missing_pages() {
    on_each(|machine| {
        machine.arrive(20);
        let count = 16 + PAGE + 16;
        machine.program(&REP_MOVSB, |regs| {
            regs.rsi = at(20, PAGE - 16);
            regs.rdi = MMIO_GPA;
            regs.rcx = count as u64;
        });
        assert_eq!(machine.finish(), [21, 22]);
        let bytes = machine.arrived(20, 3);
        let writes: Vec<_> = bytes[PAGE - 16..][..count]
            .iter()
            .zip(MMIO_GPA..)
            .map(|(byte, address)| (address, vec![*byte]))
            .collect();
        assert_eq!(machine.device.writes, writes);
    });
}

#[test]
fn memcpy_toio_to_a_device_that_kvm_serves() {
    on_each(|machine| {
        // Writes that KVM queues in a ring, so that it goes on without the CPU.
        let address = IoEventAddress::Mmio(MMIO_GPA);
        machine.guest.vm.register_coalesced_mmio(address, PAGE as u32).expect("a zone");
        machine.guest.vcpu.map_coalesced_mmio_ring().expect("the ring");
        machine.arrive(20);
        machine.program(&REP_MOVSB, |regs| {
            regs.rsi = at(20, PAGE - 16);
            regs.rdi = MMIO_GPA;
            regs.rcx = 32;
        });
        assert_eq!(machine.finish(), [21]);
        let mut written = Vec::new();
        while let Some(entry) = machine.guest.vcpu.coalesced_mmio_read().expect("the ring") {
            assert_eq!(entry.phys_addr, MMIO_GPA + written.len() as u64);
            written.push(entry.data[0]);
        }
        assert_eq!(written, machine.arrived(20, 2)[PAGE - 16..][..32]);
    });
}

#[test]
fn what_was_read_from_a_device_is_not_read_again() {
    on_each(|machine| {
        // push dword [ebx]: the stack is known to be missing only after the read.
        machine.program(&[0x67, 0x66, 0xff, 0x33], |regs| {
            regs.rbx = MMIO_GPA + 8;
            regs.rsp = at(30, 4);
        });
        flat_stack(machine);
        assert_eq!(machine.finish(), [30]);
        assert_eq!(machine.device.reads, [(MMIO_GPA + 8, 4)]);
        let mut expected = machine.expected(30);
        for (i, byte) in expected[..4].iter_mut().enumerate() {
            *byte = mmio_byte(MMIO_GPA + 8 + i as u64);
        }
        assert_eq!(machine.memory(30, 1), expected);
        assert_eq!(machine.regs().rsp, at(30, 0));

        // pop dword [ebx]: a missing stack, then the device.
        machine.program(&[0x67, 0x66, 0x8f, 0x03], |regs| {
            regs.rbx = MMIO_GPA + 16;
            regs.rsp = at(31, 8);
        });
        assert_eq!(machine.finish(), [31]);
        let popped = machine.expected(31)[8..12].to_vec();
        assert_eq!(machine.device.writes, [(MMIO_GPA + 16, popped)]);
        assert_eq!(machine.regs().rsp, at(31, 12));
    });
}

/// Has the stack pointer use all of its 32 bits.
fn flat_stack(machine: &Machine) {
    let vcpu = &machine.guest.vcpu;
    let mut sregs = vcpu.get_sregs().expect("sregs");
    sregs.ss.db = 1;
    vcpu.set_sregs(&sregs).expect("sregs");
}

#[test]
fn cmps_reads_the_device_once() {
    on_each(|machine| {
        for (page, from, to) in [(33, MMIO_GPA, at(33, 0)), (34, at(34, 0), MMIO_GPA)] {
            // repe cmpsb
            machine.program(&[0x67, 0xf3, 0xa6], |regs| {
                (regs.rsi, regs.rdi, regs.rcx) = (from, to, 8);
            });
            let bytes: Vec<u8> = (MMIO_GPA..MMIO_GPA + 8).map(mmio_byte).collect();
            machine.image(page, 0, &bytes);
            assert_eq!(machine.finish(), [page]);
            assert_eq!(machine.regs().rcx, 0);
            assert_ne!(machine.regs().rflags & 1 << 6, 0, "equal");
            let reads: Vec<_> = (MMIO_GPA..MMIO_GPA + 8).map(|address| (address, 1)).collect();
            assert_eq!(machine.device.reads, reads);
        }
    });
}

#[test]
fn ordinary_instructions_change_memory_once() {
    allow_emulate();
    on_each(|machine| {
        // Each on a page of its own, and across the end of one: a value, and
        // what becomes of it with eax = 5 and ecx = 0x101.
        type Becomes = fn(u32) -> u32;
        let cases: [(&[u8], Becomes); 8] = [
            (&[0x67, 0x66, 0x89, 0x0b], |_| 0x101), // mov [ebx], ecx
            (&[0x67, 0x66, 0x01, 0x0b], |old| old + 0x101), // add [ebx], ecx
            (&[0xf0, 0x67, 0x66, 0x01, 0x0b], |old| old + 0x101), // lock add
            (&[0x67, 0x66, 0x11, 0x0b], |old| old + 0x102), // adc [ebx], ecx, carry set
            (&[0x67, 0x66, 0x87, 0x0b], |_| 0x101), // xchg [ebx], ecx
            (&[0xf0, 0x67, 0x66, 0x0f, 0xc1, 0x0b], |old| old + 0x101), // lock xadd
            (&[0x67, 0x66, 0xff, 0x03], |old| old + 1), // inc dword [ebx]
            (&[0xf0, 0x67, 0x66, 0x0f, 0xb1, 0x0b], |_| 0x101), // lock cmpxchg
        ];
        for (number, (instruction, becomes)) in cases.into_iter().enumerate() {
            for (page, offset) in [(40 + 4 * number, 64), (42 + 4 * number, PAGE - 2)] {
                let old = 5u32;
                let crosses = offset + 4 > PAGE;
                let bytes = old.to_le_bytes();
                let here = if crosses { 2 } else { 4 };
                machine.image(page, offset, &bytes[..here]);
                if crosses {
                    machine.image(page + 1, 0, &bytes[here..]);
                }
                let code = [&EMULATE, instruction].concat();
                machine.program(&code, |regs| {
                    (regs.rax, regs.rbx, regs.rcx) = (5, at(page, offset), 0x101);
                    regs.rflags |= 1;
                });
                let missed = machine.finish();
                let pages = if crosses { vec![page, page + 1] } else { vec![page] };
                assert_eq!(missed, pages, "{instruction:x?}");
                let memory = machine.memory(page, 2);
                let new = u32::from_le_bytes(memory[offset..offset + 4].try_into().expect("4"));
                assert_eq!(new, becomes(old), "{instruction:x?}");
            }
        }
    });
}

#[test]
fn a_store_across_pages_is_whole_or_not_done() {
    allow_emulate();
    on_each(|machine| {
        machine.arrive(90);
        let code = [&EMULATE[..], &[0x67, 0x66, 0x89, 0x0b]].concat();
        machine.program(&code, |regs| {
            (regs.rbx, regs.rcx) = (at(90, PAGE - 2), 0x0403_0201);
        });
        assert_eq!(machine.run(), End::Missing(91));
        assert_eq!(machine.memory(90, 1), machine.expected(90));
        assert_eq!(machine.finish(), [91]);
        assert_eq!(machine.memory(90, 2)[PAGE - 2..][..4], [1, 2, 3, 4]);
    });
}

#[test]
fn calls_and_interrupts_push_once() {
    allow_emulate();
    on_each(|machine| {
        flat_stack(machine);
        // call 0:0x1100, across the start of a page.
        machine.guest.code.put(0x100, &[0xf4]);
        let far_call = [&EMULATE[..], &[0x9a, 0x00, 0x11, 0x00, 0x00]].concat();
        machine.program(&far_call, |regs| regs.rsp = at(101, 2));
        assert_eq!(machine.finish(), [101, 100]);
        assert_eq!(machine.regs().rip, 0x1101);
        assert_eq!(machine.regs().rsp, at(100, PAGE - 2));
        let back = 0x1000u16 + far_call.len() as u16;
        let mut expected = machine.arrived(100, 2);
        expected[PAGE - 2..PAGE].copy_from_slice(&back.to_le_bytes());
        expected[PAGE..PAGE + 2].copy_from_slice(&[0, 0]);
        assert_eq!(machine.memory(100, 2), expected);
    });
}

#[test]
fn instructions_are_fetched_from_present_pages_only() {
    on_each(|machine| {
        // mov eax, [ebx], its last bytes on another page, and of that page KVM
        // must fetch by itself: the CPU has it mapped already.
        let code = [0x67, 0x66, 0x8b, 0x83, 0, 0, 0, 0, 0xf4];
        let split = 5;
        let nop = [0x90, 0xf4];
        for (page, offset, bytes) in
            [(110, PAGE - split, &code[..split]), (111, 0, &code[split..]), (111, 64, &nop)]
        {
            machine.image(page, offset, bytes);
        }
        for page in [110, 111] {
            machine.arrive(page);
            machine.image(page, 0, &[]);
        }
        code_at_memory(machine);
        machine.enter(at(111, 64), |_| ());
        assert_eq!(machine.finish(), []);
        machine.enter(at(110, PAGE - split), |regs| regs.rbx = MMIO_GPA + 4);
        machine.guest.bitmap.set(111);
        assert_eq!(machine.run(), End::Missing(111));
        assert_eq!(machine.run(), End::Missing(111));
        assert_eq!(machine.device.reads, []);
        machine.guest.bitmap.clear(111);
        assert_eq!(machine.finish(), []);
        assert_eq!(machine.device.reads, [(MMIO_GPA + 4, 4)]);
        let value = (0..4).map(|i| mmio_byte(MMIO_GPA + 4 + i)).collect::<Vec<_>>();
        assert_eq!((machine.regs().rax as u32).to_le_bytes(), value[..]);
    });
}

/// Has 16-bit code reach the memory under test.
fn code_at_memory(machine: &Machine) {
    let vcpu = &machine.guest.vcpu;
    let mut sregs = vcpu.get_sregs().expect("sregs");
    sregs.cs.limit = u32::MAX;
    sregs.cs.g = 1;
    vcpu.set_sregs(&sregs).expect("sregs");
}

/// Lets a guest in long mode reach page `page` through three levels of page
/// tables, each of which has yet to arrive.
fn missing_tables(machine: &mut Machine, page: usize) -> [usize; 3] {
    let tables = [200, 210, 220];
    machine.image(tables[0], 0, &entry(tables[1]));
    machine.image(tables[1], 0, &entry(tables[2]));
    machine.image(tables[2], 0, &entry(page));
    machine.image(tables[2], 8, &entry(page + 1));
    machine.long_mode(at(tables[0], 0));
    tables
}

/// The first entry of a table in the memory under test.
fn entry_of(machine: &Machine, table: usize, index: usize) -> u64 {
    let bytes = machine.guest.memory.get(table * PAGE + index * 8, 8);
    u64::from_le_bytes(bytes.try_into().expect("8"))
}

#[test]
fn page_tables_are_walked_when_they_are_there() {
    on_each(|machine| {
        let tables = missing_tables(machine, 230);
        // rep outsb, which reads memory by KVM's walk alone
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
fn page_tables_are_walked_before_the_device_is_read() {
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
fn ordinary_accesses_walk_page_tables_that_are_there() {
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
fn descriptors_are_read_when_they_are_there() {
    allow_emulate();
    on_each(|machine| {
        machine.long_mode(at(300, 0));
        let vcpu = &machine.guest.vcpu;
        let mut sregs = vcpu.get_sregs().expect("sregs");
        sregs.gdt.base = at(240, 0);
        sregs.gdt.limit = 0xff;
        vcpu.set_sregs(&sregs).expect("sregs");
        // A data segment, not accessed yet: KVM sets that bit.
        let descriptor = 0x00cf_9200_0000_ffffu64;
        machine.image(240, 0x18, &descriptor.to_le_bytes());
        // mov es, eax
        machine.program(&[&EMULATE[..], &[0x8e, 0xc0]].concat(), |regs| regs.rax = 0x18);
        assert_eq!(machine.finish(), [240]);
        let es = machine.guest.vcpu.get_sregs().expect("sregs").es;
        assert_eq!((es.selector, es.type_), (0x18, 3));
        assert_eq!(entry_of(machine, 240, 3), descriptor | 1 << 40);
    });
}

#[test]
fn other_system_structures_are_read_when_they_are_there() {
    allow_emulate();
    on_each(|machine| {
        // lgdt [ebx]
        machine.image(250, 0, &[0x27, 0x00, 0x78, 0x56, 0x34, 0x12]);
        let code = [&EMULATE[..], &[0x67, 0x66, 0x0f, 0x01, 0x13]].concat();
        machine.program(&code, |regs| regs.rbx = at(250, 0));
        assert_eq!(machine.finish(), [250]);
        let gdt = machine.guest.vcpu.get_sregs().expect("sregs").gdt;
        assert_eq!((gdt.base, gdt.limit), (0x1234_5678, 0x27));
        // sidt [ebx], across the end of a page
        machine.arrive(251);
        let code = [&EMULATE[..], &[0x67, 0x66, 0x0f, 0x01, 0x0b]].concat();
        machine.program(&code, |regs| regs.rbx = at(251, PAGE - 4));
        assert_eq!(machine.finish(), [252]);
        let idt = machine.guest.vcpu.get_sregs().expect("sregs").idt;
        let expected =
            [idt.limit.to_le_bytes().as_slice(), &(idt.base as u32).to_le_bytes()].concat();
        assert_eq!(machine.memory(251, 2)[PAGE - 4..][..6], expected);
        // int 0x20, with the vectors at a page that has yet to arrive
        let mut sregs = machine.guest.vcpu.get_sregs().expect("sregs");
        sregs.idt.base = at(253, 0);
        sregs.idt.limit = 0x3ff;
        machine.guest.vcpu.set_sregs(&sregs).expect("sregs");
        flat_stack(machine);
        machine.image(253, 0x80, &[0x00, 0x12, 0x00, 0x00]);
        machine.guest.code.put(0x200, &[0xf4]);
        let code = [&EMULATE[..], &[0xcd, 0x20]].concat();
        // From the prefix again, for the CPU reads the vector first.
        for page in [255, 254, 253] {
            machine.program(&code, |regs| regs.rsp = at(255, 2));
            assert_eq!(machine.run(), End::Missing(page));
            machine.arrive(page);
        }
        machine.program(&code, |regs| regs.rsp = at(255, 2));
        assert_eq!(machine.finish(), []);
        assert_eq!(machine.regs().rip, 0x1201);
        assert_eq!(machine.regs().rsp, at(254, PAGE - 4));
    });
}
