// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Copies of memory to an image: lazy, present from the start, and with a source that fails.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]
#![cfg(not(loom))]

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use demand_memory::{
    Backing, BackingError, BackingKind, DemandMemory, DemandRegion, FaultPath, Fill, FillRate,
    ImageProgress, Mapping, MemfdBacking, PAGE_SIZE, PageRange, Pager, PagerConfig, Retrier,
    RetryPolicy, Stats, Waiter, WriteImageError,
};
use demand_source::{Destination, HashedImage, ImageWriter, PageCounts, PageSource};
use proptest::prelude::*;
use test_support::host;
use test_support::image::{Near, far, is_hole, page_of};
use vm_memory::{Address, Bytes, GuestAddress};

fn region(
    start: u64,
    kind: BackingKind,
    pages: u64,
    source: &Arc<dyn PageSource>,
    image_offset: u64,
) -> DemandRegion {
    let config = PagerConfig {
        backing: Arc::new(MemfdBacking::new(kind, pages * PAGE_SIZE).unwrap()),
        source: source.clone(),
        image_offset,
        stats: Arc::new(Stats::new()),
        retrier: Retrier::new(RetryPolicy::default(), |_| {}),
    };
    DemandRegion::new(GuestAddress(start), config, ()).unwrap()
}

/// Creates a memory of two regions, the second of `second` pages, over one image.
fn two(kind: BackingKind, second: u64, source: impl PageSource + 'static) -> DemandMemory {
    let source: Arc<dyn PageSource> = Arc::new(source);
    let first = region(0, kind, FIRST, &source, 0);
    let second = region(SECOND, kind, second, &source, FIRST * PAGE_SIZE);
    DemandMemory::new(vec![first, second]).unwrap()
}

/// Pages of the first region: as many as a huge page of 2 MiB has.
const FIRST: u64 = 512;
/// Guest physical address of the second region.
const SECOND: u64 = 1 << 32;

/// Returns the guest physical address of a page of the image.
fn address(page: u64) -> GuestAddress {
    GuestAddress(if page < FIRST { page } else { SECOND / PAGE_SIZE + page - FIRST } * PAGE_SIZE)
}

fn missing(memory: &DemandMemory) -> u64 {
    let all = |pager: &Arc<Pager>| PageRange::new(0, pager.pages());
    memory.pagers().map(|pager| pager.bitmap().count_missing(all(pager))).sum()
}

/// Returns the number of bytes allocated to the memory objects.
fn allocated(memory: &DemandMemory) -> u64 {
    let blocks = |file: &File| file.metadata().unwrap().blocks() * 512;
    memory.pagers().map(|pager| blocks(pager.backing().file().unwrap())).sum()
}

fn size(memory: &DemandMemory) -> u64 {
    memory.pagers().map(|pager| pager.pages() * PAGE_SIZE).sum()
}

/// An image of memory, and the progress that was reported last.
struct Written {
    _folder: tempfile::TempDir,
    image: HashedImage,
    done: ImageProgress,
}

fn try_write(
    memory: &DemandMemory,
    progress: &mut dyn FnMut(ImageProgress) -> bool,
) -> Result<Written, WriteImageError> {
    let folder = tempfile::tempdir().unwrap();
    let (image, table) = (folder.path().join("image"), folder.path().join("table"));
    let mut writer = ImageWriter::create(&image, &table, size(memory), [1; 16]).unwrap();
    let done = memory.write_image(&mut writer, progress)?;
    let summary = writer.finish().unwrap();
    assert_eq!((summary.pages, summary.size), (done.pages, done.bytes));
    let image = HashedImage::open(&image, &table).unwrap();
    Ok(Written { _folder: folder, image, done })
}

/// Writes an image, and checks that this leaves memory unchanged.
fn write(memory: &DemandMemory) -> Written {
    let before = (missing(memory), allocated(memory));
    let mut last = 0;
    let written = try_write(memory, &mut |so_far| {
        assert!(so_far.bytes >= last && so_far.total == size(memory), "{so_far:?} after {last}");
        last = so_far.bytes;
        true
    });
    assert_eq!(last, size(memory));
    assert_eq!((missing(memory), allocated(memory)), before);
    written.unwrap()
}

