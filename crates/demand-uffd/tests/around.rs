// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faults that fetch and map pages around them, in mappings of this process.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{backing, expect, expect_blocked, mapping, pager, pager_on, read, read_later, uffd};
use demand_memory::{BackingKind, FaultPath, Mapping, PAGE_SIZE, Pager};
use demand_source::{BlockingSource, Destination, Extent, SourceError, Threaded};
use demand_uffd::{ArmedMapping, DEFAULT_THREADS, FaultService, OwnFaults};
use test_support::image::{page_of, word_of};

const PAGES: u64 = 70;
const SIZE: u64 = PAGES * PAGE_SIZE;

fn serve(pager: &Arc<Pager>, around: u64) -> (FaultService, Arc<Mapping>) {
    let mapping = mapping(pager);
    let faults = OwnFaults { path: FaultPath::Vmm, around };
    let armed = ArmedMapping::own(&uffd(), mapping.clone(), pager, faults).unwrap();
    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    service.add(&[armed]).unwrap();
    (service, mapping)
}

#[test]
fn one_fault_serves_pages_around_it() {
    for (around, faults) in [(0, 70), (1, 70), (16 * PAGE_SIZE, 5), (15 * PAGE_SIZE + 1, 5)] {
        let pager = pager(BackingKind::Shmem, SIZE);
        let (service, mapping) = serve(&pager, around);
        for page in 0..PAGES {
            assert_eq!(read(&mapping, page * PAGE_SIZE), word_of(page * PAGE_SIZE), "page {page}");
        }
        // After that, all faults are counted.
        service.stop();
        let path = pager.stats().path(FaultPath::Vmm);
        assert_eq!((path.faults, path.pages), (faults, PAGES), "{around}");
        if around == 16 * PAGE_SIZE {
            let blocks = BTreeMap::from([(16 * PAGE_SIZE, 4), (6 * PAGE_SIZE, 1)]);
            assert_eq!(path.granularity_histogram, blocks);
        }
    }
}

/// A source that cannot read one page.
struct BadPage {
    bad: Arc<AtomicBool>,
}

impl BlockingSource for BadPage {
    fn size(&self) -> u64 {
        SIZE
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: SIZE })
    }
    fn read(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        let pages = offset / PAGE_SIZE..(offset + to.len() as u64) / PAGE_SIZE;
        if pages.contains(&6) && self.bad.load(Ordering::Relaxed) {
            return Err(SourceError::Abandoned);
        }
        let content: Vec<u8> = pages.flat_map(page_of).collect();
        to.write_at(0, &content);
        Ok(())
    }
}

#[test]
fn missing_page_around_a_fault_stays_trapped() {
    let bad = Arc::new(AtomicBool::new(true));
    let source = Threaded::new(BadPage { bad: bad.clone() }, 2).unwrap();
    let pager = pager_on(backing(BackingKind::Shmem, SIZE), source);
    let (_service, mapping) = serve(&pager, 16 * PAGE_SIZE);
    // Its neighbours do not wait for it.
    for page in [5, 7, 15, 0] {
        expect(&read_later(&mapping, page * PAGE_SIZE), page * PAGE_SIZE);
    }
    let reader = read_later(&mapping, 6 * PAGE_SIZE);
    expect_blocked(&reader);
    assert!(pager.bitmap().is_missing(6));
    bad.store(false, Ordering::Relaxed);
    expect(&reader, 6 * PAGE_SIZE);
}
