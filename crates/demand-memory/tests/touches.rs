// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The first touches of pages, and the pages that background fill holds for them.
#![cfg(not(loom))]
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread;

use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, FaultPath, Fill, FillOptions, FillOrder, FillRange,
    Hold, MapPresent, MemfdBacking, PAGE_SIZE, PageRange, Pager, PagerConfig, Touch, TouchLog,
    Waiter,
};
use demand_source::{
    BlockingSource, Destination, Extent, HashedImage, ImageWriter, PageSource, SourceError,
    Threaded,
};
use test_support::wait::until;
use vm_memory::{Bytes, GuestAddress};

const PAGES: u64 = 256;

fn byte_of(page: u64) -> u8 {
    (page % 251) as u8 + 1
}

/// A source that counts its reads, and answers each once a message allows it, if it has a gate.
struct Counted {
    reads: Arc<AtomicU64>,
    gate: Option<Mutex<Receiver<()>>>,
}

impl BlockingSource for Counted {
    fn size(&self) -> u64 {
        PAGES * PAGE_SIZE
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: PAGES * PAGE_SIZE })
    }
    fn read(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if let Some(gate) = &self.gate {
            gate.lock().unwrap().recv().map_err(|_| SourceError::Abandoned)?;
        }
        for at in 0..to.len() as u64 / PAGE_SIZE {
            let byte = byte_of(offset / PAGE_SIZE + at);
            to.write_at((at * PAGE_SIZE) as usize, &[byte; PAGE_SIZE as usize]);
        }
        Ok(())
    }
}

fn pager_of(source: Arc<dyn PageSource>) -> Arc<Pager> {
    let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, PAGES * PAGE_SIZE).unwrap());
    Pager::new(PagerConfig::new(backing, source)).unwrap()
}

fn counted() -> (Arc<Pager>, Arc<AtomicU64>) {
    let reads = Arc::new(AtomicU64::new(0));
    let source = Counted { reads: reads.clone(), gate: None };
    (pager_of(Arc::new(Threaded::new(source, 4).unwrap())), reads)
}

fn all() -> PageRange {
    PageRange::new(0, PAGES)
}

fn touch(pager: &Arc<Pager>, page: u64, path: FaultPath) {
    pager.ensure(PageRange::page(page), path, &Waiter::new()).unwrap();
}

fn pages_of(log: &TouchLog) -> Vec<u64> {
    log.touches().iter().map(|touch| touch.page).collect()
}

fn is_held(pager: &Pager, page: u64) -> bool {
    pager.bitmap().is_missing(page) && pager.bitmap().is_populated(page)
}

fn content(memory: &DemandMemory, page: u64) -> u8 {
    memory.read_obj(GuestAddress(page * PAGE_SIZE + 77)).unwrap()
}

/// Returns a memory of one region, and its pager.
fn memory_of(source: Arc<dyn PageSource>) -> (DemandMemory, Arc<Pager>) {
    let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, PAGES * PAGE_SIZE).unwrap());
    let config = PagerConfig::new(backing, source);
    let region = DemandRegion::new(GuestAddress(0), config, ()).unwrap();
    let pager = region.pager().clone();
    (DemandMemory::new(vec![region]).unwrap(), pager)
}

