// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Statistics of each path and of the source: pages, bytes, latencies, failures.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;
use serde::{Deserialize, Serialize};

use crate::PAGE_SIZE;
use crate::latency::{Latencies, Sum};

/// The path by which a page is requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultPath {
    /// A vCPU.
    Guest,
    /// The hypervisor itself: emulator operands, clock pages and the like.
    #[serde(rename = "kvm_internal")]
    HypervisorInternal,
    /// The VMM, through vm-memory or a raw pointer.
    Vmm,
    /// A vhost-user back-end.
    BackEnd,
    /// Background fill, for no particular accessor.
    Fill,
}

impl FaultPath {
    /// All paths, in the order of reports.
    pub const ALL: [FaultPath; 5] = [
        FaultPath::Guest,
        FaultPath::HypervisorInternal,
        FaultPath::Vmm,
        FaultPath::BackEnd,
        FaultPath::Fill,
    ];

    /// Returns the path's name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            FaultPath::Guest => "guest",
            FaultPath::HypervisorInternal => "kvm_internal",
            FaultPath::Vmm => "vmm",
            FaultPath::BackEnd => "back_end",
            FaultPath::Fill => "fill",
        }
    }
}

/// Latencies of one path, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LatencyMicros {
    /// The time within which half of the faults were resolved.
    pub p50: f64,
    /// The time within which 99 of 100 faults were resolved.
    pub p99: f64,
    /// The longest latency.
    pub max: f64,
}

/// The distribution of the latencies of one path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LatencyCounts {
    /// The number of faults whose latency is at most each bound, and above the one before it; then
    /// of those above the last bound. A latency counts as the middle of a range of values that are
    /// within 0.4 % of it.
    pub counts: Vec<u64>,
    /// The sum of all latencies, to within 0.4 %.
    pub total: Duration,
}

/// The activity of one path.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PathReport {
    /// Number of faults: accesses of this path to missing pages.
    pub faults: u64,
    /// Bytes mapped for the faulter by one resolution: the commonest value of
    /// `granularity_histogram`; 0 without a fault.
    pub granularity_bytes: u64,
    /// Number of faults for each number of bytes that a resolution mapped.
    pub granularity_histogram: BTreeMap<u64, u64>,
    /// Number of pages that this path fetched.
    pub pages: u64,
    /// Bytes that this path read from the source; holes are not read.
    pub bytes_fetched: u64,
    /// Latency from the fault's arrival in this process to its resolution.
    pub latency_us: LatencyMicros,
}

/// The activity of the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceReport {
    /// Number of reads.
    pub reads: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Number of failed attempts.
    pub errors: u64,
    /// Number of attempts after a failure.
    pub retries: u64,
}

/// A group of pages that became present, for a timeline of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineEvent {
    /// Time since the statistics were created, in microseconds.
    pub at_us: u64,
    /// Number of pages.
    pub pages: u64,
    /// The path that fetched them.
    pub path: FaultPath,
    /// How many of them were [expected](crate::Pager::note_touches): a working set has them.
    pub expected: u64,
}

#[derive(Default)]
struct PathCounts {
    /// Number of faults whose resolution mapped one page: nearly all faults of a guest.
    of_a_page: AtomicU64,
    /// The other faults, by the bytes mapped. Each of them is costly enough to afford a lock.
    larger: Mutex<BTreeMap<u64, u64>>,
    pages: AtomicU64,
    reads: AtomicU64,
    bytes_fetched: AtomicU64,
    latencies: Latencies,
}

