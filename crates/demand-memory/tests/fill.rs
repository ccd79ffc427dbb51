// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Background fill from a distant source: throughput, order, bounds, and the faults beside it.
#![cfg(not(loom))]
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use demand_memory::{
    BackingKind, FaultPath, Fill, FillOptions, FillOrder, FillRange, FillRate, InFlight,
    MemfdBacking, PAGE_SIZE, PageRange, Pager, PagerConfig, Waiter,
};
use demand_source::{
    BlockingSource, Completion, Destination, Extent, PageSource, Request, SourceError, Threaded,
};
use test_support::wait::{A_WHILE, PATIENCE, until};

const CHUNK: u64 = FillOptions::CHUNK;

/// The content of each read, by its offset.
fn byte_of(offset: u64) -> u8 {
    (offset / PAGE_SIZE % 251) as u8
}

/// A source at a distance: each read takes a round trip.
struct Far {
    size: u64,
    round_trip: Duration,
    /// The offsets that were read, in order.
    reads: Arc<Mutex<Vec<u64>>>,
    /// Bytes that are being read, and the most there were.
    in_flight: AtomicU64,
    most: Arc<AtomicU64>,
    /// A message for each read that may continue, if reads wait for one.
    gate: Option<Mutex<Receiver<()>>>,
}

impl Far {
    fn new(size: u64, round_trip: Duration) -> Self {
        Far {
            size,
            round_trip,
            reads: Arc::default(),
            in_flight: AtomicU64::new(0),
            most: Arc::default(),
            gate: None,
        }
    }
}

impl BlockingSource for Far {
    fn size(&self) -> u64 {
        self.size
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: self.size })
    }
    fn read(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        let len = to.len() as u64;
        self.reads.lock().unwrap().push(offset);
        let now = self.in_flight.fetch_add(len, Ordering::Relaxed) + len;
        self.most.fetch_max(now, Ordering::Relaxed);
        if let Some(gate) = &self.gate {
            gate.lock().unwrap().recv().map_err(|_| SourceError::Abandoned)?;
        }
        thread::sleep(self.round_trip);
        to.write_at(0, &vec![byte_of(offset); to.len()]);
        self.in_flight.fetch_sub(len, Ordering::Relaxed);
        Ok(())
    }
}

fn pager_of(source: Arc<dyn PageSource>, image_offset: u64, size: u64) -> Arc<Pager> {
    let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, size).unwrap());
    Pager::new(PagerConfig { image_offset, ..PagerConfig::new(backing, source) }).unwrap()
}

fn far(size: u64, threads: usize, round_trip: Duration) -> Arc<Pager> {
    let source = Far::new(size, round_trip);
    pager_of(Arc::new(Threaded::new(source, threads).unwrap()), 0, size)
}

/// Fills the memory of a pager, and returns the bytes per second and the window at the end.
fn fill_all(pager: &Arc<Pager>, in_flight: InFlight) -> (u64, u64) {
    let begun = Instant::now();
    let options = FillOptions { in_flight, ..FillOptions::default() };
    let fill = Fill::start(vec![pager.clone()], options).unwrap();
    until("all pages are present", || pager.bitmap().is_complete());
    let rate = (pager.pages() * PAGE_SIZE) as f64 / begun.elapsed().as_secs_f64();
    (rate as u64, fill.in_flight_limit())
}

#[test]
fn fill_adapts_to_the_distance() {
    // So long that a busy machine is not the limit.
    let round_trip = Duration::from_millis(200);
    let fixed = fill_all(&far(4 << 20, 128, round_trip), InFlight::Fixed(2 * CHUNK));
    let adaptive = fill_all(&far(128 << 20, 128, round_trip), InFlight::default());
    let show = |rate: u64| format!("{round_trip:?}: {:.1} MB/s", rate as f64 / 1e6);
    println!("{} with two requests in flight", show(fixed.0));
    println!("{} adapting, {} KiB in flight at last", show(adaptive.0), adaptive.1 >> 10);
    assert_eq!(fixed.1, 2 * CHUNK);
    assert!(fixed.0 < 2_750_000, "{fixed:?}");
    // The source can serve 64 requests at a time; on a busy machine it serves fewer.
    assert!(adaptive.0 > 4 * fixed.0, "{adaptive:?} after {fixed:?}");
}

