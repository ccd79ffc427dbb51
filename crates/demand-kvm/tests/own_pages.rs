// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pages that MSRs name to KVM are fetched before the guest or the VMM sets the MSRs, so that KVM's
//! writes to them are kept. On every backing and with every engine: this needs no trap.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use common::*;
use demand_kvm::{Engine, FaultError, MsrFilter, Virtualization, own_pages};
use demand_memory::{BackingKind, FaultPath, PAGE_SIZE, Waiter};
use demand_source::Threaded;
use kvm_bindings::{Msrs, kvm_msi, kvm_msr_entry, kvm_regs};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use test_support::host::{is_lab, skip};
use test_support::wait::PATIENCE;

const PAGES: u64 = 512;

const WALL_CLOCK: u32 = 0x4b56_4d00;
const SYSTEM_TIME: u32 = 0x4b56_4d01;
const STEAL_TIME: u32 = 0x4b56_4d03;
const PV_EOI: u32 = 0x4b56_4d04;

/// Offsets in the region.
const WALL_CLOCK_AT: u64 = 11 * PAGE_SIZE - 4;
const SYSTEM_TIME_AT: u64 = 20 * PAGE_SIZE + 64;
const STEAL_TIME_AT: u64 = 30 * PAGE_SIZE + 128;
const PV_EOI_AT: u64 = 40 * PAGE_SIZE + 8;

/// Returns the value of an MSR that makes KVM use the memory at an offset.
fn value(msr: u32, at: u64) -> u64 {
    REGION + at + u64::from(msr != WALL_CLOCK)
}