#[test]
fn held_pages_are_published_by_touch() {
    let reads = Arc::new(AtomicU64::new(0));
    let source = Counted { reads: reads.clone(), gate: None };
    let (memory, pager) = memory_of(Arc::new(Threaded::new(source, 4).unwrap()));
    let log = Arc::new(TouchLog::new(Hold::All));
    pager.note_touches(&log, &[]).unwrap();
    let fill = Fill::start(vec![pager.clone()], FillOptions::default()).unwrap();
    until("fill has all pages", || (0..PAGES).all(|page| is_held(&pager, page)));
    let read = reads.load(Ordering::Relaxed);
    assert_eq!(pager.bitmap().count_missing(all()), PAGES);
    for page in [9, 200, 3] {
        assert_eq!(content(&memory, page), byte_of(page));
        assert!(!pager.bitmap().is_missing(page));
    }
    touch(&pager, 9, FaultPath::Guest);
    pager.ensure(PageRange::new(62, 4), FaultPath::BackEnd, &Waiter::new()).unwrap();
    assert_eq!(reads.load(Ordering::Relaxed), read, "a touch of a held page asks the source");
    assert_eq!(pages_of(&log), [9, 200, 3, 62, 63, 64, 65]);
    let [first, .., last] = log.touches()[..] else { panic!() };
    assert!(matches!(first, Touch { path: FaultPath::Vmm, .. }), "{first:?}");
    assert!(last.path == FaultPath::BackEnd && last.at_us >= first.at_us, "{last:?}");
    assert!(!pager.bitmap().is_complete());
    pager.end_touches();
    assert!(pager.bitmap().is_complete());
    assert_eq!(pager.stats().pages_arrived(), PAGES);
    assert_eq!(pager.stats().source().bytes, PAGES * PAGE_SIZE);
    for page in 0..PAGES {
        assert_eq!(content(&memory, page), byte_of(page));
    }
    assert_eq!(log.len(), 7, "touches after the end are noted");
    drop(fill);
}

#[test]
fn fill_passes_its_window_while_holding() {
    let (pager, _) = counted();
    pager.note_touches(&Arc::new(TouchLog::new(Hold::All)), &[]).unwrap();
    let options = FillOptions {
        chunk: PAGE_SIZE,
        in_flight: demand_memory::InFlight::Fixed(PAGE_SIZE),
        ..FillOptions::default()
    };
    let _fill = Fill::start(vec![pager.clone()], options).unwrap();
    until("fill has all pages", || (0..PAGES).all(|page| is_held(&pager, page)));
}

#[test]
fn touch_during_arrival_is_never_lost() {
    for round in 0..20 {
        let (pager, _) = counted();
        let log = Arc::new(TouchLog::new(Hold::All));
        pager.note_touches(&log, &[]).unwrap();
        let complete = Arc::new(AtomicU64::new(0));
        let told = complete.clone();
        pager.on_complete(move || {
            told.fetch_add(1, Ordering::Relaxed);
        });
        thread::scope(|scope| {
            scope.spawn(|| {
                for first in (0..PAGES).step_by(8) {
                    pager.fetch(PageRange::new(first, 8), FaultPath::Fill).unwrap();
                }
            });
            for vcpu in 0..3 {
                let pager = &pager;
                scope.spawn(move || {
                    for step in 0..PAGES {
                        touch(pager, (step * 37 + vcpu * 85 + round) % PAGES, FaultPath::Guest);
                    }
                });
            }
        });
        // Every page was touched, so none is left, and each was noted once.
        assert!(pager.bitmap().is_complete());
        let mut pages = pages_of(&log);
        pages.sort_unstable();
        assert_eq!(pages, (0..PAGES).collect::<Vec<_>>());
        assert_eq!(complete.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn end_during_arrivals_leaves_none_held() {
    for round in 0..40 {
        let (pager, _) = counted();
        let log = Arc::new(TouchLog::new(Hold::All));
        pager.note_touches(&log, &[]).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                for first in (0..PAGES).step_by(4) {
                    pager.fetch(PageRange::new(first, 4), FaultPath::Fill).unwrap();
                }
            });
            scope.spawn(|| {
                for page in (0..PAGES).rev().step_by(3) {
                    touch(&pager, page, FaultPath::Guest);
                }
            });
            scope.spawn(|| {
                until("some have arrived", || {
                    let arrived = (0..PAGES).filter(|page| pager.bitmap().is_populated(*page));
                    arrived.count() >= round * 3
                });
                pager.end_touches();
            });
        });
        until("all pages are present", || pager.bitmap().is_complete());
    }
}

