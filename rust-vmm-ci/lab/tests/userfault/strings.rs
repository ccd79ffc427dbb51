// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of string instructions that KVM emulates, for a port or for MMIO: a missing page causes an
//! ordinary exit, and no byte of a device is lost or read twice.

use kvm_ioctls::IoEventAddress;

use crate::guest::PAGE;
use crate::machine::{End, MMIO_GPA, PORT, at, expect_input, mmio_byte, on_each, port_byte};

/// Each instruction has the prefix for 32-bit addresses, because the code is 16-bit.
const REP_OUTSB: [u8; 3] = [0x67, 0xf3, 0x6e];
const REP_INSB: [u8; 3] = [0x67, 0xf3, 0x6c];
const REP_INSW: [u8; 3] = [0x67, 0xf3, 0x6d];
const REP_MOVSB: [u8; 3] = [0x67, 0xf3, 0xa4];
const STD: u8 = 0xfd;

#[test]
fn outs_waits_for_its_page() {
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
fn memcpy_toio_to_a_device_served_by_kvm() {
    on_each(|machine| {
        // Coalesced writes: KVM queues them in a ring and continues without an exit to user space.
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
