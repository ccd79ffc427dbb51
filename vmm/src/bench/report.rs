// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a measurement reports.

use std::fmt::Write;

use demand_memory::{LatencyMicros, PathReport, SourceReport};
use serde::{Deserialize, Serialize};

use crate::report::size;

/// The figures of one measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchReport {
    /// How vCPU accesses to missing pages were trapped.
    pub engine: String,
    /// What the memory was made of.
    pub backing: String,
    /// Where the pages came from: `hot`, or an image.
    pub source: String,
    /// In what order each vCPU touched its pages.
    pub order: String,
    /// `read` or `write`.
    pub access: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Memory of each vCPU, in bytes.
    pub memory_bytes_per_cpu: u64,
    /// Pages that the vCPUs touched, each once.
    pub pages: u64,
    /// Faults of the vCPUs.
    pub faults: u64,
    /// Whether each vCPU saw the bytes of the source in the order in which it read them, and the
    /// memory held them (and what it wrote) in the end. Always so: else there is no report.
    pub verified: bool,
    /// From the first vCPU's first touch to the last one's last, in nanoseconds. Where the clock
    /// counts instructions these are instructions.
    pub time_ns: u64,
    /// `time_ns` by `pages`.
    pub ns_per_page: f64,
    /// Pages of all vCPUs together in a second.
    pub pages_per_second: f64,
    /// Latencies of the vCPUs' faults.
    pub latency_us: LatencyMicros,
    /// The vCPUs' path as in other reports.
    pub guest: PathReport,
    /// What KVM itself touched.
    pub kvm_internal: PathReport,
    /// Reads of the source.
    pub source_reads: SourceReport,
    /// From the process's start to its first `KVM_RUN`, in microseconds.
    pub time_to_first_instruction_us: u64,
}

impl BenchReport {
    /// The report for people.
    pub fn table(&self) -> String {
        let mut table = String::new();
        let plural = if self.cpus == 1 { "" } else { "s" };
        let lines = [
            format!(
                "{} vCPU{plural} with {} of {} each, engine {}, source {}, {} {}s",
                self.cpus,
                size(self.memory_bytes_per_cpu),
                self.backing,
                self.engine,
                self.source,
                self.order,
                self.access
            ),
            format!(
                "  {} pages, {} faults, each maps {}",
                self.pages,
                self.faults,
                size(self.guest.granularity_bytes)
            ),
            format!(
                "  {:.1} ms: {:.0} ns a page, {:.0} pages/s",
                self.time_ns as f64 / 1e6,
                self.ns_per_page,
                self.pages_per_second
            ),
            format!(
                "  latency us: p50 {:.1}, p99 {:.1}, max {:.1}",
                self.latency_us.p50, self.latency_us.p99, self.latency_us.max
            ),
            format!("  first instruction after {} us", self.time_to_first_instruction_us),
            "  verified: the guest saw what the source holds".to_string(),
        ];
        for line in lines {
            writeln!(table, "{line}").expect("a string takes everything");
        }
        table
    }
}
