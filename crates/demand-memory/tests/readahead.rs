// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Readahead for sequential readers: fewer waits for a distant source, none for a near one.
#![cfg(not(loom))]

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use demand_memory::{
    BackingKind, FaultPath, MemfdBacking, PAGE_SIZE, PageRange, Pager, PagerConfig, Waiter,
};
use demand_source::{BlockingSource, Destination, Extent, PageSource, SourceError, Threaded};
use test_support::image::Near;

const PAGES: u64 = 2048;
const SIZE: u64 = PAGES * PAGE_SIZE;

struct Far;

impl BlockingSource for Far {
    fn size(&self) -> u64 {
        SIZE
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: SIZE })
    }
    fn read(&self, _: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        thread::sleep(Duration::from_millis(5));
        to.write_at(0, &vec![7; to.len()]);
        Ok(())
    }
}

fn pager(source: Arc<dyn PageSource>, readahead: Option<u64>) -> Arc<Pager> {
    let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, SIZE).unwrap());
    let pager = Pager::new(PagerConfig::new(backing, source)).unwrap();
    readahead.iter().for_each(|bytes| pager.read_ahead(*bytes));
    pager
}

fn far(readahead: Option<u64>) -> Arc<Pager> {
    pager(Arc::new(Threaded::new(Far, 64).unwrap()), readahead)
}

/// Touches pages one after the other. Returns the number of those that were missing.
fn touch(pager: &Arc<Pager>, pages: impl IntoIterator<Item = u64>) -> u64 {
    let waiter = Waiter::new();
    let mut missing = 0;
    for page in pages {
        if pager.bitmap().is_missing(page) {
            missing += 1;
            pager.ensure(PageRange::page(page), FaultPath::Guest, &waiter).unwrap();
        }
    }
    missing
}

fn pages_of(pager: &Pager, path: FaultPath) -> u64 {
    pager.stats().path(path).pages
}

#[test]
fn sequential_readers_fault_less_often() {
    let begun = Instant::now();
    let without = touch(&far(None), 0..64);
    let each = begun.elapsed() / 64;
    assert_eq!(without, 64);
    let begun = Instant::now();
    let pager = far(Some(1 << 20));
    let faults = touch(&pager, 0..PAGES);
    println!(
        "{PAGES} pages in order: {faults} faults in {:.1?}; without readahead {:.1?}",
        begun.elapsed(),
        each * u32::try_from(PAGES).unwrap()
    );
    assert!(faults < PAGES / 20, "{faults}");
    assert!(begun.elapsed() < each * 512);
    assert!(pager.bitmap().is_complete());
    assert_eq!(pages_of(&pager, FaultPath::Guest) + pages_of(&pager, FaultPath::Fill), PAGES);
}

#[test]
fn readahead_is_bounded() {
    let pager = far(Some(128 << 10));
    let waiter = Waiter::new();
    for page in 0..256 {
        pager.ensure(PageRange::page(page), FaultPath::Guest, &waiter).unwrap();
        let last = (0..PAGES).rev().find(|page| !pager.bitmap().is_missing(*page)).unwrap();
        assert!(last <= page + 32, "page {last} is present while page {page} is read");
    }
}

#[test]
fn scattered_readers_get_no_readahead() {
    let pager = far(Some(1 << 20));
    touch(&pager, (0..100).map(|fault| fault * 997 % PAGES));
    assert_eq!(pages_of(&pager, FaultPath::Fill), 0);
}

#[test]
fn near_source_gets_no_readahead() {
    let pager = pager(Arc::new(Near(SIZE)), Some(1 << 20));
    touch(&pager, 0..PAGES);
    assert_eq!(pages_of(&pager, FaultPath::Fill), 0);
}
