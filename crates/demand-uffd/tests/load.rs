// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Huge pages that are created together with their content, from a file.

mod common;

use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{base, expect_blocked, mapping, read_later, uffd};
use demand_memory::{
    Backing, BackingKind, FaultPath, LoadUnit, MemfdBacking, PAGE_SIZE, PageRange, Pager,
    PagerConfig, Retrier, RetryPolicy,
};
use demand_source::{LocalFile, MappedBytes};
use demand_uffd::{ArmedMapping, Cause, DEFAULT_THREADS, FaultService, RangeError, UnitLoader};
use test_support::host::huge_pages;
use test_support::image::word_of;
use test_support::wait::{PATIENCE, until};

const UNIT: u64 = 2 << 20;
const UNITS: u64 = 4;
const SIZE: u64 = UNITS * UNIT;

/// The units that a loader was asked for, with the causes of failures; at the end, [`FINISHED`].
type Loads = Arc<Mutex<Vec<(u64, Option<Cause>)>>>;

const FINISHED: u64 = u64::MAX;

struct Watched(UnitLoader, Loads);

impl LoadUnit for Watched {
    fn load(&self, offset: u64, content: MappedBytes<'_>) -> std::io::Result<()> {
        let result = self.0.load(offset, content);
        let cause = result.as_ref().err().map(|error| {
            let error = error.get_ref().expect("the wrapper's error is kept");
            error.downcast_ref::<RangeError>().expect("it is about a range").cause()
        });
        self.1.lock().unwrap().push((offset / UNIT, cause));
        result
    }
    fn finish(&self) {
        self.1.lock().unwrap().push((FINISHED, None));
        self.0.finish();
    }
}

/// Creates an image file, without holes except for one page of unit 1. It lies in memory, so that
/// reading it never blocks.
fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(SIZE).unwrap();
    for page in (0..SIZE / PAGE_SIZE).filter(|page| *page != 600) {
        let words = (0..PAGE_SIZE / 8).map(|i| word(page * PAGE_SIZE + i * 8));
        let bytes: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
        file.as_file().write_all_at(&bytes, page * PAGE_SIZE).unwrap();
    }
    file
}

/// Returns the image's word: like that of other tests, but never 0.
fn word(offset: u64) -> u64 {
    word_of(offset) | 1
}

struct World {
    backing: Arc<MemfdBacking>,
    pager: Arc<Pager>,
    loads: Loads,
    failures: Arc<Mutex<Vec<String>>>,
    file: tempfile::NamedTempFile,
}

fn world() -> World {
    let file = image();
    let backing = common::backing(BackingKind::Hugetlb2M, SIZE);
    let failures = Arc::new(Mutex::new(vec![]));
    let policy = RetryPolicy { longest: Duration::from_millis(20), ..RetryPolicy::default() };
    let told = failures.clone();
    let retrier =
        Retrier::new(policy, move |failure| told.lock().unwrap().push(failure.error.to_string()));
    let source = Arc::new(LocalFile::open(file.path()).unwrap());
    let pager =
        Pager::new(PagerConfig { retrier, ..PagerConfig::new(backing.clone(), source) }).unwrap();
    let loads = Loads::default();
    let loader = UnitLoader::new(&*backing).unwrap();
    pager.set_unit_loader(Arc::new(Watched(loader, loads.clone())));
    World { backing, pager, loads, failures, file }
}

