// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client for the API of a running VMM.

pub mod events;

use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use demand_memory::PAGE_SIZE;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::endpoint::Endpoint;
use crate::api::http::{ErrorBody, Response, ResponseError};
use crate::api::socket::connect_now;
use crate::api::{SnapshotRequest, SnapshotSummary, SourceStatus, State, Status};
use crate::config::vm::{RestoreConfig, VmConfig};
use crate::error::{Error, Kind};
use crate::report::progress::Progress;
use crate::report::{duration, size};

/// Time limit for an answer to a status request, which never blocks in the VMM.
const PATIENCE: Duration = Duration::from_secs(10);

/// Interval at which the client asks for progress while the VMM performs a request.
const TICK: Duration = Duration::from_millis(250);

/// Maximum length of an answer, in bytes.
const MAX_ANSWER: usize = 1 << 20;

/// An error from a request to a VMM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The snapshot's destination cannot be sent.
    #[error("cannot request snapshot {}: {source}; give another path", destination.display())]
    Destination {
        /// The destination.
        destination: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// A VM's configuration cannot be sent.
    #[error("cannot {request}: its configuration cannot be sent: {source}; use other paths")]
    Config {
        /// The request's name.
        request: &'static str,
        /// The cause.
        source: serde_json::Error,
    },
    /// No VMM listens.
    #[error(
        "cannot {request}: no VMM listens at {0}; check that one runs with --api-socket {0}",
        socket.display()
    )]
    NoVmm {
        /// The request's name.
        request: &'static str,
        /// The path of the VMM's socket.
        socket: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The socket cannot be connected to.
    #[error(
        "cannot {request}: no connection to the VMM at {}: {source}; check the socket's permissions",
        socket.display()
    )]
    Connect {
        /// The request's name.
        request: &'static str,
        /// The path of the VMM's socket.
        socket: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The VMM does not answer, or does not complete its answer.
    #[error(
        "cannot {request}: the VMM at {} has not answered in full for {} s; check whether it is \
         blocked or stopped",
        socket.display(), waited.as_secs()
    )]
    Silent {
        /// The request's name.
        request: &'static str,
        /// The path of the VMM's socket.
        socket: PathBuf,
        /// The time that the client waited.
        waited: Duration,
    },
    /// The connection was lost before the answer.
    #[error(
        "cannot {request}: the VMM at {} hung up without an answer: {source}; check whether it has \
         ended",
        socket.display()
    )]
    HungUp {
        /// The request's name.
        request: &'static str,
        /// The path of the VMM's socket.
        socket: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The answer is not one of the API.
    #[error(
        "cannot {request}: the process at {} does not answer as a VMM does: {source}; name the \
         socket of a demand-vmm",
        socket.display()
    )]
    NotAVmm {
        /// The request's name.
        request: &'static str,
        /// The path of the socket.
        socket: PathBuf,
        /// The fault of the answer.
        source: AnswerError,
    },
    /// The VMM refused the request, or failed to perform it.
    #[error("{line}")]
    Refused {
        /// The VMM's line, which is complete by itself.
        line: String,
    },
}

impl From<ClientError> for Error {
    fn from(error: ClientError) -> Self {
        Error::of(Kind::Failed, error)
    }
}

/// A VMM whose API listens on a socket. Each request uses its own connection.
///
/// See [`ApiServer`](crate::api::server::ApiServer) for an example.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    /// [`PATIENCE`], except in tests.
    patience: Duration,
}

