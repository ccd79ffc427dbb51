// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory whose image lies on storage that stops answering, with a real file system and kernel.
#![cfg(not(loom))]

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use demand_memory::{
    BackingKind, FaultPath, FetchError, Fill, FillOptions, FillRate, InFlight, MemfdBacking,
    PAGE_SIZE, PageRange, Pager, PagerConfig, Retrier, RetryPolicy, Stats, WaitWatch, Waiter,
};
use demand_source::{
    BlockingSource, Chunk, Completion, Destination, Extent, HashedImage, ImageWriter, LocalFile,
    PageSource, Request, SourceError, Threaded,
};
use test_support::fuse::SlowFile;
use test_support::image::page_of;
use test_support::wait::{A_WHILE, PATIENCE, until};

const PAGES: u64 = 1024;

/// The limit for a prompt answer on a busy machine.
const SOON: Duration = Duration::from_secs(5);

#[test]
fn storage_server() {
    test_support::fuse::serve();
}

fn slow_file() -> Option<SlowFile> {
    SlowFile::new(&(0..PAGES).flat_map(page_of).collect::<Vec<_>>())
}

fn bytes(pages: std::ops::Range<u64>) -> std::ops::Range<u64> {
    pages.start * PAGE_SIZE..pages.end * PAGE_SIZE
}

fn pager(source: impl PageSource + 'static) -> Arc<Pager> {
    let backing = MemfdBacking::new(BackingKind::Shmem, PAGES * PAGE_SIZE).unwrap();
    let retrier = Retrier::new(RetryPolicy::default(), |_| {});
    Pager::new(PagerConfig { retrier, ..PagerConfig::new(Arc::new(backing), Arc::new(source)) })
        .unwrap()
}

fn missing(pager: &Pager, range: PageRange) -> u64 {
    pager.bitmap().count_missing(range)
}

/// Runs `work` on another thread, and returns the channel of its result.
fn later<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || drop(sender.send(work())));
    receiver
}

/// Fetches pages one by one on another thread, without waiting for them.
fn expect_asked(pager: &Arc<Pager>, pages: std::ops::Range<u64>, path: FaultPath) {
    let pager = pager.clone();
    let asked = later(move || pages.for_each(|page| _ = pager.fetch(PageRange::page(page), path)));
    asked.recv_timeout(SOON).expect("fetch waits for nothing");
}

/// Fetches a page on another thread: a page that does not arrive fails the test, which ends.
fn expect_arrival(pager: &Arc<Pager>, page: u64) {
    let pager = pager.clone();
    let ensured =
        later(move || pager.ensure(PageRange::page(page), FaultPath::Guest, &Waiter::new()));
    let outcome = ensured.recv_timeout(PATIENCE);
    assert_eq!(outcome.unwrap_or_else(|_| panic!("page {page} does not arrive")), Ok(()));
}

#[test]
fn fetch_returns_while_the_storage_hangs() {
    let Some(file) = slow_file() else { return };
    let pager = pager(LocalFile::open(file.path()).unwrap());
    let _guard = file.answer_at_the_end();
    file.hold(bytes(1..2));
    // A service thread makes this call for a fault.
    let fetched = later({
        let pager = pager.clone();
        move || pager.fetch(PageRange::page(1), FaultPath::Guest)
    });
    assert_eq!(fetched.recv_timeout(SOON).expect("fetch waits for nothing"), Ok(0));
    until("the read hangs", || file.waiting() == 1);
    // Other pages arrive meanwhile.
    expect_arrival(&pager, 6);
    assert!(pager.bitmap().is_missing(1));
    file.answer();
    pager.ensure(PageRange::page(1), FaultPath::Guest, &Waiter::new()).unwrap();
}