/// The latencies of faults, in ascending order.
#[derive(Default)]
struct Latencies(Vec<Duration>);

impl Latencies {
    /// Touches a page, and notes how long that takes.
    fn touch(&mut self, pager: &Arc<Pager>, page: u64) {
        let begun = Instant::now();
        pager.ensure(PageRange::page(page), FaultPath::Guest, &Waiter::new()).unwrap();
        self.0.push(begun.elapsed());
        self.0.sort();
    }

    fn percentile(&self, percent: usize) -> Duration {
        self.0[(self.0.len() * percent / 100).min(self.0.len() - 1)]
    }
}

#[test]
fn fill_delays_no_fault() {
    let [alone, filled] = [(); 2].map(|()| far(1 << 30, 64, Duration::from_millis(50)));
    let fill = Fill::start(vec![filled.clone()], FillRate::Unlimited).unwrap();
    until("fill has adapted", || fill.in_flight_limit() > 16 * CHUNK);
    let bytes = || filled.stats().path(FaultPath::Fill).bytes_fetched;
    let (begun, before) = (Instant::now(), bytes());
    let (mut without, mut beside) = (Latencies::default(), Latencies::default());
    for fault in 0..40 {
        // Scattered, from the end on. By turns, because a busy machine delays both.
        let page = filled.pages() - 1 - fault * 37;
        assert!(filled.bitmap().is_missing(page), "fill has reached the end");
        without.touch(&alone, page);
        beside.touch(&filled, page);
    }
    let rate = (bytes() - before) as f64 / begun.elapsed().as_secs_f64() / 1e6;
    let show = |latencies: &Latencies| {
        let [p50, p99] = [50, 99].map(|percent| latencies.percentile(percent));
        format!("p50 {p50:.1?}, p99 {p99:.1?}")
    };
    println!("faults without fill: {}", show(&without));
    println!("faults beside a fill of {rate:.0} MB/s: {}", show(&beside));
    // A fault behind the fill's requests would take another 50 ms.
    let bound = without.percentile(50) + Duration::from_millis(25);
    assert!(beside.percentile(50) < bound, "{:?}", beside.0);
}

/// A source whose fill requests queue for seconds, and that notes them.
struct Queueing {
    far: Threaded<Far>,
    submitted: AtomicU64,
    /// Holds the request for this offset back, inside `submit`.
    held: Option<(u64, Mutex<Receiver<()>>)>,
}

/// Chunks that fill requests at once.
const QUEUED: u64 = 256;

impl Queueing {
    /// Two of its threads serve fill: the queue lasts 6.4 s.
    fn new(held: Option<(u64, Receiver<()>)>) -> Arc<Self> {
        let far = Far::new(QUEUED * CHUNK, Duration::from_millis(50));
        let far = Threaded::new(far, 4).unwrap();
        let held = held.map(|(offset, gate)| (offset, Mutex::new(gate)));
        Arc::new(Queueing { far, submitted: AtomicU64::new(0), held })
    }

    /// Fills a region, one chunk after another.
    fn fill(self: &Arc<Self>) -> (Arc<Pager>, Fill) {
        let pager = pager_of(self.clone(), 0, QUEUED * CHUNK);
        let in_flight = InFlight::Fixed(QUEUED * CHUNK);
        let options = FillOptions { in_flight, ..FillOptions::default() };
        let fill = Fill::start(vec![pager.clone()], options).unwrap();
        (pager, fill)
    }

    fn await_submitted(&self, count: u64) {
        until("fill has queued", || self.submitted.load(Ordering::Acquire) == count);
    }
}

impl PageSource for Queueing {
    fn size(&self) -> u64 {
        self.far.size()
    }
    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        self.far.extent(offset)
    }
    fn submit(&self, request: Request) -> Completion {
        self.submitted.fetch_add(1, Ordering::Release);
        if let Some((offset, gate)) = &self.held
            && request.chunks[0].offset == *offset
        {
            gate.lock().unwrap().recv().unwrap();
        }
        self.far.submit(request)
    }
    fn raise(&self, offset: u64, len: u64) {
        self.far.raise(offset, len);
    }
}

