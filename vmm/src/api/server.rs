// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves the API on a Unix socket. One thread accepts, and each connection has its own thread, so
//! that the VMM answers status requests while it writes a snapshot. No server thread touches guest
//! memory.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::api::http::{self, Response};
use crate::api::socket::Listener;
use crate::api::{Control, Endpoint};
use crate::error::Error;

/// Maximum number of connections that are served at a time.
pub const MAX_CONNECTIONS: usize = 32;

/// Time limit for a request to arrive, from its first byte on; for a client to start a request; and
/// for a client to read its answer.
pub const REQUEST_TIME: Duration = Duration::from_secs(10);

/// How long the server reads on after the last answer of a connection. A client may look for an
/// answer only after it has sent everything.
const LINGER: Duration = Duration::from_secs(1);

/// Maximum number of connections that get an answer saying that there are too many. The server
/// closes further connections at once.
const MAX_REFUSED: usize = 32;

/// How long the end of the server waits for requests in progress.
const END_PATIENCE: Duration = Duration::from_secs(15);

/// Serves the API until it is dropped.
///
/// Dropping it removes the socket's file and ends the server's threads. A request in progress still
/// gets its answer; the operation that it waits for must end by itself. The server abandons a
/// request that takes longer than 15 seconds, and logs that.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
/// use demand_vmm::api::{Control, ControlError, SnapshotRequest, SnapshotSummary, Status};
/// use demand_vmm::api::server::ApiServer;
/// use demand_vmm::api::client::Client;
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
///     // resume, snapshot and shutdown are similar.
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
    /// Starts to serve on a socket at `path`, with mode 0600. It replaces the socket of a process
    /// that has ended.
    ///
    /// # Errors
    ///
    /// If another process listens on the socket, if the path exists and is not a socket, if the
    /// directory does not exist or is not writable, or if the path is too long for a socket.
    pub fn start(path: &Path, control: Arc<dyn Control>) -> Result<Self, Error> {
        let listener = Arc::new(Listener::bind(path)?);
        let connections = Arc::new(Connections::default());
        let accepting = {
            let (listener, connections) = (listener.clone(), connections.clone());
            thread::Builder::new()
                .name("api".into())
                .spawn(move || accept(&listener, &connections, &control))
                .map_err(|error| Error::failed(format!("cannot start the API's thread: {error}")))?
        };
        Ok(ApiServer { listener, connections, accepting: Some(accepting) })
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.connections.begin_end();
        // This wakes the thread that is blocked in accept.
        let _ = rustix::net::shutdown(self.listener.socket(), rustix::net::Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        let left = self.connections.wait(END_PATIENCE);
        if left > 0 {
            log::warn!(
                "api: {left} requests are still in progress after {} s; they are abandoned",
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
                // For example, the process has no file descriptors left. A connecting client waits
                // meanwhile.
                if !failing {
                    log::warn!("api: cannot accept a connection: {error}; retrying");
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
                // Dropped last, because the server's end waits for the slot.
                drop(slot);
            })
        };
        if let Err(error) = thread {
            log::warn!("api: cannot start a thread for a connection: {error}");
            refuse(&stream);
        }
    }
}

/// Tells the client that there are too many connections. The answer fits into a new socket's
/// buffer, so the write does not block.
fn refuse(stream: &UnixStream) {
    let message = format!("{MAX_CONNECTIONS} connections are open already; retry later");
    let answer = Response::error(503, message).to_bytes(false, true);
    let _ = Timed::new(stream).write_all(&answer);
}

/// Waits until the client has read its last answer, before the connection is closed.
fn linger(stream: &UnixStream) {
    let _ = stream.shutdown(Shutdown::Write);
    let mut rest = Timed { stream, deadline: Instant::now() + LINGER };
    let mut buffer = [0; 4096];
    while rest.read(&mut buffer).is_ok_and(|len| len > 0) {}
}

/// Serves a connection until the client hangs up, is silent for [`REQUEST_TIME`], or sends a
/// request after which the stream cannot be parsed further.
pub fn serve(stream: &UnixStream, control: &dyn Control) {
    let mut connection =
        Connection { stream: Timed::new(stream), buffer: Vec::new(), is_new: true };
    loop {
        match connection.exchange(control) {
            Ok(true) => connection.is_new = false,
            Ok(false) | Err(End::HangUp) => break,
            Err(End::Refuse(response)) => {
                // The refusal may be due to an expired deadline.
                connection.stream.restart();
                let _ = connection.send(&response.to_bytes(false, true));
                break;
            }
        }
    }
    linger(stream);
}

/// The reason for which a connection ends.
enum End {
    /// The client has hung up.
    HangUp,
    /// A last answer to the client.
    Refuse(Response),
}

/// A connection, with the bytes received and not yet parsed.
struct Connection<'a> {
    stream: Timed<'a>,
    buffer: Vec<u8>,
    /// Whether the connection has carried no request yet.
    is_new: bool,
}

impl Connection<'_> {
    /// Receives one request and answers it. Returns whether another may follow.
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
        // The operation may have taken long.
        self.stream.restart();
        self.send(&response.to_bytes(head.keep_alive, head.method != "HEAD"))?;
        Ok(head.keep_alive)
    }

    /// Blocks until more bytes arrive.
    fn receive(&mut self) -> Result<(), End> {
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) if self.buffer.is_empty() => Err(End::HangUp),
            Ok(0) => Err(End::Refuse(Response::error(400, "the request is incomplete"))),
            Ok(len) => {
                if self.buffer.is_empty() {
                    self.stream.restart();
                }
                self.buffer.extend_from_slice(&bytes[..len]);
                Ok(())
            }
            // A client that is idle between two requests gets no message: it would take it for the
            // answer to its next request.
            Err(error) if is_timeout(&error) && (self.is_new || !self.buffer.is_empty()) => {
                let seconds = REQUEST_TIME.as_secs();
                let message = format!("no complete request arrived within {seconds} s");
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

/// A stream whose reads and writes share one deadline.
struct Timed<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
}

impl<'a> Timed<'a> {
    fn new(stream: &'a UnixStream) -> Self {
        Timed { stream, deadline: Instant::now() + REQUEST_TIME }
    }

    /// Sets the deadline anew.
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

/// The open connections.
#[derive(Debug, Default)]
struct Connections {
    inner: Mutex<Inner>,
    /// Notified when a connection ends.
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

    /// Registers a connection. Returns `None` if there are too many even for a refusal.
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

    /// Refuses further connections, and further requests on the open ones except those already
    /// sent.
    fn begin_end(&self) {
        let mut inner = self.lock();
        inner.is_ending = true;
        for stream in inner.streams.values() {
            let _ = stream.shutdown(Shutdown::Read);
        }
    }

    /// Waits until no connection is open, or `patience` has passed. Returns the number still open.
    fn wait(&self, patience: Duration) -> usize {
        let outcome =
            self.ended.wait_timeout_while(self.lock(), patience, |inner| !inner.streams.is_empty());
        outcome.unwrap_or_else(PoisonError::into_inner).0.streams.len()
    }
}

/// A registered connection.
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
