// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Recording and replay of working sets, with memory and a store at a distance.
#![cfg(feature = "http")]
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

#[path = "../cache/server.rs"]
mod server;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use demand_memory::{
    BackingKind, FaultPath, Fill, FillOptions, FillOrder, FillRange, Hold, MemfdBacking, PAGE_SIZE,
    PageRange, Pager, PagerConfig, TouchCounts, TouchLog, Waiter,
};
use demand_remote::image::{Push, RemoteImage};
use demand_remote::working_set::{
    ImageId, Recording, ReplayedSource, WorkingSet, beside_image, record,
};
use demand_remote::{Location, Store};
use demand_source::{
    Chunk, Completion, Destination, LocalFile, OwnedBytes, PageSource, Priority, Request,
};
use server::Server;
use test_support::wait::until;

/// Pages of the image: 128 chunks of 16 pages.
const PAGES: u64 = 2048;
/// The distance of the store.
const ROUND_TRIP: Duration = Duration::from_millis(10);

/// Returns the content of a page: it hardly compresses, and differs from all others.
fn content(page: u64) -> Vec<u8> {
    let mut state = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut word = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..PAGE_SIZE / 8).flat_map(|_| word()).collect()
}

/// A store with a snapshot.
struct Place {
    folder: tempfile::TempDir,
    image: LocalFile,
}

impl Place {
    fn new() -> Self {
        Place::with_zeros(0..0)
    }

    /// Pushes an image in which these pages are zeros.
    fn with_zeros(zeros: Range<u64>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let page = |page| match zeros.contains(&page) {
            true => vec![0; PAGE_SIZE as usize],
            false => content(page),
        };
        std::fs::write(&path, (0..PAGES).flat_map(page).collect::<Vec<_>>()).unwrap();
        let image = LocalFile::open(&path).unwrap();
        let store = Store::directory(folder.path().join("store")).unwrap();
        Push::new(&image, [7; 16]).run(&store, "vm7", &mut |_| true).unwrap();
        Place { folder, image }
    }

    fn store(&self) -> PathBuf {
        self.folder.path().join("store")
    }
}

fn id_of(image: &RemoteImage) -> ImageId {
    ImageId::of_index(image.manifest().index.sha256, image.size())
}

fn pager_of(source: Arc<dyn PageSource>) -> Arc<Pager> {
    let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, PAGES * PAGE_SIZE).unwrap());
    Pager::new(PagerConfig::new(backing, source)).unwrap()
}

/// Touches pages one after the other, as a vCPU does. Returns the time that it took.
fn run(pager: &Arc<Pager>, pages: &[u64]) -> Duration {
    let begun = Instant::now();
    let waiter = Waiter::new();
    for page in pages {
        pager.ensure(PageRange::page(*page), FaultPath::Guest, &waiter).unwrap();
    }
    begun.elapsed()
}

/// Pages of different chunks, in an order that is not that of addresses.
fn touched(offset: u64) -> Vec<u64> {
    (0..100).map(|step| step * 101 % 128 * 16 + offset).collect()
}

/// The outcome of a run: its time, the requests for chunks, and the touches.
struct Outcome {
    time: Duration,
    requests: usize,
    /// Requests that may have been made a second time, because the first one was late.
    hedges: usize,
    counts: TouchCounts,
}

impl Outcome {
    /// Asserts that each fault has made one request, besides those that were made a second time.
    fn expect_requests(&self, faults: usize) {
        let most = faults + self.hedges;
        assert!((faults..=most).contains(&self.requests), "{}, {faults} to {most}", self.requests);
    }
}

