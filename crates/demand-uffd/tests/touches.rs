// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! First touches in a guest's armed mapping, of pages that background fill has brought before.

mod common;

use std::sync::Arc;
use std::thread;

use common::{check_page, pager};
use demand_memory::{
    BackingKind, FaultPath, Hold, PAGE_SIZE, PageRange, Pager, TouchLog, VcpuTrap,
};
use demand_uffd::{DEFAULT_THREADS, FaultService};
use test_support::host::huge_pages;
use test_support::wait::until;

const SIZE: u64 = 4 << 20;
const PAGES: u64 = SIZE / PAGE_SIZE;

/// Notes the touches of a pager, and has fill bring all its pages, which are held.
fn hold_all(pager: &Arc<Pager>) -> Arc<TouchLog> {
    let log = Arc::new(TouchLog::new(Hold::All));
    pager.note_touches(&log, &[]).unwrap();
    pager.fetch(PageRange::new(0, PAGES), FaultPath::Fill).unwrap();
    let bitmap = pager.bitmap();
    until("all pages are held", || {
        (0..PAGES).all(|page| bitmap.is_missing(page) && bitmap.is_populated(page))
    });
    log
}

fn faults(pager: &Pager) -> u64 {
    pager.stats().path(FaultPath::Guest).faults
}

#[test]
fn touches_of_held_pages_are_local_faults() {
    let pager = pager(BackingKind::Shmem, SIZE);
    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    let guest = service.arm_guest([&pager], VcpuTrap::Mapping).unwrap().remove(0);
    let log = hold_all(&pager);
    let read = pager.stats().source().bytes;
    let touched: Vec<u64> = (0..100).map(|step| step * 37 % PAGES).collect();
    touched.iter().for_each(|page| check_page(guest.mapping(), *page));
    let noted: Vec<_> = log.touches().iter().map(|touch| (touch.page, touch.path)).collect();
    assert_eq!(noted, touched.iter().map(|page| (*page, FaultPath::Guest)).collect::<Vec<_>>());
    until("all faults are counted", || faults(&pager) == 100);
    assert_eq!(pager.bitmap().count_missing(PageRange::new(0, PAGES)), PAGES - 100);
    pager.end_touches();
    assert!(pager.bitmap().is_complete());
    (0..PAGES).for_each(|page| check_page(guest.mapping(), page));
    assert_eq!((faults(&pager), pager.stats().source().bytes), (100, read));
    service.finish().unwrap();
}

#[test]
fn touches_and_end_race_without_loss() {
    for _ in 0..10 {
        let pager = pager(BackingKind::Shmem, SIZE);
        let service = FaultService::start(DEFAULT_THREADS).unwrap();
        let guest = service.arm_guest([&pager], VcpuTrap::Mapping).unwrap().remove(0);
        let log = Arc::new(TouchLog::new(Hold::All));
        pager.note_touches(&log, &[]).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                for first in (0..PAGES).step_by(16) {
                    pager.fetch(PageRange::new(first, 16), FaultPath::Fill).unwrap();
                }
            });
            for vcpu in 0..2 {
                let guest = &guest;
                scope.spawn(move || {
                    for step in 0..PAGES {
                        check_page(guest.mapping(), (step * 37 + vcpu * 511) % PAGES);
                    }
                });
            }
            scope.spawn(|| {
                until("some were touched", || log.len() > 100);
                pager.end_touches();
            });
        });
        until("all pages are present", || pager.bitmap().is_complete());
        service.finish().unwrap();
    }
}

/// A huge page is mapped as a whole, so one touch is that of all its pages.
#[test]
fn touch_publishes_a_whole_huge_page() {
    let Some(_pool) = huge_pages(2) else { return };
    let pager = pager(BackingKind::Hugetlb2M, SIZE);
    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    let guest = service.arm_guest([&pager], VcpuTrap::Mapping).unwrap().remove(0);
    let log = hold_all(&pager);
    check_page(guest.mapping(), 7);
    assert_eq!(log.len(), 512);
    assert_eq!(pager.bitmap().count_missing(PageRange::new(0, PAGES)), 512);
    pager.end_touches();
    (0..PAGES).for_each(|page| check_page(guest.mapping(), page));
    service.finish().unwrap();
}
