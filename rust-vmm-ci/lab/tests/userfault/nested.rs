// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of a guest (L1) that runs a guest (L2): the structures that KVM reads for both, and nested
//! page tables, which KVM shadows, with prefetching, even if the host has nested paging.

use std::fs;

use kvm_bindings::{Msrs, kvm_msr_entry};

use crate::guest::{CODE_GPA, PAGE};
use crate::machine::{Machine, PORT, TABLES, at, entry, on_each, sum_of_first_words, used_entry};

/// Address of L2's program: the second page of the code slot, identity-mapped for L2.
const L2_CODE_GPA: u64 = CODE_GPA + PAGE as u64;
const VMRUN: [u8; 3] = [0x0f, 0x01, 0xd8];
const VMLOAD: [u8; 3] = [0x0f, 0x01, 0xda];
const VMSAVE: [u8; 3] = [0x0f, 0x01, 0xdb];
/// The exit code of L2 for an I/O instruction.
const EXIT_IOIO: u64 = 0x7b;

/// Pages of the memory under test: the VMCB, the permission maps of ports and of MSRs, and nested
/// page tables.
const VMCB: usize = 400;
const PORTS: usize = 410;
const MSRS: usize = 420;
const NPT: [usize; 4] = [430, 431, 432, 433];

/// Returns whether L1 can use nested paging, which is the case if this KVM uses it.
fn nested_paging() -> bool {
    let parameter = "/sys/module/kvm_amd/parameters/npt";
    fs::read_to_string(parameter).is_ok_and(|text| text.trim() != "N" && text.trim() != "0")
}

/// Sets up the guest as an L1 in long mode that is about to run an L2 in real mode; L2's addresses
/// are L1's.
fn l1(machine: &mut Machine) {
    machine.long_mode(0);
    let mut sregs = machine.guest.vcpu.get_sregs().expect("sregs");
    sregs.efer |= 1 << 12;
    machine.guest.vcpu.set_sregs(&sregs).expect("sregs");
    let save_area = kvm_msr_entry {
        index: 0xc001_0117,
        data: CODE_GPA + 2 * PAGE as u64,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[save_area]).expect("one");
    assert_eq!(machine.guest.vcpu.set_msrs(&msrs).expect("MSRs"), 1);
    machine.image(VMCB, 0, &vmcb());
    for page in [PORTS, PORTS + 1, PORTS + 2, MSRS, MSRS + 1] {
        machine.image(page, 0, &[0; PAGE]);
    }
    // L2 signals its end through this port, which L1 intercepts.
    machine.image(PORTS, PORT as usize / 8, &[1 << (PORT % 8)]);
    let low = TABLES + 8;
    machine.image(NPT[0], 0, &entry(NPT[1]));
    machine.image(NPT[1], 0, &entry(NPT[2]));
    let low_table = CODE_GPA + (low * PAGE) as u64;
    machine.image(NPT[2], 0, &(low_table | 7).to_le_bytes());
    machine.image(NPT[2], 8, &entry(NPT[3]));
    for index in 0..512 {
        let gpa = (index * PAGE) as u64;
        machine.guest.code.put(low * PAGE + index * 8, &(gpa | 7).to_le_bytes());
        machine.image(NPT[3], index * 8, &used_entry(index));
    }
}