/// Restores from the store behind a server, and touches pages. Replays the working set, if there is
/// to be one.
fn restored(place: &Place, pages: &[u64], replays: bool) -> Outcome {
    let server = Server::start(&place.store(), ROUND_TRIP, None);
    let url: Location = server.url("vm").parse().unwrap();
    let image = RemoteImage::open(&Store::open(&url).unwrap(), "vm7").unwrap();
    let (id, at) = (id_of(&image), beside_image(&url, image.manifest().index.sha256));
    let watch = image.watch();
    let image: Arc<dyn PageSource> = Arc::new(image);
    let log = Arc::new(TouchLog::new(Hold::All));
    let (pager, ranges) = if replays {
        let set = WorkingSet::open(&at, id).unwrap();
        let pages = set.ranges().map(|range| PageRange::new(range.start, range.end - range.start));
        let pages: Vec<_> = pages.collect();
        (pager_of(Arc::new(ReplayedSource::new(image, set))), pages)
    } else {
        (pager_of(image), Vec::new())
    };
    pager.note_touches(&log, &ranges).unwrap();
    let order = ranges.into_iter().map(|pages| FillRange { region: 0, pages }).collect();
    let options = FillOptions { order: FillOrder::RangesOnly(order), ..FillOptions::default() };
    let fill = Fill::start(vec![pager.clone()], options).unwrap();
    let time = run(&pager, pages);
    drop(fill);
    let mut page = vec![0; PAGE_SIZE as usize];
    for number in pages {
        pager.backing().readable_file().map_or_else(
            || panic!("shared memory is readable"),
            |file| {
                use std::os::unix::fs::FileExt;
                file.read_exact_at(&mut page, number * PAGE_SIZE).unwrap();
            },
        );
        assert!(page == content(*number), "page {number}");
    }
    if !replays {
        let pages: Vec<_> = log.touches().iter().map(|touch| touch.page).collect();
        let recording =
            Recording { image: id, source: &place.image, touched: &pages, before: None };
        let index = at.split().unwrap().1;
        let at = Location::Path(place.store().join("ws").join(index));
        record(&at, recording, &|| true).unwrap();
    }
    let hedges = watch.figures().hedges.made as usize;
    Outcome { time, requests: server.fetched().len(), hedges, counts: log.counts() }
}

#[test]
fn replay_removes_nearly_all_fetches_of_faults() {
    let place = Place::new();
    let pages = touched(3);
    let demand = restored(&place, &pages, false);
    demand.expect_requests(100);
    assert_eq!(demand.counts.misses, 100);
    let replay = restored(&place, &pages, true);
    let sooner = demand.time.as_secs_f64() / replay.time.as_secs_f64();
    println!(
        "demand only {:?}, {} requests; replay {:?}, {} requests, {:?}: {sooner:.1} times sooner",
        demand.time, demand.requests, replay.time, replay.requests, replay.counts
    );
    // At most 3 % of the faults are left.
    assert!(replay.requests <= 3, "{}", replay.requests);
    let TouchCounts { hits, late, misses, .. } = replay.counts;
    assert_eq!((hits + late, misses), (100, 0));
    assert_eq!(replay.counts.waste(), 0, "pages arrived in vain");
    // Each fetch of a fault takes a round trip, and each of two frames one or two.
    assert!(sooner > 2.0, "{sooner}");
}

#[test]
fn other_run_asks_for_no_more_than_without() {
    let place = Place::new();
    restored(&place, &touched(3), false);
    let other = touched(9);
    let replay = restored(&place, &other, true);
    replay.expect_requests(100);
    assert_eq!(replay.counts.misses, 100);
    println!("another run beside a replay: {:?} for 100 round trips", replay.time);
}

#[test]
fn zeros_around_the_set_cost_no_fault() {
    // 4 MiB and a chunk; the last 2 MiB, of which no page was recorded, stay as they are.
    let place = Place::with_zeros(496..1536);
    let store = Store::directory(place.store()).unwrap();
    let image = || RemoteImage::open(&store, "vm7").unwrap();
    let (id, at) = (id_of(&image()), Location::Path(place.folder.path().join("set")));
    let touched = [3, 500, 600, 700, 5];
    let recording = Recording { image: id, source: &image(), touched: &touched, before: None };
    assert_eq!(record(&at, recording, &|| true).unwrap().zero_pages, 3);
    let misses = [false, true].map(|with_zeros| {
        let set = WorkingSet::open(&at, id).unwrap();
        let pages = set.ranges().collect::<Vec<_>>();
        let source = Arc::new(ReplayedSource::new(Arc::new(image()), set));
        let around = source.zeros_around();
        assert_eq!(around, [496..512, 512..1024]);
        let to_pages = |range: &Range<u64>| PageRange::new(range.start, range.end - range.start);
        let expected: Vec<_> = pages.iter().map(to_pages).collect();
        let zeros = around.iter().filter(|_| with_zeros).map(to_pages);
        let order = expected.iter().copied().chain(zeros);
        let order = order.map(|pages| FillRange { region: 0, pages }).collect();
        let pager = pager_of(source);
        let log = Arc::new(TouchLog::new(Hold::Sample));
        pager.note_touches(&log, &expected).unwrap();
        let options = FillOptions { order: FillOrder::RangesOnly(order), ..FillOptions::default() };
        let _fill = Fill::start(vec![pager.clone()], options).unwrap();
        let last = if with_zeros { 1023 } else { 5 };
        until("the set is replayed", || pager.bitmap().is_populated(last));
        // Another run touches others of the zeros.
        run(&pager, &(496..1024).step_by(5).chain([1030, 1031]).collect::<Vec<_>>());
        log.counts().misses
    });
    println!("faults on pages of zeros: {} without, {} with those around", misses[0], misses[1]);
    // None of them was recorded, and two are in another 2 MiB.
    assert_eq!(misses, [108, 2]);
}

