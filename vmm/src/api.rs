// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VMM's HTTP API: its endpoints, and the values in requests and answers.
//! [`ApiServer`](crate::api::server::ApiServer) serves it on a Unix socket.
//!
//! | request | answer |
//! |---|---|
//! | `GET /api/v1/status` | [`Status`] |
//! | `PUT /api/v1/pause`, `resume`, `shutdown` | [`Status`], after the request |
//! | `PUT /api/v1/snapshot` with a [`SnapshotRequest`] | [`SnapshotSummary`] |
//!
//! `POST` works as well as `PUT`. All bodies are JSON. A failure has the body
//! `{"error": "one line"}`, with status 400 if the request is wrong, 409 if the VM's state does not
//! allow it, and 500 if the operation started and failed.

pub mod client;
pub mod http;
pub mod server;
pub(crate) mod socket;

use std::fmt;
use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::api::http::Response;
use crate::error::Error;

/// The operations that a VMM offers through the API. Requests arrive on several threads at once.
pub trait Control: Send + Sync {
    /// Returns the VM's status. It never blocks: clients ask for it while other requests are in
    /// progress, to see how far they are.
    fn status(&self) -> Status;

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

/// The cause of a refused or failed request, which decides the HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The VM's state does not allow the request: 409.
    WrongState,
    /// The request is wrong: 400.
    Invalid,
    /// The operation started and failed: 500.
    Failed,
}

/// A refused or failed request: one line with the request, the cause and a remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlError {
    /// The kind of cause.
    pub kind: ErrorKind,
    /// The one-line message.
    pub message: String,
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

    fn new(kind: ErrorKind, message: impl fmt::Display) -> Self {
        // `Error` joins the message into one line.
        ControlError { kind, message: Error::failed(message).to_string() }
    }
}

impl fmt::Display for ControlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ControlError {}

impl From<Error> for ControlError {
    fn from(error: Error) -> Self {
        ControlError::failed(error)
    }
}

impl From<ControlError> for Response {
    fn from(error: ControlError) -> Self {
        let status = match error.kind {
            ErrorKind::WrongState => 409,
            ErrorKind::Invalid => 400,
            ErrorKind::Failed => 500,
        };
        Response::error(status, error.message)
    }
}

/// The VM's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
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

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
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

/// The VM's configuration and state, and how much of its memory is present.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The VM's state.
    pub state: State,
    /// How vCPU accesses to missing pages are trapped.
    pub engine: String,
    /// The kind of the memory's backing.
    pub backing: String,
    /// Size of the memory, in bytes.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Number of 4 KiB pages of the memory.
    pub pages_total: u64,
    /// Number of pages that are present.
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
    /// The device's state, in one word.
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

/// An operation of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// [`Control::status`]
    Status,
    /// [`Control::pause`]
    Pause,
    /// [`Control::resume`]
    Resume,
    /// [`Control::snapshot`]
    Snapshot,
    /// [`Control::shutdown`]
    Shutdown,
}

impl Endpoint {
    const ALL: [Endpoint; 5] = [
        Endpoint::Status,
        Endpoint::Pause,
        Endpoint::Resume,
        Endpoint::Snapshot,
        Endpoint::Shutdown,
    ];

    /// Returns the endpoint's path.
    pub fn path(self) -> &'static str {
        match self {
            Endpoint::Status => "/api/v1/status",
            Endpoint::Pause => "/api/v1/pause",
            Endpoint::Resume => "/api/v1/resume",
            Endpoint::Snapshot => "/api/v1/snapshot",
            Endpoint::Shutdown => "/api/v1/shutdown",
        }
    }

    /// Returns the endpoint for a request's method and path.
    ///
    /// # Errors
    ///
    /// The answer for an unknown path (404), or for a method that the path does not support (405).
    pub fn find(method: &str, path: &str) -> Result<Endpoint, Response> {
        let Some(endpoint) = Endpoint::ALL.into_iter().find(|endpoint| endpoint.path() == path)
        else {
            let known = Endpoint::ALL.map(Endpoint::path).join(", ");
            return Err(Response::error(
                404,
                format!("unknown path {path:.99}; the paths are {known}"),
            ));
        };
        let methods: &[&str] = match endpoint {
            Endpoint::Status => &["GET", "HEAD"],
            _ => &["PUT", "POST"],
        };
        if methods.contains(&method) {
            return Ok(endpoint);
        }
        let allow = if endpoint == Endpoint::Status { "GET, HEAD" } else { "PUT, POST" };
        let error = format!("{path} does not take {method:.20}; it takes {allow}");
        Err(Response { allow: Some(allow), ..Response::error(405, error) })
    }

    /// Returns whether a request must have a body.
    pub fn needs_body(self) -> bool {
        self == Endpoint::Snapshot
    }

    /// Performs the operation and returns its answer.
    pub fn answer(self, body: &[u8], control: &dyn Control) -> Response {
        match self.try_answer(body, control) {
            Ok(response) => response,
            Err(error) => error.into(),
        }
    }

    fn try_answer(self, body: &[u8], control: &dyn Control) -> Result<Response, ControlError> {
        if !self.needs_body() && !matches!(body.trim_ascii(), b"" | b"{}") {
            let path = self.path();
            return Err(ControlError::invalid(format!("{path} takes no body; send none")));
        }
        match self {
            Endpoint::Status => {}
            Endpoint::Pause => control.pause()?,
            Endpoint::Resume => control.resume()?,
            Endpoint::Shutdown => control.shutdown()?,
            Endpoint::Snapshot => {
                let request: SnapshotRequest = serde_json::from_slice(body).map_err(|error| {
                    ControlError::invalid(format!("the body is not a snapshot request: {error}"))
                })?;
                if !request.destination.is_absolute() {
                    return Err(ControlError::invalid(format!(
                        "the destination '{}' is not an absolute path; it must begin with /",
                        request.destination.display()
                    )));
                }
                return Ok(Response::json(200, &control.snapshot(&request)?));
            }
        }
        Ok(Response::json(200, &control.status()))
    }
}
