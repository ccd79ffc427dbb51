// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fault handler without KVM: threads play the part of KVM and the vCPUs.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use common::*;
use demand_kvm::{
    FaultError, FaultHandler, FaultRegion, KVM_MEMORY_EXIT_FLAG_USERFAULT, RegionsOverlap,
};
use demand_memory::{BackingKind, FaultPath, Fill, FillRate, PAGE_SIZE, PageRange, Pager, Waiter};
use demand_source::Threaded;
use vm_memory::GuestAddress;

const FLAG: u64 = KVM_MEMORY_EXIT_FLAG_USERFAULT;

fn handler_of(regions: &[(u64, &Arc<Pager>)]) -> Result<FaultHandler, RegionsOverlap> {
    let region = |(start, pager): &(u64, &Arc<Pager>)| {
        FaultRegion::userfault(GuestAddress(*start), (*pager).clone())
    };
    FaultHandler::new(regions.iter().map(region))
}

#[test]
fn each_region_gets_its_own_faults() {
    let (low, high) = (file_pager(BackingKind::Shmem, 8), file_pager(BackingKind::Shmem, 16));
    let handler = handler_of(&[(REGION, &high), (0x10000, &low)]).unwrap();
    let waiter = Waiter::new();
    handler.handle(0x10000 + 5 * PAGE_SIZE, PAGE_SIZE, FLAG, &waiter).unwrap();
    handler.handle(REGION, PAGE_SIZE, FLAG, &waiter).unwrap();
    // More than one page at a time, in case KVM ever asks for that.
    handler.handle(REGION + 14 * PAGE_SIZE, 2 * PAGE_SIZE, FLAG, &waiter).unwrap();
    let missing = |pager: &Pager| -> Vec<u64> {
        (0..pager.pages()).filter(|page| pager.bitmap().is_missing(*page)).collect()
    };
    assert_eq!(missing(&low), [0, 1, 2, 3, 4, 6, 7]);
    assert_eq!(missing(&high), (1..14).collect::<Vec<_>>());
    let guest = high.stats().path(FaultPath::Guest);
    assert_eq!((guest.faults, guest.pages, guest.granularity_bytes), (2, 3, 2 * PAGE_SIZE));
}

#[test]
fn foreign_exits_are_refused() {
    let pager = file_pager(BackingKind::Shmem, 8);
    let handler = handler_of(&[(REGION, &pager)]).unwrap();
    let waiter = Waiter::new();
    for (gpa, size, flags) in [
        (REGION, PAGE_SIZE, 0),
        (REGION, PAGE_SIZE, 1 << 3),
        (REGION, PAGE_SIZE, FLAG | 1 << 3),
        (REGION - PAGE_SIZE, PAGE_SIZE, FLAG),
        (REGION + 8 * PAGE_SIZE, PAGE_SIZE, FLAG),
        (REGION + 7 * PAGE_SIZE, 2 * PAGE_SIZE, FLAG),
        (REGION, 0, FLAG),
        (REGION, u64::MAX, FLAG),
        (u64::MAX, 2, FLAG),
    ] {
        let error = handler.handle(gpa, size, flags, &waiter).unwrap_err();
        assert_eq!(error, FaultError::Unexpected { gpa, size, flags });
        assert!(error.to_string().starts_with("cannot handle a memory fault exit"), "{error}");
    }
    assert_eq!(pager.bitmap().count_missing(PageRange::new(0, 8)), 8);
    assert_eq!(pager.stats().path(FaultPath::Guest).faults, 0);
}

#[test]
fn overlapping_regions_are_refused() {
    let pager = file_pager(BackingKind::Shmem, 8);
    let next = REGION + 8 * PAGE_SIZE;
    handler_of(&[(REGION, &pager), (next, &pager)]).unwrap();
    let error = handler_of(&[(next - PAGE_SIZE, &pager), (REGION, &pager)]).unwrap_err();
    assert_eq!(error, RegionsOverlap { first: REGION, second: next - PAGE_SIZE });
}

#[test]
fn present_page_is_not_fetched_again() {
    let pager = file_pager(BackingKind::Shmem, 8);
    let handler = handler_of(&[(REGION, &pager)]).unwrap();
    let waiter = Waiter::new();
    for _ in 0..3 {
        handler.handle(REGION, PAGE_SIZE, FLAG, &waiter).unwrap();
    }
    let guest = pager.stats().path(FaultPath::Guest);
    assert_eq!((guest.faults, guest.pages, guest.bytes_fetched), (3, 1, PAGE_SIZE));
}

