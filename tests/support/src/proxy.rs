// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A TCP proxy on loopback in front of a server of the tests: a long and narrow link, with faults
//! that are set while it runs.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Most connections at a time. More are closed at once.
const MOST_CONNECTIONS: usize = 256;

/// Bytes that are read at once.
const PIECE: usize = 64 << 10;

/// Most pieces of one direction of a connection that are on the link.
const MOST_PIECES: usize = 1024;

/// The address of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A port of 127.0.0.1.
    Port(u16),
    /// A Unix socket.
    Socket(PathBuf),
}

/// The properties of the link to a server. Its delays do not limit its throughput.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Delay of the bytes to the server.
    pub to_server: Duration,
    /// Delay of the bytes to the clients.
    pub to_client: Duration,
    /// Bytes per second to the clients, all connections together, which wait in one queue.
    pub rate: Option<u64>,
}

impl Link {
    /// Returns a link with this time for a round trip, half of it in each direction, and without a
    /// limit of the rate. A new connection costs a round trip before its first byte.
    pub fn round_trip(time: Duration) -> Link {
        Link { to_server: time / 2, to_client: time - time / 2, rate: None }
    }

    /// Limits the rate, in bytes per second.
    #[must_use]
    pub fn rate(self, rate: u64) -> Link {
        Link { rate: Some(rate), ..self }
    }
}

/// A fault. Offsets count the bytes that a connection has passed to its client since the fault was
/// set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection ends at this offset.
    Cut(u64),
    /// No byte passes from this offset on, and the connection stays open.
    Stall(u64),
    /// The lowest bit of the byte at this offset is flipped.
    Flip(u64),
    /// An answer of HTTP has this number of bytes, and says so.
    Truncate(u64),
    /// A request of HTTP is answered with this status, and with this code in a body as S3 has it.
    Status(u16, &'static str),
    /// Connections end, and new ones are closed at once.
    Refuse,
}

struct State {
    link: Link,
    fault: Option<Fault>,
    /// The number of times that the fault still occurs.
    left: usize,
    /// The number of the fault.
    number: u64,
    /// The time at which all bytes to the clients so far have passed the link.
    free: Instant,
    /// The open connections.
    open: HashMap<usize, Arc<Ends>>,
}

impl State {
    /// Returns whether the fault occurs now, once more.
    fn occurs(&mut self) -> bool {
        self.left > 0 && {
            self.left -= 1;
            true
        }
    }
}

struct Shared {
    target: Target,
    state: Mutex<State>,
    connections: AtomicUsize,
    requests: AtomicUsize,
    /// Bytes that were put on the link to the clients.
    sent: AtomicU64,
    stopped: AtomicBool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A proxy on a port of 127.0.0.1. Dropping it ends its connections.
pub struct FaultProxy {
    shared: Arc<Shared>,
    port: u16,
    acceptor: Option<JoinHandle<()>>,
}

impl FaultProxy {
    /// Starts a proxy without delay, limit or fault.
    ///
    /// # Panics
    ///
    /// If no port is free.
    pub fn start(target: Target) -> FaultProxy {
        FaultProxy::start_at(target, 0)
    }

    /// Like [`start`](Self::start), on this port.
    ///
    /// # Panics
    ///
    /// If the port is not free.
    pub fn start_at(target: Target, port: u16) -> FaultProxy {
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = State {
            link: Link::default(),
            fault: None,
            left: 0,
            number: 0,
            free: Instant::now(),
            open: HashMap::new(),
        };
        let shared = Arc::new(Shared {
            target,
            state: Mutex::new(state),
            connections: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
            sent: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
        });
        let accepting = shared.clone();
        let acceptor = thread::spawn(move || {
            for client in listener.incoming() {
                if accepting.stopped.load(Ordering::SeqCst) {
                    break;
                }
                // A client that has gone, or a server that is down: the client's connection ends.
                let _ = client.and_then(|client| connect(&accepting, client));
            }
        });
        FaultProxy { shared, port, acceptor: Some(acceptor) }
    }

    /// Returns the port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Changes the link. Bytes that are on it keep their delay.
    pub fn set_link(&self, link: Link) {
        self.shared.state().link = link;
    }