impl Written {
    fn is(&self, expected: impl Fn(u64) -> Vec<u8>) {
        // The read compares each page with its hash.
        let mut content = vec![0xee; self.image.size() as usize];
        self.image.read_through(0, &mut Destination::from(&mut content[..])).unwrap();
        for (page, content) in (0..).zip(content.chunks_exact(PAGE_SIZE as usize)) {
            assert!(content == expected(page), "page {page}");
        }
    }
}

/// Returns a page of the image after a guest write to it.
fn touched(page: u64) -> Vec<u8> {
    let mut content = page_of(page);
    content[9] = 0xd1;
    content
}

/// Makes some pages present and writes to some of these; the rest stay missing. Returns the
/// expected content of each page.
fn half_present(memory: &DemandMemory) -> impl Fn(u64) -> Vec<u8> {
    let pages = size(memory) / PAGE_SIZE;
    for page in (0..pages).filter(|page| page % 7 < 3) {
        memory.read_obj::<u8>(address(page)).unwrap();
    }
    for page in (0..pages).filter(|page| page % 21 < 2) {
        memory.write_obj(0xd1u8, address(page).unchecked_add(9)).unwrap();
    }
    // A page with content is overwritten with zeros.
    assert!(!is_hole(7));
    memory.write_slice(&[0; PAGE_SIZE as usize], address(7)).unwrap();
    move |page| match page {
        7 => vec![0; PAGE_SIZE as usize],
        page if page % 21 < 2 => touched(page),
        page => page_of(page),
    }
}

fn is_what_the_guest_would_see(kind: BackingKind, second: u64) {
    let bytes = (FIRST + second) * PAGE_SIZE;
    // One source answers at once, the other on its threads.
    for source in [None, Some(far(bytes).0)] {
        let memory = match source {
            None => two(kind, second, Near(bytes)),
            Some(far) => two(kind, second, far),
        };
        let expected = half_present(&memory);
        assert!(missing(&memory) > size(&memory) / PAGE_SIZE / 2);
        let written = write(&memory);
        written.is(&expected);
        let data = (0..bytes / PAGE_SIZE).filter(|page| expected(*page).iter().any(|b| *b != 0));
        let data = data.count() as u64;
        let holes = bytes / PAGE_SIZE - data;
        assert_eq!(written.done.pages, PageCounts { data, holes });
        // Holes of the source were not read.
        let read = (0..bytes / PAGE_SIZE).filter(|page| page % 7 >= 3 && page % 21 >= 2);
        let read = read.filter(|page| !is_hole(*page)).count() as u64 * PAGE_SIZE;
        assert_eq!(written.done.from_source, read);
        // It equals an image of completely filled memory.
        for pager in memory.pagers() {
            let all = PageRange::new(0, pager.pages());
            pager.ensure(all, FaultPath::Fill, &Waiter::new()).unwrap();
        }
        let complete = write(&memory);
        complete.is(&expected);
        assert_eq!((complete.done.pages, complete.done.from_source), (written.done.pages, 0));
    }
}

#[test]
fn lazy_memory_image_is_the_guests_view() {
    // More than 1 MiB, and not a multiple of it.
    is_what_the_guest_would_see(BackingKind::Shmem, 300);
}

