// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images, memory and waits that the tests share.
#![allow(dead_code)] // Each test binary uses a part of it.

pub mod foolish;
pub mod process;

use std::collections::HashSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, MemfdBacking, PAGE_SIZE, Pager, RegionConfig, Retrier,
    RetryPolicy, Stats,
};
use demand_source::{BlockingSource, Destination, Extent, SourceError, Threaded};
use vm_memory::GuestAddress;

/// Long enough for whatever does arrive, on a busy host.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough for what must not arrive to do so.
pub const A_WHILE: Duration = Duration::from_millis(150);

/// Guest memory is two regions: this many bytes at 0, and as many at `HIGH`.
pub const SIZE: u64 = 6 << 20;
pub const HIGH: u64 = 1 << 32;
pub const PAGES: u64 = SIZE / PAGE_SIZE;

/// Every fifth page is a hole. The ring of the tests lies in page 3.
pub fn is_hole(page: u64) -> bool {
    page.is_multiple_of(5)
}

/// The word at a guest address (a multiple of 8).
pub fn word_of(address: u64) -> u64 {
    let offset = if address >= HIGH { address - HIGH + SIZE } else { address };
    word_at(offset)
}

/// The word at `offset` of the image.
fn word_at(offset: u64) -> u64 {
    if is_hole(offset / PAGE_SIZE) { 0 } else { offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }
}

/// The address of a page, counted through both regions.
pub fn address_of(page: u64) -> u64 {
    if page < PAGES { page * PAGE_SIZE } else { HIGH + (page - PAGES) * PAGE_SIZE }
}

#[derive(Default)]
pub struct Control {
    held: Mutex<HashSet<u64>>,
    changed: Condvar,
}

impl Control {
    pub fn hold(&self, pages: impl IntoIterator<Item = u64>) {
        self.held.lock().unwrap().extend(pages);
    }
    pub fn let_go(&self) {
        self.held.lock().unwrap().clear();
        self.changed.notify_all();
    }
}

struct Far(Arc<Control>);

impl BlockingSource for Far {
    fn size(&self) -> u64 {
        2 * SIZE
    }
    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        let page = offset / PAGE_SIZE;
        Ok(if is_hole(page) {
            Extent::Hole { end: (page + 1) * PAGE_SIZE }
        } else {
            Extent::Data { end: ((page / 5 + 1) * 5 * PAGE_SIZE).min(2 * SIZE) }
        })
    }
    fn read(&self, offset: u64, destination: &mut Destination<'_>) -> Result<(), SourceError> {
        let end = offset + destination.len() as u64;
        let mut held = self.0.held.lock().unwrap();
        while (offset / PAGE_SIZE..end.div_ceil(PAGE_SIZE)).any(|page| held.contains(&page)) {
            held = self.0.changed.wait(held).unwrap();
        }
        drop(held);
        let words: Vec<u8> =
            (offset..end).step_by(8).flat_map(|at| word_at(at).to_ne_bytes()).collect();
        destination.write_at(0, &words);
        Ok(())
    }
}

pub struct Memory {
    pub memory: DemandMemory,
    pub control: Arc<Control>,
    pub stats: Arc<Stats>,
}

impl Memory {
    pub fn new(kind: BackingKind) -> Self {
        Self::with(kind, &[0, HIGH])
    }

    pub fn with(kind: BackingKind, starts: &[u64]) -> Self {
        let control = Arc::new(Control::default());
        let stats = Arc::new(Stats::new());
        let retrier = Retrier::new(RetryPolicy::default(), |_| {});
        let source = Arc::new(Threaded::new(Far(control.clone()), 8).unwrap());
        let regions = starts.iter().enumerate().map(|(index, start)| {
            let config = RegionConfig {
                start: GuestAddress(*start),
                backing: Arc::new(MemfdBacking::new(kind, SIZE, false).unwrap()),
                source: source.clone(),
                image_offset: (index as u64 % 2) * SIZE,
                stats: stats.clone(),
                retrier: retrier.clone(),
            };
            DemandRegion::new(config, ()).unwrap()
        });
        let memory = DemandMemory::new(regions.collect()).unwrap();
        Memory { memory, control, stats }
    }

    pub fn pagers(&self) -> Vec<Arc<Pager>> {
        self.memory.pagers().cloned().collect()
    }

    pub fn fill(&self) {
        for pager in self.memory.pagers() {
            let all = demand_memory::PageRange::new(0, pager.pages());
            pager.fetch(all, demand_memory::Path::Fill).unwrap();
        }
        until("memory is complete", || self.memory.pagers().all(|p| p.bitmap().is_complete()));
    }
}

pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

static POOL: Mutex<()> = Mutex::new(());

/// Huge pages of 2 MiB for a test, one test at a time. Without `LAB=1` a test that finds none is
/// skipped, and says so.
pub fn huge_pages(pages: u64) -> Option<MutexGuard<'static, ()>> {
    let guard = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free = || std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    // The test before may not have given back all of its pages yet.
    for _ in 0..50 {
        if free().is_some_and(|free| free >= pages) {
            return Some(guard);
        }
        if std::env::var("LAB").is_err() {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    assert!(std::env::var("LAB").is_err(), "{pages} free huge pages of 2 MiB are needed");
    println!("SKIPPED: {pages} free huge pages of 2 MiB are needed (sysctl vm.nr_hugepages)");
    None
}
