// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images, regions and readers that the tests share.
#![allow(dead_code)] // Each test binary uses a part of it.

use std::collections::HashSet;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use demand_memory::{
    BackingKind, Mapping, MemfdBacking, PAGE_SIZE, Pager, Retrier, RetryPolicy, Stats,
};
use demand_source::{
    BlockingSource, Completion, Destination, Extent, PageSource, Request, SourceError, Threaded,
};
use demand_uffd::{Features, Userfaultfd};

/// Long enough for whatever does arrive, on a busy host.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough for what must not arrive to do so.
pub const A_WHILE: Duration = Duration::from_millis(150);

/// Whether the image has a hole there.
pub fn is_hole(page: u64) -> bool {
    page.is_multiple_of(5)
}

/// The word at `offset` (bytes, a multiple of 8) of the image.
pub fn word_of(offset: u64) -> u64 {
    if is_hole(offset / PAGE_SIZE) { 0 } else { offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }
}

pub fn page_of(page: u64) -> Vec<u8> {
    (0..PAGE_SIZE / 8).flat_map(|i| word_of(page * PAGE_SIZE + i * 8).to_ne_bytes()).collect()
}

fn write(offset: u64, destination: &mut Destination<'_>) {
    for at in (0..destination.len() as u64).step_by(PAGE_SIZE as usize) {
        destination.write_at(at as usize, &page_of((offset + at) / PAGE_SIZE));
    }
}

fn extent(offset: u64, size: u64) -> Extent {
    let page = offset / PAGE_SIZE;
    if is_hole(page) {
        Extent::Hole { end: (page + 1) * PAGE_SIZE }
    } else {
        Extent::Data { end: size.min((page / 5 + 1) * 5 * PAGE_SIZE) }
    }
}

/// A source that answers at once.
pub struct Near(pub u64);

impl PageSource for Near {
    fn size(&self) -> u64 {
        self.0
    }
    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        Ok(extent(offset, self.0))
    }
    fn submit(&self, mut request: Request) -> Completion {
        for chunk in &mut request.chunks {
            write(chunk.offset, &mut chunk.destination);
        }
        drop(request);
        Completion::ready(Ok(()))
    }
    fn read_now(
        &self,
        offset: u64,
        destination: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        write(offset, destination);
        Some(Ok(()))
    }
}

#[derive(Default)]
pub struct Control {
    /// Pages that are held back.
    held: Mutex<HashSet<u64>>,
    changed: Condvar,
    /// Pages that cannot be read.
    failing: Mutex<HashSet<u64>>,
}

impl Control {
    pub fn hold(&self, pages: impl IntoIterator<Item = u64>) {
        self.held.lock().unwrap().extend(pages);
    }
    pub fn let_go(&self) {
        self.held.lock().unwrap().clear();
        self.changed.notify_all();
    }
    /// Lets all pages go when it is dropped, so that a test that fails can end.
    pub fn let_go_at_the_end(self: &Arc<Self>) -> impl Drop {
        struct Guard(Arc<Control>);
        impl Drop for Guard {
            fn drop(&mut self) {
                self.0.let_go();
            }
        }
        Guard(self.clone())
    }
    pub fn fail(&self, pages: impl IntoIterator<Item = u64>) {
        self.failing.lock().unwrap().extend(pages);
    }
    pub fn recover(&self) {
        self.failing.lock().unwrap().clear();
    }
}

/// A source that blocks, and does what a test tells it.
pub struct Far {
    size: u64,
    control: Arc<Control>,
}

impl BlockingSource for Far {
    fn size(&self) -> u64 {
        self.size
    }
    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        Ok(extent(offset, self.size))
    }
    fn read(&self, offset: u64, destination: &mut Destination<'_>) -> Result<(), SourceError> {
        let pages = offset / PAGE_SIZE..(offset + destination.len() as u64).div_ceil(PAGE_SIZE);
        let mut held = self.control.held.lock().unwrap();
        while pages.clone().any(|page| held.contains(&page)) {
            held = self.control.changed.wait(held).unwrap();
        }
        drop(held);
        let failing = self.control.failing.lock().unwrap();
        if pages.clone().any(|page| failing.contains(&page)) {
            let error = std::io::Error::from_raw_os_error(5);
            let image = "image".into();
            let len = destination.len() as u64;
            return Err(SourceError::Read { image, offset, len, error });
        }
        drop(failing);
        write(offset, destination);
        Ok(())
    }
}

pub fn far(size: u64) -> (Threaded<Far>, Arc<Control>) {
    let control = Arc::new(Control::default());
    (Threaded::new(Far { size, control: control.clone() }, 8).unwrap(), control)
}

pub fn pager_on(backing: Arc<MemfdBacking>, source: impl PageSource + 'static) -> Arc<Pager> {
    let policy = RetryPolicy { longest: Duration::from_millis(20), ..RetryPolicy::default() };
    let retrier = Retrier::new(policy, |_| {});
    Pager::new(backing, Arc::new(source), 0, Arc::new(Stats::new()), retrier).unwrap()
}

pub fn backing(kind: BackingKind, size: u64) -> Arc<MemfdBacking> {
    Arc::new(MemfdBacking::new(kind, size, false).unwrap())
}

pub fn pager(kind: BackingKind, size: u64) -> Arc<Pager> {
    pager_on(backing(kind, size), Near(size))
}

pub fn mapping(pager: &Arc<Pager>) -> Arc<Mapping> {
    Arc::new(pager.backing().map().unwrap())
}

pub fn uffd() -> Arc<Userfaultfd> {
    Arc::new(Userfaultfd::open(Features::GUEST_MEMORY).unwrap())
}

pub fn base(mapping: &Mapping) -> u64 {
    mapping.address().as_ptr() as u64
}

/// Reads a word; waits if the page is trapped.
pub fn read(mapping: &Mapping, offset: u64) -> u64 {
    // SAFETY: `at` keeps the word within the mapping, and nobody writes to it through a reference.
    unsafe { mapping.at(offset).cast::<u64>().as_ptr().read_volatile() }
}

/// Reads a word on a thread of its own, so that a test whose fault is not served fails, and does
/// not hang.
pub fn read_later(mapping: &Arc<Mapping>, offset: u64) -> Receiver<u64> {
    let (sender, receiver) = mpsc::channel();
    let mapping = mapping.clone();
    thread::spawn(move || {
        let _ = sender.send(read(&mapping, offset));
    });
    receiver
}

pub fn expect(reader: &Receiver<u64>, offset: u64) {
    let word = reader.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{offset:#x} not served"));
    assert_eq!(word, word_of(offset), "the word at {offset:#x}");
}

pub fn expect_blocked(reader: &Receiver<u64>) {
    if let Ok(word) = reader.recv_timeout(A_WHILE) {
        panic!("read {word:#x} before its page had arrived");
    }
}

/// Reads all words of a page, and compares.
pub fn check_page(mapping: &Mapping, page: u64) {
    for offset in (page * PAGE_SIZE..(page + 1) * PAGE_SIZE).step_by(8) {
        assert_eq!(read(mapping, offset), word_of(offset), "the word at {offset:#x}");
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