impl Client {
    /// Returns a client for the VMM that listens at `socket`. It does not connect yet.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Client { socket: socket.into(), patience: PATIENCE }
    }

    /// Returns the VM's status.
    ///
    /// # Errors
    ///
    /// If no VMM listens, or does not answer within 10 seconds.
    pub fn status(&self) -> Result<Status, ClientError> {
        self.try_status().map_err(|why| self.error(Endpoint::Status, why))
    }

    /// Returns the figures of the VM as OpenMetrics text, for a program that collects those of a
    /// host's VMs.
    ///
    /// # Errors
    ///
    /// If no VMM listens, or does not answer within 10 seconds.
    pub fn metrics(&self) -> Result<String, ClientError> {
        self.try_get(Endpoint::Metrics)
            .and_then(|response| successful(&response).map(String::from_utf8_lossy).map(Into::into))
            .map_err(|why| self.error(Endpoint::Metrics, why))
    }

    /// Defines the VM that [`boot`](Client::boot) starts, and returns the status. All paths must be
    /// absolute, because the VMM has another working directory.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Client::pause); also if a path is not UTF-8, which JSON cannot carry.
    pub fn create(&self, config: &VmConfig) -> Result<Status, ClientError> {
        self.configure(Endpoint::Create, config)
    }

    /// Boots the VM that was created, and returns its new status.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Client::pause).
    pub fn boot(&self) -> Result<Status, ClientError> {
        self.command(Endpoint::Boot)
    }

    /// Restores a VM, and returns its new status. All paths must be absolute.
    ///
    /// # Errors
    ///
    /// As for [`create`](Client::create).
    pub fn restore(&self, config: &RestoreConfig) -> Result<Status, ClientError> {
        self.configure(Endpoint::Restore, config)
    }

    /// Pauses the VM and returns its new status.
    ///
    /// # Errors
    ///
    /// If no VMM listens, if the VMM answers with an error, or if it no longer answers status
    /// requests.
    pub fn pause(&self) -> Result<Status, ClientError> {
        self.command(Endpoint::Pause)
    }

    /// Resumes the VM and returns its new status.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Client::pause).
    pub fn resume(&self) -> Result<Status, ClientError> {
        self.command(Endpoint::Resume)
    }

    /// Ends the VM and returns its new status.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Client::pause).
    pub fn shutdown(&self) -> Result<Status, ClientError> {
        self.command(Endpoint::Shutdown)
    }

    /// Requests a snapshot and waits for it without a time limit. `progress` gets the status from
    /// time to time. The snapshot continues even if the client goes away.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Client::pause); also if the destination is not UTF-8, which JSON cannot
    /// carry.
    pub fn snapshot(
        &self,
        request: &SnapshotRequest,
        mut progress: impl FnMut(&Status),
    ) -> Result<SnapshotSummary, ClientError> {
        let body = serde_json::to_vec(request).map_err(|source| ClientError::Destination {
            destination: request.destination.clone(),
            source,
        })?;
        self.try_command(Endpoint::Snapshot, &body, &mut progress)
            .map_err(|why| self.error(Endpoint::Snapshot, why))
    }

    fn error(&self, endpoint: Endpoint, failure: Failure) -> ClientError {
        let (request, socket) = (endpoint.action(), self.socket.clone());
        match failure {
            Failure::Refused(line) => ClientError::Refused { line },
            Failure::Connect(source)
                if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
            {
                ClientError::NoVmm { request, socket, source }
            }
            Failure::Connect(source) => ClientError::Connect { request, socket, source },
            Failure::Silent => ClientError::Silent { request, socket, waited: self.patience },
            Failure::Gone(source) => ClientError::HungUp { request, socket, source },
            Failure::Answer(source) => ClientError::NotAVmm { request, socket, source },
        }
    }

    fn try_status(&self) -> Result<Status, Failure> {
        value(&self.try_get(Endpoint::Status)?)
    }

    fn try_get(&self, endpoint: Endpoint) -> Result<Response, Failure> {
        let mut exchange = self.send("GET", endpoint, &[])?;
        let begun = Instant::now();
        loop {
            if let Some(response) = exchange.receive()? {
                return Ok(response);
            }
            if begun.elapsed() > self.patience {
                return Err(Failure::Silent);
            }
        }
    }

    fn command(&self, endpoint: Endpoint) -> Result<Status, ClientError> {
        self.command_with(endpoint, &[])
    }

    fn configure(
        &self,
        endpoint: Endpoint,
        config: &impl Serialize,
    ) -> Result<Status, ClientError> {
        let body = serde_json::to_vec(config)
            .map_err(|source| ClientError::Config { request: endpoint.action(), source })?;
        self.command_with(endpoint, &body)
    }

    fn command_with(&self, endpoint: Endpoint, body: &[u8]) -> Result<Status, ClientError> {
        let mut progress = RequestProgress::new(endpoint);
        self.try_command(endpoint, body, &mut |status| progress.show(status))
            .map_err(|why| self.error(endpoint, why))
    }

    fn try_command<T: DeserializeOwned>(
        &self,
        endpoint: Endpoint,
        body: &[u8],
        progress: &mut dyn FnMut(&Status),
    ) -> Result<T, Failure> {
        let mut exchange = self.send("PUT", endpoint, body)?;
        loop {
            if let Some(response) = exchange.receive()? {
                return value(&response);
            }
            // The request takes long. A VMM that still answers status requests is alive. An answer
            // that has begun has its own time limit.
            match self.try_status() {
                Ok(status) => progress(&status),
                Err(Failure::Silent) => return Err(Failure::Silent),
                // The VMM may have ended, in which case its last answer is on its way, or it may be
                // busy.
                Err(_) => {}
            }
        }
    }

    fn send(&self, method: &str, endpoint: Endpoint, body: &[u8]) -> Result<Exchange, Failure> {
        let begun = Instant::now();
        let mut stream = loop {
            match connect_now(&self.socket) {
                Ok(stream) => break stream,
                // The listener's queue is full.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if begun.elapsed() > self.patience {
                        return Err(Failure::Silent);
                    }
                    thread::sleep(Duration::from_millis(20));
                }
                Err(error) => return Err(Failure::Connect(error)),
            }
        };
        let head = format!(
            "{method} {} HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            endpoint.path(),
            body.len()
        );
        stream.set_write_timeout(Some(self.patience)).map_err(Failure::Gone)?;
        stream.set_read_timeout(Some(TICK)).map_err(Failure::Gone)?;
        // A server that is too busy answers before it reads the request.
        match stream.write_all(&[head.as_bytes(), body].concat()) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            Err(error) => return Err(Failure::Gone(error)),
        }
        Ok(Exchange { stream, bytes: Vec::new(), patience: self.patience, begun: None })
    }
}

