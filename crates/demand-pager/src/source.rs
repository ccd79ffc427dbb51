// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `PagerSource`, the source of pages behind a pager's socket.

use std::fmt;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use demand_source::{
    Completion, Extent, MissingPages, OwnProcess, PageSource, Request, SourceError, join_within,
};

use crate::connection::{Connected, Image, connect, send};
use crate::error::{PagerError, PagerErrorKind, lost, shared};
use crate::location::Location;
use crate::options::PagerOptions;
use crate::protocol::MOST;
use crate::queue::{Queue, all_data};
use crate::receive::Receiver;
use crate::watched::Watched;

/// Longest wait of a dropped source for its threads.
const END_WITHIN: Duration = Duration::from_secs(1);
/// A connection that lasts as long is followed by the shortest pause.
const LASTING: Duration = Duration::from_secs(1);
/// Interval of the log's lines while a pager is away.
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// An image of a pager, as a source of pages.
///
/// Faults of demand overtake those of background fill, of which only few are sent at a time. The
/// pager may answer in any order.
///
/// While the pager is away, faults wait, and a line in the log says so. The source connects again,
/// and sends all faults without an answer again; the image must then have the same size and
/// generation id as before. A pager that breaks the protocol fails the faults that wait.
///
/// The protocol has no holes: zeros are answers like others. An image with page hashes
/// ([`HashedSource`](demand_source::HashedSource)) knows its holes, and checks each page.
///
/// Dropping it answers the faults that are left with [`SourceError::Abandoned`], and waits for its
/// threads for a second at most.
pub struct PagerSource {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    process: OwnProcess,
}

/// The part of a source that its threads use.
struct Shared {
    location: Location,
    /// The location, as errors call it.
    name: String,
    image: Image,
    options: PagerOptions,
    queue: Queue,
    watched: Watched,
}

impl PagerSource {
    /// Connects to a pager, and opens an image. Waits for it at most as long as the options say.
    ///
    /// # Errors
    ///
    /// [`PagerError`], at the first failure: it is not repeated.
    pub fn open(location: &Location, options: PagerOptions) -> Result<Self, PagerError> {
        let name = location.to_string();
        let failed = |kind| PagerError::new(&name, kind);
        let first = connect(location, options.connect).map_err(failed)?;
        let (image, queue) = (first.image, Queue::new(options.windows()));
        let location = location.clone();
        let shared = Arc::new(Shared {
            location,
            name: name.clone(),
            image,
            options,
            queue,
            watched: Watched::default(),
        });
        let running = shared.clone();
        let thread = thread::Builder::new()
            .name("dp-pager".into())
            .spawn(move || running.run(first))
            .map_err(|source| failed(PagerErrorKind::Connect { source }))?;
        Ok(PagerSource { shared, thread: Some(thread), process: OwnProcess::current() })
    }

    /// Returns the id of the image's content, which the pager chose.
    pub fn generation(&self) -> [u8; 16] {
        self.shared.image.generation
    }
}

impl Shared {
    /// Keeps a connection until the source is closed.
    fn run(&self, first: Connected) {
        let mut next = Some(first);
        let mut pause = self.options.pause;
        // The time of the log's last line about a pager that is away, and the faults in it.
        let mut report: Option<(Instant, usize)> = None;
        loop {
            let connected = next.take().map_or_else(|| self.connect(), Ok);
            let begun = Instant::now();
            let (kind, answers) = match connected {
                Ok(connected) => {
                    if report.is_some() {
                        log::info!("connected to {} again; {}", self.name, self.queue.waits());
                    }
                    self.serve(connected)
                }
                Err(kind) => (Some(kind), 0),
            };
            let Some(kind) = kind.filter(|_| self.queue.is_open()) else { return };
            if answers > 0 {
                report = None;
            }
            if begun.elapsed() >= LASTING {
                pause = self.options.pause;
            }
            let (absent, error) = (kind.is_absence(), Arc::new(PagerError::new(&self.name, kind)));
            for part in self.queue.take_unwanted() {
                part.fail(SourceError::Withdrawn);
            }
            let waits = self.queue.waits();
            let is_due = |(last, faults): (Instant, usize)| {
                last.elapsed() >= REPORT_EVERY || (faults == 0 && waits.faults > 0)
            };
            if report.is_none_or(is_due) {
                log::warn!("{error}; connecting again; {waits}");
                report = Some((Instant::now(), waits.faults));
            }
            if !absent {
                for part in self.queue.take_all() {
                    part.fail(shared(&error));
                }
            }
            if !self.queue.pause(pause) {
                return;
            }
            pause = (pause * 2).min(self.options.longest_pause);
        }
    }

    fn connect(&self) -> Result<Connected, PagerErrorKind> {
        let connected = connect(&self.location, self.options.connect)?;
        self.image.check(&connected.image)?;
        Ok(connected)
    }

    /// Sends and receives until the connection is over. Returns the reason, unless the source is
    /// closed, and the number of answers.
    fn serve(&self, connected: Connected) -> (Option<PagerErrorKind>, u64) {
        let Connected { stream, staging, watches, .. } = connected;
        let copies = stream.try_clone().and_then(|copy| Ok((copy, stream.try_clone()?)));
        let (receiving, kept) = match copies {
            Ok(copies) => copies,
            Err(error) => return (Some(lost(error)), 0),
        };
        let open = self.queue.begin(kept);
        let mut receiver = Receiver { queue: &self.queue, pager: &self.name, staging, answers: 0 };
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("dp-pager-answers".into());
            let spawned = thread.spawn_scoped(scope, || {
                let kind = receiver.run(receiving);
                self.queue.end(kind);
            });
            if let Err(error) = spawned {
                self.queue.end(lost(error));
            }
            self.watched.begin(watches, &self.queue);
            while open && let Some(batch) = self.queue.next() {
                if let Err(error) = send(&stream, &batch.bytes, batch.file.as_deref()) {
                    self.queue.end(lost(error));
                }
            }
            self.watched.end();
            // Ends the receiver, too.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        });
        (self.queue.ended(), receiver.answers)
    }
}

impl PageSource for PagerSource {
    fn size(&self) -> u64 {
        self.shared.image.size
    }

    /// All is data: the protocol says nothing of holes.
    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        all_data(offset, self.size(), &self.shared.name)
    }

    fn submit(&self, request: Request) -> Completion {
        self.shared.queue.submit(request, MOST, self.size(), &self.shared.name)
    }

    fn raise(&self, offset: u64, len: u64) {
        self.shared.queue.raise(offset, len);
    }

    fn share_missing(&self, missing: &MissingPages) {
        self.shared.watched.add(missing, &self.shared.queue);
    }
}

impl Drop for PagerSource {
    fn drop(&mut self) {
        if !self.process.is_current() {
            // The connection is still the parent's.
            return;
        }
        self.shared.queue.close();
        let _ = join_within(self.thread.take().into_iter().collect(), END_WITHIN);
        drop(self.shared.queue.take_all());
    }
}

impl fmt::Debug for PagerSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagerSource")
            .field("name", &self.shared.name)
            .field("image", &self.shared.image)
            .finish_non_exhaustive()
    }
}
