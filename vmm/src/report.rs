// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The report of a run, as JSON and as a table.

pub mod outputs;
pub mod progress;
mod timeline;

use std::fmt::Write;
use std::time::Duration;

use demand_memory::{FaultPath, PathReport, SourceReport, Stats};
use serde::{Deserialize, Serialize};

pub use timeline::Moment;
use timeline::Picture;

/// The report of one run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The stage of the run: "host", "lab", or the user's name for it.
    pub stage: String,
    /// The engine that trapped vCPU accesses to missing pages, or "none".
    pub engine: String,
    /// The backing of the memory.
    pub backing: String,
    /// Size of the memory, in bytes.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Whether memory and disk were found to hold the expected content. Only the user of a guest can
    /// know that content, and can set this field.
    pub verified: bool,
    /// Figures for the vCPUs.
    pub guest: PathReport,
    /// Figures for KVM itself.
    pub kvm_internal: PathReport,
    /// Figures for the VMM.
    pub vmm: PathReport,
    /// Figures for the vhost-user back-end.
    pub back_end: PathReport,
    /// Figures for background fill.
    pub fill: PathReport,
    /// The most that background fill kept in flight at last, in bytes; 0 without fill.
    #[serde(default)]
    pub fill_in_flight_bytes: u64,
    /// Figures for the page source.
    pub source: SourceReport,
    /// Figures for the host cache; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheReport>,
    /// Figures for the working set; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_set: Option<WorkingSetReport>,
    /// Figures for the requests for pushed snapshots; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<RemoteReport>,
    /// Time from the process's start to its first `KVM_RUN`, in microseconds.
    pub time_to_first_instruction_us: u64,
    /// Time from the process's start until the last page was present, in microseconds; 0 if pages
    /// were still missing at the end, or if all were present from the start.
    pub time_to_complete_us: u64,
    /// The error that ended the run; absent after an end in order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The replay of a working set, and its recording. Touches are counted while they are noted: for 30
/// seconds by default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSetReport {
    /// The use of the working set: `record`, `replay` or `auto`.
    pub mode: String,
    /// Pages of the set that was replayed; 0 if none was.
    pub replayed_pages: u64,
    /// Bytes that were read of it, as stored.
    pub fetched_bytes: u64,
    /// Frames of the set that could not be read, or were damaged: their pages came from the image.
    pub failed_frames: u64,
    /// Pages of the set that arrived before their first touch, and were touched. Under `replay` it
    /// is an estimate, from a sample of one page in 64.
    pub hits: u64,
    /// Pages of the set that were touched before they arrived.
    pub late: u64,
    /// Pages outside the set that were touched before they arrived.
    pub misses: u64,
    /// Pages of the set that arrived, and were not touched; an estimate like `hits`.
    pub waste: u64,
    /// Pages of the set that was recorded; 0 if none was.
    pub recorded_pages: u64,
    /// Its length, in bytes.
    pub recorded_bytes: u64,
    /// The error for which none was recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The use that a run has made of the host cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheReport {
    /// Reads that the cache answered.
    pub hits: u64,
    /// Bytes of these reads.
    pub hit_bytes: u64,
    /// Chunks that came from the store.
    pub misses: u64,
    /// Bytes that were written to the cache.
    pub written_bytes: u64,
    /// Chunks that came from the store because another VM, which had claimed them, was late.
    pub overdue: u64,
    /// Packs that were removed to keep to the size.
    pub evicted: u64,
}

#[cfg(feature = "remote")]
impl From<demand_remote::CacheStats> for CacheReport {
    fn from(stats: demand_remote::CacheStats) -> Self {
        CacheReport {
            hits: stats.hits,
            hit_bytes: stats.hit_bytes,
            misses: stats.misses,
            written_bytes: stats.written_bytes,
            overdue: stats.overdue,
            evicted: stats.evicted,
        }
    }
}

/// The requests of a run for pushed snapshots, from all places together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteReport {
    /// Requests that were answered.
    pub requests: u64,
    /// Bytes of the answers.
    pub bytes: u64,
    /// Requests for faults that were made twice, because they were late.
    pub hedges: u64,
    /// Those of them whose second request was answered first.
    pub hedges_won: u64,
    /// Pages that were fetched beside those that faults needed.
    pub around_pages: u64,
    /// Those of them that were read later, by faults or by background fill.
    pub around_used_pages: u64,
    /// Requests for faults that are in progress or queued.
    pub demand_queue: u64,
    /// Other requests that are.
    pub fill_queue: u64,
}