#[test]
fn a_wait_for_hanging_storage_is_kicked() {
    let Some(file) = slow_file() else { return };
    let pager = pager(LocalFile::open(file.path()).unwrap());
    let _guard = file.answer_at_the_end();
    file.fall_silent();
    let waiter = Waiter::new();
    let vcpu = later({
        let (pager, waiter) = (pager.clone(), waiter.clone());
        move || pager.ensure(PageRange::page(1), FaultPath::Guest, &waiter)
    });
    until("the storage is asked", || file.waiting() > 0);
    waiter.kick();
    assert_eq!(vcpu.recv_timeout(SOON).expect("it is kicked"), Err(FetchError::Kicked));
}

#[test]
fn unanswered_waits_are_found() {
    let Some(file) = slow_file() else { return };
    let pager = pager(LocalFile::open(file.path()).unwrap());
    let _guard = file.answer_at_the_end();
    file.hold(bytes(1..9));
    let mut watch = WaitWatch::default();
    let mut look = || watch.look([&pager]);
    pager.fetch(PageRange::page(1), FaultPath::Guest).unwrap();
    // One request in flight: pages behind it stay missing.
    let in_flight = InFlight::Fixed(FillOptions::CHUNK);
    let options = FillOptions { in_flight, ..FillOptions::default() };
    let fill = Fill::start(vec![pager.clone()], options).unwrap();
    until("fill hangs", || file.waiting() > 1);
    assert!(look().is_none(), "no thread but that of fill waits");
    drop(fill);
    let waiter = Waiter::new();
    let vcpu = later({
        let (pager, waiter) = (pager.clone(), waiter.clone());
        move || pager.ensure(PageRange::new(0, 4), FaultPath::Guest, &waiter)
    });
    until("a thread waits", || waiter.is_waiting());
    // Page 0 may still be on its way.
    until("it waits for what hangs", || {
        look().is_some_and(|wait| wait.image_offset() == PAGE_SIZE)
    });
    thread::sleep(A_WHILE);
    waiter.kick();
    assert_eq!(vcpu.recv_timeout(SOON).expect("it is kicked"), Err(FetchError::Kicked));
    // Later waits are shorter. This is how a back-end's fault waits.
    let (sender, arrived) = mpsc::channel();
    pager.fetch(PageRange::page(5), FaultPath::BackEnd).unwrap();
    pager.bitmap().when_present(PageRange::page(5), move || sender.send(()).unwrap());
    let wait = look().expect("the page was waited for and is missing");
    assert_eq!(wait.image_offset(), PAGE_SIZE);
    assert!(wait.waiting() >= A_WHILE && !wait.is_over());
    file.answer();
    arrived.recv_timeout(PATIENCE).expect("all pages arrive");
    until("the wait is over", || wait.is_over());
    assert!(look().is_none());
    file.hold(bytes(900..901));
    let (sender, arrived) = mpsc::channel();
    pager.fetch(PageRange::page(900), FaultPath::BackEnd).unwrap();
    pager.bitmap().when_present(PageRange::page(900), move || sender.send(()).unwrap());
    let wait = look().expect("a callback waits");
    assert_eq!(wait.image_offset(), 900 * PAGE_SIZE);
    file.answer();
    arrived.recv_timeout(PATIENCE).expect("the page arrives");
}

#[test]
fn failed_fetches_count_as_answered() {
    let Some(file) = slow_file() else { return };
    file.fail(bytes(7..8));
    let backing = MemfdBacking::new(BackingKind::Shmem, PAGES * PAGE_SIZE).unwrap();
    let first = Duration::from_secs(600);
    let policy = RetryPolicy { first, longest: first, limit: None };
    let retrier = Retrier::new(policy, |_| {});
    let (source, stats) = (LocalFile::open(file.path()).unwrap(), Arc::new(Stats::new()));
    let pager = Pager::new(PagerConfig {
        stats,
        retrier: retrier.clone(),
        ..PagerConfig::new(Arc::new(backing), Arc::new(source))
    })
    .unwrap();
    let waiter = Waiter::new();
    let vcpu = later({
        let (pager, waiter) = (pager.clone(), waiter.clone());
        move || pager.ensure(PageRange::page(7), FaultPath::Guest, &waiter)
    });
    until("a thread waits", || waiter.is_waiting());
    until("the fetch has failed", || retrier.is_failing());
    let mut watch = WaitWatch::default();
    for _ in 0..3 {
        assert!(watch.look([&pager]).is_none());
    }
    pager.stop();
    assert_eq!(vcpu.recv_timeout(SOON).expect("the wait ends"), Err(FetchError::Stopped));
}