#[test]
fn kicked_waiter_on_slow_source_can_wait_again() {
    let gate = Gate::new(8);
    let pager = pager(BackingKind::Shmem, 8, Arc::new(Threaded::new(gate.clone(), 2).unwrap()));
    let handler = handler_of(&[(REGION, &pager)]).unwrap();
    let waiter = Waiter::new();
    let handle = || handler.handle(REGION, PAGE_SIZE, FLAG, &waiter);
    thread::scope(|scope| {
        let vcpu = scope.spawn(handle);
        a_while();
        assert!(!vcpu.is_finished());
        waiter.kick();
        assert_eq!(vcpu.join().unwrap(), Err(FaultError::Kicked { gpa: REGION }));
        assert_eq!(handle(), Err(FaultError::Kicked { gpa: REGION }));
        waiter.clear_kick();
        let vcpu = scope.spawn(handle);
        a_while();
        assert!(!vcpu.is_finished() && pager.bitmap().is_missing(0));
        gate.open();
        vcpu.join().unwrap().unwrap();
    });
    assert_eq!(pager.stats().source().reads, 1);
    assert_eq!(pager.stats().path(FaultPath::Guest).faults, 1);
}

#[test]
fn stopping_the_memory_ends_the_wait() {
    let gate = Gate::new(8);
    let pager = pager(BackingKind::Shmem, 8, Arc::new(Threaded::new(gate.clone(), 2).unwrap()));
    let handler = handler_of(&[(REGION, &pager)]).unwrap();
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| handler.handle(REGION, PAGE_SIZE, FLAG, &Waiter::new()));
        a_while();
        pager.stop();
        assert_eq!(vcpu.join().unwrap(), Err(FaultError::Stopped { gpa: REGION }));
    });
    gate.open();
}

/// vCPUs that all need the same pages while fill runs: each reads the bit as KVM does, then the
/// content, of which every word must be present.
#[test]
fn no_reader_is_ever_ahead_of_the_content() {
    const PAGES: u64 = 96;
    const ROUNDS: u64 = 20;
    const CPUS: u64 = 4;
    for _ in 0..ROUNDS {
        let pager = pager(BackingKind::Shmem, PAGES, Arc::new(Torn(PAGES)));
        let mapping = pager.backing().map().unwrap();
        let handler = handler_of(&[(REGION, &pager)]).unwrap();
        let begin = Barrier::new(CPUS as usize + 1);
        let watching = AtomicBool::new(true);
        let check = |page: u64| {
            for at in (page * PAGE_SIZE..(page + 1) * PAGE_SIZE).step_by(4) {
                assert_eq!(look_at_word(&mapping, at), word(at), "page {page}, offset {at:#x}");
            }
        };
        // As KVM reads it: a plain load of the word, then a barrier.
        let is_missing = |page: u64| {
            let bits = pager.bitmap().words().load((page / 64) as usize);
            bits >> (page % 64) & 1 == 1
        };
        thread::scope(|scope| {
            let vcpus: Vec<_> = (0..CPUS)
                .map(|cpu| {
                    let (handler, begin) = (&handler, &begin);
                    scope.spawn(move || {
                        let waiter = Waiter::new();
                        begin.wait();
                        for index in 0..PAGES {
                            // Two go up, two go down.
                            let page = if cpu % 2 == 0 { index } else { PAGES - 1 - index };
                            while is_missing(page) {
                                let gpa = REGION + page * PAGE_SIZE;
                                handler.handle(gpa, PAGE_SIZE, FLAG, &waiter).unwrap();
                            }
                            check(page);
                        }
                    })
                })
                .collect();
            // A thread that only reads: it sees pages just as they are published.
            scope.spawn(|| {
                while watching.load(Ordering::Relaxed) {
                    (0..PAGES).filter(|page| !is_missing(*page)).for_each(check);
                }
            });
            begin.wait();
            let fill = Fill::start(vec![pager.clone()], FillRate::Unlimited).unwrap();
            let results: Vec<_> = vcpus.into_iter().map(|vcpu| vcpu.join()).collect();
            watching.store(false, Ordering::Relaxed);
            drop(fill);
            assert!(results.iter().all(Result::is_ok));
        });
        assert_eq!(pager.stats().pages_arrived(), PAGES);
        assert!(pager.bitmap().is_complete());
    }
}
