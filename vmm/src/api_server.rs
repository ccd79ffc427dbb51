// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves the API on a Unix socket: a thread that accepts, and one for each connection, so that a
//! status is told while a snapshot is written. None of them touches the guest's memory.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::api::{Control, Endpoint};
use crate::error::Error;
use crate::http::{self, Response};
use crate::socket::Listener;

/// The most connections that are served at a time.
pub const MAX_CONNECTIONS: usize = 32;

/// How long a request may take to come, from its first byte on; how long a client may take to
/// begin with one; and how long it may take to take its answer.
pub const REQUEST_TIME: Duration = Duration::from_secs(10);

/// How long the rest of what a client sends is waited for when it has its last answer: it may look
/// for it only when it has sent everything.
const LINGER: Duration = Duration::from_secs(1);

/// The most connections that are told that there are too many. Beyond, they are closed at once.
const MAX_REFUSED: usize = 32;

/// How long the end of the server waits for requests that are under way.
const END_PATIENCE: Duration = Duration::from_secs(15);

/// Serves the API until it is dropped.
///
/// Dropping it removes the socket's file and ends the server's threads. A request that is under
/// way still gets its answer: what it waits for must come to an end by itself. One that does not
/// within 15 seconds is left behind, and that is logged.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
/// use demand_vmm::api::{Control, ControlError, SnapshotRequest, SnapshotSummary, Status};
/// use demand_vmm::api_server::ApiServer;
/// use demand_vmm::client::Client;
///
/// /// A VMM without a VM.
/// struct Nothing;
///
/// impl Control for Nothing {
///     fn status(&self) -> Status {
///         serde_json::from_value(serde_json::json!({
///             "state": "stopped", "engine": "uffd", "backing": "shmem", "memory_bytes": 0,
///             "cpus": 0, "pages_total": 0, "pages_present": 0, "devices": [], "uptime_us": 1,
///             "pid": std::process::id(), "version": "0",
///         }))
///         .unwrap()
///     }
///     fn pause(&self) -> Result<(), ControlError> {
///         Err(ControlError::wrong_state("pause: there is no VM; start one"))
///     }
///     # fn resume(&self) -> Result<(), ControlError> { self.pause() }
///     # fn shutdown(&self) -> Result<(), ControlError> { self.pause() }
///     # fn snapshot(&self, _: &SnapshotRequest) -> Result<SnapshotSummary, ControlError> {
///     #     Err(ControlError::wrong_state("snapshot: there is no VM; start one"))
///     # }
///     // resume, snapshot and shutdown alike
/// }
///
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("api.sock");
/// let server = ApiServer::start(&path, Arc::new(Nothing)).unwrap();
/// let client = Client::new(&path);
/// assert_eq!(client.status().unwrap().pid, std::process::id());
/// assert!(client.pause().unwrap_err().to_string().contains("there is no VM"));
/// drop(server);
/// assert!(!path.exists());
/// ```
#[derive(Debug)]
pub struct ApiServer {
    listener: Arc<Listener>,
    connections: Arc<Connections>,
    accepting: Option<JoinHandle<()>>,
}

