// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests that work with any KVM: plain slots, slots that another engine traps, kicks.

mod common;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::*;
use demand_kvm::{
    DemandSlot, Engine, FaultError, FaultHandler, Finished, KVM_MEMORY_EXIT_FLAG_USERFAULT,
    PlainSlot, SlotError, VcpuKick,
};
use demand_memory::{BackingKind, GuestTrapError, Mapping, PAGE_SIZE, VcpuTrap};
use demand_source::Threaded;
use demand_uffd::{ArmGuestError, DEFAULT_THREADS, FaultService};
use vm_memory::GuestAddress;

const PAGES: u64 = 16;

fn no_faults() -> FaultHandler {
    FaultHandler::new([]).unwrap()
}

/// Returns the pages whose bit is set in a dirty log.
fn dirty(log: &[u64]) -> Vec<u64> {
    (0..log.len() as u64 * 64)
        .filter(|page| log[(page / 64) as usize] >> (page % 64) & 1 == 1)
        .collect()
}

#[test]
fn guest_reads_image_and_writes_are_logged() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(&kvm, Engine::Uffd);
    let pager = file_pager(BackingKind::Shmem, PAGES);
    fill(&pager);
    let slot = machine.slot(&pager, Engine::Uffd);
    assert!(!slot.is_trapping());
    assert!(matches!(slot.dirty_log(), Err(SlotError::DirtyLog { .. })));

    let mut cpu = machine.vcpu(0);
    machine.copy_and_compare(&mut cpu, &no_faults(), Pages::run(0, PAGES), 0, page);

    slot.set_dirty_logging(true).unwrap();
    machine.load(&mut cpu, Program::Write { value: 77 }, Pages { first: 1, count: 3, stride: 5 });
    cpu.run(&no_faults()).unwrap();
    assert_eq!(dirty(&slot.dirty_log().unwrap()), [1, 6, 11]);
    assert!(dirty(&slot.dirty_log().unwrap()).is_empty());
    slot.set_dirty_logging(false).unwrap();
    assert_eq!(slot.finish(), Ok(Finished::Now));
    assert_eq!(look_at_word(slot.mapping(), 6 * PAGE_SIZE + 16), 78);
    machine.copy_and_compare(&mut cpu, &no_faults(), Pages::run(0, PAGES), 0, |index| {
        let mut expected = page(index);
        if index % 5 == 1 {
            let value = 77 + (index as u32 / 5);
            expected[16..20].copy_from_slice(&value.to_le_bytes());
        }
        expected
    });
}

#[test]
fn a_kernel_without_userfault_says_so() {
    let Some(kvm) = kvm() else { return };
    if demand_kvm::probe().kvm.unwrap().userfault.works() {
        return;
    }
    let vm = Arc::new(kvm.create_vm().unwrap());
    let pager = file_pager(BackingKind::Shmem, PAGES);
    let mapping = Arc::new(pager.backing().map().unwrap());
    let slot =
        DemandSlot::new(vm, 0, GuestAddress(REGION), mapping.clone(), pager, Engine::KvmUserfault);
    let error = slot.unwrap_err();
    assert!(matches!(error, SlotError::Create { .. }), "{error}");
    assert!(error.to_string().contains("use engine uffd"), "{error}");
    assert_eq!(Arc::strong_count(&mapping), 1, "a slot that never was keeps nothing");
}