    /// Begins a fault, which occurs up to `times`, in place of the one before.
    pub fn set_fault(&self, fault: Fault, times: usize) {
        let mut state = self.shared.state();
        (state.fault, state.left) = (Some(fault), times);
        state.number += 1;
        if fault == Fault::Refuse {
            state.open.values().for_each(|ends| ends.end());
        }
    }

    /// Ends the fault.
    pub fn clear_fault(&self) {
        self.shared.state().fault = None;
    }

    /// Returns the number of times that the fault can still occur.
    pub fn faults_left(&self) -> usize {
        self.shared.state().left
    }

    /// Returns the number of connections that were made.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Returns the number of GET requests of HTTP that have arrived.
    pub fn requests(&self) -> usize {
        self.shared.requests.load(Ordering::SeqCst)
    }

    /// Returns the number of bytes that the clients were sent.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::SeqCst)
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        // It wakes the acceptor.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        self.shared.state().open.values().for_each(|ends| ends.end());
    }
}

impl std::fmt::Debug for FaultProxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FaultProxy").field("port", &self.port).finish_non_exhaustive()
    }
}

/// The connection to the server.
enum Server {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Server {
    fn connect(target: &Target) -> io::Result<Server> {
        match target {
            Target::Port(port) => {
                let stream = TcpStream::connect(("127.0.0.1", *port))?;
                stream.set_nodelay(true)?;
                Ok(Server::Tcp(stream))
            }
            Target::Socket(path) => UnixStream::connect(path).map(Server::Unix),
        }
    }

    /// Acknowledges at once what comes next. A server that sends the head and the body of an answer
    /// apart, and waits for an acknowledgement in between, as s3s-fs does, would else be delayed by
    /// up to 40 ms, which is not the link's.
    fn acknowledge_at_once(&self) {
        if let Server::Tcp(stream) = self {
            // The connection may have ended already.
            let _ = rustix::net::sockopt::set_tcp_quickack(stream, true);
        }
    }

    fn shutdown(&self, how: Shutdown) {
        // The connection may have ended already.
        let _ = match self {
            Server::Tcp(stream) => stream.shutdown(how),
            Server::Unix(stream) => stream.shutdown(how),
        };
    }
}

impl Read for &Server {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Server::Tcp(stream) => (&mut &*stream).read(bytes),
            Server::Unix(stream) => (&mut &*stream).read(bytes),
        }
    }
}