/// The longest that a fault may take at the end of that queue: it takes 50 ms on a quiet machine.
const RAISED: Duration = Duration::from_millis(1500);

#[test]
fn fault_overtakes_fill_that_queues() {
    let source = Queueing::new(None);
    let (pager, _fill) = source.fill();
    source.await_submitted(QUEUED);
    let begun = Instant::now();
    let page = PageRange::page(pager.pages() - 5);
    pager.ensure(page, FaultPath::Guest, &Waiter::new()).unwrap();
    let waited = begun.elapsed();
    println!("a thread waited for {waited:.1?}");
    assert!(waited < RAISED, "{waited:?}");

    // As faults that a service reads.
    let (sender, present) = mpsc::channel();
    let begun = Instant::now();
    let page = PageRange::page(pager.pages() - 5 - 2 * C);
    assert!(pager.bitmap().is_missing(page.first));
    pager.fetch(page, FaultPath::BackEnd).unwrap();
    pager.when_present(page, move || sender.send(begun.elapsed()).unwrap());
    let waited = present.recv_timeout(PATIENCE).unwrap();
    println!("a callback came after {waited:.1?}");
    assert!(waited < RAISED, "{waited:?}");
}

/// The fault comes after the page was claimed for fill, and before the source has the request.
#[test]
fn fault_overtakes_fill_that_is_submitted() {
    let (go, gate) = mpsc::channel();
    let source = Queueing::new(Some(((QUEUED - 1) * CHUNK, gate)));
    let (pager, _fill) = source.fill();
    source.await_submitted(QUEUED);
    let waiter = Waiter::new();
    thread::scope(|scope| {
        let fault = scope.spawn(|| {
            let page = PageRange::page(pager.pages() - 5);
            pager.ensure(page, FaultPath::Guest, &waiter).unwrap();
        });
        until("the fault waits", || waiter.is_waiting());
        // It has looked for queued requests, too.
        thread::sleep(Duration::from_millis(50));
        let begun = Instant::now();
        go.send(()).unwrap();
        fault.join().unwrap();
        let waited = begun.elapsed();
        println!("the fault waited for {waited:.1?} more");
        assert!(waited < RAISED, "{waited:?}");
    });
}

#[test]
fn bytes_in_flight_are_bounded() {
    const SIZE: u64 = 64 * CHUNK;
    for (in_flight, bound) in [(InFlight::Fixed(8 * CHUNK), 8 * CHUNK), (InFlight::Fixed(1), CHUNK)]
    {
        // No read ends before as many as possible have begun.
        let (go, gate) = mpsc::channel();
        let mut source = Far::new(SIZE, Duration::ZERO);
        source.gate = Some(Mutex::new(gate));
        let most = source.most.clone();
        let pager = pager_of(Arc::new(Threaded::new(source, 128).unwrap()), 0, SIZE);
        let options = FillOptions { in_flight, ..FillOptions::default() };
        let _fill = Fill::start(vec![pager.clone()], options).unwrap();
        until("the reads begin", || most.load(Ordering::Relaxed) >= bound);
        thread::sleep(A_WHILE);
        (0..64).for_each(|_| go.send(()).unwrap());
        until("all is filled", || pager.bitmap().is_complete());
        assert_eq!(most.load(Ordering::Relaxed), bound, "{in_flight:?}");
    }
    let source = Far::new(SIZE, Duration::from_millis(5));
    let most = source.most.clone();
    let pager = pager_of(Arc::new(Threaded::new(source, 128).unwrap()), 0, SIZE);
    fill_all(&pager, InFlight::Adaptive { at_most: 4 * CHUNK });
    let most = most.load(Ordering::Relaxed);
    assert!(most <= 4 * CHUNK, "{most}");
}

/// A source whose reads wait, and the numbers of the chunks that were read.
struct Gated {
    pagers: Vec<Arc<Pager>>,
    reads: Arc<Mutex<Vec<u64>>>,
    go: mpsc::Sender<()>,
}

