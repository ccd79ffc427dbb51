// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves the API on a Unix socket. One thread accepts, and each connection has its own thread, so
//! that the VMM answers status requests while it writes a snapshot. No server thread touches guest
//! memory.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::api::Control;
use crate::api::endpoint::Endpoint;
use crate::api::events::{EventReader, MAX_READERS, Next};
use crate::api::http::{self, Response};
use crate::api::socket::{Listener, SocketError};
use crate::error::{Error, Kind};
use crate::sync::LockExt;

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

/// Interval at which a stream of events looks whether its client has gone.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How long after the VM's end a client may take to read the rest of the events.
const LAST_EVENTS: Duration = Duration::from_secs(1);

/// An error from starting to serve the API.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The socket cannot be created.
    #[error("cannot create the API socket {}: {source}", path.display())]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// The cause.
        source: SocketError,
    },
    /// The thread that accepts connections cannot be started.
    #[error("cannot start the API's thread: {0}")]
    Thread(#[source] io::Error),
}

impl From<StartError> for Error {
    fn from(error: StartError) -> Self {
        Error::of(Kind::Failed, error)
    }
}

/// Serves the API until it is dropped.
///
/// Dropping it removes the socket's file and ends the server's threads, and streams of events. A
/// request in progress still gets its answer; the operation that it waits for must end by itself.
/// The server abandons a request that takes longer than 15 seconds, and logs that.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
/// use demand_vmm::api::{Control, ControlError, SnapshotRequest, SnapshotSummary, Status};
/// use demand_vmm::api::events::EventLog;
/// use demand_vmm::api::server::ApiServer;
/// use demand_vmm::api::client::Client;
///
/// /// A VMM without a VM.
/// #[derive(Default)]
/// struct Nothing(Arc<EventLog>);
///
/// impl Control for Nothing {
///     fn events(&self) -> Arc<EventLog> {
///         self.0.clone()
///     }
///     fn status(&self) -> Status {
///         serde_json::from_value(serde_json::json!({
///             "state": "stopped", "engine": "uffd", "backing": "shmem", "memory_bytes": 0,
///             "cpus": 0, "pages_total": 0, "pages_present": 0, "devices": [], "uptime_us": 1,
///             "pid": std::process::id(), "version": "0",
///         }))
///         .unwrap()
///     }
///     fn pause(&self) -> Result<(), ControlError> {
///         Err(ControlError::wrong_state("cannot pause: there is no VM; start one"))
///     }
///     # fn resume(&self) -> Result<(), ControlError> { self.pause() }
///     # fn shutdown(&self) -> Result<(), ControlError> { self.pause() }
///     # fn snapshot(&self, _: &SnapshotRequest) -> Result<SnapshotSummary, ControlError> {
///     #     Err(ControlError::wrong_state("cannot take a snapshot: there is no VM; start one"))
///     # }
///     // resume, snapshot and shutdown are similar.
/// }
///
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("api.sock");
/// let server = ApiServer::start(&path, Arc::new(Nothing::default())).unwrap();
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
    pub fn start(path: &Path, control: Arc<dyn Control>) -> Result<Self, StartError> {
        let listener = Listener::bind(path)
            .map_err(|source| StartError::Socket { path: path.into(), source })?;
        log::info!("api: listening on {}", path.display());
        let listener = Arc::new(listener);
        let connections = Arc::new(Connections::default());
        let accepting = {
            let (listener, connections) = (listener.clone(), connections.clone());
            thread::Builder::new()
                .name("api".into())
                .spawn(move || accept(&listener, &connections, &control))
                .map_err(StartError::Thread)?
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
            let (stream, control, all) = (stream.clone(), control.clone(), connections.clone());
            thread::Builder::new().name("api-connection".into()).spawn(move || {
                if slot.is_served {
                    serve_until(&stream, &*control, &|| all.is_ending());
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
    let message = format!(
        "cannot serve the request: {MAX_CONNECTIONS} connections are open already; retry later"
    );
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
    serve_until(stream, control, &|| false);
}

/// As [`serve`], and ends a stream of events once `is_ending` says so.
fn serve_until(stream: &UnixStream, control: &dyn Control, is_ending: &dyn Fn() -> bool) {
    let timed = Timed::new(stream);
    let mut connection = Connection { stream: timed, buffer: Vec::new(), is_new: true, is_ending };
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
    is_ending: &'a dyn Fn() -> bool,
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
        // The head stays in the buffer until its body is there: an empty buffer means that no
        // request has begun.
        let body_len = head.body.unwrap_or(0);
        let end = head.len + body_len;
        let response = match Endpoint::find(&head.method, &head.path) {
            Err(response) if body_len > 0 => return Err(End::Refuse(response)),
            Err(response) => response,
            Ok(endpoint) => {
                if endpoint.needs_body() && head.body.is_none() {
                    let message = format!(
                        "cannot serve {}: it needs a body with a Content-Length; send one",
                        head.path
                    );
                    return Err(End::Refuse(Response::error(411, message)));
                }
                if head.expects_continue && self.buffer.len() < end {
                    self.send(http::CONTINUE)?;
                }
                while self.buffer.len() < end {
                    self.receive()?;
                }
                let body = &self.buffer[head.len..end];
                if endpoint == Endpoint::Events {
                    return Err(self.stream_events(&head, body, control));
                }
                endpoint.answer(body, control)
            }
        };
        self.buffer.drain(..end);
        log::debug!("api: {:?} {:?}: {}", head.method, head.path, response.status);
        // The operation may have taken long.
        self.stream.restart();
        self.send(&response.to_bytes(head.keep_alive, head.method != "HEAD"))?;
        Ok(head.keep_alive)
    }

    /// Answers a request for events: a line for each, until the VM has ended.
    fn stream_events(&self, head: &http::Head, body: &[u8], control: &dyn Control) -> End {
        if let Err(error) = Endpoint::Events.check_body(body) {
            return End::Refuse(error.into());
        }
        if !head.knows_chunks {
            let message = "cannot send events: they come in chunks, which HTTP/1.0 does not have; \
                           use HTTP/1.1";
            return End::Refuse(Response::error(505, message));
        }
        let Some(reader) = control.events().read() else {
            let message = format!(
                "cannot send events: {MAX_READERS} clients read the events already; retry later"
            );
            return End::Refuse(Response::error(503, message));
        };
        log::debug!("api: {:?} {:?}: a stream", head.method, head.path);
        // An error means that the client has gone.
        let _ = self.try_stream(reader);
        End::HangUp
    }

    fn try_stream(&self, mut reader: EventReader) -> io::Result<()> {
        self.send_patiently(http::LINES_HEAD, &reader)?;
        loop {
            match reader.next(LOOK_EVERY) {
                Next::Event(event) => {
                    let chunk = http::line_chunk(&event).map_err(io::Error::other)?;
                    self.send_patiently(&chunk, &reader)?;
                }
                Next::Nothing if (self.is_ending)() || has_gone(self.stream.stream) => {
                    return Ok(());
                }
                Next::Nothing => {}
                Next::Ended => return self.send_patiently(http::LAST_CHUNK, &reader),
            }
        }
    }

    /// Sends bytes to a client that may read them as slowly as it likes, except at the end.
    fn send_patiently(&self, mut bytes: &[u8], reader: &EventReader) -> io::Result<()> {
        let mut stream = self.stream.stream;
        stream.set_write_timeout(Some(LOOK_EVERY))?;
        while !bytes.is_empty() {
            match stream.write(bytes) {
                Ok(len) => bytes = &bytes[len..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_timeout(&error) => {
                    let ended = reader.log().ended_for();
                    if (self.is_ending)() || ended.is_some_and(|ago| ago > LAST_EVENTS) {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Blocks until more bytes arrive.
    fn receive(&mut self) -> Result<(), End> {
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) if self.buffer.is_empty() => Err(End::HangUp),
            Ok(0) => {
                let message = "cannot parse the request: it is incomplete; send all of it";
                Err(End::Refuse(Response::error(400, message)))
            }
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
                let message = format!(
                    "cannot parse the request: not all of it arrived within {seconds} s; send it \
                     at once"
                );
                Err(End::Refuse(Response::error(408, message)))
            }
            Err(_) => Err(End::HangUp),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), End> {
        self.stream.write_all(bytes).map_err(|_| End::HangUp)
    }
}

/// Whether the client has closed the connection. One that has only shut down its sending side still
/// reads.
fn has_gone(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    let polled = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    polled.is_ok() && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
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
        self.inner.lock_always()
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
