// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The API: what a running VMM can be asked, the values that go both ways, and which request asks
//! for what. [`ApiServer`](crate::api_server::ApiServer) serves it on a Unix socket.
//!
//! | request | answer |
//! |---|---|
//! | `GET /api/v1/status` | [`Status`] |
//! | `PUT /api/v1/pause`, `resume`, `shutdown` | [`Status`], as it is then |
//! | `PUT /api/v1/snapshot` with a [`SnapshotRequest`] | [`SnapshotSummary`] |
//!
//! `POST` does as well as `PUT`. Everything is JSON; what fails is `{"error": "one line"}`: 400 for
//! a request that is wrong, 409 if the VM's state does not allow it, 500 if it was begun and failed.

use std::fmt;
use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::http::Response;

/// What a VMM does when the API asks for it. Requests come on several threads at once.
pub trait Control: Send + Sync {
    /// What the VM is and does now. It never waits for anything: it is asked while other requests
    /// are under way, to see how far they are.
    fn status(&self) -> Status;

    /// Stops all vCPUs at a consistent point.
    ///
    /// # Errors
    ///
    /// [`WrongState`](ErrorKind::WrongState) if the VM is paused already, is not yet running, or
    /// has ended, and while something else is under way; [`Failed`](ErrorKind::Failed) if a vCPU
    /// does not come out of the guest.
    fn pause(&self) -> Result<(), ControlError>;

    /// Lets them go on, and the devices if a snapshot has stopped them.
    ///
    /// # Errors
    ///
    /// [`WrongState`](ErrorKind::WrongState) if the VM runs already, or is not paused, and while
    /// something else is under way; [`Failed`](ErrorKind::Failed) if a device does not go on.
    fn resume(&self) -> Result<(), ControlError>;

    /// Writes a snapshot. It may take minutes.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) for a destination that cannot be one,
    /// [`WrongState`](ErrorKind::WrongState) if the VM has ended or a snapshot is under way,
    /// [`Failed`](ErrorKind::Failed) if it was begun and nothing is left of it.
    fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotSummary, ControlError>;

    /// Ends the VM in order. It returns when that is begun; a snapshot that is under way then
    /// comes to an end with an error, and so does a restore that waits for the pages it needs to
    /// begin. To ask again does no harm.
    ///
    /// # Errors
    ///
    /// [`WrongState`](ErrorKind::WrongState) where there is nothing to end.
    fn shutdown(&self) -> Result<(), ControlError>;
}

/// Why a request was not done, which is what the HTTP status tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The VM's state does not allow it: 409.
    WrongState,
    /// The request is wrong: 400.
    Invalid,
    /// It was begun and failed: 500.
    Failed,
}

/// A request that was not done: one line that says what was asked, what happened and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlError {
    /// Why.
    pub kind: ErrorKind,
    /// The line.
    pub message: String,
}

impl ControlError {
    /// The VM's state does not allow it.
    pub fn wrong_state(message: impl fmt::Display) -> Self {
        ControlError::new(ErrorKind::WrongState, message)
    }

    /// The request is wrong.
    pub fn invalid(message: impl fmt::Display) -> Self {
        ControlError::new(ErrorKind::Invalid, message)
    }

    /// It was begun and failed.
    pub fn failed(message: impl fmt::Display) -> Self {
        ControlError::new(ErrorKind::Failed, message)
    }

    fn new(kind: ErrorKind, message: impl fmt::Display) -> Self {
        // One line, as all errors are.
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

/// What a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It is being set up.
    Starting,
    /// Its vCPUs run.
    Running,
    /// They do not.
    Paused,
    /// They do not, and a snapshot is being written.
    Snapshotting,
    /// It has ended.
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

/// The condition of a guest that neither runs nor asked for its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestCondition {
    /// Its kernel has said that it has panicked.
    Panicked,
    /// All of its vCPUs are halted with interrupts off: nothing makes them run again.
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

/// What a VM is, and how far its memory has arrived.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What it is doing.
    pub state: State,
    /// How vCPU accesses to missing pages are trapped.
    pub engine: String,
    /// What the memory is made of.
    pub backing: String,
    /// Size of the memory, in bytes.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Pages of 4 KiB that the memory has.
    pub pages_total: u64,
    /// How many of them are present.
    pub pages_present: u64,
    /// The devices, in the order in which the guest finds them.
    pub devices: Vec<DeviceStatus>,
    /// Microseconds since the process began.
    pub uptime_us: u64,
    /// The VMM's process.
    pub pid: u32,
    /// The program's version.
    pub version: String,
    /// The guest's condition, if it neither runs nor asked for its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestCondition>,
    /// How far a snapshot is, if one is being written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotProgress>,
    /// What went wrong last and still does, say a source that cannot be read: one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// What it is to the guest, say `blk`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its back-end's socket, if it is a back-end that serves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// What it is doing: one word.
    pub state: String,
}

/// How far a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotProgress {
    /// Where it goes.
    pub destination: String,
    /// Pages that are written, holes included.
    pub pages_done: u64,
    /// Pages that the memory has.
    pub pages_total: u64,
}

/// What the VM does after a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Go {
    /// It runs.
    Resume,
    /// It stays paused.
    Pause,
    /// It ends.
    Shutdown,
}

/// Asks for a snapshot: `{"destination": "/snapshots/a", "then": "resume"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// The directory to be made: an absolute path, since the VMM's working directory is not the
    /// client's.
    pub destination: PathBuf,
    /// What the VM does then; if nothing is said, what it did before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub then: Option<Go>,
}

/// A snapshot that is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotSummary {
    /// Where it is.
    pub destination: PathBuf,
    /// Pages of 4 KiB with content.
    pub data_pages: u64,
    /// Pages that are holes: all zeros, and without room on the disk.
    pub hole_pages: u64,
    /// Bytes that were written, tables and state included.
    pub bytes: u64,
    /// Microseconds that it took.
    pub took_us: u64,
    /// The part that it lacks: one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// What is asked for.
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

    /// Its path.
    pub fn path(self) -> &'static str {
        match self {
            Endpoint::Status => "/api/v1/status",
            Endpoint::Pause => "/api/v1/pause",
            Endpoint::Resume => "/api/v1/resume",
            Endpoint::Snapshot => "/api/v1/snapshot",
            Endpoint::Shutdown => "/api/v1/shutdown",
        }
    }

    /// What a request with this method and this path asks for.
    ///
    /// # Errors
    ///
    /// The answer to a path (404) or a method (405) that there is not.
    pub fn find(method: &str, path: &str) -> Result<Endpoint, Response> {
        let Some(endpoint) = Endpoint::ALL.into_iter().find(|endpoint| endpoint.path() == path)
        else {
            let known = Endpoint::ALL.map(Endpoint::path).join(", ");
            return Err(Response::error(404, format!("there is no {path:.99}; there are {known}")));
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

    /// Whether a request must have a body.
    pub fn needs_body(self) -> bool {
        self == Endpoint::Snapshot
    }

    /// Does what is asked for.
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
                    ControlError::invalid(format!("the body is no request for a snapshot: {error}"))
                })?;
                if !request.destination.is_absolute() {
                    return Err(ControlError::invalid(format!(
                        "the destination '{}' is no absolute path; send one that begins with /",
                        request.destination.display()
                    )));
                }
                return Ok(Response::json(200, &control.snapshot(&request)?));
            }
        }
        Ok(Response::json(200, &control.status()))
    }
}