#[test]
fn wholly_missing_units_come_with_their_content() {
    let Some(_pool) = huge_pages(UNITS) else { return };
    let World { pager, loads, .. } = world();
    let (mapping, uffd) = (mapping(&pager), uffd());
    let armed = ArmedMapping::foreign(&uffd, base(&mapping), &pager).unwrap();
    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    service.add(&[armed]).unwrap();
    // Unit 2 already has a page.
    pager.fetch(PageRange::page(2 * 512 + 7), FaultPath::Guest).unwrap();
    for page in (0..SIZE / PAGE_SIZE).rev() {
        let offset = page * PAGE_SIZE;
        let read = read_later(&mapping, offset + 8).recv_timeout(PATIENCE).unwrap();
        let hole = page == 600;
        assert_eq!(read, if hole { 0 } else { word(offset + 8) }, "at {offset:#x}");
    }
    service.finish().unwrap();
    // Unit 1 has a hole, which is not read.
    assert_eq!(*loads.lock().unwrap(), [(3, None), (0, None), (FINISHED, None)]);
    let report = pager.stats().path(FaultPath::BackEnd);
    assert_eq!(report.faults, UNITS);
}

#[test]
fn units_of_longer_runs_are_loaded_until_complete() {
    let Some(_pool) = huge_pages(UNITS) else { return };
    let World { backing, pager, loads, .. } = world();
    assert_eq!(pager.fetch(PageRange::new(0, 3 * 512), FaultPath::Vmm), Ok(3 * 512));
    assert_eq!(*loads.lock().unwrap(), [(0, None), (2, None)]);
    assert_eq!(pager.fetch(PageRange::new(3 * 512, 512), FaultPath::Vmm), Ok(512));
    assert!(pager.bitmap().is_complete());
    assert_eq!(loads.lock().unwrap()[2..], [(3, None), (FINISHED, None)]);
    // A second loader comes too late.
    let loader = Arc::new(UnitLoader::new(&*backing).unwrap());
    pager.set_unit_loader(loader.clone());
    // SAFETY: no memory belongs to an empty range.
    let nothing = unsafe { MappedBytes::new(std::ptr::NonNull::dangling(), 0) };
    assert_eq!(loader.load(0, nothing).unwrap_err().raw_os_error(), Some(libc::EBADF));
}

/// As after an attempt that failed halfway.
#[test]
fn existing_unit_is_filled_in_place() {
    let Some(_pool) = huge_pages(UNITS) else { return };
    let World { backing, pager, loads, .. } = world();
    backing.allocate(PageRange::new(512 * 3, 512)).unwrap();
    assert_eq!(pager.fetch(PageRange::new(512 * 3, 512), FaultPath::BackEnd), Ok(512));
    assert_eq!(*loads.lock().unwrap(), [(3, Some(Cause::Exists))]);
    let mapping = mapping(&pager);
    for offset in (3 * UNIT..SIZE).step_by(8) {
        assert_eq!(common::read(&mapping, offset), word(offset), "at {offset:#x}");
    }
}

#[test]
fn shrunk_image_gives_no_zeros() {
    // The first case's reader may still hold its memory while the second case runs.
    let Some(_pool) = huge_pages(2 * UNITS) else { return };
    // By whole pages, which the kernel reports, and by a part of one, which reads as zeros.
    shrunk(UNIT);
    shrunk(SIZE - 100);
}

fn shrunk(to: u64) {
    let World { pager, loads, failures, file, .. } = world();
    let (mapping, uffd) = (mapping(&pager), uffd());
    let armed = ArmedMapping::foreign(&uffd, base(&mapping), &pager).unwrap();
    // One thread, which remembers the end of the file's data.
    let service = FaultService::start(1).unwrap();
    service.add(&[armed]).unwrap();
    // The file is now known to be data to its end, and is mapped.
    let before = read_later(&mapping, 2 * UNIT + 8).recv_timeout(PATIENCE);
    assert_eq!(before, Ok(word(2 * UNIT + 8)));
    file.as_file().set_len(to).unwrap();
    let reader = read_later(&mapping, 3 * UNIT + 8 + PAGE_SIZE);
    until("the failure is told", || !failures.lock().unwrap().is_empty());
    expect_blocked(&reader);
    let told = failures.lock().unwrap()[0].clone();
    assert!(told.contains("end"), "{told}");
    assert_eq!(loads.lock().unwrap()[0], (2, None));
    assert!(pager.bitmap().is_missing(SIZE / PAGE_SIZE - 1));
}
