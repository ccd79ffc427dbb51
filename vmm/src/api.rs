// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VMM's HTTP API: its endpoints, and the values in requests and answers.
//! [`ApiServer`](crate::api::server::ApiServer) serves it on a Unix socket.
//!
//! | request | answer |
//! |---|---|
//! | `GET /api/v1/status` | [`Status`] |
//! | `GET /metrics` | the figures of status and report as OpenMetrics text |
//! | `GET /api/v1/events` | a line for each [`VmEvent`](events::VmEvent), until the VM has ended |
//! | `PUT /api/v1/vm.create` with a [`VmConfig`] | [`Status`], after the request |
//! | `PUT /api/v1/vm.boot` | the same |
//! | `PUT /api/v1/vm.restore` with a [`RestoreConfig`] | the same |
//! | `PUT /api/v1/vm.pause`, `vm.resume`, `vm.shutdown` | the same |
//! | `PUT /api/v1/vm.snapshot` with a [`SnapshotRequest`] | [`SnapshotSummary`] |
//!
//! The last four work without `vm.` as well, and `POST` as well as `PUT`. Other bodies are JSON. A
//! failure has the body `{"error": "cannot DO THING: CAUSE; HINT"}`, one line, with status 400 if
//! the request is wrong, 409 if the VM's state does not allow it, and 500 if the operation started
//! and failed. `openapi.yaml`, beside this module, describes all of it for programs.

pub mod client;
pub mod endpoint;
pub mod events;
pub mod http;
mod metrics;
pub mod server;
pub(crate) mod socket;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum;
use demand_memory::Stats;
use serde::{Deserialize, Serialize};

use crate::api::endpoint::Endpoint;
use crate::api::events::EventLog;
use crate::api::http::Response;
use crate::config::names::with_keys;
use crate::config::vm::{RestoreConfig, VmConfig};
use crate::error::{Error, Kind};
use crate::report::WorkingSetReport;
pub use crate::vm::sources::SourceFigures;

/// The operations that a VMM offers through the API. Requests arrive on several threads at once.
pub trait Control: Send + Sync {
    /// Returns the VM's status. It never blocks: clients ask for it while other requests are in
    /// progress, to see how far they are.
    fn status(&self) -> Status;

    /// Returns the VM's statistics, or `None` if there is no VM. It never blocks.
    fn stats(&self) -> Option<Arc<Stats>> {
        None
    }

    /// Returns the figures of what is remote. It never blocks.
    fn source_figures(&self) -> SourceFigures {
        SourceFigures::default()
    }

    /// Returns the log of the VM's events.
    fn events(&self) -> Arc<EventLog>;

    /// Defines the VM that [`boot`](Self::boot) starts, in a process without one.
    ///
    /// # Errors
    ///
    /// [`WrongState`](ErrorKind::WrongState) if the process has a VM, which is the default;
    /// [`Invalid`](ErrorKind::Invalid) if there cannot be such a VM.
    fn create(&self, config: &VmConfig) -> Result<(), ControlError> {
        let _ = config;
        Err(ControlError::wrong_state(format_args!("cannot create a VM: {HAS_ONE}")))
    }

    /// Boots the VM that was created. It returns once the vCPUs run.
    ///
    /// # Errors
    ///
    /// [`WrongState`](ErrorKind::WrongState) if no VM was created or it was booted, which is the
    /// default; [`Invalid`](ErrorKind::Invalid) and [`Failed`](ErrorKind::Failed) if it cannot be
    /// booted.
    fn boot(&self) -> Result<(), ControlError> {
        Err(ControlError::wrong_state(format_args!("cannot boot a VM: {HAS_ONE}")))
    }

    /// Restores a VM from a snapshot, in a process without one. It returns once the vCPUs run,
    /// before the VM's memory has arrived.
    ///
    /// # Errors
    ///
    /// [`WrongState`](ErrorKind::WrongState) if the process has a VM, which is the default;
    /// [`Invalid`](ErrorKind::Invalid) and [`Failed`](ErrorKind::Failed) if it cannot be restored.
    fn restore(&self, config: &RestoreConfig) -> Result<(), ControlError> {
        let _ = config;
        Err(ControlError::wrong_state(format_args!("cannot restore a VM: {HAS_ONE}")))
    }

    /// Stops all vCPUs at a consistent point.
    ///
    /// # Errors
    ///
    /// [`WrongState`](ErrorKind::WrongState) if the VM is already paused, is not yet running, or
    /// has ended, or if another operation is in progress; [`Failed`](ErrorKind::Failed) if a vCPU
    /// does not leave the guest.
    fn pause(&self) -> Result<(), ControlError>;