#[test]
fn touch_waits_for_page_in_flight() {
    let (allow, gate) = mpsc::channel();
    let source = Counted { reads: Arc::default(), gate: Some(Mutex::new(gate)) };
    let pager = pager_of(Arc::new(Threaded::new(source, 1).unwrap()));
    let log = Arc::new(TouchLog::new(Hold::All));
    pager.note_touches(&log, &[PageRange::new(0, 4)]).unwrap();
    pager.fetch(PageRange::new(0, 4), FaultPath::Fill).unwrap();
    let waiter = Waiter::new();
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| pager.ensure(PageRange::page(2), FaultPath::Guest, &waiter));
        until("the vCPU waits", || waiter.is_waiting());
        allow.send(()).unwrap();
        vcpu.join().unwrap().unwrap();
    });
    until("the others have arrived", || is_held(&pager, 3) || !pager.bitmap().is_missing(3));
    assert!(!pager.bitmap().is_missing(2));
    let counts = log.counts();
    assert_eq!((counts.late, counts.hits, counts.misses, counts.arrived), (1, 0, 0, 4));
}

#[test]
fn hits_late_misses_and_waste_are_counted() {
    let (pager, _) = counted();
    let log = Arc::new(TouchLog::new(Hold::All));
    pager.note_touches(&log, &[PageRange::new(0, 100)]).unwrap();
    pager.fetch(PageRange::new(0, 90), FaultPath::Fill).unwrap();
    until("they have arrived", || (0..90).all(|page| is_held(&pager, page)));
    (0..81).for_each(|page| touch(&pager, page, FaultPath::Guest));
    (95..98).for_each(|page| touch(&pager, page, FaultPath::Guest));
    (150..157).for_each(|page| touch(&pager, page, FaultPath::Guest));
    let counts = log.counts();
    assert_eq!((counts.hits, counts.late, counts.misses), (81, 3, 7));
    assert_eq!((counts.arrived, counts.held, counts.waste()), (90, 90, 9));
}

#[test]
fn sample_holds_few_of_the_expected_pages() {
    let (pager, _) = counted();
    let log = Arc::new(TouchLog::new(Hold::Sample));
    pager.note_touches(&log, &[PageRange::new(0, 192)]).unwrap();
    let _fill = Fill::start(vec![pager.clone()], FillOptions::default()).unwrap();
    until("fill has all pages", || (0..PAGES).all(|page| pager.bitmap().is_populated(page)));
    let few = || (0..PAGES).filter(|page| pager.bitmap().is_missing(*page)).collect::<Vec<_>>();
    until("the others are present", || few().len() < 12);
    let held = few();
    assert!(!held.is_empty() && held.iter().all(|page| *page < 192), "{held:?}");
    assert_eq!(log.counts().held, held.len() as u64);
    touch(&pager, held[0], FaultPath::Guest);
    assert_eq!((log.counts().hits, pages_of(&log)), (1, vec![held[0]]));
    pager.end_touches();
    assert!(pager.bitmap().is_complete());
}

#[test]
fn snapshot_takes_held_pages_from_memory() {
    let folder = tempfile::tempdir().unwrap();
    let (image, hashes) = (folder.path().join("memory"), folder.path().join("hashes"));
    let size = PAGES * PAGE_SIZE;
    let mut writer = ImageWriter::create(&image, &hashes, size, [7; 16]).unwrap();
    for page in 0..PAGES {
        writer.write(page * PAGE_SIZE, &[byte_of(page); PAGE_SIZE as usize]).unwrap();
    }
    writer.finish().unwrap();
    let (memory, pager) = memory_of(Arc::new(HashedImage::open(&image, &hashes).unwrap()));
    let log = Arc::new(TouchLog::new(Hold::All));
    pager.note_touches(&log, &[]).unwrap();
    pager.fetch(PageRange::new(0, PAGES / 2), FaultPath::Fill).unwrap();
    until("half has arrived", || (0..PAGES / 2).all(|page| is_held(&pager, page)));
    memory.write_obj(0xa5_u8, GuestAddress(5 * PAGE_SIZE)).unwrap();
    let (copy, table) = (folder.path().join("copy"), folder.path().join("copy.hashes"));
    let mut writer = ImageWriter::create(&copy, &table, size, [8; 16]).unwrap();
    let done = memory.write_image(&mut writer, &mut |_| true).unwrap();
    writer.finish().unwrap();
    assert_eq!((done.from_memory, done.from_source), (size / 2, size / 2));
    let mut expected = std::fs::read(&image).unwrap();
    expected[5 * PAGE_SIZE as usize] = 0xa5;
    assert!(std::fs::read(&copy).unwrap() == expected);
    assert_eq!(pages_of(&log), [5], "the snapshot counts as a touch");
    assert!(is_held(&pager, 6));
}