/// Requests a page, and returns its completion and content.
fn request(source: &dyn PageSource, page: u64, priority: Priority) -> (Completion, OwnedBytes) {
    let (destination, bytes) = Destination::owned(vec![0; PAGE_SIZE as usize]);
    let chunks = vec![Chunk { offset: page * PAGE_SIZE, destination }];
    (source.submit(Request { priority, chunks }), bytes)
}

/// Writes a working set to an object of the store whose requests the server records, and opens it
/// behind the server.
fn set_behind(place: &Place, server: &Server, pages: &[u64]) -> WorkingSet {
    let id = ImageId::of_generation([7; 16], PAGES * PAGE_SIZE);
    let recording = Recording { image: id, source: &place.image, touched: pages, before: None };
    record(&Location::Path(place.store().join("packs/set")), recording, &|| true).unwrap();
    let url: Location = format!("{}/packs/set", server.url("vm")).parse().unwrap();
    WorkingSet::open(&url, id).unwrap()
}

#[test]
fn silent_frame_delays_a_fault_for_a_moment() {
    let place = Place::new();
    // The head and the table are answered.
    let server = Server::start(&place.store(), Duration::ZERO, Some(("vm", 2)));
    let set = set_behind(&place, &server, &touched(0));
    let image = LocalFile::open(place.folder.path().join("memory")).unwrap();
    let source = ReplayedSource::new(Arc::new(image), set);
    let (fill, _filled) = request(&source, 0, Priority::Fill);
    let (fault, bytes) = request(&source, 101 * 16, Priority::Demand);
    fault.wait().unwrap();
    assert!(bytes.take().unwrap() == content(101 * 16));
    // So is one that begins as background fill.
    let (raised, bytes) = request(&source, 74 * 16, Priority::Fill);
    source.raise(74 * 16 * PAGE_SIZE, PAGE_SIZE);
    raised.wait().unwrap();
    assert!(bytes.take().unwrap() == content(74 * 16));
    // Others do not wait at all.
    for page in touched(0) {
        let (fault, bytes) = request(&source, page, Priority::Demand);
        fault.wait().unwrap();
        assert!(bytes.take().unwrap() == content(page));
    }
    assert_eq!((source.stats().frames, source.stats().overdue), (0, 1));
    drop(fill);
}

#[test]
fn fault_promotes_a_queued_frame() {
    let place = Place::new();
    let server = Server::start(&place.store(), Duration::from_millis(100), None);
    let pages: Vec<u64> = (0..64 * 24).collect();
    let set = set_behind(&place, &server, &pages);
    let image = LocalFile::open(place.folder.path().join("memory")).unwrap();
    let source = ReplayedSource::new(Arc::new(image), set);
    // Background fill wants the first frames: eight are read at once, the others are queued.
    let mut filled: Vec<_> =
        (0..16).map(|frame| request(&source, frame * 64, Priority::Fill)).collect();
    let (fault, bytes) = request(&source, 15 * 64 + 7, Priority::Demand);
    fault.wait().unwrap();
    assert!(bytes.take().unwrap() == content(15 * 64 + 7));
    filled.extend((16..24).map(|frame| request(&source, frame * 64, Priority::Fill)));
    for (frame, (completion, bytes)) in (0..).zip(filled) {
        completion.wait().unwrap();
        assert!(bytes.take().unwrap() == content(frame * 64), "frame {frame}");
    }
    until("all frames were read", || source.stats().frames == 24);
    let starts = server.fetched().into_iter().filter_map(|(_, request)| {
        request.split_once(' ')?.1.split_once('-')?.0.parse::<u64>().ok()
    });
    // The first two requests are for the head and the table.
    let starts: Vec<_> = starts.skip(2).collect();
    let mut in_order = starts.clone();
    in_order.sort_unstable();
    assert_eq!(starts.len(), 24, "each frame is requested once: {starts:?}");
    let turn = |frame: usize| starts.iter().position(|start| *start == in_order[frame]).unwrap();
    assert!(turn(15) < turn(13) && turn(15) < turn(14), "{starts:?}");
}
