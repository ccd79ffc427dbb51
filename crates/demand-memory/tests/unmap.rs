// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pages that another process touched before its mapping was trapped.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use demand_memory::{
    Backing, BackingError, BackingKind, FaultPath, Mapping, MemfdBacking, PAGE_SIZE, PageRange,
    Pager, PagerConfig, Retrier, RetryPolicy, Waiter,
};
use test_support::host;
use test_support::image::{Near, word_of};

const SIZE: u64 = 8 << 20;
const PAGES: u64 = SIZE / PAGE_SIZE;

/// Creates a pager, and an untrapped mapping as another process has one.
fn memory(kind: BackingKind) -> (Arc<Pager>, Mapping) {
    memory_on(MemfdBacking::new(kind, SIZE).unwrap())
}

fn memory_on(backing: impl Backing + 'static) -> (Arc<Pager>, Mapping) {
    let backing = Arc::new(backing);
    let other = backing.map().unwrap();
    let retrier = Retrier::new(RetryPolicy::default(), |_| {});
    let source = Arc::new(Near(SIZE));
    (Pager::new(PagerConfig { retrier, ..PagerConfig::new(backing, source) }).unwrap(), other)
}

/// Returns the first word of a page.
fn read(mapping: &Mapping, page: u64) -> u64 {
    let at = mapping.at(page * PAGE_SIZE).cast::<u64>();
    // SAFETY: the word lies in the mapping, and no reference to it exists.
    unsafe { at.read_volatile() }
}

fn touch(mapping: &Mapping, pages: impl Iterator<Item = u64>) {
    pages.for_each(|page| _ = read(mapping, page));
}

/// Returns the number of pages that the memory object holds.
fn existing(pager: &Pager) -> u64 {
    pager.backing().file().unwrap().metadata().unwrap().blocks() * 512 / PAGE_SIZE
}

fn check(mapping: &Mapping) {
    let wrong = |page: &u64| read(mapping, *page) != word_of(page * PAGE_SIZE);
    assert_eq!((0..PAGES).find(wrong), None, "a page that is not what the source has");
}

#[test]
fn touched_pages_are_removed_unless_claimed() {
    let (pager, other) = memory(BackingKind::Shmem);
    let waiter = Waiter::new();
    pager.unmap_missing(&waiter).unwrap();
    pager.ensure(PageRange::new(100, 7), FaultPath::Guest, &waiter).unwrap();
    touch(&other, 0..PAGES);
    assert_eq!(existing(&pager), PAGES);
    pager.unmap_missing(&waiter).unwrap();
    assert_eq!(existing(&pager), 7);
    assert_eq!(pager.bitmap().count_missing(PageRange::new(0, PAGES)), PAGES - 7);
    pager.ensure(PageRange::new(0, PAGES), FaultPath::Guest, &waiter).unwrap();
    check(&other);
    pager.unmap_missing(&waiter).unwrap();
    assert_eq!(existing(&pager), PAGES);
}

/// A memory object that removes units slowly, and reports when it begins.
#[derive(Debug)]
struct Slow(MemfdBacking, Mutex<Sender<()>>);

impl Backing for Slow {
    fn kind(&self) -> BackingKind {
        self.0.kind()
    }
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn map(&self) -> Result<Mapping, BackingError> {
        self.0.map()
    }
    fn allocate(&self, pages: PageRange) -> Result<(), BackingError> {
        self.0.allocate(pages)
    }
    fn next_existing(&self, within: PageRange) -> Result<Option<PageRange>, BackingError> {
        self.0.next_existing(within)
    }
    fn remove(&self, units: PageRange) -> Result<(), BackingError> {
        self.1.lock().unwrap().send(()).unwrap();
        thread::sleep(Duration::from_millis(200));
        self.0.remove(units)
    }
    fn file(&self) -> Option<&Arc<File>> {
        self.0.file()
    }
}

/// A page that is requested during its removal arrives afterwards.
#[test]
fn removal_costs_no_arriving_page() {
    let (sender, removal) = mpsc::channel();
    let backing = MemfdBacking::new(BackingKind::Shmem, SIZE).unwrap();
    let (pager, other) = memory_on(Slow(backing, Mutex::new(sender)));
    touch(&other, 0..PAGES);
    thread::scope(|scope| {
        scope.spawn(|| pager.unmap_missing(&Waiter::new()).unwrap());
        removal.recv().unwrap();
        pager.ensure(PageRange::page(7), FaultPath::Guest, &Waiter::new()).unwrap();
    });
    assert_eq!(existing(&pager), 1);
    assert_eq!(read(&other, 7), word_of(7 * PAGE_SIZE));
}

#[test]
fn removed_huge_pages_stay_reserved() {
    let Some(_pool) = host::huge_pages(SIZE >> 21) else { return };
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages";
    let reserved = || fs::read_to_string(POOL).unwrap().trim().parse::<u64>().unwrap();
    let before = reserved();
    let (pager, other) = memory(BackingKind::Hugetlb2M);
    assert_eq!(reserved(), before + 4);
    let waiter = Waiter::new();
    pager.ensure(PageRange::page(600), FaultPath::Guest, &waiter).unwrap();
    touch(&other, 0..PAGES);
    assert_eq!((reserved(), existing(&pager)), (before, PAGES));
    pager.unmap_missing(&waiter).unwrap();
    // The half-filled unit is now complete; the others are removed and reserved again.
    assert_eq!((reserved(), existing(&pager)), (before + 3, 512));
    assert_eq!(pager.bitmap().first_missing(PageRange::new(512, 512)), None);
    assert_eq!(pager.bitmap().count_missing(PageRange::new(0, PAGES)), PAGES - 512);
    pager.ensure(PageRange::new(0, PAGES), FaultPath::Guest, &waiter).unwrap();
    check(&other);
}
