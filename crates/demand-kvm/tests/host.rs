// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests that work with any KVM: plain slots, slots that another engine traps, kicks.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::*;
use demand_kvm::{
    DemandSlot, DemandSlotConfig, DemandVcpu, Engine, FaultError, FaultHandler, FaultRegion,
    KVM_MEMORY_EXIT_FLAG_USERFAULT, PlainSlot, SlotError, Step, VcpuKick,
};
use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, GuestMapping, MemfdBacking, PAGE_SIZE, PagerConfig,
    VcpuTrap,
};
use demand_source::Threaded;
use demand_uffd::{DEFAULT_THREADS, FaultService};
use vm_memory::GuestAddress;
use vmm_sys_util::signal::block_signal;

const PAGES: u64 = 16;

#[test]
fn guest_reads_image_and_its_writes() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(&kvm, Engine::Uffd);
    let pager = file_pager(BackingKind::Shmem, PAGES);
    fill(&pager);
    let slot = machine.slot(&pager, Engine::Uffd);
    assert!(!slot.is_trapping());

    let mut cpu = machine.vcpu(0);
    machine.copy_and_compare(&mut cpu, &no_faults(), Pages::run(0, PAGES), 0, page);

    machine.load(&mut cpu, Program::Write { value: 77 }, Pages { first: 1, count: 3, stride: 5 });
    cpu.run(&no_faults()).unwrap();
    assert_eq!(slot.finish(), Ok(()));
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
    let machine = Machine::new(&kvm, Engine::Uffd);
    let pager = file_pager(BackingKind::Shmem, PAGES);
    let mapping = guest_mapping(&pager, Engine::KvmUserfault);
    let kept = mapping.mapping().clone();
    let config = machine.slot_config(2, mapping, Engine::KvmUserfault);
    let error = DemandSlot::new(config).unwrap_err();
    assert!(matches!(error, SlotError::Create { .. }), "{error}");
    assert!(error.to_string().contains("may lack KVM Userfault"), "{error}");
    // This test, and the service that traps it.
    assert_eq!(Arc::strong_count(&kept), 2, "a slot that never was keeps nothing");
}

#[test]
fn impossible_slots_are_refused() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(&kvm, Engine::Uffd);
    let pager = file_pager(BackingKind::Shmem, PAGES);
    fill(&pager);
    let mapping = guest_mapping(&pager, Engine::Uffd);
    let _slot = machine.slot_over(mapping.clone(), Engine::Uffd);
    let new = |number, start| {
        let config = machine.slot_config(number, mapping.clone(), Engine::Uffd);
        DemandSlot::new(DemandSlotConfig { start: GuestAddress(start), ..config }).unwrap_err()
    };
    let error = new(3, REGION + PAGE_SIZE);
    assert!(error.to_string().contains("overlaps another memslot"), "{error}");
    assert!(matches!(new(3, 0x123), SlotError::Unaligned { start: 0x123, .. }));
    let error = new(u32::MAX, 2 * REGION);
    assert!(error.to_string().contains("Invalid argument"), "{error}");
}

/// A mapping that is not armed for the engine is refused. The trap is removed with the slot;
/// accesses to its missing pages are then an error and never zeros.
#[test]
fn wrongly_armed_mapping_is_refused() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(&kvm, Engine::Uffd);
    let new = |mapping: &GuestMapping, engine| {
        DemandSlot::new(machine.slot_config(2, mapping.clone(), engine))
    };
    let pager = file_pager(BackingKind::Shmem, PAGES);
    let unarmed = GuestMapping::unarmed(&pager).unwrap();
    for engine in [Engine::Uffd, Engine::KvmAttributes] {
        let error = new(&unarmed, engine).unwrap_err();
        assert!(matches!(error, SlotError::Unarmed { number: 2, .. }), "{error}");
    }
    if !features().own_accesses {
        let error = new(&unarmed, Engine::KvmUserfault).unwrap_err();
        assert!(error.to_string().contains("when KVM itself makes them"), "{error}");
    }
    drop(unarmed);

    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    let armed = service.arm_guest([&pager], VcpuTrap::Mapping).unwrap().remove(0);
    let error = new(&armed, Engine::KvmUserfault).unwrap_err();
    let trap = VcpuTrap::Mapping;
    assert!(matches!(error, SlotError::ArmedOtherwise { armed, .. } if armed == trap), "{error}");
    let slot = new(&armed, Engine::Uffd).unwrap();
    let error = slot.finish().unwrap_err();
    assert!(matches!(error, SlotError::PagesMissing { missing: PAGES, .. }), "{error}");
    assert!(armed.mapping().traps_all());
    drop(slot);
    // The kernel reads it and reports an error; a read in user space would be a signal.
    let (file, bytes) = (tempfile::tempfile().unwrap(), PAGE_SIZE as usize);
    let from = armed.mapping().address().as_ptr();
    // SAFETY: the mapping is kept, and the kernel only reads it.
    let wrote = unsafe { libc::write(file.as_raw_fd(), from.cast(), bytes) };
    let error = std::io::Error::last_os_error();
    assert_eq!((wrote, error.raw_os_error()), (-1, Some(libc::EFAULT)));
    let error = new(&armed, Engine::Uffd).unwrap_err();
    assert!(matches!(error, SlotError::Revoked { number: 2 }), "{error}");
}

