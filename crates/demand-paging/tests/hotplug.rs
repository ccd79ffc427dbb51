// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Regions that come to a running VM, and go: for its guest, its devices, fill and completion.

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use bare_guest::Mode;
use bare_guest::summing::{self, Driver};
use common::*;
use demand_paging::demand_memory::{FaultPath, PAGE_SIZE, to_usize};
use demand_paging::demand_source::LocalFile;
use demand_paging::{
    Engine, EngineChoice, Error, FillRate, Lazy, LazyBuilder, LazyRegion, LazyVcpu, LazyVm, Step,
};
use kvm_bindings::{Msrs, kvm_msr_entry};
use tempfile::NamedTempFile;
use test_support::host::skip_without_patch;
use test_support::image::{Control, far, word_of};
use test_support::wait::{A_WHILE, PATIENCE};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// Guest address of the region that comes and goes, its size in bytes, and its memslot.
const PLUGGED: u64 = 1 << 30;
const LEN: u64 = 4 << 20;
const SLOT: u32 = 9;
const START: GuestAddress = GuestAddress(PLUGGED);

/// Returns the image of a guest that sums the region that comes, and the region's image.
fn images() -> Option<(NamedTempFile, NamedTempFile)> {
    let plugged = image_of(LEN)?;
    let guest = NamedTempFile::new().unwrap();
    let data = (PLUGGED, LEN);
    let driver = Driver { size: SIZE, available: 0, used: 0, requests: 0, data };
    summing::write_driver(guest.path(), &driver).unwrap();
    Some((guest, plugged))
}

fn region(image: &Path) -> LazyRegion {
    LazyRegion::new(SLOT, START, LEN, Arc::new(LocalFile::open(image).unwrap()))
}

fn vcpu_of(vm: &LazyVm, number: u64) -> LazyVcpu {
    let vcpu = vm.create_vcpu(number).unwrap();
    let mut sregs = vcpu.fd().get_sregs().unwrap();
    Mode::Protected.apply(&mut sregs);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.fd().set_regs(&summing::start(SIZE)).unwrap();
    vcpu
}

/// The guest sums the region while it is there, and finds nothing when it is gone.
#[test]
fn guest_and_devices_see_regions_come_and_go() {
    let Some((guest, plugged)) = images() else { return };
    each(guest.path(), |builder, _| {
        let memory = builder.build().unwrap();
        let device = memory.address_space().clone();
        let vm = attach(memory).unwrap();
        // (The first word is zero.)
        let word = || device.memory().read_obj::<u32>(GuestAddress(PLUGGED + 4));
        for round in 0..2 {
            let mut nowhere = vcpu_of(&vm, 2 * round);
            let exit = loop {
                if let Step::Exit(exit) = nowhere.step().unwrap() {
                    break format!("{exit:?}");
                }
            };
            assert!(exit.starts_with("MmioRead"), "{exit}");
            word().unwrap_err();
            let mut vcpu = vcpu_of(&vm, 2 * round + 1);
            vm.insert_region(region(plugged.path())).unwrap();
            let missing = |at: u64| {
                let memory = vm.memory();
                let pager = memory.pagers().last().unwrap();
                pager.bitmap().is_missing(at / PAGE_SIZE)
            };
            assert!(missing(0) && missing(LEN - 1));
            let sum = run(&mut vcpu).unwrap();
            summing::check(plugged.path(), 0..LEN, sum).unwrap();
            assert_ne!(word().unwrap(), 0);
            vm.remove_region(START).unwrap();
        }
        word().unwrap_err();
    });
}

#[test]
fn taken_places_and_numbers_are_refused() {
    let Some((guest, plugged)) = images() else { return };
    let vm = attach(lazy(guest.path()).build().unwrap()).unwrap();
    let source = || Arc::new(LocalFile::open(plugged.path()).unwrap());
    let over = LazyRegion::new(SLOT, GuestAddress(SIZE - LEN), LEN, source());
    let error = vm.insert_region(over).unwrap_err();
    assert!(matches!(error, Error::Overlap(_)), "{error}");
    let error = vm.insert_region(LazyRegion::new(0, START, LEN, source())).unwrap_err();
    assert!(matches!(error, Error::SlotUsed { number: 0 }), "{error}");
    let long = LazyRegion::new(SLOT, START, 2 * LEN, source());
    assert!(matches!(vm.insert_region(long).unwrap_err(), Error::Pager(_)));
    let error = vm.remove_region(START).unwrap_err();
    assert!(matches!(error, Error::NoRegionAt { start: PLUGGED }), "{error}");
    vm.insert_region(region(plugged.path())).unwrap();
    let held = vm.slots();
    let error = vm.remove_region(START).unwrap_err();
    assert!(matches!(error, Error::SlotHeld { start: PLUGGED }), "{error}");
    drop(held);
    let sum = run(&mut vcpu_of(&vm, 0)).unwrap();
    summing::check(plugged.path(), 0..LEN, sum).unwrap();
    vm.remove_region(START).unwrap();
}

