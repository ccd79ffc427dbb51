// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The source: one connection with many queries in flight, made anew when it breaks.
//!
//! `submit` only queues. One thread connects and sends, another receives; both end with the
//! connection. When it breaks, its queries fail, and the pager asks again after a pause of its own:
//! so each failure is reported, and this code needs no retries.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use demand_source::{
    Chunk, Completer, Completion, Destination, Extent, PageSource, Priority, Request, Retry,
    SourceError, join_within,
};

use super::error::TcpError;
use super::protocol::{Answer, Hello, MOST, Query, Status};

/// The limits of a connection.
#[derive(Clone, Copy, Debug)]
pub struct TcpOptions {
    /// Longest time to connect.
    pub connect: Duration,
    /// Longest time for an answer. A server that is silent for longer counts as gone.
    pub answer: Duration,
    /// Pause before connecting again after a failure; it doubles up to a second.
    pub pause: Duration,
    /// Most queries in flight. Background fill takes at most half of them.
    pub window: usize,
}

impl Default for TcpOptions {
    /// Returns 3 s to connect, 5 s for an answer, pauses from 50 ms, 64 queries in flight.
    fn default() -> Self {
        TcpOptions {
            connect: Duration::from_secs(3),
            answer: Duration::from_secs(5),
            pause: Duration::from_millis(50),
            window: 64,
        }
    }
}

/// Longest pause before connecting again.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Longest wait of a dropped source for its threads.
const END_WITHIN: Duration = Duration::from_secs(1);

/// One query: a part of a request. It is dropped when it is over.
struct Piece {
    // Dropped before `whole`: the memory goes back before the outcome takes effect.
    destination: Destination<'static>,
    offset: u64,
    priority: Priority,
    whole: Arc<Whole>,
}

/// A request. It is answered when its last piece is dropped.
struct Whole {
    state: Mutex<WholeState>,
}

struct WholeState {
    completer: Option<Completer>,
    /// Pieces without an outcome yet.
    left: usize,
    error: Option<SourceError>,
}

impl Whole {
    fn lock(&self) -> MutexGuard<'_, WholeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn piece(&self, outcome: Result<(), SourceError>) {
        let mut state = self.lock();
        state.left -= 1;
        state.error = state.error.take().or(outcome.err());
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Some(completer) = state.completer.take() else { return };
        match state.error.take() {
            Some(error) => completer.complete(Err(error)),
            None if state.left == 0 => completer.complete(Ok(())),
            // Dropped with the source: dropping the completer says so.
            None => {}
        }
    }
}

impl Piece {
    /// Ends the query. The outcome takes effect after the memory has gone back.
    fn end(self, outcome: Result<(), SourceError>) {
        self.whole.piece(outcome);
    }

    fn is_wanted(&self) -> bool {
        self.destination.is_wanted()
            && self.whole.lock().completer.as_ref().is_some_and(Completer::is_awaited)
    }
}

#[derive(Default)]
struct State {
    demand: VecDeque<Piece>,
    fill: VecDeque<Piece>,
    /// Queries that were sent, in this order, by their tags.
    in_flight: BTreeMap<u64, (Instant, Piece)>,
    filling: usize,
    next_tag: u64,
    /// Why the present connection is over.
    lost: Option<TcpError>,
    /// The present connection, to be shut down by others.
    stream: Option<TcpStream>,
    closed: bool,
}

struct Shared {
    address: String,
    hello: Hello,
    options: TcpOptions,
    state: Mutex<State>,
    changed: Condvar,
}

