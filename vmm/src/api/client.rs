// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A client for the API of a running VMM.

use std::fmt;
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use demand_memory::PAGE_SIZE;
use indicatif::{ProgressBar, ProgressStyle};
use serde::de::DeserializeOwned;

use crate::api::http::{ErrorBody, Response};
use crate::api::socket::connect_now;
use crate::api::{Endpoint, SnapshotRequest, SnapshotSummary, Status};
use crate::error::Error;
use crate::report::{duration, size};

/// Time limit for an answer to a status request, which never blocks in the VMM.
const PATIENCE: Duration = Duration::from_secs(10);

/// Interval at which the client asks for progress while the VMM performs a request.
const TICK: Duration = Duration::from_millis(250);

/// Maximum length of an answer, in bytes.
const MAX_ANSWER: usize = 1 << 20;

/// A VMM whose API listens on a socket. Each request uses its own connection.
///
/// See [`ApiServer`](crate::api::server::ApiServer) for an example.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// Returns a client for the VMM that listens at `socket`. It does not connect yet.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Client { socket: socket.into() }
    }

    /// Returns the VM's status.
    ///
    /// # Errors
    ///
    /// If no VMM listens, or does not answer within 10 seconds.
    pub fn status(&self) -> Result<Status, Error> {
        self.try_status().map_err(|why| self.error("status", why))
    }

    /// Pauses the VM and returns its new status.
    ///
    /// # Errors
    ///
    /// If no VMM listens, if the VMM answers with an error, or if it no longer answers status
    /// requests.
    pub fn pause(&self) -> Result<Status, Error> {
        self.command("pause", Endpoint::Pause)
    }

    /// Resumes the VM and returns its new status.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Client::pause).
    pub fn resume(&self) -> Result<Status, Error> {
        self.command("resume", Endpoint::Resume)
    }

    /// Ends the VM and returns its new status.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Client::pause).
    pub fn shutdown(&self) -> Result<Status, Error> {
        self.command("shutdown", Endpoint::Shutdown)
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
    ) -> Result<SnapshotSummary, Error> {
        let body = serde_json::to_vec(request).map_err(|error| {
            let path = request.destination.display();
            Error::failed(format!("cannot request snapshot {path}: {error}; give another path"))
        })?;
        self.try_command(Endpoint::Snapshot, &body, &mut progress)
            .map_err(|why| self.error("snapshot", why))
    }

    fn error(&self, what: &str, why: Failure) -> Error {
        let socket = self.socket.display();
        match why {
            // The VMM's line is complete by itself.
            Failure::Said(line) => Error::failed(line),
            Failure::Connect(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
            {
                Error::failed(format!(
                    "{what}: no VMM listens at {socket}; check that one runs with --api-socket \
                     {socket}"
                ))
            }
            Failure::Connect(error) => {
                Error::failed(format!("{what}: cannot connect to the VMM at {socket}: {error}"))
            }
            Failure::Silent => Error::failed(format!(
                "{what}: the VMM at {socket} has not answered for {} s; it may be blocked or \
                 stopped",
                PATIENCE.as_secs()
            )),
            Failure::Gone(why) => Error::failed(format!(
                "{what}: the VMM at {socket} hung up without an answer: {why}; it may have ended"
            )),
            Failure::Answer(why) => Error::failed(format!(
                "{what}: the process at {socket} does not answer as a VMM does: {why}"
            )),
        }
    }

    fn try_status(&self) -> Result<Status, Failure> {
        let mut exchange = self.send("GET", Endpoint::Status, &[])?;
        let begun = Instant::now();
        loop {
            if let Some(response) = exchange.receive()? {
                return value(&response);
            }
            if begun.elapsed() > PATIENCE {
                return Err(Failure::Silent);
            }
        }
    }

    fn command(&self, what: &'static str, endpoint: Endpoint) -> Result<Status, Error> {
        let mut progress = Progress::new(what);
        self.try_command(endpoint, &[], &mut |status| progress.show(status))
            .map_err(|why| self.error(what, why))
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
            // The request takes long. A VMM that still answers status requests is alive.
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
                    if begun.elapsed() > PATIENCE {
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
        stream.set_write_timeout(Some(PATIENCE)).map_err(Failure::gone)?;
        stream.set_read_timeout(Some(TICK)).map_err(Failure::gone)?;
        // A server that is too busy answers before it reads the request.
        match stream.write_all(&[head.as_bytes(), body].concat()) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            Err(error) => return Err(Failure::gone(error)),
        }
        Ok(Exchange { stream, bytes: Vec::new() })
    }
}

/// The reason for which a request yields no value.
enum Failure {
    /// No connection could be made.
    Connect(io::Error),
    /// The VMM accepted the connection but does not answer.
    Silent,
    /// The connection was lost.
    Gone(String),
    /// The answer is not one of the API.
    Answer(String),
    /// The answer is an error.
    Said(String),
}

impl Failure {
    fn gone(why: impl fmt::Display) -> Self {
        Failure::Gone(why.to_string())
    }
}

/// A request in progress.
struct Exchange {
    stream: UnixStream,
    bytes: Vec<u8>,
}