/// A VM whose page 3 does not arrive, and the outcome of the removal of demand paging.
fn held_vm(engine: EngineChoice) -> (LazyVm, Arc<Control>, Receiver<Result<(), Error>>) {
    let (source, control) = far(SIZE);
    control.hold([3]);
    let (sender, finished) = channel();
    let memory = LazyBuilder::new(Arc::new(source))
        .engine(engine)
        .lazy(Lazy::Require)
        .fill(FillRate::Unlimited)
        .on_finish(move |outcome| drop(sender.send(outcome)))
        .build()
        .unwrap();
    (attach(memory).unwrap(), control, finished)
}

/// Fill fetches the region's pages, and demand paging ends with the last page of all regions.
#[test]
fn fill_and_completion_cover_later_regions() {
    let Some((_, plugged)) = images() else { return };
    for engine in engines() {
        let (vm, control, finished) = held_vm(EngineChoice::Only(engine));
        let release = control.release_at_the_end();
        vm.insert_region(region(plugged.path())).unwrap();
        let (complete, all_present) = channel();
        vm.on_complete(move || complete.send(()).unwrap_or_default());
        test_support::wait::until("fill reaches the region", || {
            vm.memory().pagers().last().unwrap().bitmap().is_complete()
        });
        finished.recv_timeout(A_WHILE).unwrap_err();
        all_present.try_recv().unwrap_err();
        drop(release);
        finished.recv_timeout(PATIENCE).unwrap().unwrap();
        all_present.recv_timeout(PATIENCE).unwrap();
        assert!(vm.is_finished());
        assert_eq!(vm.stats().path(FaultPath::Fill).pages, (SIZE + LEN) / PAGE_SIZE);
    }
}

/// A region whose last page never arrives, and its removal.
#[test]
fn removed_region_delays_no_completion() {
    if images().is_none() {
        return;
    }
    for engine in engines() {
        let (vm, control, finished) = held_vm(EngineChoice::Only(engine));
        let release = control.release_at_the_end();
        let (source, plugged) = far(LEN);
        plugged.hold([7]);
        let _release = plugged.release_at_the_end();
        vm.insert_region(LazyRegion::new(SLOT, START, LEN, Arc::new(source))).unwrap();
        drop(release);
        finished.recv_timeout(A_WHILE).unwrap_err();
        let error = vm.finish().unwrap_err();
        assert!(matches!(error, Error::Missing { .. }), "{error}");
        vm.remove_region(START).unwrap();
        finished.recv_timeout(PATIENCE).unwrap().unwrap();
        assert!(vm.is_finished());
    }
}

/// Once demand paging is gone, a region is read first, unless that is forbidden.
#[test]
fn region_after_paging_has_ended_is_read_first() {
    let Some((guest, plugged)) = images() else { return };
    for (mode, fill) in [(Lazy::Off, false), (Lazy::Auto, true), (Lazy::Require, true)] {
        let (sender, finished) = channel();
        let builder = lazy(guest.path()).lazy(mode);
        let builder = if fill { builder.fill(FillRate::Unlimited) } else { builder };
        let memory = builder.on_finish(move |outcome| drop(sender.send(outcome))).build().unwrap();
        let vm = attach(memory).unwrap();
        finished.recv_timeout(PATIENCE).unwrap().unwrap();
        let mut number = 0;
        let mut sum = || {
            number += 1;
            run(&mut vcpu_of(&vm, number)).unwrap()
        };
        let inserted = vm.insert_region(region(plugged.path()));
        if mode == Lazy::Require {
            let error = inserted.unwrap_err();
            assert!(matches!(error, Error::Removed { start: PLUGGED }), "{error}");
        } else {
            inserted.unwrap();
            assert!(vm.memory().pagers().all(|pager| pager.bitmap().is_complete()));
            summing::check(plugged.path(), 0..LEN, sum()).unwrap();
            vm.remove_region(START).unwrap();
        }
        vm.insert_region(LazyRegion::zeroed(SLOT, START, LEN)).unwrap();
        assert_eq!(sum(), 0);
    }
}

