// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shared memory with transparent huge pages: writing one page creates its neighbours too, and no
//! reader may take these for content.

mod common;

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::thread;

use common::{base, check_page, expect, mapping, pager_on, read, read_later, uffd};
use demand_memory::{Backing, BackingKind, FaultPath, MemfdBacking, PAGE_SIZE, PageRange, Pager};
use demand_uffd::{ArmedMapping, DEFAULT_THREADS, Event, FaultService, Modes};
use test_support::host::transparent_huge_pages;
use test_support::image::{Near, word_of};
use test_support::wait::until;

const UNIT: u64 = 512;
const PAGES: u64 = 4 * UNIT;
const SIZE: u64 = PAGES * PAGE_SIZE;

/// Creates a region for which the kernel is asked to use huge pages; the returned function gives
/// the bytes allocated to it.
fn huge() -> (Arc<Pager>, impl Fn() -> u64) {
    let backing = MemfdBacking::new(BackingKind::Shmem, SIZE).unwrap();
    let backing = Arc::new(backing.with_transparent_huge_pages(true));
    let file = backing.file().unwrap().clone();
    let allocated = move || file.metadata().unwrap().blocks() * 512;
    (pager_on(backing, Near(SIZE)), allocated)
}

fn service(mappings: &[Arc<ArmedMapping>]) -> FaultService {
    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    service.add(mappings).unwrap();
    service
}

#[test]
fn existing_neighbours_stay_missing() {
    if !transparent_huge_pages() {
        return;
    }
    let (pager, allocated) = huge();
    let (guest_uffd, back_end_uffd) = (uffd(), uffd());
    let (guest, back_end) = (mapping(&pager), mapping(&pager));
    let armed = ArmedMapping::own(&guest_uffd, guest.clone(), &pager, FaultPath::Guest).unwrap();
    assert_eq!(armed.granularity(), PAGE_SIZE);
    pager.set_guest_trap(armed.clone()).unwrap();
    let theirs = ArmedMapping::foreign(&back_end_uffd, base(&back_end), &pager).unwrap();
    let service = service(&[armed, theirs]);

    // The kernel allocates a huge page only if it has a contiguous one.
    let unit = (0..4).map(|unit| unit * UNIT * PAGE_SIZE).find(|unit| {
        let before = allocated();
        expect(&read_later(&guest, unit + PAGE_SIZE), unit + PAGE_SIZE);
        allocated() - before == 2 << 20
    });
    let unit = unit.expect("the kernel gives a huge page, or this shows nothing");
    // A reader resumes when the page is mapped; the bit is cleared a moment later.
    let pages = PageRange::of_bytes(unit, UNIT * PAGE_SIZE);
    until("one page has arrived", || pager.bitmap().count_missing(pages) == UNIT - 1);
    // The guest reads a neighbour, the back-end the rest of the unit, the guest the rest of its
    // pages.
    let (second, third) = (unit + 2 * PAGE_SIZE, unit + 3 * PAGE_SIZE);
    expect(&read_later(&guest, second), second);
    expect(&read_later(&back_end, third), third);
    let readers = [&guest, &back_end].map(|mapping| {
        let mapping = mapping.clone();
        thread::spawn(move || (0..PAGES).rev().for_each(|page| check_page(&mapping, page)))
    });
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    assert!(pager.stats().path(FaultPath::Guest).faults > 2);
    service.finish().unwrap();
}

/// Shows the kernel's behaviour with MISSING alone: neighbours of a present page read as zeros.
#[test]
fn missing_alone_lets_neighbours_through() {
    if !transparent_huge_pages() {
        return;
    }
    let (pager, _) = huge();
    let (uffd, mapping) = (uffd(), mapping(&pager));
    pager.fetch(PageRange::page(1), FaultPath::Guest).unwrap();
    uffd.register(base(&mapping), mapping.len(), Modes::MISSING).unwrap();
    assert_eq!(read(&mapping, 2 * PAGE_SIZE), 0);
    assert_ne!(word_of(2 * PAGE_SIZE), 0, "the image has something else there");
    assert_eq!(uffd.read(&mut Vec::<Event>::new()).unwrap(), 0);
}
