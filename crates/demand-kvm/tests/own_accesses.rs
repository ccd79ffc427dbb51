// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! KVM's own accesses for a guest: operands of instructions that it emulates, and the page tables
//! on the way to them. They never read a missing page as zeros, and their writes are never
//! overwritten when the page is populated.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use common::*;
use demand_kvm::Engine;
use demand_memory::{BackingKind, FaultPath, PAGE_SIZE};
use kvm_bindings::kvm_regs;
use test_support::host::{is_lab, skip};
use test_support::wait::until;

/// 2 MiB: one unit of huge pages, partly present as soon as one page is present.
const PAGES: u64 = 512;

/// Runs a guest's string instruction on a region in which page 3 is present, so that its unit is
/// partly present.
fn run(rig: &Rig, entry: fn(&Entries) -> u64, regs: kvm_regs) -> Device {
    rig.arrive(3);
    let mut cpu = rig.machine.vcpu(0);
    let mut device = Device::default();
    rig.machine.begin(&mut cpu, entry(&rig.machine.entries), regs);
    rig.run(&mut cpu, &mut device).unwrap();
    device
}

/// A run of bytes in the region: the end of page 7, all of page 8, the beginning of page 9.
const AT: u64 = 8 * PAGE_SIZE - 50;
const LEN: u64 = PAGE_SIZE + 100;

fn within_image(image: &[u8]) -> &[u8] {
    &image[AT as usize..(AT + LEN) as usize]
}

fn with_device_bytes(mut image: Vec<u8>) -> Vec<u8> {
    for (index, byte) in image[AT as usize..(AT + LEN) as usize].iter_mut().enumerate() {
        *byte = device_byte(index);
    }
    image
}

fn outs() -> kvm_regs {
    kvm_regs { rsi: REGION + AT, rcx: LEN, rdx: u64::from(PORT), ..Default::default() }
}

fn ins() -> kvm_regs {
    kvm_regs { rdi: REGION + AT, rcx: LEN, rdx: u64::from(PORT), ..Default::default() }
}

#[test]
fn strings_to_a_port_are_the_images() {
    let image = full_image(PAGES);
    where_own_accesses_are_trapped(&image, |rig| {
        let device = run(&rig, |entries| entries.outs, outs());
        assert!(device.written == within_image(&image), "{:x?}", &device.written[..64]);
        let pages = |path| rig.pager().stats().path(path).pages;
        if rig.slot.engine().faults_by_unit() && rig.pager().unit_pages() > 1 {
            assert_eq!(pages(FaultPath::Guest), PAGES - 1);
        } else {
            // A fault is counted after its faulter is woken.
            until("all faults are counted", || {
                pages(FaultPath::Guest) + pages(FaultPath::HypervisorInternal) == 3
            });
        }
        rig.check(&image);
    });
}

#[test]
fn strings_from_a_port_stay() {
    let image = full_image(PAGES);
    where_own_accesses_are_trapped(&image, |rig| {
        run(&rig, |entries| entries.ins, ins());
        rig.check(&with_device_bytes(image.clone()));
    });
}

#[test]
fn strings_from_a_device_stay() {
    let image = full_image(PAGES);
    where_own_accesses_are_trapped(&image, |rig| {
        let regs = kvm_regs { rsi: DEVICE, rdi: REGION + AT, rcx: LEN, ..Default::default() };
        run(&rig, |entries| entries.movs, regs);
        rig.check(&with_device_bytes(image.clone()));
    });
}

/// A guest's page tables: the page directory and the page table of the region lie in the region.
const DIRECTORY: u64 = 300;
const TABLE: u64 = 301;
/// Present, writable.
const MAPPED: u32 = 0b11;
/// Accessed, dirty: set by the processor or by KVM.
const MARKS: u32 = 0b110_0000;
const PAGE_4M: u32 = 1 << 7;

/// Creates an image with identity-mapping page tables: 4 MiB pages, except for the region.
fn image_with_tables() -> Vec<u8> {
    let mut image = full_image(PAGES);
    let mut put = |page: u64, index: u32, entry: u32| {
        let at = (page * PAGE_SIZE) as usize + index as usize * 4;
        image[at..at + 4].copy_from_slice(&entry.to_le_bytes());
    };
    for index in 0..1024 {
        put(DIRECTORY, index, index << 22 | PAGE_4M | MAPPED);
        put(TABLE, index, (REGION as u32 + (index << 12)) | MAPPED);
    }
    let table = (REGION + TABLE * PAGE_SIZE) as u32;
    put(DIRECTORY, (REGION >> 22) as u32, table | MAPPED);
    image
}

