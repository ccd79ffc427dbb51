// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of other instructions that KVM emulates, and of the structures that it reads for them:
//! missing pages cause exits, and memory is changed exactly once.

use crate::guest::{CODE_GPA, PAGE, PAGES};
use crate::machine::{
    EMULATE, END_GPA, End, MMIO_GPA, Machine, PORT, allow_emulate, at, entry_of, mmio_byte, on_each,
};

#[test]
fn device_read_is_not_repeated() {
    on_each(|machine| {
        // push dword [ebx]: KVM finds the stack missing only after the read of the device.
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

        // pop dword [ebx]: first the missing stack, then the device.
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

#[test]
fn abandoned_instruction_is_forgotten() {
    on_each(|machine| {
        flat_stack(machine);
        // push dword [ebx], as above
        machine.program(&[0x67, 0x66, 0xff, 0x33], |regs| {
            (regs.rbx, regs.rsp) = (MMIO_GPA, at(32, 4));
        });
        assert_eq!(machine.run(), End::Missing(32));
        // mov eax, [ebx], at another address
        machine.guest.code.put(64, &[0x67, 0x66, 0x8b, 0x03, 0xf4]);
        machine.enter(CODE_GPA + 64, |regs| regs.rbx = MMIO_GPA + 8);
        assert!(machine.finish().is_empty());
        assert_eq!(machine.device.reads, [(MMIO_GPA + 8, 4)]);
        assert_eq!(machine.regs().rax as u8, mmio_byte(MMIO_GPA + 8));
    });
}

#[test]
fn unreadable_bitmap_is_a_plain_fault_in_emulation() {
    on_each(|machine| {
        // outsb
        machine.program(&[0x67, 0x6e], |regs| (regs.rsi, regs.rdx) = (at(3, 0), PORT.into()));
        machine.guest.bitmap.forbid();
        let error = machine.guest.vcpu.run().expect_err("no bitmap");
        assert_eq!(error.errno(), libc::EFAULT);
    });
}

/// Makes the stack segment use the full 32-bit stack pointer.
fn flat_stack(machine: &Machine) {
    let vcpu = &machine.guest.vcpu;
    let mut sregs = vcpu.get_sregs().expect("sregs");
    sregs.ss.db = 1;
    vcpu.set_sregs(&sregs).expect("sregs");
}

#[test]
fn ordinary_instructions_change_memory_once() {
    allow_emulate();
    on_each(|machine| {
        // Each instruction runs on a separate page, and across the end of a page. The cases give
        // the instruction and its effect on a value, with eax = 5 and ecx = 0x101.
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
fn store_across_pages_is_all_or_nothing() {
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
fn device_before_a_missing_page_is_written_once() {
    allow_emulate();
    on_each(|machine| {
        flat_stack(machine);
        // As above, but the first push is just behind the memory, and the second in it.
        machine.guest.code.put(0x100, &[0xf4]);
        let far_call = [&EMULATE[..], &[0x9a, 0x00, 0x11, 0x00, 0x00]].concat();
        machine.program(&far_call, |regs| regs.rsp = END_GPA + 2);
        assert_eq!(machine.finish(), [PAGES - 1]);
        assert_eq!(machine.device.writes, [(END_GPA, vec![0, 0])]);
        assert_eq!(machine.regs().rip, 0x1101);
    });
}

#[test]
fn instructions_are_fetched_from_present_pages_only() {
    on_each(|machine| {
        // mov eax, [ebx + 0], whose last bytes are on another page. KVM must fetch them itself: the
        // CPU already has that page mapped.
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
        assert!(machine.finish().is_empty());
        machine.enter(at(110, PAGE - split), |regs| regs.rbx = MMIO_GPA + 4);
        machine.guest.bitmap.set(111);
        assert_eq!(machine.run(), End::Missing(111));
        assert_eq!(machine.run(), End::Missing(111));
        assert_eq!(machine.device.reads, []);
        machine.guest.bitmap.clear(111);
        assert!(machine.finish().is_empty());
        assert_eq!(machine.device.reads, [(MMIO_GPA + 4, 4)]);
        let value = (0..4).map(|i| mmio_byte(MMIO_GPA + 4 + i)).collect::<Vec<_>>();
        assert_eq!((machine.regs().rax as u32).to_le_bytes(), value[..]);
    });
}

/// Raises the code segment's limit so that 16-bit code can run in the memory under test.
fn code_at_memory(machine: &Machine) {
    let vcpu = &machine.guest.vcpu;
    let mut sregs = vcpu.get_sregs().expect("sregs");
    sregs.cs.limit = u32::MAX;
    sregs.cs.g = 1;
    vcpu.set_sregs(&sregs).expect("sregs");
}

#[test]
fn descriptors_are_read_when_present() {
    allow_emulate();
    on_each(|machine| {
        machine.long_mode(at(300, 0));
        let vcpu = &machine.guest.vcpu;
        let mut sregs = vcpu.get_sregs().expect("sregs");
        sregs.gdt.base = at(240, 0);
        sregs.gdt.limit = 0xff;
        vcpu.set_sregs(&sregs).expect("sregs");
        // A data segment whose accessed bit is clear; KVM sets it.
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
fn other_system_structures_are_read_when_present() {
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
        // int 0x20, with the interrupt vectors on a missing page
        let mut sregs = machine.guest.vcpu.get_sregs().expect("sregs");
        sregs.idt.base = at(253, 0);
        sregs.idt.limit = 0x3ff;
        machine.guest.vcpu.set_sregs(&sregs).expect("sregs");
        flat_stack(machine);
        machine.image(253, 0x80, &[0x00, 0x12, 0x00, 0x00]);
        machine.guest.code.put(0x200, &[0xf4]);
        let code = [&EMULATE[..], &[0xcd, 0x20]].concat();
        // Restarted from the prefix each time, because the CPU reads the vector first.
        for page in [255, 254, 253] {
            machine.program(&code, |regs| regs.rsp = at(255, 2));
            assert_eq!(machine.run(), End::Missing(page));
            machine.arrive(page);
        }
        machine.program(&code, |regs| regs.rsp = at(255, 2));
        assert!(machine.finish().is_empty());
        assert_eq!(machine.regs().rip, 0x1201);
        assert_eq!(machine.regs().rsp, at(254, PAGE - 4));
    });
}