impl ApiServer {
    /// Begins to serve on a socket at `path`, of mode 0600. The socket of a process that is gone is
    /// replaced.
    ///
    /// # Errors
    ///
    /// If somebody listens there, if there is something that is no socket, if there is no such
    /// folder or no right to write in it, or if the path is longer than a socket's may be.
    pub fn start(path: &Path, control: Arc<dyn Control>) -> Result<Self, Error> {
        let listener = Arc::new(Listener::bind(path)?);
        let connections = Arc::new(Connections::default());
        let accepting = {
            let (listener, connections) = (listener.clone(), connections.clone());
            thread::Builder::new()
                .name("api".into())
                .spawn(move || accept(&listener, &connections, &control))
                .map_err(|error| Error::failed(format!("start the API's thread: {error}")))?
        };
        Ok(ApiServer { listener, connections, accepting: Some(accepting) })
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.connections.begin_end();
        // Whoever waits in accept comes out.
        let _ = rustix::net::shutdown(self.listener.socket(), rustix::net::Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        let left = self.connections.wait(END_PATIENCE);
        if left > 0 {
            log::warn!(
                "api: {left} requests are still under way after {} s; they are left behind",
                END_PATIENCE.as_secs()
            );
        }
    }
}

fn accept(listener: &Listener, connections: &Arc<Connections>, control: &Arc<dyn Control>) {
    let mut failing = false;
    while !connections.is_ending() {
        let stream = match listener.socket().accept() {
            Ok((stream, _)) => stream,
            Err(_) if connections.is_ending() => return,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                // Say, no descriptors are left: who wants to connect waits.
                if !failing {
                    log::warn!("api: accept a connection: {error}; it is tried again");
                }
                failing = true;
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        failing = false;
        let stream = Arc::new(stream);
        let Some(slot) = connections.add(&stream) else {
            refuse(&stream);
            continue;
        };
        let thread = {
            let (stream, control) = (stream.clone(), control.clone());
            thread::Builder::new().name("api-connection".into()).spawn(move || {
                if slot.is_served {
                    serve(&stream, &*control);
                } else {
                    refuse(&stream);
                    linger(&stream);
                }
                drop((stream, control));
                // Last: the server's end waits for it.
                drop(slot);
            })
        };
        if let Err(error) = thread {
            log::warn!("api: start a thread for a connection: {error}");
            refuse(&stream);
        }
    }
}

/// Says that there are too many. A socket that is new has room for it.
fn refuse(stream: &UnixStream) {
    let message = format!("{MAX_CONNECTIONS} connections are served already; try again later");
    let answer = Response::error(503, message).to_bytes(false, true);
    let _ = Timed::new(stream).write_all(&answer);
}

/// Lets the client read its last answer before the connection is gone.
fn linger(stream: &UnixStream) {
    let _ = stream.shutdown(Shutdown::Write);
    let mut rest = Timed { stream, deadline: Instant::now() + LINGER };
    let mut buffer = [0; 4096];
    while rest.read(&mut buffer).is_ok_and(|len| len > 0) {}
}

/// Serves a connection until the client hangs up, is silent for [`REQUEST_TIME`], or has sent
/// something after which there is no going on.
pub fn serve(stream: &UnixStream, control: &dyn Control) {
    let mut connection =
        Connection { stream: Timed::new(stream), buffer: Vec::new(), is_new: true };
    loop {
        match connection.exchange(control) {
            Ok(true) => connection.is_new = false,
            Ok(false) | Err(End::HangUp) => break,
            Err(End::Refuse(response)) => {
                // It may be for the time that is up.
                connection.stream.restart();
                let _ = connection.send(&response.to_bytes(false, true));
                break;
            }
        }
    }
    linger(stream);
}

/// Why a connection ends.
enum End {
    /// The client has gone.
    HangUp,
    /// What it sent is answered, and no more.
    Refuse(Response),
}

/// A connection, with what has come and is not yet understood.
struct Connection<'a> {
    stream: Timed<'a>,
    buffer: Vec<u8>,
    /// Whether there was no request yet.
    is_new: bool,
}

impl Connection<'_> {
    /// Takes one request and answers it; says whether another may follow.
    fn exchange(&mut self, control: &dyn Control) -> Result<bool, End> {
        self.stream.restart();
        let head = loop {
            match http::parse_head(&self.buffer) {
                Ok(Some(head)) => break head,
                Ok(None) => self.receive()?,
                Err(response) => return Err(End::Refuse(response)),
            }
        };
        self.buffer.drain(..head.len);
        let body_len = head.body.unwrap_or(0);
        let response = match Endpoint::find(&head.method, &head.path) {
            Err(response) if body_len > 0 => return Err(End::Refuse(response)),
            Err(response) => response,
            Ok(endpoint) => {
                if endpoint.needs_body() && head.body.is_none() {
                    let message = format!("{} needs a body with a Content-Length", head.path);
                    return Err(End::Refuse(Response::error(411, message)));
                }
                if head.expects_continue && self.buffer.len() < body_len {
                    self.send(http::CONTINUE)?;
                }
                while self.buffer.len() < body_len {
                    self.receive()?;
                }
                let body: Vec<u8> = self.buffer.drain(..body_len).collect();
                endpoint.answer(&body, control)
            }
        };
        log::debug!("api: {:?} {:?}: {}", head.method, head.path, response.status);
        // What the request asked for may have taken long.
        self.stream.restart();
        self.send(&response.to_bytes(head.keep_alive, head.method != "HEAD"))?;
        Ok(head.keep_alive)
    }