/// Returns the VMCB, which controls how L2 runs.
fn vmcb() -> Vec<u8> {
    let mut vmcb = vec![0; PAGE];
    let mut put = |offset: usize, bytes: &[u8]| {
        vmcb[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    // Intercepts: ports and MSRs by their maps, HLT, shutdown, VMRUN.
    put(0x00c, &(1u32 << 24 | 1 << 27 | 1 << 28 | 1 << 31).to_le_bytes());
    put(0x010, &1u32.to_le_bytes());
    put(0x040, &at(PORTS, 0).to_le_bytes());
    put(0x048, &at(MSRS, 0).to_le_bytes());
    put(0x058, &1u32.to_le_bytes());
    put(0x090, &u64::from(nested_paging()).to_le_bytes());
    put(0x0b0, &at(NPT[0], 0).to_le_bytes());
    // ES to GS: selector, attributes, limit, base.
    for segment in 0..6 {
        let attributes: u16 = if segment == 1 { 0x89b } else { 0x893 };
        put(0x402 + 16 * segment, &attributes.to_le_bytes());
        put(0x404 + 16 * segment, &u32::MAX.to_le_bytes());
    }
    put(0x4d0, &(1u64 << 12).to_le_bytes());
    put(0x558, &(1u64 << 4).to_le_bytes());
    put(0x560, &0x400u64.to_le_bytes());
    put(0x568, &0xffff_0ff0u64.to_le_bytes());
    put(0x570, &2u64.to_le_bytes());
    put(0x578, &L2_CODE_GPA.to_le_bytes());
    put(0x668, &0x0007_0406_0007_0406u64.to_le_bytes());
    vmcb
}

/// Returns a value that KVM has written to the VMCB.
fn left(machine: &Machine, offset: usize) -> u64 {
    let bytes = machine.guest.memory.get(VMCB * PAGE + offset, 8);
    u64::from_le_bytes(bytes.try_into().expect("8"))
}

/// Returns the pages that are missed before L2's first instruction.
fn first_missed() -> Vec<usize> {
    let mut missed = vec![VMCB, PORTS, PORTS + 1, PORTS + 2, MSRS, MSRS + 1];
    if nested_paging() {
        missed.extend(&NPT[..3]);
    }
    missed
}

#[test]
fn l2_runs_on_arriving_pages() {
    on_each(|machine| {
        l1(machine);
        // mov eax, [ebx]; out PORT, al
        machine.guest.code.put(PAGE, &[0x67, 0x66, 0x8b, 0x03, 0xe6, PORT as u8]);
        machine.program(&VMRUN, |regs| (regs.rax, regs.rbx) = (at(VMCB, 0), at(300, 0)));
        let mut expected = first_missed();
        if nested_paging() {
            expected.push(NPT[3]);
        }
        expected.push(300);
        assert_eq!(machine.finish(), expected);
        assert_eq!(left(machine, 0x070), EXIT_IOIO);
        assert_eq!((left(machine, 0x5f8) as u32).to_le_bytes(), machine.expected(300)[..4]);
        assert_eq!(machine.device.out, [0u8; 0]);
    });
}

#[test]
fn nothing_is_mapped_ahead_for_an_l2() {
    on_each(|machine| {
        l1(machine);
        let pages = 64;
        for page in (300..300 + pages).step_by(2) {
            machine.arrive(page);
        }
        // The present pages first, then the missing ones, whose entries are adjacent.
        let mut code = Vec::new();
        for first in [300, 301] {
            code.extend([0x66, 0xbb]); // mov ebx, page
            code.extend((at(first, 0) as u32).to_le_bytes());
            code.extend([0x66, 0xb9]); // mov ecx, count
            code.extend((pages as u32 / 2).to_le_bytes());
            code.extend([0x67, 0x66, 0x03, 0x03]); // add eax, [ebx]
            code.extend([0x66, 0x81, 0xc3, 0x00, 0x20, 0x00, 0x00]); // add ebx, 0x2000
            code.extend([0x66, 0x49, 0x75, 0xf1]); // dec ecx; jnz
        }
        code.extend([0xe6, PORT as u8]);
        machine.guest.code.put(PAGE, &code);
        machine.program(&VMRUN, |regs| regs.rax = at(VMCB, 0));
        let mut expected = first_missed();
        if nested_paging() {
            expected.push(NPT[3]);
        }
        expected.extend((301..300 + pages).step_by(2));
        assert_eq!(machine.finish(), expected);
        assert_eq!(left(machine, 0x070), EXIT_IOIO);
        assert_eq!(left(machine, 0x5f8) as u32, sum_of_first_words(machine, 300, pages));
    });
}

#[test]
fn kvm_emulates_for_l2_on_arriving_pages() {
    on_each(|machine| {
        l1(machine);
        // rep outsb to a port that L1 does not intercept, so that L0 emulates it
        let port = 0x80;
        assert_eq!(port, PORT);
        machine.image(PORTS, PORT as usize / 8, &[0]);
        machine.guest.code.put(PAGE, &[0x67, 0xf3, 0x6e, 0xf4]);
        machine.program(&VMRUN, |regs| {
            (regs.rax, regs.rsi) = (at(VMCB, 0), at(300, PAGE - 4));
            (regs.rcx, regs.rdx) = (8, PORT.into());
        });
        let mut expected = first_missed();
        if nested_paging() {
            expected.push(NPT[3]);
        }
        expected.extend([300, 301]);
        assert_eq!(machine.finish(), expected);
        assert_eq!(machine.device.out, machine.arrived(300, 2)[PAGE - 4..][..8]);
    });
}

#[test]
fn vmload_and_vmsave_wait_for_their_page() {
    on_each(|machine| {
        l1(machine);
        machine.image(440, 0, &vmcb());
        machine.program(&VMLOAD, |regs| regs.rax = at(440, 0));
        assert_eq!(machine.finish(), [440]);
        machine.program(&VMSAVE, |regs| regs.rax = at(441, 0));
        assert_eq!(machine.finish(), [441]);
        // The FS segment, as it was loaded.
        assert_eq!(machine.memory(441, 1)[0x440..0x450], vmcb()[0x440..0x450]);
    });
}