    /// Resumes the vCPUs, and the devices if a snapshot has stopped them.
    ///
    /// # Errors
    ///
    /// [`WrongState`](ErrorKind::WrongState) if the VM already runs, or is not paused, or if
    /// another operation is in progress; [`Failed`](ErrorKind::Failed) if a device does not resume.
    fn resume(&self) -> Result<(), ControlError>;

    /// Writes a snapshot, which may take minutes.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) if the destination cannot hold a snapshot,
    /// [`WrongState`](ErrorKind::WrongState) if the VM has ended or a snapshot is in progress,
    /// [`Failed`](ErrorKind::Failed) if the snapshot started and failed, in which case nothing of
    /// it remains.
    fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotSummary, ControlError>;

    /// Ends the VM in order. It returns once the end has begun. A snapshot in progress then fails
    /// with an error, and so does a restore that still waits for the pages that it needs to start.
    /// A repeated call does no harm.
    ///
    /// # Errors
    ///
    /// [`WrongState`](ErrorKind::WrongState) if there is no VM to end.
    fn shutdown(&self) -> Result<(), ControlError>;
}

/// The cause of a request for a VM in a process that has one, and the hint.
const HAS_ONE: &str = "this process runs one already; start another demand-vmm for it";

/// The cause of a refused or failed request, which decides the HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The VM's state does not allow the request: 409.
    WrongState,
    /// The request is wrong: 400.
    Invalid,
    /// The operation started and failed: 500.
    Failed,
}

/// A refused or failed request: one line with the request, the cause and a remedy.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct ControlError {
    kind: ErrorKind,
    #[source]
    error: Error,
}

impl ControlError {
    /// Returns an error of kind [`WrongState`](ErrorKind::WrongState).
    pub fn wrong_state(message: impl fmt::Display) -> Self {
        ControlError::new(ErrorKind::WrongState, message)
    }

    /// Returns an error of kind [`Invalid`](ErrorKind::Invalid).
    pub fn invalid(message: impl fmt::Display) -> Self {
        ControlError::new(ErrorKind::Invalid, message)
    }

    /// Returns an error of kind [`Failed`](ErrorKind::Failed).
    pub fn failed(message: impl fmt::Display) -> Self {
        ControlError::new(ErrorKind::Failed, message)
    }

    /// Returns the error for a VM that does not start: [`Invalid`](ErrorKind::Invalid) if the
    /// request is the cause, else [`Failed`](ErrorKind::Failed).
    pub(crate) fn of_start(error: &Error) -> Self {
        // A client knows keys, and not the options of a command line.
        let line = with_keys(&error.to_string(), |_| true);
        match error.kind() {
            Kind::Usage => ControlError::invalid(line),
            Kind::Failed | Kind::Host => ControlError::failed(line),
        }
    }

    /// Returns the same error, whose line begins with what was asked for.
    pub(crate) fn of(self, endpoint: Endpoint) -> Self {
        let line = self.error.to_string();
        if line.starts_with("cannot ") {
            return self;
        }
        ControlError::new(self.kind, format_args!("cannot {}: {line}", endpoint.action()))
    }

    fn new(kind: ErrorKind, message: impl fmt::Display) -> Self {
        ControlError { kind, error: Error::failed(message) }
    }

    /// Returns the kind of cause.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl<E: Into<Error>> From<E> for ControlError {
    fn from(error: E) -> Self {
        ControlError { kind: ErrorKind::Failed, error: error.into() }
    }
}

impl From<ControlError> for Response {
    fn from(error: ControlError) -> Self {
        let status = match error.kind {
            ErrorKind::WrongState => 409,
            ErrorKind::Invalid => 400,
            ErrorKind::Failed => 500,
        };
        Response::error(status, error.to_string())
    }
}

/// The VM's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The process has no VM.
    Empty,
    /// The VM is defined, and uses nothing of the host yet.
    Created,
    /// The VM is being set up.
    Starting,
    /// The vCPUs run.
    Running,
    /// The vCPUs are stopped.
    Paused,
    /// The vCPUs are stopped while a snapshot is written.
    Snapshotting,
    /// The VM has ended.
    Stopped,
}

