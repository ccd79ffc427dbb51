// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The operations of the API: their paths and methods, and what each does with a request's body.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::api::http::Response;
use crate::api::metrics;
use crate::api::{Control, ControlError, SnapshotRequest};
use crate::config::vm::{RestoreConfig, VmConfig};

/// An operation of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// [`Control::status`]
    Status,
    /// [`Control::status`] and [`Control::stats`], as OpenMetrics text
    Metrics,
    /// [`Control::events`]
    Events,
    /// [`Control::create`]
    Create,
    /// [`Control::boot`]
    Boot,
    /// [`Control::restore`]
    Restore,
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
    /// All operations.
    pub const ALL: [Endpoint; 10] = [
        Endpoint::Status,
        Endpoint::Metrics,
        Endpoint::Events,
        Endpoint::Create,
        Endpoint::Boot,
        Endpoint::Restore,
        Endpoint::Pause,
        Endpoint::Resume,
        Endpoint::Snapshot,
        Endpoint::Shutdown,
    ];

    /// Returns the endpoint's path.
    pub fn path(self) -> &'static str {
        self.paths()[0]
    }

    /// Returns all paths of the endpoint: its own, and the short one that some have as well.
    pub fn paths(self) -> &'static [&'static str] {
        match self {
            Endpoint::Status => &["/api/v1/status"],
            // The first is where Prometheus looks unless told otherwise.
            Endpoint::Metrics => &["/metrics", "/api/v1/metrics"],
            Endpoint::Events => &["/api/v1/events"],
            Endpoint::Create => &["/api/v1/vm.create"],
            Endpoint::Boot => &["/api/v1/vm.boot"],
            Endpoint::Restore => &["/api/v1/vm.restore"],
            Endpoint::Pause => &["/api/v1/vm.pause", "/api/v1/pause"],
            Endpoint::Resume => &["/api/v1/vm.resume", "/api/v1/resume"],
            Endpoint::Snapshot => &["/api/v1/vm.snapshot", "/api/v1/snapshot"],
            Endpoint::Shutdown => &["/api/v1/vm.shutdown", "/api/v1/shutdown"],
        }
    }

    /// Returns the methods that the endpoint takes.
    pub fn methods(self) -> &'static [&'static str] {
        match self {
            Endpoint::Status | Endpoint::Metrics => &["GET", "HEAD"],
            Endpoint::Events => &["GET"],
            _ => &["PUT", "POST"],
        }
    }

    fn allow(self) -> &'static str {
        match self {
            Endpoint::Status | Endpoint::Metrics => "GET, HEAD",
            Endpoint::Events => "GET",
            _ => "PUT, POST",
        }
    }

    /// Returns the operation in words, for errors: `cannot {action}: ...`.
    pub(crate) fn action(self) -> &'static str {
        match self {
            Endpoint::Status => "read the status",
            Endpoint::Metrics => "read the metrics",
            Endpoint::Events => "read the events",
            Endpoint::Create => "create a VM",
            Endpoint::Boot => "boot a VM",
            Endpoint::Restore => "restore a VM",
            Endpoint::Pause => "pause",
            Endpoint::Resume => "resume",
            Endpoint::Snapshot => "take a snapshot",
            Endpoint::Shutdown => "shut down",
        }
    }

    /// Returns the endpoint for a request's method and path.
    ///
    /// # Errors
    ///
    /// The answer for an unknown path (404), or for a method that the path does not support (405).
    pub fn find(method: &str, path: &str) -> Result<Endpoint, Response> {
        let Some(endpoint) = Endpoint::ALL.into_iter().find(|it| it.paths().contains(&path)) else {
            let known = Endpoint::ALL.map(Endpoint::path).join(", ");
            return Err(Response::error(
                404,
                format!("cannot serve {path:.99}: there is no such path; the paths are {known}"),
            ));
        };
        if endpoint.methods().contains(&method) {
            return Ok(endpoint);
        }
        let allow = endpoint.allow();
        let error = format!("cannot serve {path}: it does not take {method:.20}; it takes {allow}");
        Err(Response { allow: Some(allow), ..Response::error(405, error) })
    }

    /// Returns whether a request must have a body.
    pub fn needs_body(self) -> bool {
        matches!(self, Endpoint::Create | Endpoint::Restore | Endpoint::Snapshot)
    }

    /// Performs the operation and returns its answer. The answer to
    /// [`Events`](Endpoint::Events) is a stream, so this is the status instead.
    pub fn answer(self, body: &[u8], control: &dyn Control) -> Response {
        match self.try_answer(body, control) {
            Ok(response) => response,
            Err(error) => error.of(self).into(),
        }
    }

    /// Refuses a body that the operation does not take.
    pub(super) fn check_body(self, body: &[u8]) -> Result<(), ControlError> {
        if !self.needs_body() && !matches!(body.trim_ascii(), b"" | b"{}") {
            let path = self.path();
            let error = format_args!("cannot serve {path}: it takes no body; send none");
            return Err(ControlError::invalid(error));
        }
        Ok(())
    }

    fn try_answer(self, body: &[u8], control: &dyn Control) -> Result<Response, ControlError> {
        self.check_body(body)?;
        match self {
            Endpoint::Status | Endpoint::Events => {}
            Endpoint::Metrics => {
                let text =
                    metrics::text(control.status(), control.stats(), control.source_figures());
                let text = text.map_err(|_| {
                    ControlError::failed("cannot read the metrics: no text came about; repeat it")
                })?;
                let content_type = metrics::CONTENT_TYPE;
                let response = Response { body: text.into(), content_type, ..Response::empty(200) };
                return Ok(response);
            }
            Endpoint::Create => {
                let config: VmConfig = parse(body, "VM configuration")?;
                config.paths().try_for_each(check_absolute)?;
                control.create(&config)?;
            }
            Endpoint::Boot => control.boot()?,
            Endpoint::Restore => {
                let config: RestoreConfig = parse(body, "restore request")?;
                config.paths().try_for_each(|path| check_absolute(&path))?;
                control.restore(&config)?;
            }
            Endpoint::Pause => control.pause()?,
            Endpoint::Resume => control.resume()?,
            Endpoint::Shutdown => control.shutdown()?,
            Endpoint::Snapshot => {
                let request: SnapshotRequest = parse(body, "snapshot request")?;
                check_absolute(&request.destination)?;
                return Ok(Response::json(200, &control.snapshot(&request)?));
            }
        }
        Ok(Response::json(200, &control.status()))
    }
}

/// Parses a body. The error names the place in it.
fn parse<T: DeserializeOwned>(body: &[u8], name: &str) -> Result<T, ControlError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let wrong = |error: &dyn std::fmt::Display| {
        let error = error.to_string();
        let hint = if error.contains("; ") { "" } else { "; correct it" };
        ControlError::invalid(format_args!("cannot use the body as a {name}: {error}{hint}"))
    };
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| wrong(&error))?;
    json.end().map_err(|error| wrong(&error))?;
    Ok(value)
}

/// Refuses a relative path: the client and the VMM have different working directories.
fn check_absolute(path: &Path) -> Result<(), ControlError> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(ControlError::invalid(format!(
        "cannot use the path '{}': it is not absolute; let it begin with /",
        path.display()
    )))
}