/// Returns an image in which only one of KVM's structures, `len` bytes at `at`, has changed.
fn with(rig: &Rig, image: &[u8], at: u64, len: usize) -> Vec<u8> {
    let mut expected = image.to_vec();
    expected[at as usize..at as usize + len].copy_from_slice(&rig.bytes(at, len));
    expected
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn word64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Checks a version: KVM counts it up from the image's value, and leaves an even one.
fn check_version(now: u32, image: u32) {
    let ahead = now.wrapping_sub(image);
    assert!(now.is_multiple_of(2) && (1..1000).contains(&ahead), "{now:#x} after {image:#x}");
}

/// Checks KVM's writes, and that fill does not overwrite them.
fn check(rig: &Rig, image: &[u8], msr: u32) {
    let (at, len) = match msr {
        WALL_CLOCK => (WALL_CLOCK_AT, 12),
        SYSTEM_TIME => (SYSTEM_TIME_AT, 32),
        STEAL_TIME => (STEAL_TIME_AT, 64),
        _ => unreachable!(),
    };
    let then = &image[at as usize..at as usize + len];
    let now = rig.bytes(at, len);
    let version = if msr == STEAL_TIME { 8 } else { 0 };
    check_version(word32(&now, version), word32(then, version));
    if msr == STEAL_TIME {
        // KVM adds to the value from the image.
        let stolen = word64(&now, 0).wrapping_sub(word64(then, 0));
        assert!(stolen < 60_000_000_000, "{stolen} ns");
    }
    rig.check(&with(rig, image, at, len));
    assert_eq!(rig.bytes(at, 4)[..], now[..4], "what KVM wrote was overwritten");
}

fn on_each(test: impl Fn(Engine, BackingKind, &[u8], &dyn Fn() -> Rig)) {
    let image = full_image(PAGES);
    for engine in Engine::ALL {
        let Some(kvm) = kvm_with(engine) else { continue };
        for kind in backings(image.len() as u64) {
            println!("{engine} on {kind}");
            test(engine, kind, &image, &|| Rig::new(&kvm, engine, kind, source_of(&image)));
        }
    }
}

fn set(cpu: &Cpu, index: u32, data: u64) -> bool {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    cpu.vcpu.set_msrs(&Msrs::from_entries(&[entry]).unwrap()).unwrap() == 1
}

#[test]
fn pages_are_fetched_before_user_space_sets_msrs() {
    on_each(|_, _, image, rig| {
        for (msr, at) in [
            (WALL_CLOCK, WALL_CLOCK_AT),
            (SYSTEM_TIME, SYSTEM_TIME_AT),
            (STEAL_TIME, STEAL_TIME_AT),
        ] {
            let rig = rig();
            rig.arrive(3);
            let mut cpu = rig.machine.vcpu(0);
            let entry = kvm_msr_entry { index: msr, data: value(msr, at), ..Default::default() };
            let pages = own_pages(&[entry], None);
            rig.handler.fetch_pages(&pages, cpu.kick.waiter()).unwrap();
            let internal = rig.pager().stats().path(FaultPath::HypervisorInternal);
            assert_eq!(internal.faults, if msr == WALL_CLOCK { 2 } else { 1 });
            if !set(&cpu, msr, value(msr, at)) {
                assert!(!is_lab(), "MSR {msr:#x}");
                skip(&format!("this KVM has no MSR {msr:#x}"));
                continue;
            }
            let regs = kvm_regs { rcx: 0, ..Default::default() };
            rig.machine.begin(&mut cpu, rig.machine.entries.outs, regs);
            rig.run(&mut cpu, &mut Device::default()).unwrap();
            check(&rig, image, msr);
        }
    });
}

/// Makes the guest write an MSR; returns the value that it reads back.
fn write_msr(rig: &Rig, cpu: &mut Cpu, msr: u32, data: u64) -> Result<Vec<u8>, Stopped> {
    let mut device = Device::default();
    let regs = kvm_regs {
        rcx: u64::from(msr),
        rax: data & 0xffff_ffff,
        rdx: data >> 32,
        ..Default::default()
    };
    rig.machine.begin(cpu, rig.machine.entries.wrmsr, regs);
    rig.run(cpu, &mut device)?;
    Ok(device.written)
}

/// Sets the trap if this KVM supports it.
fn trap(rig: &Rig) -> Option<MsrFilter> {
    match MsrFilter::new(&rig.machine.vm) {
        Ok(trap) => Some(trap),
        Err(error) => {
            skip(&error.to_string());
            None
        }
    }
}

#[test]
fn pages_are_fetched_before_guest_sets_msrs() {
    on_each(|_, _, image, rig| {
        for (msr, at) in [
            (WALL_CLOCK, WALL_CLOCK_AT),
            (SYSTEM_TIME, SYSTEM_TIME_AT),
            (STEAL_TIME, STEAL_TIME_AT),
        ] {
            let rig = rig();
            rig.arrive(3);
            let Some(trap) = trap(&rig) else { return };
            let mut cpu = rig.machine.vcpu(0);
            let data = value(msr, at);
            let read = match write_msr(&rig, &mut cpu, msr, data) {
                Err(Stopped::Shutdown) if !is_lab() => {
                    skip(&format!("this KVM has no MSR {msr:#x}"));
                    continue;
                }
                result => result.unwrap(),
            };
            assert_eq!(read, data.to_le_bytes());
            assert!(rig.pager().stats().path(FaultPath::HypervisorInternal).faults > 0);
            // A second run, in which KVM may write again.
            write_msr(&rig, &mut cpu, msr, data).unwrap();
            check(&rig, image, msr);
            // No page is missing; the guest now sets the MSR directly.
            trap.remove().unwrap();
            let faults = rig.pager().stats().path(FaultPath::HypervisorInternal).faults;
            let off = if msr == WALL_CLOCK { 0 } else { data & !1 };
            assert_eq!(write_msr(&rig, &mut cpu, msr, off).unwrap(), off.to_le_bytes());
            assert_eq!(rig.pager().stats().path(FaultPath::HypervisorInternal).faults, faults);
        }
    });
}

#[test]
fn refused_msr_value_faults_in_the_guest() {
    on_each(|_, _, image, rig| {
        let rig = rig();
        let Some(_trap) = trap(&rig) else { return };
        let mut cpu = rig.machine.vcpu(0);
        // Bits 1 to 5 are reserved. Without the trap this is #GP, which the guest does not handle.
        let data = value(STEAL_TIME, STEAL_TIME_AT) | 2;
        assert_eq!(write_msr(&rig, &mut cpu, STEAL_TIME, data), Err(Stopped::Shutdown));
        rig.check(image);
    });
}

#[test]
fn kicked_guest_still_completes_its_msr_write() {
    let Some(kvm) = kvm_with(Engine::Uffd) else { return };
    let gate = Gate::new(PAGES);
    let source = Arc::new(Threaded::new(gate.clone(), 2).unwrap());
    let rig = Rig::new(&kvm, Engine::Uffd, BackingKind::Shmem, source);
    let Some(_trap) = trap(&rig) else { return };
    let mut cpu = rig.machine.vcpu(0);
    let data = value(SYSTEM_TIME, SYSTEM_TIME_AT);
    let kick = cpu.kick.clone();
    let mut device = Device::default();
    let (rcx, rax) = (u64::from(SYSTEM_TIME), data);
    let regs = kvm_regs { rcx, rax, ..Default::default() };
    rig.machine.begin(&mut cpu, rig.machine.entries.wrmsr, regs);
    let gpa = REGION + SYSTEM_TIME_AT;
    for _ in 0..2 {
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| rig.run(&mut cpu, &mut device));
            a_while();
            assert!(!vcpu.is_finished());
            kick.kick();
            let kicked = Err(Stopped::Fault(FaultError::Kicked { gpa }));
            assert_eq!(vcpu.join().unwrap(), kicked);
        });
        assert!(device.pending.is_some() && rig.pager().bitmap().is_missing(20));
        kick.clear();
    }
    gate.open();
    rig.run(&mut cpu, &mut device).unwrap();
    assert_eq!(device.written, data.to_le_bytes());
    check(&rig, &full_image(PAGES), SYSTEM_TIME);
}

