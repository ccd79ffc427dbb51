// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of the pages whose addresses a guest writes to MSRs, and that KVM writes itself.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::guest::PAGE;
use crate::machine::{End, Machine, at, on_each};

pub const WALL_CLOCK: u32 = 0x4b56_4d00;
const SYSTEM_TIME: u32 = 0x4b56_4d01;
const STEAL_TIME: u32 = 0x4b56_4d03;

pub fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    let msrs = Msrs::from_entries(&[entry]).expect("one");
    assert_eq!(vcpu.set_msrs(&msrs).expect("MSRs"), 1);
}

/// Asserts that a page has its source content, except for the structure that KVM wrote.
pub fn expect_around(machine: &Machine, page: usize, from: usize, length: usize) {
    let (now, was) = (machine.memory(page, 1), machine.expected(page));
    assert_eq!(now[..from], was[..from]);
    assert_eq!(now[from + length..], was[from + length..]);
}

#[test]
fn the_clock_waits_for_its_page() {
    on_each(|machine| {
        machine.image(50, 64, &[0; 32]);
        set_msr(&machine.guest.vcpu, SYSTEM_TIME, at(50, 64) | 1);
        machine.program(&[0x90], |_| ());
        assert_eq!(machine.finish(), [50]);
        let clock = machine.memory(50, 1)[64..96].to_vec();
        let version = u32::from_le_bytes(clock[..4].try_into().expect("4"));
        assert!(version > 0 && version % 2 == 0, "version {version}");
        assert_ne!(clock[8..24], [0; 16], "the time");
        expect_around(machine, 50, 64, 32);
    });
}

#[test]
fn steal_time_waits_for_its_page() {
    on_each(|machine| {
        machine.image(51, 64, &[0; 64]);
        set_msr(&machine.guest.vcpu, STEAL_TIME, at(51, 64) | 1);
        machine.program(&[0x90], |_| ());
        assert_eq!(machine.finish(), [51]);
        let version = machine.memory(51, 1)[64 + 8];
        assert!(version > 0 && version % 2 == 0, "version {version}");
        expect_around(machine, 51, 64, 64);
    });
}

#[test]
fn the_wall_clock_waits_for_its_page() {
    on_each(|machine| {
        machine.image(52, 64, &[0; 12]);
        // wrmsr
        machine.program(&[0x0f, 0x30], |regs| {
            (regs.rcx, regs.rax) = (WALL_CLOCK.into(), at(52, 64));
        });
        assert_eq!(machine.finish(), [52]);
        let version = machine.memory(52, 1)[64];
        assert!(version > 0 && version % 2 == 0, "version {version}");
        expect_around(machine, 52, 64, 12);
    });
}

#[test]
fn the_wall_clock_waits_for_both_its_pages() {
    on_each(|machine| {
        let from = PAGE - 8;
        machine.image(52, from, &[0; 8]);
        machine.image(53, 0, &[0; 4]);
        // wrmsr
        machine.program(&[0x0f, 0x30], |regs| {
            (regs.rcx, regs.rax) = (WALL_CLOCK.into(), at(52, from));
        });
        assert_eq!(machine.finish(), [52, 53]);
        let version = machine.memory(52, 1)[from];
        assert!(version > 0 && version % 2 == 0, "version {version}");
        expect_around(machine, 52, from, 8);
        expect_around(machine, 53, 0, 4);
        assert_ne!(machine.memory(53, 1)[..4], [0; 4], "the nanoseconds");
    });
}

#[test]
fn page_named_by_user_space_is_not_written() {
    on_each(|machine| {
        let before = machine.memory(53, 1);
        set_msr(&machine.guest.vcpu, WALL_CLOCK, at(53, 64));
        assert_eq!(machine.memory(53, 1), before);
        machine.program(&[0x90], |_| ());
        assert_eq!(machine.run(), End::Halt);
        assert_eq!(before.len(), PAGE);
    });
}
