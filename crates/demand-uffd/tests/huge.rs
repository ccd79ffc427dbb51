// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fault service on huge pages: a unit of 2 MiB, filled 4096 bytes at a time.

mod common;

use std::sync::Arc;
use std::thread;

use common::{
    base, check_page, expect, expect_blocked, mapping, pager, pager_on, read, read_later, uffd,
};
use demand_memory::{BackingKind, FaultPath, PAGE_SIZE, PageRange};
use demand_uffd::{ArmedMapping, DEFAULT_THREADS, Event, FaultService, Modes};
use test_support::host::huge_pages;
use test_support::image::far;
use test_support::wait::until;

const UNIT: u64 = 512;
const PAGES: u64 = 4 * UNIT;
const SIZE: u64 = PAGES * PAGE_SIZE;
const KIND: BackingKind = BackingKind::Hugetlb2M;

fn service(mappings: &[Arc<ArmedMapping>]) -> FaultService {
    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    service.add(mappings).unwrap();
    service
}

#[test]
fn units_arrive_whole() {
    let Some(_pool) = huge_pages(4) else { return };
    let (pager, uffd) = (pager(KIND, SIZE), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm).unwrap();
    assert_eq!(armed.granularity(), 2 << 20);
    let service = service(&[armed]);
    for page in (0..PAGES).rev() {
        check_page(&mapping, page);
    }
    service.finish().unwrap();
    let report = pager.stats().path(FaultPath::Vmm);
    assert_eq!((report.faults, report.granularity_bytes), (4, 2 << 20));
}

/// The case that MISSING alone gets wrong: the unit exists, but most of its pages are missing.
#[test]
fn a_half_filled_unit_is_completed_first() {
    let Some(_pool) = huge_pages(4) else { return };
    let (pager, uffd) = (pager(KIND, SIZE), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::foreign(&uffd, base(&mapping), &pager).unwrap();
    assert_eq!(armed.granularity(), 2 << 20);
    let _service = service(&[armed]);
    for page in [1, 511, 600] {
        pager.fetch(PageRange::page(page), FaultPath::Guest).unwrap();
    }
    // One that is present, and one that is missing.
    expect(&read_later(&mapping, PAGE_SIZE), PAGE_SIZE);
    expect(&read_later(&mapping, 700 * PAGE_SIZE), 700 * PAGE_SIZE);
    (0..PAGES).for_each(|page| check_page(&mapping, page));
}

#[test]
fn incomplete_unit_is_not_reachable() {
    let Some(_pool) = huge_pages(4) else { return };
    let (source, control) = far(SIZE);
    let pager = pager_on(common::backing(KIND, SIZE), source);
    let (uffd, mapping) = (uffd(), mapping(&pager));
    let armed = ArmedMapping::foreign(&uffd, base(&mapping), &pager).unwrap();
    let _service = service(&[armed]);
    control.hold([511]);
    let reader = read_later(&mapping, 2 * PAGE_SIZE);
    until("the others arrive", || !pager.bitmap().is_missing(2) && !pager.bitmap().is_missing(99));
    expect_blocked(&reader);
    control.release();
    expect(&reader, 2 * PAGE_SIZE);
    expect(&read_later(&mapping, 511 * PAGE_SIZE), 511 * PAGE_SIZE);
}

/// The guest's mapping under an engine that traps accesses to partly present units itself: the
/// mapping traps only wholly missing units, which are completed before the faulter resumes.
#[test]
fn missing_units_only() {
    let Some(_pool) = huge_pages(4) else { return };
    let (source, control) = far(SIZE);
    let pager = pager_on(common::backing(KIND, SIZE), source);
    let (uffd, mapping) = (uffd(), mapping(&pager));
    let armed = ArmedMapping::own_missing_units(
        &uffd,
        mapping.clone(),
        &pager,
        FaultPath::HypervisorInternal,
    )
    .unwrap();
    assert_eq!(armed.modes(), Modes::MISSING);
    pager.set_guest_trap(armed.clone()).unwrap();
    let service = service(&[armed]);
    control.hold([UNIT + 511]);
    let reader = read_later(&mapping, (UNIT + 2) * PAGE_SIZE);
    until("the others arrive", || !pager.bitmap().is_missing(UNIT + 2));
    expect_blocked(&reader);
    control.release();
    expect(&reader, (UNIT + 2) * PAGE_SIZE);
    // A present page is read without a fault, as by a vCPU.
    let faults = || pager.stats().path(FaultPath::HypervisorInternal).faults;
    until("the first is counted", || faults() == 1);
    pager.fetch(PageRange::page(1), FaultPath::Guest).unwrap();
    until("it arrives", || !pager.bitmap().is_missing(1));
    check_page(&mapping, 1);
    assert_eq!(faults(), 1);
    pager.fetch(PageRange::new(0, PAGES), FaultPath::Fill).unwrap();
    until("all arrive", || pager.bitmap().is_complete());
    service.finish().unwrap();
}

/// Shows the kernel's behaviour with MISSING alone, and why it is never used for other readers.
#[test]
fn missing_alone_lets_half_filled_units_through() {
    let Some(_pool) = huge_pages(1) else { return };
    let (pager, uffd) = (pager(KIND, UNIT * PAGE_SIZE), uffd());
    let mapping = mapping(&pager);
    pager.fetch(PageRange::page(1), FaultPath::Guest).unwrap();
    uffd.register(base(&mapping), mapping.len(), Modes::MISSING).unwrap();
    assert_eq!(read(&mapping, 2 * PAGE_SIZE), 0, "the image has something else there");
    assert_eq!(uffd.read(&mut Vec::<Event>::new()).unwrap(), 0);
}

#[test]
fn single_pages_and_units_are_served_together() {
    let Some(_pool) = huge_pages(4) else { return };
    let (source, _control) = far(SIZE);
    let pager = pager_on(common::backing(KIND, SIZE), source);
    let (access, back_end) = (mapping(&pager), mapping(&pager));
    let (own, theirs) = (uffd(), uffd());
    let service = service(&[
        ArmedMapping::own(&own, access.clone(), &pager, FaultPath::Vmm).unwrap(),
        ArmedMapping::foreign(&theirs, base(&back_end), &pager).unwrap(),
    ]);
    let mut readers = Vec::new();
    for mapping in [&access, &back_end, &access, &back_end] {
        let mapping = mapping.clone();
        readers.push(thread::spawn(move || (0..PAGES).for_each(|page| check_page(&mapping, page))));
    }
    // As a vCPU does, 4096 bytes at a time.
    let vcpu = {
        let pager = pager.clone();
        thread::spawn(move || {
            for page in (0..PAGES).rev() {
                pager.fetch(PageRange::page(page), FaultPath::Guest).unwrap();
            }
        })
    };
    readers.into_iter().chain([vcpu]).for_each(|thread| thread.join().unwrap());
    until("all arrive", || pager.bitmap().is_complete());
    service.finish().unwrap();
}
