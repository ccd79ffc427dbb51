// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One connection: a task that connects, sends, receives, and connects again when it breaks.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use demand_source::Priority;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::Notify;
use tokio::time::sleep;

use super::error::{NbdError, NbdErrorKind, lost};
use super::flight::Work;
use super::handshake::Mode;
use super::location::Location;
use super::options::NbdOptions;
use super::protocol::{Command, request};
use super::queue::{Closing, Shared};
use super::reply;
use super::stream::{self, Connected};

/// Bytes that are received at once.
const BUFFER: usize = 256 << 10;
/// Requests that are sent at once. Other connections take the next ones.
const BATCH: usize = 4;
/// Shortest pause before connecting again.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
/// Longest time to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// A connection's place in its source.
pub(crate) struct Connection {
    pub(crate) shared: Arc<Shared>,
    pub(crate) location: Location,
    pub(crate) options: Arc<NbdOptions>,
    pub(crate) priority: Priority,
    /// Index of the connection in its source.
    pub(crate) index: usize,
}

/// The end of a connection.
enum End {
    /// The source was dropped.
    Closed,
    Broken(NbdErrorKind),
}

impl Connection {
    /// Serves requests until the source is dropped, first on `connected` if it is given.
    pub(crate) async fn run(self, connected: Option<Connected>) {
        let mut closing = self.shared.closing();
        let mut first = connected;
        let mut pause = self.options.pause;
        // The failure was logged.
        let mut logged = false;
        loop {
            let connected = match first.take() {
                Some(connected) => Ok(connected),
                None => tokio::select! {
                    () = closing.wait() => return,
                    connected = self.connect() => connected,
                },
            };
            let kind = match connected {
                Ok(connected) => {
                    if logged {
                        log::info!("connected to {} again", self.shared.export);
                    }
                    logged = false;
                    let (end, useful) = self.serve(connected, &mut closing).await;
                    if useful {
                        pause = self.options.pause;
                    }
                    match end {
                        End::Closed => return,
                        End::Broken(kind) => kind,
                    }
                }
                Err(kind) => kind,
            };
            let error = Arc::new(NbdError::new(&self.shared.export, kind));
            if !logged {
                log::warn!("{error}; connecting again");
                logged = true;
            }
            self.fail_flight(&error);
            self.shared.unreachable(&error);
            if closing.is_closing() {
                return;
            }
            tokio::select! {
                () = closing.wait() => return,
                () = self.shared.recovery() => {}
                () = sleep(varied(pause)) => {}
            }
            pause = (pause * 2).min(self.options.longest_pause);
        }
    }

    async fn connect(&self) -> Result<Connected, NbdErrorKind> {
        let connected = stream::connect(&self.location, &self.options).await?;
        self.shared.geometry.check(&connected.export)?;
        Ok(connected)
    }

    fn fail_flight(&self, error: &Arc<NbdError>) {
        let flying = self.shared.flight(self.index).take();
        flying.into_iter().for_each(|work| work.fail(error));
    }

    /// Sends and receives until the connection ends. Returns whether any request was answered.
    async fn serve(&self, connected: Connected, closing: &mut Closing) -> (End, bool) {
        let Connected { stream, mode, .. } = connected;
        let (input, output) = tokio::io::split(stream);
        let input = BufReader::with_capacity(BUFFER, input);
        let (freed, useful) = (Notify::new(), AtomicBool::new(false));
        self.shared.up(self.priority);
        let end = tokio::select! {
            end = self.receive(input, mode, &freed, &useful) => end,
            end = self.send(output, mode, &freed) => end,
            end = self.watch() => end,
            () = async { closing.wait().await; sleep(GOODBYE).await } => End::Closed,
        };
        self.shared.down(self.priority);
        let end = if closing.is_closing() { End::Closed } else { end };
        (end, useful.into_inner())
    }

    async fn receive<R: AsyncRead + Unpin>(
        &self,
        mut input: BufReader<R>,
        mode: Mode,
        freed: &Notify,
        useful: &AtomicBool,
    ) -> End {
        let flight = &self.shared.flights[self.index];
        loop {
            let (sent, failure) = match reply::receive(&mut input, flight, mode).await {
                Ok(None) => continue,
                Ok(Some(finished)) => finished,
                Err(_) if self.shared.closing().is_closing() => {
                    // The requests were answered when the source was dropped. The server closes the
                    // connection after its last reply; some servers fail if it is cut before.
                    let _ = tokio::io::copy_buf(&mut input, &mut tokio::io::sink()).await;
                    return End::Closed;
                }
                Err(kind) => return End::Broken(kind),
            };
            if !useful.swap(true, Ordering::Relaxed) {
                self.shared.recovered();
            }
            freed.notify_one();
            self.finish(sent.work, failure);
        }
    }

