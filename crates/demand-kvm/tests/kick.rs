// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kicks of a vCPU that waits for a page inside `KVM_RUN`, on a slot whose mapping is armed.
//! `host.rs`, `exits.rs` and `own_pages.rs` test kicks of a vCPU that waits in the handler or runs
//! guest code.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::sync::Arc;
use std::thread;

use common::*;
use demand_kvm::{Engine, Virtualization};
use demand_memory::{BackingKind, PAGE_SIZE};
use demand_source::Threaded;
use kvm_bindings::kvm_regs;
use test_support::host::skip;
use test_support::wait::until;

const PAGES: u64 = 512;

/// Runs a test on a rig whose source answers once the gate is opened.
fn with_gate(engine: Engine, kind: BackingKind, test: impl FnOnce(Rig, Gate)) {
    let Some(kvm) = kvm_with(engine) else { return };
    if demand_kvm::probe().virtualization == Virtualization::Emulated {
        // There, every guest access is an access by KVM itself.
        return skip("this KVM emulates the guest's instructions");
    }
    if !backings(PAGES * PAGE_SIZE).contains(&kind) {
        return;
    }
    println!("{engine} on {kind}");
    let gate = Gate::new(PAGES);
    let source = Arc::new(Threaded::new(gate.clone(), 2).unwrap());
    test(Rig::new(&kvm, engine, kind, source), gate);
}

/// Under the engine uffd a guest's access waits inside `KVM_RUN` while the source does not answer.
/// KVM ends the wait for any signal (`FOLL_INTERRUPTIBLE`, since Linux 6.2).
#[test]
fn guest_waiting_in_userfaultfd_is_kicked_out() {
    for kind in [BackingKind::Shmem, BackingKind::Hugetlb2M] {
        with_gate(Engine::Uffd, kind, |rig, gate| {
            let mut cpu = rig.machine.vcpu(0);
            let kick = cpu.kick.clone();
            rig.machine.load(&mut cpu, Program::Copy { out: 0 }, Pages::run(7, 3));
            let mut device = Device::default();
            for _ in 0..3 {
                thread::scope(|scope| {
                    let vcpu = scope.spawn(|| rig.run(&mut cpu, &mut device));
                    a_while();
                    assert!(!vcpu.is_finished() && rig.pager().bitmap().is_missing(7));
                    kick.kick();
                    until("the kick was lost", || vcpu.is_finished());
                    assert_eq!(vcpu.join().unwrap(), Err(Stopped::Kicked));
                });
                assert!(cpu.vcpu.get_regs().is_ok() && rig.pager().bitmap().is_missing(7));
                kick.clear();
            }
            gate.open();
            rig.run(&mut cpu, &mut device).unwrap();
            assert!((0..3).all(|page| rig.machine.copied(page) == full_page(7 + page)));
        });
    }
}

/// KVM's own access through the armed mapping waits until the page is present, in spite of kicks:
/// the kernel ends it for deadly signals only (`fault_signal_pending` in
/// `include/linux/sched/signal.h`), and retries repeatedly with other signals pending. Meanwhile
/// the vCPU runs no instruction of the guest, and the kick is still in force when the access
/// completes.
#[test]
fn kick_takes_effect_once_kvms_access_completes() {
    with_gate(Engine::Uffd, BackingKind::Shmem, |rig, gate| {
        let mut cpu = rig.machine.vcpu(0);
        let kick = cpu.kick.clone();
        let regs = kvm_regs {
            rsi: REGION + 7 * PAGE_SIZE,
            rcx: 3 * PAGE_SIZE,
            rdx: u64::from(PORT),
            ..Default::default()
        };
        rig.machine.begin(&mut cpu, rig.machine.entries.outs, regs);
        let mut device = Device::default();
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| rig.run(&mut cpu, &mut device));
            a_while();
            assert!(!vcpu.is_finished());
            kick.kick();
            a_while();
            assert!(!vcpu.is_finished() && rig.pager().bitmap().is_missing(7));
            assert!(kick.is_kicked());
            gate.open();
            until("the kick was lost", || vcpu.is_finished());
            assert_eq!(vcpu.join().unwrap(), Err(Stopped::Kicked));
        });
        // The guest has made little progress: at most to the end of one of KVM's batches.
        assert!(device.written.len() < 3 * 4096);
        kick.clear();
        rig.run(&mut cpu, &mut device).unwrap();
        let expected: Vec<u8> = (7..10).flat_map(full_page).collect();
        assert!(device.written == expected);
    });
}