#[test]
fn impossible_slots_are_refused() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(&kvm, Engine::Uffd);
    let pager = file_pager(BackingKind::Shmem, PAGES);
    fill(&pager);
    let slot = machine.slot(&pager, Engine::Uffd);
    let mapping = slot.mapping();
    let new = |number, start, mapping: &Arc<Mapping>| {
        let (vm, mapping) = (machine.vm.clone(), mapping.clone());
        DemandSlot::new(vm, number, GuestAddress(start), mapping, pager.clone(), Engine::Uffd)
            .unwrap_err()
    };
    let error = new(3, REGION + PAGE_SIZE, mapping);
    assert!(error.to_string().contains("overlaps another memslot"), "{error}");
    assert!(matches!(new(3, 0x123, mapping), SlotError::Unaligned { start: 0x123, .. }));
    let other = file_pager(BackingKind::Shmem, 1);
    let short = Arc::new(other.backing().map().unwrap());
    let error = new(3, 2 * REGION, &short);
    assert!(matches!(error, SlotError::Size { mapping: PAGE_SIZE, .. }), "{error}");
    let error = new(u32::MAX, 2 * REGION, mapping);
    assert!(error.to_string().contains("Invalid argument"), "{error}");
}

/// An unarmed mapping is refused under `uffd`, and so is one that does not trap all accesses. The
/// trap is removed with the slot; accesses to its missing pages are then an error and never zeros.
#[test]
fn unarmed_mapping_is_refused_under_uffd() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(&kvm, Engine::Uffd);
    let pager = file_pager(BackingKind::Shmem, PAGES);
    let new = |mapping: &Arc<Mapping>| {
        let (vm, mapping) = (machine.vm.clone(), mapping.clone());
        DemandSlot::new(vm, 2, GuestAddress(REGION), mapping, pager.clone(), Engine::Uffd)
    };
    let unarmed = Arc::new(pager.backing().map().unwrap());
    let error = new(&unarmed).unwrap_err();
    assert!(matches!(error, SlotError::Unarmed { number: 2 }), "{error}");

    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    let armed = service.arm_guest([&pager], VcpuTrap::Mapping).unwrap().remove(0);
    let slot = new(&armed).unwrap();
    let error = slot.finish().unwrap_err();
    assert!(matches!(error, SlotError::PagesMissing { missing: PAGES, .. }), "{error}");
    assert!(armed.traps_all());
    drop(slot);
    // The kernel reads it and reports an error; a read in user space would be a signal.
    let (file, bytes) = (tempfile::tempfile().unwrap(), PAGE_SIZE as usize);
    // SAFETY: the mapping is kept, and the kernel only reads it.
    let wrote = unsafe { libc::write(file.as_raw_fd(), armed.address().as_ptr().cast(), bytes) };
    let error = std::io::Error::last_os_error();
    assert_eq!((wrote, error.raw_os_error()), (-1, Some(libc::EFAULT)));

    // Arming cannot be repeated: another mapping is refused, before and after the slot.
    let arm = || service.arm_guest([&pager], VcpuTrap::Mapping).unwrap_err();
    assert!(matches!(arm(), ArmGuestError::Order(GuestTrapError::Twice)));
}

#[test]
fn arming_after_the_slot_is_refused() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(&kvm, Engine::Uffd);
    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    let pager = file_pager(BackingKind::Shmem, PAGES);
    // As for an engine that needs no armed mapping, on a kernel that has no such engine.
    let mapping = Arc::new(pager.backing().map().unwrap());
    pager.note_memslot(&mapping);
    let error = service.arm_guest([&pager], VcpuTrap::Hypervisor).unwrap_err();
    assert!(matches!(error, ArmGuestError::Order(GuestTrapError::AfterSlot)), "{error}");
    // The same holds for pages that were fetched.
    let other = file_pager(BackingKind::Shmem, PAGES);
    fill(&other);
    let slot = machine.slot(&other, Engine::Uffd);
    let error = service.arm_guest([&other], VcpuTrap::Mapping).unwrap_err();
    assert!(matches!(error, ArmGuestError::Order(GuestTrapError::AfterSlot)), "{error}");
    drop(slot);
    let error = service.arm_guest([&other], VcpuTrap::Mapping).unwrap_err();
    assert!(matches!(error, ArmGuestError::Order(GuestTrapError::AfterFetch)), "{error}");
}

