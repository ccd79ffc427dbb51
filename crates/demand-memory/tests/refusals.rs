// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pages that a source refuses for good, and requests that no longer matter when their turn comes.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]
#![cfg(not(loom))]

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, FaultPath, FetchError, Fill, FillRate, MemfdBacking,
    PAGE_SIZE, PageRange, Pager, PagerConfig, Retrier, RetryPolicy, Waiter, WriteImageError,
};
use demand_source::{
    BlockingSource, Destination, Extent, ImageWriter, PageSource, Retry, SourceError, Threaded,
};
use test_support::image::page_of;
use test_support::wait::{A_WHILE, PATIENCE, until};
use vm_memory::GuestAddress;

const PAGES: u64 = 1024;

/// A source that refuses some pages for good, and counts its reads.
#[derive(Clone, Default)]
struct Refuses(Arc<State>);

#[derive(Default)]
struct State {
    refused: Mutex<BTreeSet<u64>>,
    reads: Mutex<Vec<Range<u64>>>,
    /// Held while no read may begin.
    gate: Mutex<()>,
}

impl Refuses {
    fn refuse(&self, pages: impl IntoIterator<Item = u64>) {
        self.0.refused.lock().unwrap().extend(pages);
    }
    fn relent(&self) {
        self.0.refused.lock().unwrap().clear();
    }
    fn reads(&self) -> usize {
        self.0.reads.lock().unwrap().len()
    }
}

impl BlockingSource for Refuses {
    fn size(&self) -> u64 {
        PAGES * PAGE_SIZE
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: PAGES * PAGE_SIZE })
    }
    fn read(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        let pages = offset / PAGE_SIZE..(offset + to.len() as u64) / PAGE_SIZE;
        self.0.reads.lock().unwrap().push(pages.clone());
        drop(self.0.gate.lock().unwrap());
        if self.0.refused.lock().unwrap().range(pages.clone()).next().is_some() {
            return Err(SourceError::other("no such object; restore it", Retry::Never));
        }
        for (page, at) in pages.zip((0..).step_by(PAGE_SIZE as usize)) {
            to.write_at(at, &page_of(page));
        }
        Ok(())
    }
}

/// The failures that an observer was told: pages, wanted, given up.
type Reports = Arc<Mutex<Vec<(PageRange, bool, bool)>>>;

/// Returns a region that `source` fills with one thread or on the calling thread, its retrier, and
/// the reports of failures.
fn region(source: impl PageSource + 'static) -> (DemandRegion, Retrier, Reports) {
    let backing = MemfdBacking::new(BackingKind::Shmem, PAGES * PAGE_SIZE).unwrap();
    let reports = Reports::default();
    let policy = RetryPolicy { longest: Duration::from_millis(50), ..RetryPolicy::default() };
    let retrier = Retrier::new(policy, {
        let reports = reports.clone();
        move |failure| {
            assert_eq!(failure.retry, Retry::Never);
            reports.lock().unwrap().push((failure.pages, failure.wanted, failure.given_up));
        }
    });
    let config = PagerConfig {
        retrier: retrier.clone(),
        ..PagerConfig::new(Arc::new(backing), Arc::new(source))
    };
    (DemandRegion::new(GuestAddress(0), config, ()).unwrap(), retrier, reports)
}

/// Waits for pages on a thread, as a vCPU does.
fn wait_for(
    pager: &Arc<Pager>,
    pages: PageRange,
    path: FaultPath,
) -> mpsc::Receiver<Result<(), FetchError>> {
    let (sender, receiver) = mpsc::channel();
    let pager = pager.clone();
    thread::spawn(move || sender.send(pager.ensure(pages, path, &Waiter::new())));
    receiver
}

fn missing(pager: &Pager) -> u64 {
    pager.bitmap().count_missing(PageRange::new(0, PAGES))
}

#[test]
fn refused_page_waits_for_a_request() {
    let source = Refuses::default();
    source.refuse([3]);
    let (region, retrier, reports) = region(Threaded::new(source.clone(), 2).unwrap());
    let vcpu = wait_for(region.pager(), PageRange::page(3), FaultPath::Guest);
    until("it is reported", || reports.lock().unwrap().len() == 1);
    // Many pauses of the policy pass without another attempt, and without a page.
    thread::sleep(4 * A_WHILE);
    assert_eq!(*reports.lock().unwrap(), [(PageRange::page(3), true, true)]);
    assert_eq!(source.reads(), 1);
    assert!(retrier.is_failing() && region.pager().bitmap().is_missing(3));
    assert!(vcpu.try_recv().is_err(), "the fault stays open");
    // Asked again, the source still refuses, and that is reported, too.
    retrier.retry_now();
    until("it is reported again", || reports.lock().unwrap().len() == 2);
    assert_eq!(source.reads(), 2);
    source.relent();
    thread::sleep(A_WHILE);
    assert_eq!(source.reads(), 2);
    retrier.retry_now();
    assert_eq!(vcpu.recv_timeout(PATIENCE).expect("the page arrives"), Ok(()));
    until("nothing is left to retry", || !retrier.is_failing());
}

