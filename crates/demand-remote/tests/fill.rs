// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Background fill over a long and narrow link, beside faults.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use demand_memory::{
    BackingKind, FaultPath, Fill, FillOptions, InFlight, MemfdBacking, PAGE_SIZE, PageRange, Pager,
    PagerConfig, Stats, Waiter,
};
use demand_remote::ObjectImage;
use demand_source::PageSource;
use test_support::proxy::{FaultProxy, Link, Target};
use test_support::servers::Web;
use test_support::wait::until;

const FILLED: u64 = 16 << 20;
const TOUCHED: u64 = 4 << 20;
/// Bytes per second, and the time of a round trip: so slow that a busy machine is not the limit.
const RATE: u64 = 8 << 20;
/// Number of threads that touch pages: vCPUs.
const THREADS: usize = 4;
const TRIP: Duration = Duration::from_millis(100);

/// Two regions of an image behind a link: one for background fill, one for faults.
fn regions(proxy: &FaultProxy) -> [Arc<Pager>; 2] {
    let url = format!("http://127.0.0.1:{}/image", proxy.port());
    let source: Arc<dyn PageSource> = Arc::new(ObjectImage::open(&url.parse().unwrap()).unwrap());
    let stats = Arc::new(Stats::new());
    [(0, FILLED), (FILLED, TOUCHED)].map(|(image_offset, len)| {
        let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, len).unwrap());
        let config = PagerConfig::new(backing, source.clone());
        Pager::new(PagerConfig { image_offset, stats: stats.clone(), ..config }).unwrap()
    })
}

/// Touches pages by several threads, until `stop` is set or so many by each. Returns the times of
/// the last three quarters, in order of length.
fn touch(pager: &Arc<Pager>, most: usize, stop: &AtomicBool) -> Vec<Duration> {
    let next = AtomicU64::new(0);
    let times = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..most {
                    let page = next.fetch_add(1, Ordering::Relaxed);
                    if page >= pager.pages() || stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let begun = Instant::now();
                    pager.ensure(PageRange::page(page), FaultPath::Guest, &Waiter::new()).unwrap();
                    times.lock().unwrap().push(begun.elapsed());
                }
            });
        }
    });
    let mut times = times.into_inner().unwrap();
    times.drain(..times.len() / 4);
    times.sort();
    times
}

/// Fills one region, and touches pages of the other meanwhile if `with_faults`. Returns the time of
/// the fill and those of the faults.
fn fill(proxy: &FaultProxy, in_flight: InFlight, with_faults: bool) -> (Duration, Vec<Duration>) {
    let [filled, touched] = regions(proxy);
    let stop = AtomicBool::new(!with_faults);
    thread::scope(|scope| {
        let faults = scope.spawn(|| touch(&touched, usize::MAX, &stop));
        let begun = Instant::now();
        let options = FillOptions { in_flight, ..FillOptions::default() };
        let fill = Fill::start(vec![filled.clone()], options).unwrap();
        until("all is filled", || filled.bitmap().is_complete());
        let took = begun.elapsed();
        stop.store(true, Ordering::Relaxed);
        drop(fill);
        (took, faults.join().unwrap())
    })
}

fn shown(times: &[Duration]) -> String {
    let [median, p99] = [50, 99].map(|percent| times[(times.len() - 1) * percent / 100]);
    format!("{} faults, median {median:.1?}, p99 {p99:.1?}", times.len())
}

#[test]
fn fill_leaves_room_for_faults() {
    let folder = tempfile::tempdir().unwrap();
    let mut image = File::create(folder.path().join("image")).unwrap();
    for page in 0..(FILLED + TOUCHED) / PAGE_SIZE {
        image.write_all(&vec![(page % 251) as u8 + 1; PAGE_SIZE as usize]).unwrap();
    }
    let Some(web) = Web::start(folder.path(), "") else { return };
    let proxy = FaultProxy::start(Target::Port(web.port()));
    proxy.set_link(Link::round_trip(TRIP).rate(RATE));
    let adaptive = InFlight::default();
    let idle = touch(&regions(&proxy)[1], 12, &AtomicBool::new(false));
    println!("no fill: {}", shown(&idle));
    let (alone, _) = fill(&proxy, adaptive, false);
    println!("no faults: {:.0} MiB/s", FILLED as f64 / f64::from(1 << 20) / alone.as_secs_f64());
    let (beside, faults) = fill(&proxy, adaptive, true);
    let rate = FILLED as f64 / f64::from(1 << 20) / beside.as_secs_f64();
    println!("both: {rate:.0} MiB/s, {}", shown(&faults));
    let (_, delayed) = fill(&proxy, InFlight::Fixed(16 << 20), true);
    println!("16 MiB in flight: {}", shown(&delayed));
    let median = |times: &[Duration]| times[times.len() / 2];
    assert!(beside < alone * 3, "{beside:?}, without faults {alone:?}");
    assert!(median(&faults) * 3 < median(&delayed) * 2, "{}", shown(&delayed));
}
