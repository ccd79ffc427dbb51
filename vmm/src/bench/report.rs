// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The report of a measurement.

use std::fmt::Write;

use demand_memory::{LatencyMicros, PathReport, SourceReport};
use demand_uffd::ServiceCounts;
use serde::{Deserialize, Serialize};

use crate::report::size;

/// The figures of one measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BenchReport {
    /// How vCPU accesses to missing pages were trapped.
    pub engine: String,
    /// The kind of the memory's backing.
    pub backing: String,
    /// Source of the pages: `hot`, or an image.
    pub source: String,
    /// The order in which each vCPU touched its pages.
    pub order: String,
    /// `read` or `write`.
    pub access: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Memory of each vCPU, in bytes.
    pub memory_bytes_per_cpu: u64,
    /// Number of pages touched by all vCPUs, each once.
    pub pages: u64,
    /// Number of vCPU faults.
    pub faults: u64,
    /// Whether each vCPU read the source's bytes in the right order, and the memory finally held
    /// them, or the words that the vCPU wrote. Always true, because a mismatch yields no report.
    pub verified: bool,
    /// Time from the first touch of any vCPU to the last, in nanoseconds; or in instructions, on a
    /// machine whose clock counts those.
    pub time_ns: u64,
    /// Processor time of all threads of this process during `time_ns`, in nanoseconds: of vCPUs and
    /// of threads that serve faults.
    pub cpu_time_ns: u64,
    /// `time_ns` divided by `pages`.
    pub ns_per_page: f64,
    /// Pages per second of all vCPUs together.
    pub pages_per_second: f64,
    /// Latencies of the vCPUs' faults.
    pub latency_us: LatencyMicros,
    /// The vCPUs' path, as in other reports.
    pub guest: PathReport,
    /// The path of KVM's own accesses.
    pub kvm_internal: PathReport,
    /// Reads of the source.
    pub source_reads: SourceReport,
    /// The threads that serve faults.
    pub service: ServiceReport,
    /// Time from the process's start to its first `KVM_RUN`, in microseconds.
    pub time_to_first_instruction_us: u64,
}

/// The work of the threads that serve faults of userfaultfds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceReport {
    /// Number of messages that were read.
    pub messages: u64,
    /// Number of times that a sleeping thread was woken.
    pub wake_ups: u64,
    /// Number of times that a thread found the next message while it was spinning.
    pub spun: u64,
}

impl From<ServiceCounts> for ServiceReport {
    fn from(counts: ServiceCounts) -> Self {
        let ServiceCounts { messages, wake_ups, spun } = counts;
        ServiceReport { messages, wake_ups, spun }
    }
}

impl BenchReport {
    /// Returns the report as a table for people.
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
            format!(
                "  {:.1} ms of processor time for 1,000 pages; {} wake-ups, {} messages while spinning",
                self.cpu_time_ns as f64 / 1e6 / (self.pages as f64 / 1e3),
                self.service.wake_ups,
                self.service.spun
            ),
            format!("  first instruction after {} us", self.time_to_first_instruction_us),
            "  verified: the guest saw what the source holds".to_string(),
        ];
        for line in lines {
            writeln!(table, "{line}").expect("writing to a String cannot fail");
        }
        table
    }
}
