// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Backings and sources that break their contract: their safe code must not reach memory that it
//! was not given, and no page may count as present that was not filled.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]
#![cfg(not(loom))]

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use demand_memory::{
    Backing, BackingError, BackingKind, DemandMemory, DemandRegion, FaultPath, LoadUnit, Mapping,
    MemfdBacking, PAGE_SIZE, PageRange, Pager, PagerConfig, PagerError, Retrier, RetryPolicy,
    Stats, WriteImageError,
};
use demand_source::{
    BlockingSource, Completion, Destination, Extent, ImageWriter, MappedBytes, PageSource, Request,
    SourceError, Threaded,
};
use test_support::image::{Near, page_of};
use test_support::wait::{A_WHILE, until};
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

const PAGES: u64 = 64;
const SIZE: u64 = PAGES * PAGE_SIZE;

fn backing() -> MemfdBacking {
    MemfdBacking::new(BackingKind::Shmem, SIZE).unwrap()
}

fn config(backing: impl Backing + 'static, source: impl PageSource + 'static) -> PagerConfig {
    PagerConfig {
        backing: Arc::new(backing),
        source: Arc::new(source),
        image_offset: 0,
        stats: Arc::new(Stats::new()),
        retrier: Retrier::new(RetryPolicy::default(), |_| {}),
    }
}

/// A backing whose mapping is shorter than its reported size.
#[derive(Debug)]
struct Short(MemfdBacking);

impl Backing for Short {
    fn kind(&self) -> BackingKind {
        self.0.kind()
    }
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn map(&self) -> Result<Mapping, BackingError> {
        let file = self.0.file().expect("it is a file");
        Ok(Mapping::shared(file, SIZE - 1).unwrap())
    }
    fn allocate(&self, pages: PageRange) -> Result<(), BackingError> {
        self.0.allocate(pages)
    }
    fn next_existing(&self, within: PageRange) -> Result<Option<PageRange>, BackingError> {
        self.0.next_existing(within)
    }
    fn remove(&self, units: PageRange) -> Result<(), BackingError> {
        self.0.remove(units)
    }
    fn file(&self) -> Option<&Arc<File>> {
        self.0.file()
    }
}

#[test]
fn a_mapping_shorter_than_its_backing_is_refused() {
    let expected = |error: PagerError| {
        let short = PagerError::MappingShort { size: SIZE, mapped: SIZE - 1 };
        assert_eq!(error.to_string(), short.to_string());
    };
    expected(
        DemandRegion::<()>::new(GuestAddress(0), config(Short(backing()), Near(SIZE)), ())
            .unwrap_err(),
    );
    expected(Pager::new_present(Arc::new(Short(backing())), Arc::new(Stats::new())).unwrap_err());
}

#[test]
fn memory_past_the_last_address_is_refused() {
    let at =
        |start| DemandRegion::<()>::new(GuestAddress(start), config(backing(), Near(SIZE)), ());
    assert!(matches!(at(u64::MAX - SIZE + 2), Err(PagerError::PastTheEnd { size: SIZE, .. })));
    at(u64::MAX - SIZE + 1).unwrap();
}

/// Returns the content of a page, which must be present.
fn content(region: &DemandRegion, page: u64) -> Vec<u8> {
    let mut content = vec![0xee; PAGE_SIZE as usize];
    assert!(!region.pager().bitmap().is_missing(page));
    region.read_slice(&mut content, MemoryRegionAddress(page * PAGE_SIZE)).unwrap();
    content
}

/// A source that answers before it returns the memory that it was lent.
#[derive(Clone)]
struct Keeper(Arc<Kept>);

struct Kept {
    kept: Mutex<Vec<Destination<'static>>>,
    failing: AtomicBool,
    requests: AtomicUsize,
}

impl PageSource for Keeper {
    fn size(&self) -> u64 {
        SIZE
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: SIZE })
    }
    fn submit(&self, request: Request) -> Completion {
        self.0.requests.fetch_add(1, Ordering::Relaxed);
        for mut chunk in request.chunks {
            Near(SIZE).read_now(chunk.offset, &mut chunk.destination).unwrap().unwrap();
            self.0.kept.lock().unwrap().push(chunk.destination);
        }
        let failing = self.0.failing.load(Ordering::Relaxed);
        Completion::ready(if failing { Err(SourceError::Abandoned) } else { Ok(()) })
    }
}

fn keeper(failing: bool) -> (Arc<Kept>, DemandRegion) {
    let failing = AtomicBool::new(failing);
    let kept = Arc::new(Kept { kept: Mutex::default(), failing, requests: AtomicUsize::new(0) });
    let region =
        DemandRegion::new(GuestAddress(0), config(backing(), Keeper(kept.clone())), ()).unwrap();
    (kept, region)
}

#[test]
fn a_page_is_missing_until_its_loan_ends() {
    let (keeper, region) = keeper(false);
    assert_eq!(region.pager().fetch(PageRange::page(1), FaultPath::Guest), Ok(0));
    assert!(region.pager().bitmap().is_missing(1), "the source can still write to it");
    keeper.kept.lock().unwrap().clear();
    assert!(content(&region, 1) == page_of(1));
}

#[test]
fn a_failed_page_is_retried_after_its_loan() {
    let (keeper, region) = keeper(true);
    region.pager().fetch(PageRange::page(1), FaultPath::Guest).unwrap();
    thread::sleep(A_WHILE);
    assert_eq!(keeper.requests.load(Ordering::Relaxed), 1, "the source can still write to it");
    keeper.failing.store(false, Ordering::Relaxed);
    keeper.kept.lock().unwrap().clear();
    until("it is tried again", || keeper.requests.load(Ordering::Relaxed) == 2);
    until("it is given back", || keeper.kept.lock().unwrap().pop().is_some());
    // The retrying thread may not have the outcome yet.
    until("it arrives", || !region.pager().bitmap().is_missing(1));
    assert!(content(&region, 1) == page_of(1));
}

