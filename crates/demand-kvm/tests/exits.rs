// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The engines under which vCPUs leave `KVM_RUN`, with real guests. A test is skipped if the kernel
//! lacks the engine; in the lab (LAB=1) that is a failure.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::sync::Arc;
use std::thread;

use common::*;
use demand_kvm::{DemandSlot, DemandSlotConfig, Engine, FaultError, FaultHandler, SlotError};
use demand_memory::{BackingKind, FaultPath, Fill, FillRate, PAGE_SIZE, PageRange, Pager, Waiter};
use demand_source::Threaded;
use vm_memory::GuestAddress;

/// 4 MiB: two units of 2 MiB.
const PAGES: u64 = 1024;

/// Runs a test on a machine whose region is missing, for each engine and backing.
fn on_each(
    source: impl Fn(BackingKind) -> Arc<Pager>,
    test: impl Fn(&Machine, &Arc<Pager>, demand_kvm::DemandSlot, &FaultHandler),
) {
    for engine in [Engine::KvmUserfault, Engine::KvmAttributes] {
        let Some(kvm) = kvm_with(engine) else { continue };
        for kind in backings(PAGES * PAGE_SIZE) {
            println!("{engine} on {kind}");
            let machine = Machine::new(&kvm, engine);
            let pager = source(kind);
            let slot = machine.slot(&pager, engine);
            let handler = handler(&slot);
            test(&machine, &pager, slot, &handler);
        }
    }
}

fn from_file(kind: BackingKind) -> Arc<Pager> {
    file_pager(kind, PAGES)
}

fn missing(pager: &Pager) -> u64 {
    pager.bitmap().count_missing(PageRange::new(0, PAGES))
}

#[test]
fn guest_sees_image_and_fetches_only_touched_pages() {
    on_each(from_file, |machine, pager, _slot, handler| {
        let mut cpu = machine.vcpu(0);
        let touched = [
            Pages::run(0, 100),
            Pages { first: 1023, count: 60, stride: -8 },
            Pages { first: 110, count: 100, stride: 3 },
        ];
        let mut count = 0;
        for pages in touched {
            machine.copy_and_compare(&mut cpu, handler, pages, 0, page);
            count += pages.count;
        }
        let guest = pager.stats().path(FaultPath::Guest);
        assert_eq!((guest.faults, guest.pages), (count, count));
        assert_eq!(guest.granularity_histogram.into_iter().collect::<Vec<_>>(), [(4096, count)]);
        assert_eq!(missing(pager), PAGES - count);
        let holes = touched.iter().flat_map(|pages| pages.iter()).filter(|page| is_hole(*page));
        assert_eq!(guest.bytes_fetched, (count - holes.count() as u64) * PAGE_SIZE);
        // A second time: no page is missing there.
        machine.copy_and_compare(&mut cpu, handler, touched[1], 0, page);
        assert_eq!(pager.stats().path(FaultPath::Guest).faults, count);
    });
}

#[test]
fn guest_writes_are_never_overwritten() {
    on_each(from_file, |machine, pager, slot, handler| {
        let written = || assert_eq!(missing(pager), PAGES - 200);
        check_writes_stay(machine, &slot, handler, written);
    });
}

#[test]
fn two_vcpus_read_disjoint_and_shared_pages() {
    on_each(from_file, |machine, pager, _slot, handler| {
        let mut cpus = [machine.vcpu(0), machine.vcpu(1)];
        let even = Pages { first: 0, count: 200, stride: 2 };
        copy_by_two(machine, &mut cpus, handler, [even, Pages { first: 1, ..even }]);
        let guest = pager.stats().path(FaultPath::Guest);
        assert_eq!((guest.faults, guest.pages), (400, 400));
        let same = Pages::run(600, 250);
        copy_by_two(machine, &mut cpus, handler, [same, same]);
        let guest = pager.stats().path(FaultPath::Guest);
        // Where both vCPUs faulted on a page, one of them fetched it.
        assert!((650..=900).contains(&guest.faults), "{guest:?}");
        assert_eq!(guest.pages, 650);
        assert_eq!(missing(pager), PAGES - 650);
    });
}

#[test]
fn waiting_vcpu_can_be_kicked() {
    let gates = std::cell::RefCell::new(Vec::new());
    let source = |kind| {
        let gate = Gate::new(PAGES);
        gates.borrow_mut().push(gate.clone());
        pager(kind, PAGES, Arc::new(Threaded::new(gate, 2).unwrap()))
    };
    on_each(source, |machine, pager, _slot, handler| {
        let gate = gates.borrow().last().unwrap().clone();
        let mut cpu = machine.vcpu(0);
        let kick = cpu.kick.clone();
        machine.load(&mut cpu, Program::Copy { out: 0 }, Pages::run(7, 3));
        let kicked = Err(Stopped::Fault(FaultError::Kicked { gpa: REGION + 7 * PAGE_SIZE }));
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| cpu.run(handler));
            a_while();
            assert!(!vcpu.is_finished());
            kick.kick();
            assert_eq!(vcpu.join().unwrap(), kicked);
        });
        // Paused: its state can be read. It then resumes and waits for the same page.
        assert!(cpu.vcpu.get_regs().is_ok() && pager.bitmap().is_missing(7));
        kick.clear();
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| cpu.run(handler));
            a_while();
            assert!(!vcpu.is_finished());
            gate.open();
            assert_eq!(vcpu.join().unwrap(), Ok(()));
        });
        for index in 0..3 {
            assert!(machine.copied(index) == full_page(7 + index));
        }
        assert_eq!(pager.stats().path(FaultPath::Guest).pages, 3);
    });
}