#[test]
fn hanging_reads_leave_threads_for_others() {
    let Some(file) = slow_file() else { return };
    let pager = pager(LocalFile::open(file.path()).unwrap());
    let _guard = file.answer_at_the_end();
    // One read less than the source has threads.
    file.hold(bytes(1..32));
    expect_asked(&pager, 1..32, FaultPath::Guest);
    until("they hang", || file.waiting() == 31);
    [40, 41, 600].into_iter().for_each(|page| expect_arrival(&pager, page));
    // Hanging reads of background fill leave threads for demand.
    file.answer();
    until("they arrive", || missing(&pager, PageRange::new(1, 31)) == 0);
    file.hold(bytes(100..200));
    expect_asked(&pager, 100..200, FaultPath::Fill);
    until("fill hangs", || file.waiting() == 16);
    thread::sleep(A_WHILE);
    assert_eq!(file.waiting(), 16);
    expect_arrival(&pager, 900);
}

#[test]
fn fill_ends_while_the_storage_hangs() {
    let Some(file) = slow_file() else { return };
    let pager = pager(LocalFile::open(file.path()).unwrap());
    let _guard = file.answer_at_the_end();
    file.fall_silent();
    let fill = Fill::start(vec![pager.clone()], FillRate::Unlimited).unwrap();
    until("the storage is asked", || file.waiting() > 0);
    let ended = later(move || drop(fill));
    ended.recv_timeout(SOON).expect("the end of fill waits for nothing");
    // Reads under way keep the memory, and its end waits for none of them.
    pager.stop();
    let memory = Arc::downgrade(&pager);
    let ended = later(move || drop(pager));
    ended.recv_timeout(SOON).expect("the end of the memory waits for nothing");
    file.answer();
    until("the memory ends with the last read", || memory.strong_count() == 0);
}

#[test]
fn checked_image_never_blocks_the_fault_service() {
    let folder = tempfile::tempdir().unwrap();
    let (image, table) = (folder.path().join("memory"), folder.path().join("hashes"));
    let mut writer = ImageWriter::create(&image, &table, PAGES * PAGE_SIZE, [7; 16]).unwrap();
    for page in 0..PAGES {
        writer.write(page * PAGE_SIZE, &page_of(page)).unwrap();
    }
    writer.finish().unwrap();
    // The pages can be read at once, but reads of their hashes hang.
    let Some(file) = SlowFile::new(&std::fs::read(&table).unwrap()) else { return };
    let pager = pager(HashedImage::open(&image, file.path()).unwrap());
    let _guard = file.answer_at_the_end();
    file.fall_silent();
    let fetched = later({
        let pager = pager.clone();
        move || pager.fetch(PageRange::new(0, 512), FaultPath::BackEnd)
    });
    let fetched = fetched.recv_timeout(SOON).expect("fetch waits for nothing");
    assert!(fetched.is_ok());
    assert_eq!(missing(&pager, PageRange::new(1, 4)), 4, "nothing is present unchecked");
    file.answer();
    let begun = Instant::now();
    pager.ensure(PageRange::new(0, 512), FaultPath::BackEnd, &Waiter::new()).unwrap();
    assert!(begun.elapsed() < PATIENCE);
}

/// The failures that an observer was told: pages, wanted, given up, error text.
type Told = Arc<Mutex<Vec<(PageRange, bool, bool, String)>>>;

