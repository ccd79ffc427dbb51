// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The report of a run, as JSON and as a table.

pub(crate) mod outputs;
pub(crate) mod progress;
pub mod timeline;

use std::fmt::Write;
use std::path::Path as FilePath;

use demand_memory::{Path, PathReport, SourceReport, Stats};
use serde::{Deserialize, Serialize};

use crate::error::Error;

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
    /// Whether memory and disk were found to hold the expected content. For the test guest, a
    /// separate process has compared all of it (`--verify`). For a Linux guest, only the user can
    /// know the expected content, and can set this field.
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
    /// Figures for the page source.
    pub source: SourceReport,
    /// Time from the process's start to its first `KVM_RUN`, in microseconds.
    pub time_to_first_instruction_us: u64,
    /// Time from the process's start until the last page was present, in microseconds; 0 if pages
    /// were still missing at the end, or if all were present from the start.
    pub time_to_complete_us: u64,
}

impl Report {
    /// Copies the figures of the paths and of the source into the report.
    pub fn set_paths(&mut self, stats: &Stats) {
        self.guest = stats.path(Path::Guest);
        self.kvm_internal = stats.path(Path::KvmInternal);
        self.vmm = stats.path(Path::Vmm);
        self.back_end = stats.path(Path::BackEnd);
        self.fill = stats.path(Path::Fill);
        self.source = stats.source();
    }

    /// Returns the figures of the paths, in the order of the table.
    pub fn paths(&self) -> [(&'static str, &PathReport); 5] {
        [
            (Path::Guest.name(), &self.guest),
            (Path::KvmInternal.name(), &self.kvm_internal),
            (Path::Vmm.name(), &self.vmm),
            (Path::BackEnd.name(), &self.back_end),
            (Path::Fill.name(), &self.fill),
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
        line(
            &mut table,
            format_args!(
                "  {:<13}{:>9}{:>11}{:>10}{:>11}{:>11}{:>11}{:>12}",
                "path", "faults", "each maps", "pages", "fetched", "p50 us", "p99 us", "max us"
            ),
        );
        for (name, path) in self.paths() {
            line(
                &mut table,
                format_args!(
                    "  {:<13}{:>9}{:>11}{:>10}{:>11}{:>11.1}{:>11.1}{:>12.1}",
                    name,
                    path.faults,
                    size(path.granularity_bytes),
                    path.pages,
                    size(path.bytes_fetched),
                    path.latency_us.p50,
                    path.latency_us.p99,
                    path.latency_us.max
                ),
            );
        }
        line(
            &mut table,
            format_args!(
                "  source: {} reads, {}, {} errors, {} retries",
                self.source.reads,
                size(self.source.bytes),
                self.source.errors,
                self.source.retries
            ),
        );
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
}

/// Writes a picture of a run's pages over time to a file.
pub(crate) fn write_timeline(
    path: &FilePath,
    report: &Report,
    stats: &Stats,
    pages: u64,
) -> Result<(), Error> {
    let title = format!(
        "{}: {}, engine {}, {} vCPUs",
        report.stage, report.backing, report.engine, report.cpus
    );
    let picture = crate::report::timeline::svg(&title, &stats.timeline(), pages);
    std::fs::write(path, picture)
        .map_err(|error| Error::failed(format!("cannot write {}: {error}", path.display())))
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
    fn sizes_for_people() {
        for (bytes, text) in
            [(0, "0B"), (4096, "4K"), (2 << 20, "2M"), (1 << 30, "1G"), (1536 << 10, "1.5M")]
        {
            assert_eq!(size(bytes), text);
        }
    }
}