/// An armed mapping that refuses pages until it is told.
#[derive(Default)]
struct Refusing {
    works: AtomicBool,
    mapped: Mutex<Vec<PageRange>>,
}

impl MapPresent for Refusing {
    fn map_present(&self, pages: PageRange) -> io::Result<()> {
        if !self.works.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.mapped.lock().unwrap().push(pages);
        Ok(())
    }
}

#[test]
fn held_page_that_cannot_be_mapped_is_retried() {
    let (pager, reads) = counted();
    let trap = Arc::new(Refusing::default());
    pager.set_guest_trap(trap.clone()).unwrap();
    let log = Arc::new(TouchLog::new(Hold::All));
    pager.note_touches(&log, &[]).unwrap();
    pager.fetch(PageRange::page(1), FaultPath::Fill).unwrap();
    until("it has arrived", || is_held(&pager, 1));
    assert!(trap.mapped.lock().unwrap().is_empty(), "a held page is mapped for the guest");
    let waiter = Waiter::new();
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| pager.ensure(PageRange::page(1), FaultPath::Guest, &waiter));
        until("the vCPU waits", || waiter.is_waiting());
        trap.works.store(true, Ordering::Relaxed);
        vcpu.join().unwrap().unwrap();
    });
    assert_eq!(trap.mapped.lock().unwrap()[..], [PageRange::page(1)]);
    assert_eq!(reads.load(Ordering::Relaxed), 1);
}

#[test]
fn readers_of_all_memory_wait_for_no_touch() {
    // A source that answers later, and one that answers at once.
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("memory");
    std::fs::write(&image, vec![7; (PAGES * PAGE_SIZE) as usize]).unwrap();
    let near = pager_of(Arc::new(demand_source::LocalFile::open(&image).unwrap()));
    for pager in [counted().0, near] {
        let log = Arc::new(TouchLog::new(Hold::All));
        pager.note_touches(&log, &[]).unwrap();
        pager.fetch(PageRange::new(0, 100), FaultPath::Fill).unwrap();
        pager.ensure(all(), FaultPath::Fill, &Waiter::new()).unwrap();
        assert!(pager.bitmap().is_complete());
        assert!(log.is_empty(), "it is no touch");
    }
}

#[test]
fn stop_ends_waits_beside_held_pages() {
    let (pager, _) = counted();
    pager.note_touches(&Arc::new(TouchLog::new(Hold::All)), &[]).unwrap();
    let fill = Fill::start(vec![pager.clone()], FillOptions::default()).unwrap();
    until("fill has all pages", || (0..PAGES).all(|page| is_held(&pager, page)));
    pager.stop();
    drop(fill);
    let outcome = pager.ensure(PageRange::page(1), FaultPath::Guest, &Waiter::new());
    assert_eq!(outcome, Err(demand_memory::FetchError::Stopped));
    pager.end_touches();
}

#[test]
fn fill_of_ranges_only_ends_after_them() {
    let (pager, reads) = counted();
    let range = |first, count| FillRange { region: 0, pages: PageRange::new(first, count) };
    let order = FillOrder::RangesOnly(vec![range(40, 2), range(7, 1), range(PAGES, 9)]);
    let options = FillOptions { order, ..FillOptions::default() };
    let _fill = Fill::start(vec![pager.clone()], options).unwrap();
    until("three pages are present", || pager.bitmap().count_missing(all()) == PAGES - 3);
    thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(reads.load(Ordering::Relaxed), 2);
    assert!(!pager.bitmap().is_missing(40) && !pager.bitmap().is_missing(7));
}