fn observed(source: impl PageSource + 'static) -> (Arc<Pager>, Told) {
    let backing = MemfdBacking::new(BackingKind::Shmem, PAGES * PAGE_SIZE).unwrap();
    let told = Told::default();
    let seen = told.clone();
    let policy = RetryPolicy {
        longest: Duration::from_millis(100),
        limit: Some(Duration::from_millis(300)),
        ..RetryPolicy::default()
    };
    let retrier = Retrier::new(policy, move |failure| {
        let words = failure.error.to_string();
        seen.lock().unwrap().push((failure.pages, failure.wanted, failure.given_up, words));
    });
    let stats = Arc::new(Stats::new());
    let pager = Pager::new(PagerConfig {
        stats,
        retrier,
        ..PagerConfig::new(Arc::new(backing), Arc::new(source))
    })
    .unwrap();
    (pager, told)
}

#[test]
fn an_altered_page_costs_no_neighbour() {
    let folder = tempfile::tempdir().unwrap();
    let (image, table) = (folder.path().join("memory"), folder.path().join("hashes"));
    let mut writer = ImageWriter::create(&image, &table, PAGES * PAGE_SIZE, [7; 16]).unwrap();
    for page in 0..PAGES {
        writer.write(page * PAGE_SIZE, &page_of(page)).unwrap();
    }
    writer.finish().unwrap();
    let flip = |page: u64| {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&image).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, page * PAGE_SIZE + 9).unwrap();
        file.write_all_at(&[byte[0] ^ 1], page * PAGE_SIZE + 9).unwrap();
    };
    // One at the start and three in the middle, two of them adjacent.
    let altered = [1, 301, 303, 304];
    altered.into_iter().for_each(flip);
    let (pager, told) = observed(HashedImage::open(&image, &table).unwrap());
    let unit = PageRange::new(0, 512);
    pager.fetch(unit, FaultPath::BackEnd).unwrap();
    let begun = Instant::now();
    until("the neighbours arrive", || missing(&pager, unit) == altered.len() as u64);
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    altered.iter().for_each(|page| assert!(pager.bitmap().is_missing(*page)));
    until("each is named", || {
        let told = told.lock().unwrap();
        altered.iter().all(|page| {
            let offset = format!("offset {} of", page * PAGE_SIZE);
            told.iter().any(|(pages, wanted, _, words)| {
                *pages == PageRange::page(*page) && *wanted && words.contains(&offset)
            })
        })
    });
    altered.into_iter().for_each(flip);
    pager.ensure(unit, FaultPath::BackEnd, &Waiter::new()).unwrap();
}

#[test]
fn fill_passes_over_an_unreadable_page() {
    let Some(file) = slow_file() else { return };
    file.fail(bytes(131..132));
    let (pager, told) = observed(LocalFile::open(file.path()).unwrap());
    // One request in flight: if the fill waited for the page, nothing behind it would arrive.
    let in_flight = InFlight::Fixed(FillOptions::CHUNK);
    let options = FillOptions { in_flight, ..FillOptions::default() };
    let _fill = Fill::start(vec![pager.clone()], options).unwrap();
    let all = PageRange::new(0, PAGES);
    until("all others arrive", || missing(&pager, all) == 1);
    assert!(pager.bitmap().is_missing(131));
    // No thread waits for the page: it is reported, and never given up.
    thread::sleep(Duration::from_millis(500));
    {
        let told = told.lock().unwrap();
        let (pages, ..) = told.last().expect("it is told");
        assert_eq!(*pages, PageRange::page(131));
        assert!(told.iter().all(|(_, wanted, given_up, _)| !wanted && !given_up), "{told:?}");
    }
    let vcpu = later({
        let pager = pager.clone();
        move || pager.ensure(PageRange::page(131), FaultPath::Guest, &Waiter::new())
    });
    until("it is given up", || told.lock().unwrap().iter().any(|(_, _, given_up, _)| *given_up));
    file.recover();
    assert_eq!(vcpu.recv_timeout(PATIENCE).expect("it arrives"), Ok(()));
    until("fill is done", || pager.bitmap().is_complete());
}