#[test]
fn lazy_huge_pages_image_is_the_guests_view() {
    let Some(_pool) = host::huge_pages(3) else { return };
    is_what_the_guest_would_see(BackingKind::Hugetlb2M, 1024);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 10, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn image_does_not_depend_on_present_pages(
        fetched in prop::collection::vec((0..FIRST + 64, 1..200u64), 0..8),
        writes in prop::collection::vec(0..(FIRST + 64) * PAGE_SIZE, 0..20),
    ) {
        let pages = FIRST + 64;
        let memory = two(BackingKind::Shmem, 64, Near(pages * PAGE_SIZE));
        let mut model: Vec<u8> = (0..pages).flat_map(page_of).collect();
        for (first, count) in fetched {
            for page in first..pages.min(first + count) {
                memory.read_obj::<u8>(address(page)).unwrap();
            }
        }
        for at in writes {
            model[at as usize] ^= 0xff;
            let address = address(at / PAGE_SIZE).unchecked_add(at % PAGE_SIZE);
            memory.write_obj(model[at as usize], address).unwrap();
        }
        let page = |page: u64| model[(page * PAGE_SIZE) as usize..][..PAGE_SIZE as usize].to_vec();
        write(&memory).is(page);
    }
}

#[test]
fn background_fill_may_run_during_a_copy() {
    let pages = FIRST + 2048;
    let (source, _) = far(pages * PAGE_SIZE);
    let memory = two(BackingKind::Shmem, 2048, source);
    memory.write_obj(0xd1u8, address(3).unchecked_add(9)).unwrap();
    let pagers = memory.pagers().cloned().collect();
    let mut fill = None;
    let written = try_write(&memory, &mut |_| {
        // Started halfway through the copy, in the same order: each overtakes the other.
        fill.get_or_insert_with(|| Fill::start(Vec::clone(&pagers), FillRate::Unlimited).unwrap());
        true
    });
    written.unwrap().is(|page| if page == 3 { touched(page) } else { page_of(page) });
}

fn present(kind: BackingKind, size: u64) -> DemandMemory {
    let backing = Arc::new(MemfdBacking::new(kind, size).unwrap());
    let region = DemandRegion::new_present(GuestAddress(0), backing, Arc::new(Stats::new()), ());
    DemandMemory::new(vec![region.unwrap()]).unwrap()
}

#[test]
fn present_memory_costs_only_its_used_pages() {
    let begun = Instant::now();
    let memory = present(BackingKind::Shmem, 64 << 30);
    let took = begun.elapsed();
    // To touch all of it would take longer on any machine.
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert_eq!((missing(&memory), allocated(&memory)), (0, 0));
    let (sender, receiver) = std::sync::mpsc::channel();
    memory.on_complete(move || sender.send(()).unwrap());
    receiver.try_recv().expect("it is complete");
    // Fill ends at once, and a fetch has nothing to do.
    let pager = memory.pagers().next().unwrap();
    drop(Fill::start(vec![pager.clone()], FillRate::Unlimited).unwrap());
    assert_eq!(pager.fetch(PageRange::new(0, 1 << 20), FaultPath::BackEnd), Ok(0));
    assert_eq!((pager.stats().source().reads, allocated(&memory)), (0, 0));
}

fn holds_what_was_written(kind: BackingKind, size: u64) {
    let memory = present(kind, size);
    let last = size / PAGE_SIZE - 1;
    let content = |page| vec![(page % 251 + 1) as u8; PAGE_SIZE as usize];
    for page in [0, 300, last] {
        memory.write_slice(&content(page), GuestAddress(page * PAGE_SIZE)).unwrap();
    }
    // Touched, but still zeros.
    memory.write_obj(0u64, GuestAddress(200 * PAGE_SIZE)).unwrap();
    let written = write(&memory);
    assert_eq!(written.done.pages, PageCounts { data: 3, holes: last + 1 - 3 });
    let zeros = vec![0; PAGE_SIZE as usize];
    let expected =
        |page| if [0, 300, last].contains(&page) { content(page) } else { zeros.clone() };
    written.is(expected);
    if kind == BackingKind::Shmem {
        assert_eq!(written.done.from_memory, 4 * PAGE_SIZE);
    }
}

#[test]
fn present_memory_is_copied() {
    holds_what_was_written(BackingKind::Shmem, (16 << 20) + PAGE_SIZE);
}

#[test]
fn present_huge_pages_are_copied() {
    let Some(_pool) = host::huge_pages(3) else { return };
    holds_what_was_written(BackingKind::Hugetlb2M, 6 << 20);
}

/// A memory object that is not a file.
#[derive(Debug)]
struct Bare(MemfdBacking);

