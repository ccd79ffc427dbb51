// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The parameters of `test-vmm run`, as plain data.

use std::path::PathBuf;
use std::time::Duration;

use demand_kvm::EngineChoice;
use demand_vmm::config::{FillConfig, MemoryConfig, VhostUserConfig};

use crate::options::TestGuestOption;

/// The parameters of `run`.
#[derive(Clone, Debug)]
pub(crate) struct RunOptions {
    /// Name of the run in its report.
    pub(crate) stage: String,
    /// The guest's memory.
    pub(crate) memory: MemoryConfig,
    /// Number of vCPUs.
    pub(crate) cpus: u32,
    /// The engine that traps vCPU accesses to missing pages.
    pub(crate) engine: EngineChoice,
    /// The image that pages are fetched from.
    pub(crate) source: PathBuf,
    /// How long the source may fail, or not answer, before the run ends with an error; `None`:
    /// without limit.
    pub(crate) source_limit: Option<Duration>,
    /// The disk's back-end, if the guest has a disk.
    pub(crate) vhost_user: Option<VhostUserConfig>,
    /// Background fill.
    pub(crate) fill: FillConfig,
    /// The guest's workload.
    pub(crate) test_guest: TestGuestOption,
    /// Whether a separate process compares memory and disk at the end.
    pub(crate) verify: bool,
    /// Whether the number of present pages is printed on standard error from time to time.
    pub(crate) progress: bool,
    /// Whether the arrival of pages is recorded, for the picture of the run.
    pub(crate) timeline: bool,
}
