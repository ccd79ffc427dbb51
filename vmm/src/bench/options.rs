// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The parameters of a measurement.

use std::time::Duration;

use demand_kvm::EngineChoice;
use demand_paging::ServiceOptions;

use super::source::SourceOption;
use super::touches::Order;
use crate::config::MemoryConfig;

/// Parameters of a measurement.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Memory of each vCPU.
    pub memory: MemoryConfig,
    /// Number of vCPUs.
    pub cpus: u32,
    /// How vCPU accesses to missing pages are trapped.
    pub engine: EngineChoice,
    /// Longest spin of a thread that serves faults; `None` for the default.
    pub spin: Option<Duration>,
    /// The source of the pages.
    pub source: SourceOption,
    /// The order in which each vCPU touches its pages.
    pub order: Order,
    /// The vCPUs' access to their pages.
    pub access: Access,
    /// Number of pages that each vCPU touches; `None` for all of them.
    pub pages: Option<u64>,
}

impl BenchOptions {
    /// Returns the options of the threads that serve faults.
    pub(super) fn service(&self) -> ServiceOptions {
        let options = ServiceOptions::default();
        ServiceOptions { spin: self.spin.unwrap_or(options.spin), ..options }
    }
}

/// The guest's access to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A read of one word of the page.
    Read,
    /// A write of one word of the page.
    Write,
}

impl Access {
    /// Returns the name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Access::Read => "read",
            Access::Write => "write",
        }
    }
}