#[test]
fn dropped_slot_is_removed_despite_a_live_vcpu() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(&kvm, Engine::Uffd);
    let pager = file_pager(BackingKind::Shmem, PAGES);
    fill(&pager);
    let slot = machine.slot(&pager, Engine::Uffd);
    // Its memory stays: only the slot is missing in the guest.
    let mapping = slot.mapping().clone();
    let mut cpu = machine.vcpu(0);
    machine.copy_and_compare(&mut cpu, &no_faults(), Pages::run(0, 1), 0, page);
    drop(slot);
    assert_eq!(Arc::strong_count(&mapping), 1);
    machine.load(&mut cpu, Program::Check, Pages::run(0, 1));
    assert_eq!(cpu.run(&no_faults()), Err(Stopped::Mmio(REGION)));
    // Its number and its addresses are free.
    let other = Arc::new(pager.backing().map().unwrap());
    PlainSlot::new(machine.vm.clone(), 2, GuestAddress(REGION), other, false).unwrap();
}

#[test]
fn a_running_guest_is_kicked_out() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(&kvm, Engine::Uffd);
    let mut cpu = machine.vcpu(0);
    machine.load(&mut cpu, Program::Spin, Pages::run(0, 1));
    let kick = cpu.kick.clone();
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| cpu.run(&no_faults()));
        a_while();
        assert!(!vcpu.is_finished() && !kick.is_kicked());
        kick.kick();
        assert_eq!(vcpu.join().unwrap(), Err(Stopped::Kicked));
    });
    // The kick stays in force until it is cleared.
    assert!(kick.is_kicked());
    assert_eq!(cpu.run(&no_faults()), Err(Stopped::Kicked));
    kick.clear();
    assert!(!kick.is_kicked());
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| cpu.run(&no_faults()));
        a_while();
        assert!(!vcpu.is_finished());
        kick.kick();
        assert_eq!(vcpu.join().unwrap(), Err(Stopped::Kicked));
    });
}

#[test]
fn waiting_thread_is_kicked_out() {
    let Some(kvm) = kvm() else { return };
    let gate = Gate::new(PAGES);
    let source = Arc::new(Threaded::new(gate.clone(), 2).unwrap());
    let pager = pager(BackingKind::Shmem, PAGES, source);
    let handler = FaultHandler::new([(GuestAddress(REGION), pager)]).unwrap();
    let Cpu { vcpu: _vcpu, kick } = Machine::new(&kvm, Engine::Uffd).vcpu(0);
    let handle = || {
        kick.attach();
        handler.handle(REGION, PAGE_SIZE, KVM_MEMORY_EXIT_FLAG_USERFAULT, kick.waiter())
    };
    thread::scope(|scope| {
        let vcpu = scope.spawn(handle);
        a_while();
        assert!(!vcpu.is_finished());
        kick.kick();
        assert_eq!(vcpu.join().unwrap(), Err(FaultError::Kicked { gpa: REGION }));
        kick.clear();
        let vcpu = scope.spawn(handle);
        a_while();
        assert!(!vcpu.is_finished());
        gate.open();
        assert_eq!(vcpu.join().unwrap(), Ok(()));
    });
}

#[test]
fn no_kick_is_lost_at_any_moment() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(&kvm, Engine::Uffd);
    let mut cpu = machine.vcpu(0);
    machine.load(&mut cpu, Program::Spin, Pages::run(0, 1));
    let kick = cpu.kick.clone();
    let (kicked, kicks) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            // Even if the thread inherited a mask that blocks the signal.
            block_signal();
            for _ in 0..200 {
                assert_eq!(cpu.run(&no_faults()), Err(Stopped::Kicked));
                cpu.kick.clear();
                kicked.send(()).unwrap();
            }
        });
        for round in 0..200 {
            // Sometimes before it has entered KVM_RUN again, sometimes after.
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_micros(round) {
                std::hint::spin_loop();
            }
            kick.kick();
            kicks.recv_timeout(Duration::from_secs(20)).expect("a kick was lost");
        }
    });
}

fn block_signal() {
    // SAFETY: only this function uses the set, and the signal's number is valid.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut set, VcpuKick::signal());
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
}