/// An unavailable source is asked for at most two reads per reported failure.
#[test]
fn an_absent_source_is_asked_for_little() {
    let Some(file) = slow_file() else { return };
    file.fail(bytes(0..PAGES));
    let (pager, told) = observed(LocalFile::open(file.path()).unwrap());
    pager.fetch(PageRange::new(0, 512), FaultPath::BackEnd).unwrap();
    until("it is tried again", || told.lock().unwrap().len() >= 4);
    let (told, errors) = (told.lock().unwrap().len() as u64, pager.stats().source().errors);
    assert!(errors <= 2 * told + 2, "{errors} errors were told {told} times");
    file.recover();
    pager.ensure(PageRange::new(0, 512), FaultPath::BackEnd, &Waiter::new()).unwrap();
}

/// A source whose code panics, on the thread that asks it and on others.
struct Panics(AtomicUsize);

impl BlockingSource for Panics {
    fn size(&self) -> u64 {
        PAGES * PAGE_SIZE
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        assert_ne!(self.0.fetch_add(1, Ordering::Relaxed), 0, "on purpose");
        Ok(Extent::Data { end: PAGES * PAGE_SIZE })
    }
    fn read(&self, _: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        assert!(self.0.fetch_add(1, Ordering::Relaxed) > 3, "on purpose");
        to.write_at(0, &vec![0; to.len()]);
        Ok(())
    }
}

#[test]
fn a_panic_of_the_source_loses_no_page() {
    let (pager, told) = observed(Threaded::new(Panics(AtomicUsize::new(0)), 1).unwrap());
    let _fill = Fill::start(vec![pager.clone()], FillRate::Unlimited).unwrap();
    until("fill completes all", || pager.bitmap().is_complete());
    assert!(told.lock().unwrap().iter().any(|(.., words)| words.contains("panicked")));
}

/// A source whose first request panics, as a whole source does that is not run by [`Threaded`].
struct PanicsOnRequest(AtomicUsize);

impl PageSource for PanicsOnRequest {
    fn size(&self) -> u64 {
        PAGES * PAGE_SIZE
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: PAGES * PAGE_SIZE })
    }
    fn submit(&self, request: Request) -> Completion {
        assert!(self.0.fetch_add(1, Ordering::Relaxed) > 0, "as the test wants it");
        for Chunk { mut destination, .. } in request.chunks {
            destination.write_at(0, &vec![7; destination.len()]);
        }
        Completion::ready(Ok(()))
    }
}

#[test]
fn panic_of_a_request_is_reported_as_such() {
    let (pager, told) = observed(PanicsOnRequest(AtomicUsize::new(0)));
    pager.ensure(PageRange::page(3), FaultPath::Guest, &Waiter::new()).unwrap();
    let told = told.lock().unwrap();
    assert!(told.len() == 1 && told[0].3.contains("its code panicked"), "{told:?}");
}

/// A source that panics when it is asked for an extent that it has read.
struct PanicsLate(AtomicUsize);

impl BlockingSource for PanicsLate {
    fn size(&self) -> u64 {
        PAGES * PAGE_SIZE
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        assert_eq!(self.0.load(Ordering::Relaxed), 0, "as the test wants it");
        Ok(Extent::Data { end: PAGES * PAGE_SIZE })
    }
    fn read(&self, _: u64, destination: &mut Destination<'_>) -> Result<(), SourceError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        destination.write_at(0, &vec![7; destination.len()]);
        Ok(())
    }
}

#[test]
fn late_panic_of_the_source_loses_no_page() {
    let (pager, _) = observed(Threaded::new(PanicsLate(AtomicUsize::new(0)), 1).unwrap());
    pager.fetch(PageRange::page(3), FaultPath::Guest).unwrap();
    until("the page arrives", || !pager.bitmap().is_missing(3));
}