/// A source that writes half of each request and reports success.
#[derive(Clone, Default)]
struct Half {
    whole: Arc<AtomicBool>,
    near: bool,
}

impl BlockingSource for Half {
    fn size(&self) -> u64 {
        SIZE
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: SIZE })
    }
    fn read(&self, offset: u64, destination: &mut Destination<'_>) -> Result<(), SourceError> {
        if self.whole.load(Ordering::Relaxed) {
            return Near(SIZE).read_through(offset, destination);
        }
        destination.write_at(0, &vec![7; destination.len() / 2]);
        Ok(())
    }
}

impl PageSource for Half {
    fn size(&self) -> u64 {
        SIZE
    }
    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        BlockingSource::extent(self, offset)
    }
    fn submit(&self, request: Request) -> Completion {
        for mut chunk in request.chunks {
            self.read(chunk.offset, &mut chunk.destination).unwrap();
        }
        Completion::ready(Ok(()))
    }
    fn read_now(&self, at: u64, to: &mut Destination<'_>) -> Option<Result<(), SourceError>> {
        self.near.then(|| self.read(at, to))
    }
}

#[test]
fn success_with_half_a_page_is_a_failure() {
    let [near, far] = [true, false].map(|near| Half { whole: Arc::default(), near });
    let third = Half::default();
    let switches = [&near, &far, &third].map(|half| half.whole.clone());
    let threaded = Arc::new(Threaded::new(third, 1).unwrap());
    let sources: [Arc<dyn PageSource>; 3] = [Arc::new(near), Arc::new(far), threaded];
    for (source, whole) in sources.into_iter().zip(switches) {
        let told = Arc::new(Mutex::new(Vec::new()));
        let tell = told.clone();
        let retrier = Retrier::new(RetryPolicy::default(), move |failure| {
            tell.lock().unwrap().push(failure.error.to_string());
        });
        let config = PagerConfig { source, retrier, ..config(backing(), Near(SIZE)) };
        let region = DemandRegion::<()>::new(GuestAddress(0), config, ()).unwrap();
        region.pager().fetch(PageRange::page(1), FaultPath::Guest).unwrap();
        until("it is told", || !told.lock().unwrap().is_empty());
        assert!(region.pager().bitmap().is_missing(1));
        let short = SourceError::Short { wrote: 2048, len: 4096 }.to_string();
        assert_eq!(told.lock().unwrap()[0], short);
        whole.store(true, Ordering::Relaxed);
        until("the page arrives", || !region.pager().bitmap().is_missing(1));
        assert!(content(&region, 1) == page_of(1));
    }
}

#[test]
fn copy_from_short_source_is_refused() {
    for near in [true, false] {
        let half = Half { whole: Arc::default(), near };
        let region = DemandRegion::<()>::new(GuestAddress(0), config(backing(), half), ()).unwrap();
        let memory = DemandMemory::new(vec![region]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (image, table) = (folder.path().join("memory"), folder.path().join("hashes"));
        let mut writer = ImageWriter::create(&image, &table, SIZE, [7; 16]).unwrap();
        let error = memory.write_image(&mut writer, &mut |_| true).unwrap_err();
        let short = matches!(
            error,
            WriteImageError::Source { source: SourceError::Short { wrote, len: SIZE }, .. }
                if wrote == SIZE / 2
        );
        assert!(short, "{error}");
    }
}

/// Shared memory that calls itself huge pages, so that its units are loaded as a whole.
#[derive(Debug)]
struct Units(MemfdBacking);

impl Backing for Units {
    fn kind(&self) -> BackingKind {
        BackingKind::Hugetlb2M
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
        self.0.remove(units)
    }
    fn file(&self) -> Option<&Arc<File>> {
        self.0.file()
    }
}

const UNIT: u64 = 2 << 20;

/// A source that maps this many bytes for each unit.
struct Maps(usize);

impl PageSource for Maps {
    fn size(&self) -> u64 {
        UNIT
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: UNIT })
    }
    fn submit(&self, request: Request) -> Completion {
        Near(UNIT).submit(request)
    }
    fn mapped(&self, _: u64, _: u64) -> Option<MappedBytes<'_>> {
        Some(MappedBytes::owned(vec![0; self.0]))
    }
}

/// A loader that refuses what it counts.
#[derive(Default)]
struct Loads(AtomicUsize);

impl LoadUnit for Loads {
    fn load(&self, _: u64, _: MappedBytes<'_>) -> std::io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Err(std::io::ErrorKind::Unsupported.into())
    }
    fn finish(&self) {}
}

#[test]
fn mapped_content_of_another_length_is_not_loaded() {
    let unit = UNIT as usize;
    for (len, expected) in [(unit, 1), (unit - 4096, 0), (unit + 4096, 0), (0, 0)] {
        let backing = Units(MemfdBacking::new(BackingKind::Shmem, UNIT).unwrap());
        let region =
            DemandRegion::<()>::new(GuestAddress(0), config(backing, Maps(len)), ()).unwrap();
        let loads = Arc::new(Loads::default());
        region.pager().set_unit_loader(loads.clone());
        region.pager().fetch(PageRange::new(0, 512), FaultPath::BackEnd).unwrap();
        until("all arrive", || region.pager().bitmap().is_complete());
        assert_eq!(loads.0.load(Ordering::Relaxed), expected, "{len} bytes");
        assert!(content(&region, 511) == page_of(511));
    }
}