impl RemoteReport {
    /// Returns the sum of two places' figures.
    #[cfg(feature = "remote")]
    pub(crate) fn plus(self, other: RemoteReport) -> RemoteReport {
        RemoteReport {
            requests: self.requests + other.requests,
            bytes: self.bytes + other.bytes,
            hedges: self.hedges + other.hedges,
            hedges_won: self.hedges_won + other.hedges_won,
            around_pages: self.around_pages + other.around_pages,
            around_used_pages: self.around_used_pages + other.around_used_pages,
            demand_queue: self.demand_queue + other.demand_queue,
            fill_queue: self.fill_queue + other.fill_queue,
        }
    }
}

#[cfg(feature = "remote")]
impl From<demand_remote::image::ImageFigures> for RemoteReport {
    fn from(figures: demand_remote::image::ImageFigures) -> Self {
        RemoteReport {
            requests: figures.reads.requests,
            bytes: figures.reads.bytes,
            hedges: figures.hedges.made,
            hedges_won: figures.hedges.won,
            around_pages: figures.around.extra_pages,
            around_used_pages: figures.around.used_pages,
            demand_queue: figures.demand_queue as u64,
            fill_queue: figures.fill_queue as u64,
        }
    }
}

impl Report {
    /// Copies the figures of the paths and of the source into the report.
    pub fn set_paths(&mut self, stats: &Stats) {
        self.guest = stats.path(FaultPath::Guest);
        self.kvm_internal = stats.path(FaultPath::HypervisorInternal);
        self.vmm = stats.path(FaultPath::Vmm);
        self.back_end = stats.path(FaultPath::BackEnd);
        self.fill = stats.path(FaultPath::Fill);
        self.source = stats.source();
    }

    /// Returns the figures of the paths, in the order of the table.
    pub fn paths(&self) -> [(&'static str, &PathReport); 5] {
        [
            (FaultPath::Guest.name(), &self.guest),
            (FaultPath::HypervisorInternal.name(), &self.kvm_internal),
            (FaultPath::Vmm.name(), &self.vmm),
            (FaultPath::BackEnd.name(), &self.back_end),
            (FaultPath::Fill.name(), &self.fill),
        ]
    }

    /// Returns the report as a table for people.
    pub fn table(&self) -> String {
        let mut table = String::new();
        let line = |table: &mut String, text: std::fmt::Arguments<'_>| {
            table.write_fmt(text).expect("writing to a String cannot fail");
            table.push('\n');
        };
        line(
            &mut table,
            format_args!(
                "{}: {} of {}, engine {}, {} vCPU{}",
                self.stage,
                size(self.memory_bytes),
                self.backing,
                self.engine,
                self.cpus,
                if self.cpus == 1 { "" } else { "s" }
            ),
        );
        // A guest that boots has no missing pages, and nothing but zeros here.
        if self.engine != "none" || self.source.reads > 0 {
            self.add_figures(&mut table);
        }
        let complete = match self.time_to_complete_us {
            0 if self.engine == "none" => "all pages present from the start".to_string(),
            0 => "some pages still missing at the end".to_string(),
            us => format!("all pages present after {}", duration(us)),
        };
        line(
            &mut table,
            format_args!(
                "  first instruction after {}; {complete}",
                duration(self.time_to_first_instruction_us)
            ),
        );
        if self.verified {
            line(
                &mut table,
                format_args!("  verified: memory and disk hold exactly what they must"),
            );
        }
        table
    }

    /// Adds the figures of the paths and of the source to the table.
    fn add_figures(&self, table: &mut String) {
        *table += &format!(
            "  {:<13}{:>9}{:>11}{:>10}{:>11}{:>11}{:>11}{:>12}\n",
            "path", "faults", "each maps", "pages", "fetched", "p50 us", "p99 us", "max us"
        );
        for (name, path) in self.paths() {
            *table += &format!(
                "  {:<13}{:>9}{:>11}{:>10}{:>11}{:>11.1}{:>11.1}{:>12.1}\n",
                name,
                path.faults,
                size(path.granularity_bytes),
                path.pages,
                size(path.bytes_fetched),
                path.latency_us.p50,
                path.latency_us.p99,
                path.latency_us.max
            );
        }
        for line in self.source_lines() {
            *table += &format!("  {line}\n");
        }
    }

