// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What each path has fetched, and how long it waited.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Who asked for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Path {
    /// A vCPU.
    Guest,
    /// KVM itself: emulator operands, clock pages and the like.
    KvmInternal,
    /// The VMM, through vm-memory or a raw pointer.
    Vmm,
    /// A vhost-user back-end.
    BackEnd,
    /// Nobody: background fill.
    Fill,
}

impl Path {
    /// All paths, in the order of reports.
    pub const ALL: [Path; 5] =
        [Path::Guest, Path::KvmInternal, Path::Vmm, Path::BackEnd, Path::Fill];

    /// The path's name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Path::Guest => "guest",
            Path::KvmInternal => "kvm_internal",
            Path::Vmm => "vmm",
            Path::BackEnd => "back_end",
            Path::Fill => "fill",
        }
    }
}

/// Latencies of one path, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LatencyMicros {
    /// Half of the faults were resolved within this time.
    pub p50: f64,
    /// 99 of 100 faults were resolved within this time.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

/// What one path did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PathReport {
    /// Faults: how often somebody of this path found a page missing.
    pub faults: u64,
    /// Bytes mapped for the faulter by one resolution: the commonest value of
    /// `granularity_histogram`; 0 if there was no fault.
    pub granularity_bytes: u64,
    /// Number of faults by the bytes that their resolution mapped.
    pub granularity_histogram: BTreeMap<u64, u64>,
    /// Pages that this path brought in.
    pub pages: u64,
    /// Bytes that it read from the source; holes are not read.
    pub bytes_fetched: u64,
    /// From the fault's arrival in this process to its resolution.
    pub latency_us: LatencyMicros,
}

/// What the source did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceReport {
    /// Reads.
    pub reads: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Attempts that failed.
    pub errors: u64,
    /// Attempts after a failure.
    pub retries: u64,
}

/// Some pages that became present, for a picture of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineEvent {
    /// Time since the statistics began, in microseconds.
    pub at_us: u64,
    /// Pages that became present.
    pub pages: u64,
    /// Who brought them in.
    pub path: Path,
}

#[derive(Default)]
struct PathCounts {
    faults: u64,
    granularity: BTreeMap<u64, u64>,
    pages: u64,
    bytes_fetched: u64,
    latency_ns: Option<Histogram<u64>>,
}

#[derive(Default)]
struct Shard {
    paths: [PathCounts; Path::ALL.len()],
    source: SourceReport,
    events: Vec<TimelineEvent>,
}

const SHARDS: usize = 32;

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
/// Each thread counts for itself, so that threads on disjoint pages do not meet here.
pub struct Stats {
    shards: [CachePadded<Mutex<Shard>>; SHARDS],
    origin: Instant,
    timeline: AtomicBool,
}

impl Stats {
    /// Empty statistics that begin now.
    pub fn new() -> Self {
        Stats {
            shards: std::array::from_fn(|_| CachePadded::new(Mutex::default())),
            origin: Instant::now(),
            timeline: AtomicBool::new(false),
        }
    }

    /// Keeps, from now on, an event for each group of pages that becomes present.
    pub fn keep_timeline(&self) {
        self.timeline.store(true, Ordering::Relaxed);
    }

    fn shard(&self) -> MutexGuard<'_, Shard> {
        self.shards[shard_of_thread()].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a fault that was resolved `latency` after it arrived, by mapping
    /// `granularity_bytes` for the faulter.
    pub fn fault(&self, path: Path, granularity_bytes: u64, latency: Duration) {
        let mut shard = self.shard();
        let counts = &mut shard.paths[path as usize];
        counts.faults += 1;
        *counts.granularity.entry(granularity_bytes).or_default() += 1;
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        // Three digits, growing as needed: neither the bounds nor a record can be refused.
        let histogram =
            counts.latency_ns.get_or_insert_with(|| Histogram::new(3).expect("3 digits"));
        let _ = histogram.record(nanos.max(1));
    }