/// Creates two regions of four chunks each.
fn gated() -> Gated {
    let (go, gate) = mpsc::channel();
    let mut source = Far::new(8 * CHUNK, Duration::ZERO);
    source.gate = Some(Mutex::new(gate));
    let reads = source.reads.clone();
    let source = Arc::new(Threaded::new(source, 4).unwrap());
    let region = |index: u64| pager_of(source.clone(), index * 4 * CHUNK, 4 * CHUNK);
    Gated { pagers: vec![region(0), region(1)], reads, go }
}

impl Gated {
    /// Fills the memory one request at a time, and returns the offsets that were read. `act` runs
    /// while the second request waits.
    fn order(&self, order: FillOrder, act: impl FnOnce(&[Arc<Pager>])) -> Vec<u64> {
        let options =
            FillOptions { order, in_flight: InFlight::Fixed(CHUNK), ..FillOptions::default() };
        let _fill = Fill::start(self.pagers.clone(), options).unwrap();
        let reads = || self.reads.lock().unwrap().len();
        until("the first request waits", || reads() == 1);
        self.go.send(()).unwrap();
        until("the second request waits", || reads() == 2);
        act(&self.pagers);
        (0..64).for_each(|_| self.go.send(()).unwrap());
        until("all is filled", || self.pagers.iter().all(|pager| pager.bitmap().is_complete()));
        let reads = self.reads.lock().unwrap();
        reads.iter().map(|offset| offset / PAGE_SIZE).collect()
    }
}

/// Pages per chunk.
const C: u64 = CHUNK / PAGE_SIZE;

#[test]
fn fill_ascends_and_descends() {
    let ascending = gated().order(FillOrder::Ascending, |_| {});
    assert_eq!(ascending, (0..8).map(|chunk| chunk * C).collect::<Vec<_>>());
    let descending = gated().order(FillOrder::Descending, |_| {});
    assert_eq!(descending, (0..8).rev().map(|chunk| chunk * C).collect::<Vec<_>>());
}

#[test]
fn given_ranges_are_filled_first() {
    let range = |region, first, count| FillRange { region, pages: PageRange::new(first, count) };
    let ranges = vec![
        range(1, 2 * C + 3, C),
        range(0, 3 * C, u64::MAX),
        range(2, 0, 1),
        range(0, u64::MAX, 7),
        range(0, 5, 1),
    ];
    let order = gated().order(FillOrder::RangesFirst(ranges), |_| {});
    assert_eq!(order[..4], [6 * C + 3, 7 * C, 3 * C, 5], "{order:?}");
    // The rest of a chunk is one request of two reads, which begin in any order.
    let mut rest = order[4..6].to_vec();
    rest.sort_unstable();
    assert_eq!(rest, [0, 6], "{order:?}");
}

#[test]
fn fill_follows_the_last_fault() {
    let gated = gated();
    let order = gated.order(FillOrder::NearLastFault, |pagers| {
        pagers[1].fetch(PageRange::page(2 * C + 7), FaultPath::Guest).unwrap();
        until("the fault's read begins", || gated.reads.lock().unwrap().len() == 3);
    });
    // The fault, the rest of its chunk, and on from there; then from the first page on.
    let expected = [0, C, 6 * C + 7, 6 * C + 8, 7 * C, 2 * C, 3 * C, 4 * C, 5 * C, 6 * C];
    assert_eq!(order, expected);
}

#[test]
fn stopped_region_is_passed_over() {
    for order in [FillOrder::Ascending, FillOrder::Descending, FillOrder::NearLastFault] {
        let source = Arc::new(Threaded::new(Far::new(8 << 20, Duration::ZERO), 8).unwrap());
        let pagers = [0u64, 1, 2].map(|index| pager_of(source.clone(), index << 20, 1 << 20));
        pagers[1].stop();
        let options = FillOptions { order, ..FillOptions::default() };
        let fill = Fill::start(pagers.to_vec(), options).unwrap();
        until("the others are filled", || {
            pagers[0].bitmap().is_complete() && pagers[2].bitmap().is_complete()
        });
        let begun = Instant::now();
        drop(fill);
        assert!(begun.elapsed() < PATIENCE / 4, "the thread has ended");
    }
}