impl Exchange {
    /// Returns the answer, or `None` if it does not arrive within a [`TICK`].
    fn receive(&mut self) -> Result<Option<Response>, Failure> {
        let mut bytes = [0; 4096];
        loop {
            if let Some((response, _)) =
                Response::parse(&self.bytes, MAX_ANSWER).map_err(Failure::Answer)?
            {
                return Ok(Some(response));
            }
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(Failure::gone("the connection was closed")),
                Ok(len) => self.bytes.extend_from_slice(&bytes[..len]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(Failure::gone(error)),
            }
        }
    }
}

fn value<T: DeserializeOwned>(response: &Response) -> Result<T, Failure> {
    if response.status != 200 {
        return Err(match serde_json::from_slice::<ErrorBody>(&response.body) {
            Ok(body) => Failure::Said(body.error),
            Err(_) => Failure::Answer(format!("its status is {}", response.status)),
        });
    }
    serde_json::from_slice(&response.body).map_err(|error| Failure::Answer(error.to_string()))
}

/// Returns a status as a table for people.
pub fn table(status: &Status) -> String {
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
        format!(
            "  {:<10}{}, version {}, for {}",
            "process",
            status.pid,
            status.version,
            duration(status.uptime_us)
        ),
        format!("  {:<10}{} present", "pages", share(status.pages_present, status.pages_total)),
    ];
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
pub struct Progress {
    what: &'static str,
    bar: Option<ProgressBar>,
    said: Instant,
}

impl Progress {
    /// Returns a display that shows nothing yet.
    pub fn new(what: &'static str) -> Self {
        Progress { what, bar: None, said: Instant::now() }
    }

    /// Shows the progress that a status reports.
    pub fn show(&mut self, status: &Status) {
        if let Some(snapshot) = &status.snapshot
            && io::stderr().is_terminal()
        {
            let bar = self.bar.get_or_insert_with(|| {
                let style = ProgressStyle::with_template(
                    "{wide_bar} {percent:>3} %, {pos} of {len} pages, {eta} left",
                );
                ProgressBar::new(0).with_style(style.unwrap_or(ProgressStyle::default_bar()))
            });
            bar.set_length(snapshot.pages_total);
            bar.set_position(snapshot.pages_done);
        } else if self.said.elapsed() >= PATIENCE {
            self.said = Instant::now();
            let far = status.snapshot.as_ref().map_or(String::new(), |snapshot| {
                format!(", {} written", share(snapshot.pages_done, snapshot.pages_total))
            });
            log::warn!("{}: not done yet; the VM is {}{far}", self.what, status.state);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    use crate::api::{DeviceStatus, GuestCondition, SnapshotProgress, State};

    fn against(answer: &'static [u8]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
            stream.write_all(answer).unwrap();
        });
        let error = Client::new(&path).status().unwrap_err().to_string();
        server.join().unwrap();
        error
    }

    #[test]
    fn unexpected_answers_are_errors() {
        for (answer, text) in [
            (&b""[..], "hung up without an answer"),
            (b"SSH-2.0-x\r\n", "does not answer as a VMM"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n", "longer than"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "missing field `state`"),
            (b"HTTP/1.1 502 Bad\r\nContent-Length: 1\r\n\r\nx", "its status is 502"),
            (b"HTTP/1.1 409 No\r\nContent-Length: 15\r\n\r\n{\"error\":\"no\"}", "hung up"),
            (b"HTTP/1.1 409 No\r\nContent-Length: 14\r\n\r\n{\"error\":\"no\"}", "no"),
        ] {
            let error = against(answer);
            assert!(error.contains(text), "{error}, and not: {text}");
        }
    }

    #[test]
    fn absent_vmm_is_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        for _ in 0..2 {
            let error = Client::new(&path).pause().unwrap_err().to_string();
            assert!(error.starts_with("pause: no VMM listens at /"), "{error}");
            // The second pass meets the socket of a listener that is gone.
            let _ = UnixListener::bind(&path);
        }
    }

    #[test]
    fn a_table_says_everything() {
        let status = Status {
            state: State::Snapshotting,
            engine: "uffd".into(),
            backing: "shmem".into(),
            memory_bytes: 16384,
            cpus: 2,
            pages_total: 4,
            pages_present: 3,
            devices: vec![DeviceStatus {
                kind: "blk".into(),
                socket: Some("/run/blk".into()),
                state: "connected".into(),
            }],
            uptime_us: 1500,
            pid: 7,
            version: "0.1.0".into(),
            guest: Some(GuestCondition::Panicked),
            snapshot: Some(SnapshotProgress {
                destination: "/s".into(),
                pages_done: 1,
                pages_total: 4,
            }),
            last_error: Some("read /image: gone".into()),
        };
        assert_eq!(
            table(&status),
            "snapshotting: 16K of shmem, engine uffd, 2 vCPUs\n  \
             process   7, version 0.1.0, for 1500 us\n  \
             pages     3 of 4 (75.0 %) present\n  \
             blk       connected, /run/blk\n  \
             guest     its kernel has panicked; its console may say why\n  \
             snapshot  1 of 4 (25.0 %) written to /s\n  \
             error     read /image: gone\n"
        );
    }
}