impl State {
    /// All states, in the order of a VM's life.
    pub const ALL: [State; 7] = [
        State::Empty,
        State::Created,
        State::Starting,
        State::Running,
        State::Paused,
        State::Snapshotting,
        State::Stopped,
    ];
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            State::Empty => "empty",
            State::Created => "created",
            State::Starting => "starting",
            State::Running => "running",
            State::Paused => "paused",
            State::Snapshotting => "snapshotting",
            State::Stopped => "stopped",
        })
    }
}

/// The condition of a guest that neither runs nor has asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestCondition {
    /// The guest's kernel has reported a panic.
    Panicked,
    /// All vCPUs are halted with interrupts off, so that nothing can wake them.
    Halted,
}

impl fmt::Display for GuestCondition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GuestCondition::Panicked => "its kernel has panicked; its console may say why",
            GuestCondition::Halted => "all vCPUs are halted for good",
        })
    }
}

/// The VM's configuration and state, and how much of its memory is present. Sizes are in bytes,
/// pages are pages of 4 KiB, and times are in microseconds. Before a VM exists, numbers are 0 and
/// names are "none".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The VM's state.
    pub state: State,
    /// How vCPU accesses to missing pages are trapped: the engine's name, or "none" if no page was
    /// ever missing.
    pub engine: String,
    /// The kind of the memory's backing: `shmem`, `hugetlb-2m`, `hugetlb-1g` or `guest-memfd`.
    pub backing: String,
    /// Size of the memory, in bytes.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Number of 4 KiB pages of the memory.
    pub pages_total: u64,
    /// Number of 4 KiB pages that are present: their content has arrived, or was never missing.
    pub pages_present: u64,
    /// The devices, in the order in which the guest finds them.
    pub devices: Vec<DeviceStatus>,
    /// Microseconds since the process started.
    pub uptime_us: u64,
    /// Process ID of the VMM.
    pub pid: u32,
    /// The program's version.
    pub version: String,
    /// The guest's condition, if it neither runs nor has asked to end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestCondition>,
    /// Progress of the snapshot, if one is being written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotProgress>,
    /// The last error whose cause persists, for example a source that cannot be read: one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// The places that the memory comes from, if there are several, the preferred one first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<SourceStatus>,
    /// The limits that the VM has because of its backing: one line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<String>,
    /// Figures for the working set; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_set: Option<WorkingSetReport>,
}

/// The condition of one of several places that a VM's memory comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceStatus {
    /// The place, without credentials.
    pub source: String,
    /// Its condition.
    pub state: SourceState,
    /// The time for which it has been failing, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failing_s: Option<u64>,
    /// Number of requests that it has failed.
    pub failures: u64,
}

/// The condition of a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceState {
    /// It has not answered yet, and is used once it has.
    Opening,
    /// It delivers, or has not been needed.
    Healthy,
    /// It has failed, and not delivered since. It is tried again from time to time.
    Failing,
    /// It could not be used when the VM was restored, and is not tried again.
    LeftOut,
}

impl fmt::Display for SourceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SourceState::Opening => "opening",
            SourceState::Healthy => "healthy",
            SourceState::Failing => "failing",
            SourceState::LeftOut => "left out",
        })
    }
}

/// A device's kind and state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// The kind of device, for example `blk`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The socket of the back-end, if a back-end serves the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// The device's state, in one word: `configured` before the VM starts, then `alive`, or `gone`
    /// once its back-end has hung up.
    pub state: String,
}

/// Progress of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotProgress {
    /// The snapshot's directory.
    pub destination: String,
    /// Number of pages written so far, holes included.
    pub pages_done: u64,
    /// Number of pages of the memory.
    pub pages_total: u64,
}

/// The VM's state after a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Go {
    /// The VM resumes.
    Resume,
    /// The VM stays paused.
    Pause,
    /// The VM ends.
    Shutdown,
}

/// A request for a snapshot: `{"destination": "/snapshots/a", "then": "resume"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// The directory to create: an absolute path, because the client and the VMM have different
    /// working directories.
    pub destination: PathBuf,
    /// The VM's state afterwards; by default its state before the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub then: Option<Go>,
}

/// A finished snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotSummary {
    /// The snapshot's directory.
    pub destination: PathBuf,
    /// Number of 4 KiB pages with content.
    pub data_pages: u64,
    /// Number of pages that are holes: all zeros, without disk space.
    pub hole_pages: u64,
    /// Number of bytes written, tables and state included.
    pub bytes: u64,
    /// Duration in microseconds.
    pub took_us: u64,
    /// The part that the snapshot lacks, if any: one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}