#[test]
fn page_tables_of_an_operand_are_the_images() {
    let image = image_with_tables();
    for (entry, regs) in
        [((|entries| entries.outs) as fn(&Entries) -> u64, outs()), (|entries| entries.ins, ins())]
    {
        where_own_accesses_are_trapped(&image, |rig| {
            rig.arrive(3);
            let mut cpu = rig.machine.vcpu(0);
            let mut sregs = cpu.vcpu.get_sregs().unwrap();
            sregs.cr3 = REGION + DIRECTORY * PAGE_SIZE;
            sregs.cr4 |= 1 << 4; // PSE
            sregs.cr0 |= 1 << 31; // PG
            cpu.vcpu.set_sregs(&sregs).unwrap();
            let mut device = Device::default();
            rig.machine.begin(&mut cpu, entry(&rig.machine.entries), regs);
            match rig.run(&mut cpu, &mut device) {
                // Not every KVM that emulates the processor supports paging.
                Err(Stopped::Shutdown) if !is_lab() => return skip("no paging in guests"),
                result => result.unwrap(),
            }
            let mut expected = image.clone();
            if regs.rsi != 0 {
                assert!(device.written == within_image(&image));
            } else {
                expected = with_device_bytes(expected);
            }
            // The accessed and dirty bits are not lost either: the table's page was populated only
            // once.
            let entry = |page: u64| {
                let bytes = rig.bytes(TABLE * PAGE_SIZE + page * 4, 4);
                u32::from_le_bytes(bytes.try_into().unwrap())
            };
            for page in AT / PAGE_SIZE..=(AT + LEN) / PAGE_SIZE {
                let marks = if regs.rsi != 0 { MARKS & !0x40 } else { MARKS };
                assert_eq!(entry(page) & MARKS, marks, "page {page}");
            }
            // All other bits are unchanged.
            for page in [DIRECTORY, TABLE] {
                let from = (page * PAGE_SIZE) as usize;
                let now = rig.bytes(from as u64, PAGE_SIZE as usize);
                for (at, (now, then)) in now.iter().zip(&image[from..]).enumerate() {
                    let marks = if at % 4 == 0 { MARKS as u8 } else { 0 };
                    assert_eq!(now & !marks, then & !marks, "byte {at} of page {page}");
                }
                expected[from..from + PAGE_SIZE as usize].copy_from_slice(&now);
            }
            rig.check(&expected);
        });
    }
}

/// Where the slot's mapping is inaccessible, KVM leaves accesses to user space, as for a device.
#[test]
fn user_space_makes_accesses_left_by_kvm() {
    let image = full_image(PAGES);
    for engine in Engine::ALL {
        let Some(kvm) = kvm_with(engine) else { continue };
        for kind in backings(image.len() as u64) {
            println!("{engine} on {kind}");
            let rig = || {
                let rig = Rig::new(&kvm, engine, kind, source_of(&image));
                close(rig.slot.mapping());
                rig
            };
            let read = rig();
            let device = run(&read, |entries| entries.outs, outs());
            assert!(device.written == within_image(&image));
            assert_eq!(device.answered, LEN);
            // A KVM that respects the bitmap first exits for the page.
            let by_kvm = engine == Engine::KvmUserfault && features().own_accesses;
            let path = if by_kvm { FaultPath::Guest } else { FaultPath::HypervisorInternal };
            let fetched = read.pager().stats().path(path);
            assert_eq!((fetched.faults, fetched.pages), (3, 3));
            read.check(&image);
            let write = rig();
            let device = run(&write, |entries| entries.ins, ins());
            assert!(device.answered > 0);
            write.check(&with_device_bytes(image.clone()));
        }
    }
}

/// Shows that the tests above can fail: without a trap, on huge pages under an engine whose kernel
/// does not trap KVM's own accesses, these read zeros.
#[test]
fn an_untrapped_operand_reads_as_zeros() {
    let Some(kvm) = kvm_with(Engine::KvmAttributes) else { return };
    let image = full_image(PAGES);
    if !backings(image.len() as u64).contains(&BackingKind::Hugetlb2M) {
        return;
    }
    let source = source_of(&image);
    let rig = Rig::new(&kvm, Engine::KvmAttributes, BackingKind::Hugetlb2M, source);
    assert_eq!(rig.pager().backing().kind(), BackingKind::Hugetlb2M);
    let device = run(&rig, |entries| entries.outs, outs());
    assert!(device.written.iter().all(|byte| *byte == 0), "then say so in the README");
}