/// The fault of an answer that is not one of the API.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AnswerError {
    /// It cannot be parsed.
    #[error(transparent)]
    Response(#[from] ResponseError),
    /// Its status means success, and its body is not the value.
    #[error("{0}")]
    Value(#[source] serde_json::Error),
    /// Its status means an error, and its body does not say which.
    #[error("its status is {status}")]
    Status {
        /// The status code.
        status: u16,
    },
}

/// The reason for which a request yields no value.
enum Failure {
    /// No connection could be made.
    Connect(io::Error),
    /// The VMM accepted the connection but does not answer, or does not complete its answer.
    Silent,
    /// The connection was lost.
    Gone(io::Error),
    /// The answer is not one of the API.
    Answer(AnswerError),
    /// The answer is an error.
    Refused(String),
}

/// A request in progress.
#[derive(Debug)]
struct Exchange {
    stream: UnixStream,
    bytes: Vec<u8>,
    /// The time that a message may take from its first byte to its last.
    patience: Duration,
    /// When the first byte of an incomplete message arrived.
    begun: Option<Instant>,
}

impl Exchange {
    /// Returns the answer, or `None` if it does not arrive within a [`TICK`].
    fn receive(&mut self) -> Result<Option<Response>, Failure> {
        let begun = Instant::now();
        loop {
            if let Some((response, _)) = Response::parse(&self.bytes, MAX_ANSWER)
                .map_err(|error| Failure::Answer(error.into()))?
            {
                return Ok(Some(response));
            }
            // Bytes may trickle.
            if begun.elapsed() >= TICK || !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// Waits for more bytes, for a [`TICK`]. Returns whether some arrived. Fails if the message has
    /// begun and takes too long.
    fn fill(&mut self) -> Result<bool, Failure> {
        if self.begun.is_some_and(|begun| begun.elapsed() > self.patience) {
            return Err(Failure::Silent);
        }
        let mut bytes = [0; 4096];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(Failure::Gone(io::Error::other("the connection was closed"))),
                Ok(len) => {
                    self.bytes.extend_from_slice(&bytes[..len]);
                    self.begun.get_or_insert_with(Instant::now);
                    return Ok(true);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(Failure::Gone(error)),
            }
        }
    }
}

/// Returns the body of a response that is no error.
fn successful(response: &Response) -> Result<&[u8], Failure> {
    if response.status == 200 {
        return Ok(&response.body);
    }
    Err(match serde_json::from_slice::<ErrorBody>(&response.body) {
        Ok(body) => Failure::Refused(body.error),
        Err(_) => Failure::Answer(AnswerError::Status { status: response.status }),
    })
}

fn value<T: DeserializeOwned>(response: &Response) -> Result<T, Failure> {
    serde_json::from_slice(successful(response)?)
        .map_err(|error| Failure::Answer(AnswerError::Value(error)))
}

/// Returns a status as a table for people.
pub fn table(status: &Status) -> String {
    let process = format!(
        "  {:<10}{}, version {}, for {}",
        "process",
        status.pid,
        status.version,
        duration(status.uptime_us)
    );
    if status.state == State::Empty {
        return format!("empty: no VM; create or restore one\n{process}\n");
    }
    let mut lines = vec![
        format!(
            "{}: {} of {}, engine {}, {} vCPU{}",
            status.state,
            size(status.memory_bytes),
            status.backing,
            status.engine,
            status.cpus,
            if status.cpus == 1 { "" } else { "s" },
        ),
        process,
    ];
    if status.pages_total > 0 {
        let share = share(status.pages_present, status.pages_total);
        lines.push(format!("  {:<10}{share} present", "pages"));
    }
    for SourceStatus { source, state, failing_s, .. } in &status.sources {
        let time = failing_s.map_or(String::new(), |seconds| format!(" for {seconds} s"));
        lines.push(format!("  {:<10}{state}{time}, {source}", "source"));
    }
    for device in &status.devices {
        let socket = device.socket.as_deref().map_or(String::new(), |path| format!(", {path}"));
        lines.push(format!("  {:<10}{}{socket}", device.kind, device.state));
    }
    if let Some(condition) = status.guest {
        lines.push(format!("  {:<10}{condition}", "guest"));
    }
    if let Some(snapshot) = &status.snapshot {
        let share = share(snapshot.pages_done, snapshot.pages_total);
        lines.push(format!("  {:<10}{share} written to {}", "snapshot", snapshot.destination));
    }
    if let Some(error) = &status.last_error {
        lines.push(format!("  {:<10}{error}", "error"));
    }
    lines.extend(status.limits.iter().map(|limit| format!("  {:<10}{limit}", "note")));
    lines.push(String::new());
    lines.join("\n")
}

/// Returns a share as "3 of 4 (75.0 %)".
fn share(part: u64, whole: u64) -> String {
    let percent = if whole == 0 { 100.0 } else { part as f64 * 100.0 / whole as f64 };
    format!("{part} of {whole} ({percent:.1} %)")
}

/// Returns the line that reports a finished snapshot to people.
pub fn summary(snapshot: &SnapshotSummary) -> String {
    let warning = snapshot.warning.iter().map(|warning| format!("warning: {warning}\n"));
    format!(
        "{}: {} with content, {} of holes, {} written in {}\n{}",
        snapshot.destination.display(),
        size(snapshot.data_pages.saturating_mul(PAGE_SIZE)),
        size(snapshot.hole_pages.saturating_mul(PAGE_SIZE)),
        size(snapshot.bytes),
        duration(snapshot.took_us),
        warning.collect::<String>()
    )
}

/// Shows the progress of a long request: a snapshot's as a bar if standard error is a terminal, any
/// other as a line in the log every 10 seconds.
#[derive(Debug)]
pub struct RequestProgress {
    request: Endpoint,
    bar: Option<Progress>,
    said: Instant,
}

impl RequestProgress {
    /// Returns a display that shows nothing yet.
    pub fn new(request: Endpoint) -> Self {
        RequestProgress { request, bar: None, said: Instant::now() }
    }

    /// Shows the progress that a status reports.
    pub fn show(&mut self, status: &Status) {
        if let Some(snapshot) = &status.snapshot
            && io::stderr().is_terminal()
        {
            let bar = || Progress::new("snapshot", "pages written", snapshot.pages_total);
            self.bar.get_or_insert_with(bar).set(snapshot.pages_done);
        } else if self.said.elapsed() >= PATIENCE {
            self.said = Instant::now();
            let far = status.snapshot.as_ref().map_or(String::new(), |snapshot| {
                format!(", {} written", share(snapshot.pages_done, snapshot.pages_total))
            });
            let action = self.request.action();
            log::warn!("the request to {action} is in progress; the VM is {}{far}", status.state);
        }
    }
}

#[cfg(test)]
mod tests;