/// The end does not wait for a region that is being read.
#[test]
fn end_interrupts_an_insertion() {
    let Some((guest, _)) = images() else { return };
    let vm = attach(lazy(guest.path()).lazy(Lazy::Off).build().unwrap()).unwrap();
    let (source, control) = far(LEN);
    control.hold([7]);
    let _release = control.release_at_the_end();
    thread::scope(|scope| {
        let region = LazyRegion::new(SLOT, START, LEN, Arc::new(source));
        let inserted = scope.spawn(|| vm.insert_region(region));
        thread::sleep(A_WHILE);
        assert!(!inserted.is_finished(), "a page has not arrived");
        vm.end();
        assert!(matches!(inserted.join().unwrap(), Err(Error::Ended)));
    });
    assert!(matches!(vm.remove_region(START), Err(Error::Ended)));
}

/// KVM may wait for a page of the region as soon as the memslot exists, and says so once.
#[test]
fn kvms_own_access_finds_a_new_region() {
    let Some((guest, plugged)) = images() else { return };
    if !engines().contains(&Engine::KvmUserfault) {
        return skip_without_patch("KVM_MEM_USERFAULT");
    }
    let expected = fs::read(plugged.path()).unwrap();
    let at = to_usize(7 * PAGE_SIZE + 64);
    // The wall clock: KVM writes 12 bytes each time the MSR is set, or nothing without a memslot.
    let data = PLUGGED + at as u64;
    let clock = kvm_msr_entry { index: 0x4b56_4d00, data, ..Default::default() };
    let clock = Msrs::from_entries(&[clock]).unwrap();
    for _ in 0..3 {
        let builder = lazy(guest.path()).lazy(Lazy::Require);
        let builder = builder.engine(EngineChoice::Only(Engine::KvmUserfault));
        let vm = attach(builder.finish_by_caller().build().unwrap()).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let inserted = AtomicBool::new(false);
        thread::scope(|scope| {
            let access = scope.spawn(|| {
                while !inserted.load(Ordering::Acquire) {
                    assert_eq!(vcpu.fd().set_msrs(&clock).unwrap(), 1);
                }
            });
            vm.insert_region(region(plugged.path())).unwrap();
            inserted.store(true, Ordering::Release);
            let begun = Instant::now();
            while !access.is_finished() && begun.elapsed() < PATIENCE {
                thread::sleep(Duration::from_millis(2));
            }
            if !access.is_finished() {
                // It would wait for ever.
                vm.end();
                panic!("KVM waits for a page of which the service does not know");
            }
        });
        assert_eq!(vcpu.fd().set_msrs(&clock).unwrap(), 1);
        let mut page = [0; to_usize(PAGE_SIZE)];
        vm.memory().read_slice(&mut page, GuestAddress(PLUGGED + 7 * PAGE_SIZE)).unwrap();
        let from_image = &expected[to_usize(7 * PAGE_SIZE)..][..page.len()];
        assert_ne!(page[64..76], from_image[64..76], "the time");
        assert_eq!((&page[..64], &page[76..]), (&from_image[..64], &from_image[76..]));
    }
}

/// vCPUs that run, and devices, notice nothing of the changes of another region.
#[test]
fn changes_do_not_disturb_the_guest() {
    let Some(image) = image() else { return };
    let vm = attach(lazy(image.path()).build().unwrap()).unwrap();
    let mut vcpu = vcpu(&vm);
    let (sender, done) = channel();
    thread::scope(|scope| {
        scope.spawn(move || sender.send(run(&mut vcpu)).unwrap());
        let sum = loop {
            vm.insert_region(LazyRegion::zeroed(SLOT, START, LEN)).unwrap();
            vm.memory().write_obj(word_of(8), START).unwrap();
            vm.remove_region(START).unwrap();
            if let Ok(sum) = done.recv_timeout(Duration::from_millis(1)) {
                break sum.unwrap();
            }
        };
        check(image.path(), sum).unwrap();
    });
}