/// A source that reads from a page server ([`serve`](super::serve)).
pub struct TcpSource {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl TcpSource {
    /// Connects to the server at `address` (`host:port`), and learns which image it serves.
    ///
    /// # Errors
    ///
    /// [`TcpError`], as a [`SourceError`].
    pub fn connect(address: &str, options: TcpOptions) -> Result<Self, SourceError> {
        let (stream, hello) = connect(address, &options)?;
        let shared = Arc::new(Shared {
            address: address.into(),
            hello,
            options,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let link = shared.clone();
        let thread = thread::Builder::new()
            .name("tcp-source".into())
            .spawn(move || run(&link, stream))
            .map_err(|source| TcpError::Connect { address: address.into(), source })?;
        Ok(TcpSource { shared, thread: Some(thread) })
    }
}

/// Connects, and reads the server's first message.
fn connect(address: &str, options: &TcpOptions) -> Result<(TcpStream, Hello), TcpError> {
    let failed = |source| TcpError::Connect { address: address.into(), source };
    let mut outcome = Err(io::ErrorKind::AddrNotAvailable.into());
    for peer in address.to_socket_addrs().map_err(failed)? {
        outcome = TcpStream::connect_timeout(&peer, options.connect);
        if outcome.is_ok() {
            break;
        }
    }
    let mut stream = outcome.map_err(failed)?;
    // Queries are small, and must not wait for each other.
    stream.set_nodelay(true).map_err(failed)?;
    stream.set_read_timeout(Some(options.answer)).map_err(failed)?;
    stream.set_write_timeout(Some(options.answer)).map_err(failed)?;
    let mut hello = [0; Hello::BYTES];
    // A host whose server hangs still accepts connections.
    stream.read_exact(&mut hello).map_err(|error| lost(address, options, error))?;
    let hello = Hello::decode(&hello);
    let nonsense = TcpError::Nonsense { address: address.into(), what: "an unknown greeting" };
    Ok((stream, hello.ok_or(nonsense)?))
}

fn lost(address: &str, options: &TcpOptions, source: io::Error) -> TcpError {
    let address = address.into();
    match source.kind() {
        // The two names of a timeout.
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            TcpError::NoAnswer { address, waited: options.answer }
        }
        _ => TcpError::Lost { address, source },
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lost(&self, source: io::Error) -> TcpError {
        lost(&self.address, &self.options, source)
    }

    fn nonsense(&self, what: &'static str) -> TcpError {
        TcpError::Nonsense { address: self.address.clone(), what }
    }

    /// Connects again, to the same image.
    fn reconnect(&self) -> Result<TcpStream, TcpError> {
        let (stream, hello) = connect(&self.address, &self.options)?;
        // Pages of two images must never be mixed.
        let same = hello == self.hello;
        same.then_some(stream).ok_or_else(|| TcpError::OtherImage { address: self.address.clone() })
    }

    /// Removes the next query to send, or waits for one. Returns `None` when the connection is over.
    fn next(&self) -> Option<[u8; Query::BYTES]> {
        let mut state = self.lock();
        loop {
            if state.closed || state.lost.is_some() {
                return None;
            }
            // Half of the window is kept for demand, so that a fault never waits behind fill.
            let window = self.options.window;
            let piece = if state.in_flight.len() >= window {
                None
            } else if !state.demand.is_empty() || state.filling >= window.div_ceil(2) {
                state.demand.pop_front()
            } else {
                state.fill.pop_front()
            };
            let Some(piece) = piece else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            if !piece.is_wanted() {
                // Its callback must not run under the lock.
                drop(state);
                piece.end(Err(SourceError::Withdrawn));
                state = self.lock();
                continue;
            }
            let tag = state.next_tag;
            state.next_tag += 1;
            state.filling += usize::from(piece.priority == Priority::Fill);
            let len = u32::try_from(piece.destination.len()).expect("at most MOST bytes");
            let query = Query { tag, offset: piece.offset, len }.encode();
            // Before it is sent: the answer may be quick.
            state.in_flight.insert(tag, (Instant::now(), piece));
            return Some(query);
        }
    }

    /// Takes the query that an answer belongs to.
    fn take(&self, tag: u64) -> Option<Piece> {
        let mut state = self.lock();
        let (_, piece) = state.in_flight.remove(&tag)?;
        state.filling -= usize::from(piece.priority == Priority::Fill);
        self.changed.notify_all();
        Some(piece)
    }

    /// Fails if the oldest query has waited for too long.
    fn check_oldest(&self) -> Result<(), TcpError> {
        let state = self.lock();
        let oldest = state.in_flight.first_key_value();
        let waited = oldest.map_or(Duration::ZERO, |(_, (since, _))| since.elapsed());
        if waited < self.options.answer {
            return Ok(());
        }
        Err(TcpError::NoAnswer { address: self.address.clone(), waited })
    }

    /// Removes all queries, those that were sent and those that wait.
    fn take_all(&self) -> Vec<Piece> {
        let mut state = self.lock();
        state.filling = 0;
        let sent = std::mem::take(&mut state.in_flight).into_values().map(|(_, piece)| piece);
        let waiting = std::mem::take(&mut state.demand).into_iter();
        sent.chain(waiting).chain(std::mem::take(&mut state.fill)).collect()
    }

    /// Waits until there is a query to send, and at least for `pause`. Returns whether the source
    /// is still open.
    fn pause(&self, pause: Duration) -> bool {
        let due = Instant::now() + pause;
        let mut state = self.lock();
        while !state.closed {
            let idle = state.demand.is_empty() && state.fill.is_empty();
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() && !idle {
                return true;
            }
            let left = if left.is_zero() { LONGEST_PAUSE } else { left };
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }
}

/// Keeps a connection while there are requests.
fn run(shared: &Shared, first: TcpStream) {
    let mut stream = Some(first);
    let mut pause = shared.options.pause;
    loop {
        let begun = Instant::now();
        let connected = stream.take().map_or_else(|| shared.reconnect(), Ok);
        let error = match connected {
            Ok(stream) => converse(shared, stream),
            Err(error) => Some(error),
        };
        let Some(error) = error else { return };
        // Those that wait fail, too: the pager reports it, and asks again.
        let (retry, error) = (error.retry(), Arc::new(error));
        for piece in shared.take_all() {
            piece.end(Err(SourceError::other(error.clone(), retry)));
        }
        // A server that is away, or breaks each connection, is asked less and less often.
        let lasted = begun.elapsed() > LONGEST_PAUSE;
        pause = if lasted { shared.options.pause } else { pause };
        if !shared.pause(pause) {
            return;
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Sends and receives until the connection breaks, and returns why; `None` when the source ends.
fn converse(shared: &Shared, mut stream: TcpStream) -> Option<TcpError> {
    let (Ok(receiving), Ok(kept)) = (stream.try_clone(), stream.try_clone()) else {
        return Some(shared.lost(io::Error::last_os_error()));
    };
    shared.lock().stream = Some(kept);
    thread::scope(|scope| {
        let receiver = thread::Builder::new().name("tcp-receiver".into());
        let receiver = receiver.spawn_scoped(scope, || {
            let over = receive(shared, receiving);
            let mut state = shared.lock();
            state.lost = state.lost.take().or(over.err());
            shared.changed.notify_all();
        });
        if let Err(error) = receiver {
            shared.lock().lost = Some(shared.lost(error));
        }
        while let Some(query) = shared.next() {
            if let Err(error) = stream.write_all(&query) {
                let mut state = shared.lock();
                state.lost = state.lost.take().or(Some(shared.lost(error)));
            }
        }
        // Ends the receiver, too.
        let _ = stream.shutdown(Shutdown::Both);
    });
    let mut state = shared.lock();
    state.stream = None;
    let lost = state.lost.take();
    if state.closed { None } else { lost }
}

/// Receives answers until the connection breaks.
fn receive(shared: &Shared, mut stream: TcpStream) -> Result<(), TcpError> {
    loop {
        let mut head = [0; Answer::BYTES];
        // A timeout while nothing is in flight is no failure.
        match stream.read(&mut head[..1]) {
            Ok(0) => return Err(shared.lost(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::TimedOut
                        | io::ErrorKind::Interrupted
                ) =>
            {
                shared.check_oldest()?;
                continue;
            }
            Err(error) => return Err(shared.lost(error)),
        }
        stream.read_exact(&mut head[1..]).map_err(|error| shared.lost(error))?;
        let Some(Answer { tag, status, len }) = Answer::decode(&head) else {
            return Err(shared.nonsense("an unknown status"));
        };
        let Some(mut piece) = shared.take(tag) else {
            return Err(shared.nonsense("an answer to no query"));
        };
        let (offset, len) = (piece.offset, len as usize);
        if len > piece.destination.len() {
            let error = || shared.nonsense("more bytes than it was asked for");
            piece.end(Err(error().into()));
            return Err(error());
        }
        let refused = |retry| TcpError::Refused { address: shared.address.clone(), offset, retry };
        // Straight into the guest's memory, through a small buffer.
        if let Err(source) = piece.destination.read_exact_from(0, len, &mut stream) {
            let kind = source.kind();
            piece.end(Err(shared.lost(source).into()));
            return Err(shared.lost(kind.into()));
        }
        let outcome = match status {
            // Fewer bytes than asked for are a failure, however the server calls it.
            Status::Bytes => piece.destination.check_filled(),
            Status::Later => Err(refused(Retry::Later).into()),
            Status::Never => Err(refused(Retry::Never).into()),
        };
        piece.end(outcome);
        shared.check_oldest()?;
    }
}

impl PageSource for TcpSource {
    fn size(&self) -> u64 {
        self.shared.hello.size
    }

    /// Everything is data: the protocol tells nothing of holes.
    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        let size = self.size();
        if offset < size {
            return Ok(Extent::Data { end: size });
        }
        let image = self.shared.address.clone();
        Err(SourceError::OutOfRange { image, offset, len: 1, size })
    }

    /// Queues the request, and never waits.
    fn submit(&self, request: Request) -> Completion {
        let (completer, completion) = Completion::pair();
        let Request { priority, chunks } = request;
        let mut parts = Vec::new();
        for Chunk { mut offset, mut destination } in chunks {
            // The unit of huge pages may be 1 GiB, and arrive as one request.
            while destination.len() > MOST as usize {
                let rest = destination.split_off(MOST as usize);
                parts.push((offset, std::mem::replace(&mut destination, rest)));
                offset += u64::from(MOST);
            }
            parts.push((offset, destination));
        }
        let state = WholeState { completer: Some(completer), left: parts.len(), error: None };
        let whole = Arc::new(Whole { state: Mutex::new(state) });
        let piece = |(offset, destination)| {
            let whole = whole.clone();
            Piece { destination, offset, priority, whole }
        };
        let pieces: Vec<Piece> = parts.into_iter().map(piece).collect();
        let mut state = self.shared.lock();
        match priority {
            Priority::Demand => state.demand.extend(pieces),
            Priority::Fill => state.fill.extend(pieces),
        }
        drop(state);
        self.shared.changed.notify_all();
        completion
    }

    fn raise(&self, offset: u64, len: u64) {
        let touches = |piece: &Piece| {
            let end = piece.offset + piece.destination.len() as u64;
            piece.offset < offset.saturating_add(len) && offset < end
        };
        let mut state = self.shared.lock();
        if !state.fill.iter().any(touches) {
            return;
        }
        let fill = std::mem::take(&mut state.fill);
        for mut piece in fill {
            if touches(&piece) {
                piece.priority = Priority::Demand;
                state.demand.push_back(piece);
            } else {
                state.fill.push_back(piece);
            }
        }
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Drop for TcpSource {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        if let Some(stream) = &state.stream {
            // Ends a read or write that hangs.
            let _ = stream.shutdown(Shutdown::Both);
        }
        let queued = (std::mem::take(&mut state.demand), std::mem::take(&mut state.fill));
        drop(state);
        self.shared.changed.notify_all();
        // Outside the lock: it may run callbacks.
        drop(queued);
        let _ = join_within(self.thread.take().into_iter().collect(), END_WITHIN);
        drop(self.shared.take_all());
    }
}

impl fmt::Debug for TcpSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpSource")
            .field("address", &self.shared.address)
            .field("hello", &self.shared.hello)
            .finish_non_exhaustive()
    }
}