    /// Waits for more bytes.
    fn receive(&mut self) -> Result<(), End> {
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) if self.buffer.is_empty() => Err(End::HangUp),
            Ok(0) => Err(End::Refuse(Response::error(400, "the request ends halfway"))),
            Ok(len) => {
                if self.buffer.is_empty() {
                    self.stream.restart();
                }
                self.buffer.extend_from_slice(&bytes[..len]);
                Ok(())
            }
            // A client between two requests is not told: it would take it for the next answer.
            Err(error) if is_timeout(&error) && (self.is_new || !self.buffer.is_empty()) => {
                let seconds = REQUEST_TIME.as_secs();
                let message = format!("no whole request came within {seconds} s");
                Err(End::Refuse(Response::error(408, message)))
            }
            Err(_) => Err(End::HangUp),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), End> {
        self.stream.write_all(bytes).map_err(|_| End::HangUp)
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
}

/// A stream on which everything together is done by a deadline.
struct Timed<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
}

impl<'a> Timed<'a> {
    fn new(stream: &'a UnixStream) -> Self {
        Timed { stream, deadline: Instant::now() + REQUEST_TIME }
    }

    /// Gives it its time anew.
    fn restart(&mut self) {
        self.deadline = Instant::now() + REQUEST_TIME;
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.stream.set_read_timeout(self.left()?)?;
            match self.stream.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => return outcome,
            }
        }
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The connections that there are.
#[derive(Debug, Default)]
struct Connections {
    inner: Mutex<Inner>,
    /// One has ended.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    streams: HashMap<u64, Arc<UnixStream>>,
    served: usize,
    next: u64,
    is_ending: bool,
}

impl Connections {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a connection; `None` if there are too many to even be told.
    fn add(self: &Arc<Self>, stream: &Arc<UnixStream>) -> Option<Slot> {
        let mut inner = self.lock();
        let is_served = inner.served < MAX_CONNECTIONS;
        if inner.is_ending || (!is_served && inner.streams.len() - inner.served >= MAX_REFUSED) {
            return None;
        }
        inner.served += usize::from(is_served);
        let id = inner.next;
        inner.next += 1;
        inner.streams.insert(id, stream.clone());
        Some(Slot { connections: self.clone(), id, is_served })
    }

    fn is_ending(&self) -> bool {
        self.lock().is_ending
    }

    /// No more connections, and no more requests than have been sent on those that there are.
    fn begin_end(&self) {
        let mut inner = self.lock();
        inner.is_ending = true;
        for stream in inner.streams.values() {
            let _ = stream.shutdown(Shutdown::Read);
        }
    }

    /// Waits until there are none; says how many there are still.
    fn wait(&self, patience: Duration) -> usize {
        let outcome =
            self.ended.wait_timeout_while(self.lock(), patience, |inner| !inner.streams.is_empty());
        outcome.unwrap_or_else(PoisonError::into_inner).0.streams.len()
    }
}

/// A connection's place among them.
struct Slot {
    connections: Arc<Connections>,
    id: u64,
    is_served: bool,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut inner = self.connections.lock();
        inner.streams.remove(&self.id);
        inner.served -= usize::from(self.is_served);
        self.connections.ended.notify_all();
    }
}