#[test]
fn refused_pages_cost_no_neighbour() {
    // The pages that are tried first are refused, and some others.
    let refused: Vec<u64> = [0, 256].into_iter().chain(300..310).chain([511]).collect();
    let source = Refuses::default();
    source.refuse(refused.clone());
    let (region, retrier, reports) = region(Threaded::new(source.clone(), 2).unwrap());
    let unit = PageRange::new(0, 512);
    let back_end = wait_for(region.pager(), unit, FaultPath::BackEnd);
    let left = PAGES - 512 + refused.len() as u64;
    until("the others arrive", || missing(region.pager()) == left);
    assert!(refused.iter().all(|page| region.pager().bitmap().is_missing(*page)));
    until("each is reported", || {
        let reports = reports.lock().unwrap();
        refused.iter().all(|page| reports.iter().any(|report| report.0 == PageRange::page(*page)))
    });
    source.relent();
    retrier.retry_now();
    assert_eq!(back_end.recv_timeout(PATIENCE).expect("all arrive"), Ok(()));
}

#[test]
fn fill_passes_over_refused_pages() {
    let source = Refuses::default();
    source.refuse((64..128).chain([200]));
    let (region, retrier, reports) = region(Threaded::new(source.clone(), 2).unwrap());
    let pager = region.pager();
    let fill = Fill::start(vec![pager.clone()], FillRate::Unlimited).unwrap();
    until("all others arrive", || missing(pager) == 65);
    until("the single page is reported", || {
        reports.lock().unwrap().iter().any(|report| report.0 == PageRange::page(200))
    });
    // A wholly refused run is tried by a few of its pages only, and then left alone.
    let reads = source.reads();
    assert!(reads < 64, "{reads} reads");
    thread::sleep(4 * A_WHILE);
    assert_eq!(source.reads(), reads);
    assert!(reports.lock().unwrap().iter().all(|(_, wanted, given_up)| !wanted && !given_up));
    // A thread that needs one of them is not left without a word.
    let vcpu = wait_for(pager, PageRange::page(70), FaultPath::Guest);
    until("its wait is reported", || reports.lock().unwrap().iter().any(|report| report.2));
    assert!(vcpu.try_recv().is_err());
    source.relent();
    retrier.retry_now();
    assert_eq!(vcpu.recv_timeout(PATIENCE).expect("the page arrives"), Ok(()));
    // Pages that nothing needs may be looked at just when all are to be tried again.
    until("fill is done", || {
        retrier.retry_now();
        pager.bitmap().is_complete()
    });
    drop(fill);
}

#[test]
fn copy_of_refused_page_fails_at_once() {
    let source = Refuses::default();
    source.refuse([7]);
    let (region, ..) = region(Threaded::new(source.clone(), 1).unwrap());
    let memory = DemandMemory::new(vec![region]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (image, table) = (folder.path().join("memory"), folder.path().join("hashes"));
    let mut writer = ImageWriter::create(&image, &table, PAGES * PAGE_SIZE, [7; 16]).unwrap();
    let error = memory.write_image(&mut writer, &mut |_| true).unwrap_err();
    assert!(matches!(error, WriteImageError::Source { attempts: 1, .. }), "{error}");
}

#[test]
fn queued_reads_of_stopped_memory_are_not_made() {
    let source = Refuses::default();
    let (region, ..) = region(Threaded::new(source.clone(), 1).unwrap());
    let pager = region.pager();
    let gate = source.0.gate.lock().unwrap();
    for page in 0..8 {
        pager.fetch(PageRange::page(page), FaultPath::Guest).unwrap();
    }
    until("the first is read", || source.reads() == 1);
    pager.stop();
    drop(gate);
    // The pager, which each request keeps, goes once the last one is answered.
    let pager = Arc::downgrade(region.pager());
    drop(region);
    until("the requests end", || pager.strong_count() == 0);
    assert_eq!(source.reads(), 1);
}

/// The attempt that waits for a request keeps the pager; the end of the memory ends it.
#[test]
fn stopped_memory_of_refused_pages_is_freed() {
    let source = Refuses::default();
    source.refuse([7]);
    let (told, failures) = mpsc::channel();
    let retrier = Retrier::new(RetryPolicy::default(), move |failure| {
        let _ = told.send(failure.given_up);
    });
    let backing = MemfdBacking::new(BackingKind::Shmem, PAGES * PAGE_SIZE).unwrap();
    let threaded = Arc::new(Threaded::new(source, 1).unwrap());
    let config =
        PagerConfig { retrier: retrier.clone(), ..PagerConfig::new(Arc::new(backing), threaded) };
    let pager = Pager::new(config).unwrap();
    pager.fetch(PageRange::new(7, 1), FaultPath::Vmm).unwrap();
    assert!(failures.recv_timeout(PATIENCE).unwrap(), "it is refused for good");
    // A report comes while the pages can already be tried again.
    assert!(retrier.is_failing());
    pager.stop();
    let freed = Arc::downgrade(&pager);
    drop(pager);
    until("the pager is freed", || freed.strong_count() == 0);
    // The attempt that has freed it may not have ended.
    until("nothing is left to retry", || !retrier.is_failing());
}