#[test]
fn a_finished_slot_is_like_any_other() {
    on_each(from_file, |machine, pager, slot, handler| {
        let mut cpu = machine.vcpu(0);
        machine.copy_and_compare(&mut cpu, handler, Pages::run(100, 50), 0, page);
        assert!(slot.is_trapping());
        let error = slot.finish().unwrap_err();
        assert!(matches!(error, SlotError::PagesMissing { missing: 974, .. }), "{error}");
        assert!(slot.is_trapping());
        // The flag is cleared while the guest runs.
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| {
                for half in [0, 512] {
                    let pages = Pages::run(half, 512);
                    machine.copy_and_compare(&mut cpu, handler, pages, 0, page);
                }
            });
            let rest = Fill::start(vec![pager.clone()], FillRate::Unlimited).unwrap();
            pager.ensure(PageRange::new(0, PAGES), FaultPath::Fill, &Waiter::new()).unwrap();
            assert_eq!(slot.finish(), Ok(()));
            vcpu.join().unwrap();
            drop(rest);
        });
        assert!(!slot.is_trapping());
        assert_eq!(slot.finish(), Ok(()));
        // KVM does not read the bitmap any more: no handler would serve a fault.
        let word = pager.bitmap().words().as_ptr().cast::<std::sync::atomic::AtomicU64>();
        // SAFETY: the word lives as long as the pager, and all accesses to it are atomic.
        unsafe { &*word }.store(u64::MAX, std::sync::atomic::Ordering::SeqCst);
        machine.copy_and_compare(&mut cpu, &no_faults(), Pages::run(0, 512), 0, page);
    });
}

#[test]
fn no_vcpu_is_ever_ahead_of_the_content() {
    let torn = |kind| pager(kind, PAGES, Arc::new(Torn(PAGES)));
    on_each(torn, |machine, _pager, slot, handler| {
        check_content_is_first(machine, &slot, handler);
    });
}

/// Under memory attributes a page that fill has populated stays private until a vCPU touches it.
/// Then its present neighbours become accessible with it.
#[test]
fn vcpu_exits_once_per_run_of_present_pages() {
    let Some(kvm) = kvm_with(Engine::KvmAttributes) else { return };
    let machine = Machine::new(&kvm, Engine::KvmAttributes);
    let pager = from_file(BackingKind::Shmem);
    let slot = machine.slot(&pager, Engine::KvmAttributes);
    let handler = handler(&slot);
    let mut cpu = machine.vcpu(0);
    let arrive = |first, count| {
        pager.ensure(PageRange::new(first, count), FaultPath::Fill, &Waiter::new()).unwrap();
    };
    let faults = || pager.stats().path(FaultPath::Guest).faults;
    // 10 to 19 and 21 to 99; 20 is missing.
    arrive(10, 10);
    arrive(21, 79);
    machine.copy_and_compare(&mut cpu, &handler, Pages::run(15, 1), 0, page);
    machine.copy_and_compare(&mut cpu, &handler, Pages::run(10, 10), 0, page);
    assert_eq!(faults(), 1);
    assert!(pager.bitmap().is_missing(20));
    machine.copy_and_compare(&mut cpu, &handler, Pages::run(21, 79), 0, page);
    // One for each word of the bitmap.
    assert_eq!(faults(), 3);
    machine.copy_and_compare(&mut cpu, &handler, Pages::run(20, 1), 0, page);
    assert_eq!((faults(), pager.stats().path(FaultPath::Guest).pages), (4, 1));
    // A page that became accessible too early would show zeros.
    machine.copy_and_compare(&mut cpu, &handler, Pages::run(0, 512), 0, page);
    machine.copy_and_compare(&mut cpu, &handler, Pages::run(512, 512), 0, page);
    assert_eq!(slot.finish(), Ok(()));
}

/// A deleted slot must leave no attributes behind that would stop the guest at the next slot.
#[test]
fn a_slot_takes_its_attributes_along() {
    let Some(kvm) = kvm_with(Engine::KvmAttributes) else { return };
    let machine = Machine::new(&kvm, Engine::KvmAttributes);
    let pager = from_file(BackingKind::Shmem);
    let mut cpu = machine.vcpu(0);
    let slot = machine.slot(&pager, Engine::KvmAttributes);
    machine.copy_and_compare(&mut cpu, &handler(&slot), Pages::run(5, 5), 0, page);
    drop(slot);
    fill(&pager);
    let _slot = machine.slot(&pager, Engine::Uffd);
    machine.copy_and_compare(&mut cpu, &no_faults(), Pages::run(0, 512), 0, page);
}

/// Undoing a refused slot must not open the missing pages of the slot that it overlaps.
#[test]
fn refused_slot_leaves_attributes_alone() {
    let Some(kvm) = kvm_with(Engine::KvmAttributes) else { return };
    let machine = Machine::new(&kvm, Engine::KvmAttributes);
    let pager = from_file(BackingKind::Shmem);
    let slot = machine.slot(&pager, Engine::KvmAttributes);
    let other = from_file(BackingKind::Shmem);
    let mapping = guest_mapping(&other, Engine::KvmAttributes);
    let overlapping = || {
        let config = machine.slot_config(3, mapping.clone(), Engine::KvmAttributes);
        DemandSlot::new(DemandSlotConfig { start: GuestAddress(REGION + PAGE_SIZE), ..config })
    };
    let error = overlapping().unwrap_err();
    assert!(error.to_string().contains("overlaps another memslot"), "{error}");
    let mut cpu = machine.vcpu(0);
    let handler = handler(&slot);
    machine.copy_and_compare(&mut cpu, &handler, Pages::run(5, 5), 0, page);
    // A handler outlives its slot, and keeps no reservation.
    drop(slot);
    let _slot = overlapping().unwrap();
}