impl Backing for Bare {
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
        self.0.remove(units)
    }
    fn file(&self) -> Option<&Arc<File>> {
        None
    }
}

#[test]
fn memory_without_file_is_read_through_its_mapping() {
    let bare = Bare(MemfdBacking::new(BackingKind::Shmem, FIRST * PAGE_SIZE).unwrap());
    let source: Arc<dyn PageSource> = Arc::new(Near(FIRST * PAGE_SIZE));
    let config = PagerConfig {
        backing: Arc::new(bare),
        source,
        image_offset: 0,
        stats: Arc::new(Stats::new()),
        retrier: Retrier::new(RetryPolicy::default(), |_| {}),
    };
    let memory =
        DemandMemory::new(vec![DemandRegion::<()>::new(GuestAddress(0), config, ()).unwrap()])
            .unwrap();
    let expected = half_present(&memory);
    let before = missing(&memory);
    try_write(&memory, &mut |_| true).unwrap().is(expected);
    assert_eq!(missing(&memory), before);
}

#[test]
fn source_failure_ends_copy_and_spares_memory() {
    let pages = FIRST + 64;
    let (source, control) = far(pages * PAGE_SIZE);
    let memory = two(BackingKind::Shmem, 64, source);
    let expected = half_present(&memory);
    let before = missing(&memory);
    // A missing page of the second region.
    let victim = (FIRST..pages).find(|page| page % 7 == 4 && !is_hole(*page)).unwrap();
    control.fail([victim]);
    let error = try_write(&memory, &mut |_| true).err().unwrap();
    let WriteImageError::Source { offset, attempts, .. } = &error else { panic!("{error}") };
    assert_eq!(*attempts, 5);
    // The offset of the run of pages that are read together, without holes and present pages.
    assert!(((victim - 4) * PAGE_SIZE..=victim * PAGE_SIZE).contains(offset), "{error}");
    let text = error.to_string();
    assert!(text.contains("the VM can continue") && !text.contains('\n'), "{text}");
    assert_eq!(missing(&memory), before);

    // The source recovers between attempts.
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(120));
            control.recover();
        });
        try_write(&memory, &mut |_| true).unwrap().is(&expected);
    });
    let mut content = [0; PAGE_SIZE as usize];
    memory.read_slice(&mut content, address(victim)).unwrap();
    assert!(content == expected(victim)[..]);
}

#[test]
fn copy_can_be_cancelled_during_a_hanging_read() {
    let pages = FIRST + 64;
    let (source, control) = far(pages * PAGE_SIZE);
    let _end = control.release_at_the_end();
    let memory = two(BackingKind::Shmem, 64, source);
    // A slow machine is asked before the first chunk as well.
    let error = try_write(&memory, &mut |so_far| so_far.bytes == 0).err().unwrap();
    assert!(
        matches!(error, WriteImageError::Cancelled { bytes, total }
            if bytes == 1 << 20 && total == pages * PAGE_SIZE),
        "{error}"
    );
    // The source does not answer in the first chunk of the second region.
    control.hold([FIRST + 1]);
    let mut asked_in_vain = 0;
    let error = try_write(&memory, &mut |so_far| {
        asked_in_vain += u32::from(so_far.bytes == FIRST * PAGE_SIZE);
        asked_in_vain < 3
    });
    let error = error.err().unwrap();
    assert!(matches!(error, WriteImageError::Cancelled { .. }), "{error}");
    control.release();
    write(&memory).is(page_of);
}

#[test]
fn an_image_of_another_size_is_refused() {
    let memory = present(BackingKind::Shmem, 8192);
    let folder = tempfile::tempdir().unwrap();
    let (image, table) = (folder.path().join("image"), folder.path().join("table"));
    let mut writer = ImageWriter::create(&image, &table, 4096, [0; 16]).unwrap();
    let error = memory.write_image(&mut writer, &mut |_| true).unwrap_err();
    assert!(matches!(error, WriteImageError::Size { memory: 8192, image: 4096 }), "{error}");
}