    /// Reports the outcome of a request. No lock is held: the caller may ask for more.
    fn finish(&self, work: Work, failure: Option<NbdErrorKind>) {
        let failure = failure.map(|kind| Arc::new(NbdError::new(&self.shared.export, kind)));
        let next = match (work, failure) {
            (Work::Read(piece), None) => {
                piece.succeed();
                None
            }
            (Work::Status(query), None) => query.succeed(),
            // The server answers the goodbye.
            (work, Some(_)) if self.shared.closing().is_closing() => {
                drop(work);
                None
            }
            (Work::Status(query), Some(error)) if is_unsupported(&error) => query.unsupported(),
            (work, Some(error)) => {
                work.fail(&error);
                None
            }
        };
        self.shared.look_up(next);
    }

    async fn send<W: AsyncWrite + Unpin>(&self, mut output: W, mode: Mode, freed: &Notify) -> End {
        let mut closing = self.shared.closing();
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            let full = self.fill(&mut bytes, mode);
            if !bytes.is_empty() {
                self.shared.pass_on(self.priority);
                if let Err(error) = output.write_all(&bytes).await {
                    return End::Broken(lost(error));
                }
                if let Err(error) = output.flush().await {
                    return End::Broken(lost(error));
                }
                continue;
            }
            tokio::select! {
                () = freed.notified() => {}
                () = self.shared.woken(self.priority), if !full => {}
                () = closing.wait() => {
                    request(&mut bytes, Command::Disconnect, 0, &(0..0));
                    // The server may be gone already.
                    let _ = output.write_all(&bytes).await;
                    let _ = output.flush().await;
                    // The server closes the connection.
                    std::future::pending::<()>().await;
                }
            }
        }
    }

    /// Takes the next requests from the queue, and appends their messages. Returns whether the
    /// connection can take no more.
    fn fill(&self, bytes: &mut Vec<u8>, mode: Mode) -> bool {
        let most = match self.priority {
            Priority::Demand => self.options.demand_window,
            Priority::Fill => self.options.fill_window,
        };
        let most = most.clamp(1, 1024);
        // Fill on a connection for demand, while there is no other: it takes a part of the window.
        let most_fill = (most / 4).max(1);
        let mut taken = 0;
        while taken < BATCH {
            let room = {
                let flight = self.shared.flight(self.index);
                if flight.len() >= most {
                    return true;
                }
                self.priority == Priority::Fill || flight.fills() < most_fill
            };
            let Some(work) = self.shared.pop(self.priority, room) else { return false };
            if !work.is_wanted() {
                work.withdraw();
                continue;
            }
            let work = match work {
                Work::Status(query) if mode.allocation.is_none() => {
                    self.shared.look_up(query.unsupported());
                    continue;
                }
                work => work,
            };
            let (command, range) = (work.command(), work.range().clone());
            let cookie = self.shared.flight(self.index).add(work);
            request(bytes, command, cookie, &range);
            taken += 1;
        }
        false
    }

    /// Waits until the oldest request has been unanswered for too long.
    async fn watch(&self) -> End {
        let after = self.options.answer;
        let mut oldest: Option<(u64, Instant)> = None;
        loop {
            let now = Instant::now();
            oldest = match (self.shared.flight(self.index).oldest(), oldest) {
                (None, _) => None,
                (Some(cookie), Some((before, since))) if cookie == before => Some((before, since)),
                (Some(cookie), _) => Some((cookie, now)),
            };
            if oldest.is_some_and(|(_, since)| now - since >= after) {
                return End::Broken(NbdErrorKind::Silent { after });
            }
            sleep((after / 8).max(Duration::from_millis(5))).await;
        }
    }
}

/// Returns whether a server's error means that it has no extents, and will have none.
fn is_unsupported(error: &NbdError) -> bool {
    const EINVAL: u32 = 22;
    const ENOTSUP: u32 = 95;
    match error.kind() {
        NbdErrorKind::Failed { error, .. } => [EINVAL, ENOTSUP].contains(&error.0),
        _ => false,
    }
}

/// Returns between a half and the whole of a pause.
fn varied(pause: Duration) -> Duration {
    // The keys of each state are random.
    let random = RandomState::new().hash_one(());
    let pause = pause.max(SHORTEST_PAUSE);
    pause / 2 + pause.mul_f64((random % 1024) as f64 / 2048.0)
}