    /// Returns the figures of the sources and of the working set, as lines.
    fn source_lines(&self) -> Vec<String> {
        let mut lines = vec![format!(
            "source: {} reads, {}, {} errors, {} retries",
            self.source.reads,
            size(self.source.bytes),
            self.source.errors,
            self.source.retries
        )];
        if let Some(cache) = &self.cache {
            lines.push(format!(
                "cache: {} hits, {}, {} misses, {} written",
                cache.hits,
                size(cache.hit_bytes),
                cache.misses,
                size(cache.written_bytes)
            ));
        }
        if let Some(remote) = &self.remote {
            lines.push(format!(
                "remote: {} requests, {}, {} hedged, {} pages beside faults, {} of them used",
                remote.requests,
                size(remote.bytes),
                remote.hedges,
                remote.around_pages,
                remote.around_used_pages
            ));
        }
        if let Some(set) = &self.working_set {
            lines.push(format!(
                "working set: {} pages replayed, {} hits, {} late, {} misses, {} in vain; {} recorded",
                set.replayed_pages,
                set.hits,
                set.late,
                set.misses,
                set.waste,
                set.recorded_pages
            ));
        }
        lines
    }
}

/// Draws a run's memory over time, as an SVG, with the moments at which something happened. `pages`
/// is the number of pages of its memory.
pub fn picture(report: &Report, stats: &Stats, pages: u64, moments: &[Moment]) -> String {
    let title = format!(
        "{}: {}, engine {}, {} vCPUs",
        report.stage, report.backing, report.engine, report.cpus
    );
    timeline::svg(&Picture {
        title: &title,
        events: &stats.timeline(),
        total_pages: pages,
        moments,
        figures: &report.source_lines(),
    })
}

/// Formats a number of bytes for people: in the largest unit that it reaches, rounded to one
/// decimal if it is not whole.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "K", "M", "G", "T"];
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.fract() == 0.0 {
        format!("{value:.0}{}", UNITS[unit])
    } else {
        format!("{value:.1}{}", UNITS[unit])
    }
}

/// Returns a duration in whole microseconds, for a report.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Formats a number of microseconds for people, rounded.
pub fn duration(us: u64) -> String {
    match us {
        0..10_000 => format!("{us} us"),
        10_000..10_000_000 => format!("{:.0} ms", us as f64 / 1e3),
        _ => format!("{:.1} s", us as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_boot_has_no_table_of_zeros() {
        let mut report = Report { stage: "run".into(), cpus: 1, ..Report::default() };
        report.engine = "none".into();
        let lines = report.table();
        let lines: Vec<_> = lines.lines().collect();
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[1].ends_with("all pages present from the start"), "{lines:?}");
        report.engine = "uffd".into();
        let lines = report.table();
        assert_eq!(lines.lines().count(), 9, "{lines}");
        assert!(lines.lines().nth(7).unwrap().starts_with("  source: 0 reads"), "{lines}");
        report.cache = Some(CacheReport { hits: 7, hit_bytes: 28 << 10, ..Default::default() });
        let lines = report.table();
        let cache = "  cache: 7 hits, 28K, 0 misses, 0B written";
        assert_eq!(lines.lines().nth(8), Some(cache), "{lines}");
        let remote = RemoteReport { requests: 5, bytes: 4096, hedges: 1, ..Default::default() };
        report.remote = Some(RemoteReport { around_pages: 32, ..remote });
        let lines = report.table();
        let remote = "  remote: 5 requests, 4K, 1 hedged, 32 pages beside faults, 0 of them used";
        assert_eq!(lines.lines().nth(9), Some(remote), "{lines}");
        let set = WorkingSetReport { replayed_pages: 9, hits: 7, waste: 2, ..Default::default() };
        report.working_set = Some(set);
        let lines = report.table();
        let set =
            "  working set: 9 pages replayed, 7 hits, 0 late, 0 misses, 2 in vain; 0 recorded";
        assert_eq!(lines.lines().nth(10), Some(set), "{lines}");
    }

    #[test]
    fn sizes_for_people() {
        for (bytes, text) in
            [(0, "0B"), (4096, "4K"), (2 << 20, "2M"), (1 << 30, "1G"), (1536 << 10, "1.5M")]
        {
            assert_eq!(size(bytes), text);
        }
    }
}