impl Write for &Server {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Server::Tcp(stream) => (&mut &*stream).write(bytes),
            Server::Unix(stream) => (&mut &*stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Both ends of a connection.
struct Ends {
    client: TcpStream,
    server: Server,
}

impl Ends {
    fn end(&self) {
        let _ = self.client.shutdown(Shutdown::Both);
        self.server.shutdown(Shutdown::Both);
    }
}

/// Bytes on the link, and the time at which they arrive. An end of the connection has none.
type Piece = (Instant, Vec<u8>);

/// Connects a client with the server.
fn connect(shared: &Arc<Shared>, client: TcpStream) -> io::Result<()> {
    let number = shared.connections.fetch_add(1, Ordering::SeqCst);
    {
        let mut state = shared.state();
        let refused = state.fault == Some(Fault::Refuse) && state.occurs();
        if refused || state.open.len() >= MOST_CONNECTIONS {
            return Ok(());
        }
    }
    client.set_nodelay(true)?;
    let ends = Arc::new(Ends { client, server: Server::connect(&shared.target)? });
    shared.state().open.insert(number, ends.clone());
    let (to_server, server_line) = sync_channel(MOST_PIECES);
    let (to_client, client_line) = sync_channel(MOST_PIECES);
    let spawn = |work: Box<dyn FnOnce() + Send>| {
        thread::Builder::new().stack_size(256 << 10).spawn(work).map(drop)
    };
    let (it, of, answers) = (ends.clone(), shared.clone(), to_client.clone());
    spawn(Box::new(move || read_client(&of, &it, &to_server, &answers)))?;
    let it = ends.clone();
    spawn(Box::new(move || {
        deliver(&server_line, &mut &it.server);
        it.server.shutdown(Shutdown::Write);
    }))?;
    let (it, of) = (ends.clone(), shared.clone());
    spawn(Box::new(move || read_server(&of, &it, &to_client)))?;
    let shared = shared.clone();
    spawn(Box::new(move || {
        deliver(&client_line, &mut &ends.client);
        ends.end();
        shared.state().open.remove(&number);
    }))
}

/// Writes pieces when they arrive, up to the end of the connection.
fn deliver(line: &Receiver<Piece>, to: &mut impl Write) {
    for (at, bytes) in line {
        thread::sleep(at.saturating_duration_since(Instant::now()));
        if bytes.is_empty() || to.write_all(&bytes).is_err() {
            break;
        }
    }
}

/// Puts requests on the link.
fn read_client(
    shared: &Shared,
    ends: &Ends,
    line: &SyncSender<Piece>,
    answers: &SyncSender<Piece>,
) {
    let mut bytes = vec![0; PIECE];
    // The handshake of a connection over the link.
    let mut handshake = true;
    while let Ok(count @ 1..) = (&ends.client).read(&mut bytes) {
        let bytes = &bytes[..count];
        let is_get = bytes.starts_with(b"GET ");
        if is_get {
            shared.requests.fetch_add(1, Ordering::SeqCst);
        }
        let mut state = shared.state();
        let Link { to_server, to_client, .. } = state.link;
        let mut at = Instant::now() + to_server;
        if std::mem::take(&mut handshake) {
            at += to_server + to_client;
        }
        let fault = state.fault;
        let refusal = match fault {
            Some(Fault::Status(status, code)) if is_get && state.occurs() => Some((status, code)),
            _ => None,
        };
        drop(state);
        if let Some((status, code)) = refusal {
            let body = format!("<Error><Code>{code}</Code><Message>A fault</Message></Error>");
            let head = format!(
                "HTTP/1.1 {status} {code}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            let _ = answers.send((at + to_client, (head + &body).into()));
            let _ = answers.send((at + to_client, Vec::new()));
            return;
        }
        if line.send((at, bytes.to_vec())).is_err() {
            return;
        }
    }
}

/// Puts answers on the link, and makes the faults.
fn read_server(shared: &Shared, ends: &Ends, line: &SyncSender<Piece>) {
    let mut bytes = vec![0; PIECE];
    let (mut number, mut passed) = (0, 0);
    // The end of an answer that is truncated.
    let mut answer_end = None;
    loop {
        ends.server.acknowledge_at_once();
        let count = (&ends.server).read(&mut bytes).unwrap_or(0);
        let mut piece = bytes[..count].to_vec();
        let mut state = shared.state();
        if state.number != number {
            (number, passed) = (state.number, 0);
        }
        let (start, end) = (passed, passed + count as u64);
        passed = end;
        let mut ending = None;
        let fault = state.fault;
        match fault {
            Some(Fault::Cut(at) | Fault::Stall(at))
                if end > at && start <= at && state.occurs() =>
            {
                piece.truncate((at - start) as usize);
                ending = fault;
            }
            Some(Fault::Flip(at)) if end > at && start <= at && state.occurs() => {
                piece[(at - start) as usize] ^= 1;
            }
            Some(Fault::Truncate(to)) if start == 0 => {
                if let Some((head, head_len)) = shortened(&piece, to)
                    && state.occurs()
                {
                    answer_end = Some(head_len as u64 + to);
                    piece.splice(..head_len, head);
                }
            }
            _ => {}
        }
        if let Some(at) = answer_end
            && end >= at
        {
            piece.truncate(piece.len() - (end - at) as usize);
            ending = Some(Fault::Cut(at));
        }
        let mut leaves = Instant::now();
        if let Some(rate) = state.link.rate {
            let time = Duration::from_nanos(piece.len() as u64 * 1_000_000_000 / rate.max(1));
            leaves = leaves.max(state.free) + time;
            state.free = leaves;
        }
        let at = leaves + state.link.to_client;
        drop(state);
        let ends_here = piece.is_empty();
        shared.sent.fetch_add(piece.len() as u64, Ordering::SeqCst);
        if line.send((at, piece)).is_err() {
            return;
        }
        match ending {
            Some(Fault::Stall(_)) => {
                // The rest goes nowhere, until the client or the server ends the connection.
                while let Ok(1..) = (&ends.server).read(&mut bytes) {}
                let _ = line.send((Instant::now(), Vec::new()));
                return;
            }
            Some(_) => {
                let _ = line.send((at, Vec::new()));
                return;
            }
            None if ends_here => return,
            None => {}
        }
    }
}

/// Returns the head of an answer of HTTP, for the first piece of one, which says that the body has
/// `len` bytes; and the length of the head as it was.
fn shortened(piece: &[u8], len: u64) -> Option<(Vec<u8>, usize)> {
    let head_len = piece.windows(4).position(|bytes| bytes == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&piece[..head_len]).ok()?;
    let lines = head.split_inclusive("\r\n").map(|line| {
        match line.to_ascii_lowercase().starts_with("content-length:") {
            true => format!("Content-Length: {len}\r\n"),
            false => line.into(),
        }
    });
    Some((lines.collect::<String>().into(), head_len))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers each connection with this number of bytes.
    fn server(len: usize) -> u16 {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            for mut client in listener.incoming().map_while(Result::ok) {
                let _ = client.write_all(&vec![7; len]);
            }
        });
        port
    }

    /// Reads all that a connection passes.
    fn receive(proxy: &FaultProxy) -> (Vec<u8>, Duration) {
        let begun = Instant::now();
        let mut bytes = Vec::new();
        let mut connection = TcpStream::connect(("127.0.0.1", proxy.port())).unwrap();
        connection.read_to_end(&mut bytes).unwrap();
        (bytes, begun.elapsed())
    }

    #[test]
    fn delay_does_not_limit_throughput() {
        const LEN: usize = 8 << 20;
        let proxy = FaultProxy::start(Target::Port(server(LEN)));
        proxy.set_link(Link::round_trip(Duration::from_millis(400)));
        let (bytes, time) = receive(&proxy);
        assert_eq!(bytes.len(), LEN);
        // One piece for each delay would take 25 seconds.
        let range = Duration::from_millis(200)..Duration::from_secs(10);
        assert!(range.contains(&time), "{time:?}");
        proxy.set_link(Link::default().rate(LEN as u64));
        let (bytes, time) = receive(&proxy);
        assert_eq!(bytes.len(), LEN);
        assert!(time >= Duration::from_millis(900), "{time:?}");
    }

    #[test]
    fn parted_answers_are_not_delayed() {
        const ANSWERS: u32 = 20;
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        // The system holds the second part back until the first one is acknowledged.
        thread::spawn(move || {
            let mut client = listener.accept().unwrap().0;
            while let Ok(1..) = client.read(&mut [0]) {
                client.write_all(b"head").unwrap();
                client.write_all(b"body").unwrap();
            }
        });
        let proxy = FaultProxy::start(Target::Port(port));
        let mut connection = TcpStream::connect(("127.0.0.1", proxy.port())).unwrap();
        let begun = Instant::now();
        for _ in 0..ANSWERS {
            connection.write_all(b"?").unwrap();
            connection.read_exact(&mut [0; 8]).unwrap();
        }
        // An acknowledgement that is delayed comes after 40 ms.
        let most = Duration::from_millis(20) * ANSWERS;
        assert!(begun.elapsed() < most, "{:?}", begun.elapsed());
        assert_eq!(proxy.sent(), 8 * u64::from(ANSWERS));
    }

    #[test]
    fn faults_occur_as_often_as_set() {
        let proxy = FaultProxy::start(Target::Port(server(1000)));
        proxy.set_fault(Fault::Cut(10), 2);
        for len in [10, 10, 1000] {
            assert_eq!(receive(&proxy).0.len(), len);
        }
        proxy.set_fault(Fault::Flip(999), 1);
        assert_eq!(receive(&proxy).0[997..], [7, 7, 6]);
        assert_eq!(receive(&proxy).0[997..], [7, 7, 7]);
        proxy.set_fault(Fault::Refuse, 1);
        assert!(receive(&proxy).0.is_empty());
        assert_eq!(receive(&proxy).0.len(), 1000);
        assert_eq!((proxy.faults_left(), proxy.connections()), (0, 7));
    }
}