#[test]
fn dropped_slot_is_removed_despite_a_live_vcpu() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(&kvm, Engine::Uffd);
    let pager = file_pager(BackingKind::Shmem, PAGES);
    fill(&pager);
    // Its memory stays: only the slot is missing in the guest.
    let mapping = GuestMapping::unarmed(&pager).unwrap().mapping().clone();
    let kept = Arc::strong_count(&mapping);
    let slot = machine.slot(&pager, Engine::Uffd);
    assert!(Arc::ptr_eq(&mapping, slot.mapping()));
    let mut cpu = machine.vcpu(0);
    machine.copy_and_compare(&mut cpu, &no_faults(), Pages::run(0, 1), 0, page);
    drop(slot);
    assert_eq!(Arc::strong_count(&mapping), kept);
    machine.load(&mut cpu, Program::Check, Pages::run(0, 1));
    assert_eq!(cpu.run(&no_faults()), Err(Stopped::Mmio(REGION)));
    // Its number and its addresses are free.
    let other = Arc::new(pager.backing().map().unwrap());
    let _slot = PlainSlot::new(machine.vm.clone(), 2, GuestAddress(REGION), other).unwrap();
}

/// The thread that steps a vCPU attaches itself.
#[test]
fn stepping_thread_is_kicked_unattached() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(&kvm, Engine::Uffd);
    let mut cpu = machine.vcpu(0);
    machine.load(&mut cpu, Program::Spin, Pages::run(0, 1));
    let mut vcpu = DemandVcpu::new(cpu.vcpu).unwrap();
    let kick = vcpu.kick().clone();
    // Twice, and each time on another thread.
    for _ in 0..2 {
        thread::scope(|scope| {
            let memory = DemandMemory::<()>::default();
            let vcpu = &mut vcpu;
            let step = scope.spawn(move || {
                block_signal(VcpuKick::signal()).unwrap();
                matches!(vcpu.step(&no_faults(), &memory), Ok(Step::Again))
            });
            a_while();
            assert!(!step.is_finished());
            kick.kick();
            assert!(step.join().unwrap());
        });
    }
}

/// The slot keeps the pager, and its mapping the threads that serve it.
#[test]
fn guest_outlives_its_memory_and_service() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(&kvm, Engine::Uffd);
    let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, PAGES * PAGE_SIZE).unwrap());
    let image: Vec<u8> = (0..PAGES).flat_map(page).collect();
    let config = PagerConfig::new(backing, source_of(&image));
    let region = DemandRegion::new(GuestAddress(REGION), config, ()).unwrap();
    let memory = DemandMemory::new(vec![region]).unwrap();
    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    let guest = service.arm_guest(memory.pagers(), VcpuTrap::Mapping).unwrap().remove(0);
    let _slot = machine.slot_over(guest, Engine::Uffd);
    drop((service, memory));
    let mut cpu = machine.vcpu(0);
    machine.copy_and_compare(&mut cpu, &no_faults(), Pages::run(0, PAGES), 0, page);
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
    let handler = FaultHandler::new([FaultRegion::userfault(GuestAddress(REGION), pager)]).unwrap();
    let Cpu { vcpu: _vcpu, kick, .. } = Machine::new(&kvm, Engine::Uffd).vcpu(0);
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
            block_signal(VcpuKick::signal()).unwrap();
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