impl PathCounts {
    fn larger(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.larger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The counters of the threads of one shard. There is mostly one thread, so that the atomics and
/// locks are hardly ever contended.
#[derive(Default)]
struct Shard {
    paths: [PathCounts; FaultPath::ALL.len()],
    errors: AtomicU64,
    retries: AtomicU64,
    events: Mutex<Vec<TimelineEvent>>,
}

impl Shard {
    fn events(&self) -> MutexGuard<'_, Vec<TimelineEvent>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const SHARDS: usize = 32;

/// Most delays that are kept for background fill.
const MOST_DELAYS: usize = 256;

thread_local! {
    static SHARD: Cell<Option<usize>> = const { Cell::new(None) };
}

static NEXT_SHARD: AtomicUsize = AtomicUsize::new(0);

fn shard_of_thread() -> usize {
    SHARD.get().unwrap_or_else(|| {
        let shard = NEXT_SHARD.fetch_add(1, Ordering::Relaxed) % SHARDS;
        SHARD.set(Some(shard));
        shard
    })
}

/// Counters and latencies of all paths of a VM.
///
/// Each thread counts in one of 32 shards, so that threads on disjoint pages rarely meet here.
pub struct Stats {
    shards: [CachePadded<Shard>; SHARDS],
    /// The last requests for faults that a source has answered later: when, and after what time.
    delays: Mutex<VecDeque<(Instant, Duration)>>,
    origin: Instant,
    timeline: AtomicBool,
}

impl Stats {
    /// Creates empty statistics, which begin now.
    pub fn new() -> Self {
        Stats {
            shards: std::array::from_fn(|_| CachePadded::new(Shard::default())),
            delays: Mutex::default(),
            origin: Instant::now(),
            timeline: AtomicBool::new(false),
        }
    }

    /// Starts keeping an event for each group of pages that becomes present.
    pub fn keep_timeline(&self) {
        self.timeline.store(true, Ordering::Relaxed);
    }

    fn shard(&self) -> &Shard {
        &self.shards[shard_of_thread()]
    }

    /// Counts a fault that was resolved `latency` after it arrived, by mapping
    /// `granularity_bytes` for the faulter.
    pub fn fault(&self, path: FaultPath, granularity_bytes: u64, latency: Duration) {
        let counts = &self.shard().paths[path as usize];
        if granularity_bytes == PAGE_SIZE {
            counts.of_a_page.fetch_add(1, Ordering::Relaxed);
        } else {
            *counts.larger().entry(granularity_bytes).or_default() += 1;
        }
        counts.latencies.record(latency);
    }

    /// Counts pages that became present; `bytes_read` of their bytes were read from the source.
    /// `expected` is called for the timeline alone.
    pub(crate) fn arrived(
        &self,
        path: FaultPath,
        pages: u64,
        bytes_read: u64,
        expected: impl FnOnce() -> u64,
    ) {
        let shard = self.shard();
        let counts = &shard.paths[path as usize];
        counts.pages.fetch_add(pages, Ordering::Relaxed);
        self.read(path, bytes_read);
        if self.timeline.load(Ordering::Relaxed) {
            let at_us = u64::try_from(self.origin.elapsed().as_micros()).unwrap_or(u64::MAX);
            let expected = expected();
            shard.events().push(TimelineEvent { at_us, pages, path, expected });
        }
    }

    /// Counts bytes that were read from the source, for pages that are not present yet.
    pub(crate) fn read(&self, path: FaultPath, bytes: u64) {
        if bytes > 0 {
            let counts = &self.shard().paths[path as usize];
            counts.reads.fetch_add(1, Ordering::Relaxed);
            counts.bytes_fetched.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Keeps the delay of a request for a fault, until now.
    pub(crate) fn delayed(&self, delay: Duration) {
        let mut delays = self.delays.lock().unwrap_or_else(PoisonError::into_inner);
        if delays.len() == MOST_DELAYS {
            delays.pop_front();
        }
        delays.push_back((Instant::now(), delay));
    }

    /// Returns the delays of requests for faults since the last call, each with its time, or the
    /// last 256 of them.
    pub(crate) fn take_delays(&self) -> VecDeque<(Instant, Duration)> {
        std::mem::take(&mut *self.delays.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns the number of failed attempts.
    pub(crate) fn errors(&self) -> u64 {
        self.shards.iter().map(|shard| shard.errors.load(Ordering::Relaxed)).sum()
    }

    /// Counts a failed attempt.
    pub(crate) fn failed(&self) {
        self.shard().errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts an attempt after a failure.
    pub(crate) fn retried(&self) {
        self.shard().retries.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the activity of one path so far.
    pub fn path(&self, path: FaultPath) -> PathReport {
        let mut report = PathReport::default();
        let mut latency = Sum::new();
        for shard in &self.shards {
            let counts = &shard.paths[path as usize];
            report.pages += counts.pages.load(Ordering::Relaxed);
            report.bytes_fetched += counts.bytes_fetched.load(Ordering::Relaxed);
            let of_a_page = counts.of_a_page.load(Ordering::Relaxed);
            let larger = counts.larger();
            let larger = larger.iter().map(|(bytes, count)| (*bytes, *count));
            for (bytes, count) in larger.chain((of_a_page > 0).then_some((PAGE_SIZE, of_a_page))) {
                *report.granularity_histogram.entry(bytes).or_default() += count;
                report.faults += count;
            }
            latency.add(&counts.latencies);
        }
        let commonest = report.granularity_histogram.iter().max_by_key(|(_, count)| **count);
        report.granularity_bytes = commonest.map_or(0, |(bytes, _)| *bytes);
        if report.faults > 0 {
            let micros = |nanos: u64| nanos as f64 / 1000.0;
            report.latency_us = LatencyMicros {
                p50: micros(latency.percentile(50)),
                p99: micros(latency.percentile(99)),
                max: micros(latency.max()),
            };
        }
        report
    }

    /// Returns the distribution of a path's latencies so far, between bounds that rise.
    pub fn latencies(&self, path: FaultPath, bounds: &[Duration]) -> LatencyCounts {
        let mut sum = Sum::new();
        for shard in &self.shards {
            sum.add(&shard.paths[path as usize].latencies);
        }
        LatencyCounts { counts: sum.counts(bounds), total: sum.total() }
    }

    /// Returns the activity of the source so far.
    pub fn source(&self) -> SourceReport {
        let mut report = SourceReport::default();
        for shard in &self.shards {
            report.errors += shard.errors.load(Ordering::Relaxed);
            report.retries += shard.retries.load(Ordering::Relaxed);
            for counts in &shard.paths {
                report.reads += counts.reads.load(Ordering::Relaxed);
                report.bytes += counts.bytes_fetched.load(Ordering::Relaxed);
            }
        }
        report
    }

    /// Returns the number of pages that became present so far, on all paths.
    pub fn pages_arrived(&self) -> u64 {
        let paths = self.shards.iter().flat_map(|shard| &shard.paths);
        paths.map(|counts| counts.pages.load(Ordering::Relaxed)).sum()
    }

    /// Returns the events kept so far, in order of time.
    pub fn timeline(&self) -> Vec<TimelineEvent> {
        let mut events: Vec<_> =
            self.shards.iter().flat_map(|shard| shard.events().clone()).collect();
        events.sort_by_key(|event| event.at_us);
        events
    }
}

impl Default for Stats {
    fn default() -> Self {
        Stats::new()
    }
}

impl fmt::Debug for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stats")
            .field("pages_arrived", &self.pages_arrived())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_add_up() {
        let stats = Stats::new();
        stats.keep_timeline();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    stats.fault(FaultPath::Guest, 4096, Duration::from_micros(10));
                    stats.arrived(FaultPath::Guest, 1, 4096, || 0);
                    stats.fault(FaultPath::BackEnd, 2 << 20, Duration::from_micros(200));
                    stats.arrived(FaultPath::BackEnd, 512, 0, || 0);
                });
            }
        });
        stats.fault(FaultPath::Guest, 8192, Duration::from_millis(1));
        let guest = stats.path(FaultPath::Guest);
        assert_eq!((guest.faults, guest.pages, guest.bytes_fetched), (5, 4, 16384));
        assert_eq!(guest.granularity_bytes, 4096);
        assert_eq!(guest.granularity_histogram, BTreeMap::from([(4096, 4), (8192, 1)]));
        assert_eq!(stats.path(FaultPath::BackEnd).granularity_histogram[&(2 << 20)], 4);
        assert!((9.9..10.1).contains(&guest.latency_us.p50), "{guest:?}");
        assert!((999.0..1001.0).contains(&guest.latency_us.max), "{guest:?}");
        assert_eq!(stats.path(FaultPath::Fill), PathReport::default());
        let source = stats.source();
        assert_eq!((source.reads, source.bytes), (4, 16384));
        assert_eq!(stats.timeline().iter().map(|event| event.pages).sum::<u64>(), 4 * 513);
        assert_eq!(stats.pages_arrived(), 4 * 513);
    }
}