    /// Counts pages that became present, of which `bytes_read` bytes were read from the source.
    pub(crate) fn arrived(&self, path: Path, pages: u64, bytes_read: u64) {
        let timeline = self.timeline.load(Ordering::Relaxed);
        let mut shard = self.shard();
        let counts = &mut shard.paths[path as usize];
        counts.pages += pages;
        counts.bytes_fetched += bytes_read;
        if bytes_read > 0 {
            shard.source.reads += 1;
            shard.source.bytes += bytes_read;
        }
        if timeline {
            let at_us = self.origin.elapsed().as_micros() as u64;
            shard.events.push(TimelineEvent { at_us, pages, path });
        }
    }

    /// Counts a failed attempt.
    pub(crate) fn failed(&self) {
        self.shard().source.errors += 1;
    }

    /// Counts an attempt after a failure.
    pub(crate) fn retried(&self) {
        self.shard().source.retries += 1;
    }

    fn shards(&self) -> impl Iterator<Item = MutexGuard<'_, Shard>> {
        self.shards.iter().map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What one path did so far.
    pub fn path(&self, path: Path) -> PathReport {
        let mut report = PathReport::default();
        let mut latency: Histogram<u64> = Histogram::new(3).expect("3 digits");
        for shard in self.shards() {
            let counts = &shard.paths[path as usize];
            report.faults += counts.faults;
            report.pages += counts.pages;
            report.bytes_fetched += counts.bytes_fetched;
            for (bytes, count) in &counts.granularity {
                *report.granularity_histogram.entry(*bytes).or_default() += count;
            }
            if let Some(histogram) = &counts.latency_ns {
                latency.add(histogram).expect("histograms of the same shape");
            }
        }
        let commonest = report.granularity_histogram.iter().max_by_key(|(_, count)| **count);
        report.granularity_bytes = commonest.map_or(0, |(bytes, _)| *bytes);
        if report.faults > 0 {
            let micros = |nanos: u64| nanos as f64 / 1000.0;
            report.latency_us = LatencyMicros {
                p50: micros(latency.value_at_quantile(0.5)),
                p99: micros(latency.value_at_quantile(0.99)),
                max: micros(latency.max()),
            };
        }
        report
    }

    /// What the source did so far.
    pub fn source(&self) -> SourceReport {
        self.shards().fold(SourceReport::default(), |sum, shard| SourceReport {
            reads: sum.reads + shard.source.reads,
            bytes: sum.bytes + shard.source.bytes,
            errors: sum.errors + shard.source.errors,
            retries: sum.retries + shard.source.retries,
        })
    }

    /// Pages that became present so far, on all paths.
    pub fn pages_arrived(&self) -> u64 {
        self.shards().map(|shard| shard.paths.iter().map(|path| path.pages).sum::<u64>()).sum()
    }

    /// The events that were kept, by time.
    pub fn timeline(&self) -> Vec<TimelineEvent> {
        let mut events: Vec<_> = self.shards().flat_map(|shard| shard.events.clone()).collect();
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
                    stats.fault(Path::Guest, 4096, Duration::from_micros(10));
                    stats.arrived(Path::Guest, 1, 4096);
                    stats.fault(Path::BackEnd, 2 << 20, Duration::from_micros(200));
                    stats.arrived(Path::BackEnd, 512, 0);
                });
            }
        });
        stats.fault(Path::Guest, 8192, Duration::from_millis(1));
        let guest = stats.path(Path::Guest);
        assert_eq!((guest.faults, guest.pages, guest.bytes_fetched), (5, 4, 16384));
        assert_eq!(guest.granularity_bytes, 4096);
        assert!((9.9..10.1).contains(&guest.latency_us.p50), "{guest:?}");
        assert!((999.0..1001.0).contains(&guest.latency_us.max), "{guest:?}");
        assert_eq!(stats.path(Path::Fill), PathReport::default());
        let source = stats.source();
        assert_eq!((source.reads, source.bytes), (4, 16384));
        assert_eq!(stats.timeline().iter().map(|event| event.pages).sum::<u64>(), 4 * 513);
        assert_eq!(stats.pages_arrived(), 4 * 513);
    }
}