/// PV EOI: KVM sets the byte when it delivers an interrupt, and clears it when the guest exits.
#[test]
fn pv_eoi_byte_of_kvm_is_kept() {
    if demand_kvm::probe().virtualization == Virtualization::Emulated {
        // It leaves the guest at any instruction.
        return skip("this KVM emulates the guest's instructions");
    }
    let image = full_image(PAGES);
    for engine in Engine::ALL {
        let Some(kvm) = kvm_with(engine) else { continue };
        for kind in backings(image.len() as u64) {
            for by_guest in [false, true] {
                println!("{engine} on {kind}, set by the guest: {by_guest}");
                let machine = Machine::with_interrupts(&kvm, engine);
                let rig = Rig::with(machine, engine, kind, source_of(&image));
                rig.arrive(3);
                let Some(_trap) = trap(&rig) else { return };
                let mut cpu = rig.machine.vcpu(0);
                let mut lapic = cpu.vcpu.get_lapic().unwrap();
                lapic.regs[0xf0] = 0xffu8 as i8; // The spurious vector;
                lapic.regs[0xf1] = 1; // enabled.
                cpu.vcpu.set_lapic(&lapic).unwrap();
                let data = value(PV_EOI, PV_EOI_AT);
                let entry = kvm_msr_entry { index: PV_EOI, data, ..Default::default() };
                let mut regs = kvm_regs { rbx: REGION + PV_EOI_AT, ..regs_of(data) };
                let start = if by_guest {
                    rig.machine.entries.wrmsr
                } else {
                    let pages = own_pages(&[entry], None);
                    rig.handler.fetch_pages(&pages, &Waiter::new()).unwrap();
                    assert!(set(&cpu, PV_EOI, data));
                    regs.rcx = 0;
                    rig.machine.entries.touch
                };
                rig.machine.begin(&mut cpu, start, regs);
                // The guest sets the MSR and halts or spins until an interrupt comes. By then it
                // has touched its stack and the byte, because KVM clears the byte at any exit. An
                // exit for another reason may happen at the wrong moment, so more than one
                // interrupt may be needed.
                let mut device = Device::default();
                let mut rounds = 0;
                while device.written.last() != Some(&1) && rounds < 50 {
                    rounds += 1;
                    interrupt(&rig, &mut cpu, &mut device);
                }
                println!("{rounds} interrupts");
                if by_guest {
                    assert_eq!(device.written[..8], data.to_le_bytes());
                }
                // The guest's interrupt handler read the byte after KVM had set it.
                assert_eq!(device.written.last(), Some(&1));
                assert_eq!(rig.bytes(PV_EOI_AT, 1), [0], "cleared as the guest left");
                assert_ne!(image[PV_EOI_AT as usize], 0);
                rig.check(&with(&rig, &image, PV_EOI_AT, 1));
                assert_eq!(rig.bytes(PV_EOI_AT, 1), [0], "what KVM wrote was overwritten");
            }
        }
    }
}

/// Runs the vCPU until it has handled an interrupt that is sent after a while.
fn interrupt(rig: &Rig, cpu: &mut Cpu, device: &mut Device) {
    let kick = cpu.kick.clone();
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| rig.run(cpu, device));
        thread::sleep(Duration::from_millis(20));
        let (address_lo, data) = (0xfee0_0000, u32::from(VECTOR));
        rig.machine.vm.signal_msi(kvm_msi { address_lo, data, ..Default::default() }).unwrap();
        let begun = Instant::now();
        while !vcpu.is_finished() && begun.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(1));
        }
        // This does not affect a guest that has already handled it.
        kick.kick();
        vcpu.join().unwrap().unwrap();
    });
    kick.clear();
}

fn regs_of(data: u64) -> kvm_regs {
    kvm_regs { rcx: u64::from(PV_EOI), rax: data & 0xffff_ffff, ..Default::default() }
}
