// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Firecracker's page fault handlers as sources of pages.
//!
//! Such a handler expects a userfaultfd of the VMM's memory, and fills that memory itself
//! (`UFFDIO_COPY`). Here it gets a private mapping instead, in which threads of the source touch
//! the pages that are needed: the bytes pass through it, and no handler reaches the guest's memory.
//! The userfaultfd traps accesses of user-mode code only, and needs no privilege.
//!
//! The handler's protocol has neither sizes, errors nor ends. So the size is the caller's, an
//! answer may take any time, and only the end of the handler's process is noticed.

mod peer;
mod staging;

use std::fmt;
use std::io::{self, PipeWriter};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use demand_source::{
    Completion, Extent, OwnProcess, PageSource, Part, Request, SourceError, join_within,
};

use crate::error::{PagerError, PagerErrorKind};
use crate::options::PagerOptions;
use crate::queue::{Queue, all_data};
use peer::{Event, Peer};
use staging::{Ended, Staging};

/// Threads that touch pages: faults in flight. Background fill takes at most half of them.
const THREADS: usize = 32;
/// Bytes of a thread's stack: callbacks of requests run there.
const STACK: usize = 256 << 10;
/// Most bytes that a thread touches for one request.
const MOST: usize = 16 << 10;
/// Longest wait of a dropped source for its threads.
const END_WITHIN: Duration = Duration::from_secs(1);
/// Interval at which a thread that waits for a handler looks whether its bytes are wanted.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Interval of the log's lines while a handler is away.
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// The memory that a page fault handler of Firecracker's kind fills, as a source of pages.
///
/// The handler is sent the message that Firecracker sends: a region with the offset 0 and pages of
/// 4096 bytes. It may fill pages unasked. Their memory is kept until they are asked for, as
/// background fill does with all of them.
///
/// If the handler's process ends, faults wait, a line in the log says so, and the source connects
/// to its socket again: the next handler must serve the same content. A handler that ends its VMM
/// when it fails, as Firecracker's examples do, reaches a process of this source instead, which
/// counts as the end of the handler.
pub struct FirecrackerSource {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    process: OwnProcess,
    /// Its end wakes the thread that watches the handler.
    wake: Option<PipeWriter>,
}

struct Shared {
    socket: Box<Path>,
    /// The handler, as errors call it.
    name: String,
    /// Size of the image, in bytes.
    size: u64,
    options: PagerOptions,
    queue: Queue,
    present: Mutex<Present>,
    changed: Condvar,
}

/// The mapping that the present handler fills.
struct Present {
    /// `None` while there is no handler.
    staging: Option<Arc<Staging>>,
    closed: bool,
}

impl FirecrackerSource {
    /// Connects to a handler that listens at `socket`, for an image of `size` bytes, a multiple of
    /// 4096. Of the options, the pauses and the limit to connect are used.
    ///
    /// # Errors
    ///
    /// [`PagerError`], at the first failure: it is not repeated.
    pub fn open(
        socket: impl AsRef<Path>,
        size: u64,
        options: PagerOptions,
    ) -> Result<Self, PagerError> {
        let socket: Box<Path> = socket.as_ref().into();
        let name = format!("pager+firecracker:{}", socket.display());
        let failed = |kind| PagerError::new(&name, kind);
        let local = |source| failed(PagerErrorKind::Local { source });
        let staging = Arc::new(Staging::new(size).map_err(local)?);
        let peer = Peer::connect(&socket, &staging, options.connect).map_err(failed)?;
        let present = Mutex::new(Present { staging: Some(staging), closed: false });
        let (ended, wake) = io::pipe().map_err(local)?;
        let shared = Arc::new(Shared {
            socket,
            name: name.clone(),
            size,
            options,
            queue: Queue::new([THREADS, THREADS / 4, THREADS / 2]),
            present,
            changed: Condvar::new(),
        });
        let process = OwnProcess::current();
        let mut source =
            FirecrackerSource { shared, threads: Vec::new(), process, wake: Some(wake) };
        for _ in 0..THREADS {
            let shared = source.shared.clone();
            source.spawn("dp-touch", move || shared.touch_all()).map_err(local)?;
        }
        let shared = source.shared.clone();
        source.spawn("dp-handler", move || shared.watch(peer, ended)).map_err(local)?;
        Ok(source)
    }

    fn spawn(&mut self, name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let thread = thread::Builder::new().name(name.into()).stack_size(STACK);
        self.threads.push(thread.spawn(run)?);
        Ok(())
    }
}

impl Shared {
    fn present(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a handler, while a part is wanted.
    fn staging_for(&self, part: &Part) -> Result<Arc<Staging>, SourceError> {
        let mut present = self.present();
        loop {
            if present.closed {
                return Err(SourceError::Abandoned);
            }
            if !part.is_wanted() {
                return Err(SourceError::Withdrawn);
            }
            if let Some(staging) = &present.staging {
                return Ok(staging.clone());
            }
            let waited = self.changed.wait_timeout(present, LOOK_EVERY);
            present = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Serves faults until the source is closed.
    fn touch_all(&self) {
        while let Some(mut open) = self.queue.begin_next() {
            let outcome = loop {
                match self.staging_for(&open.part).map(|staging| staging.read(&mut open.part)) {
                    Ok(Ok(())) => break Ok(()),
                    // It is touched again in the next handler's mapping.
                    Ok(Err(Ended)) => {}
                    Err(error) => break Err(error),
                }
            };
            let part = self.queue.finish(open);
            match outcome {
                Ok(()) => part.succeed(),
                Err(error) => part.fail(error),
            }
        }
    }

    /// Watches the handler, and replaces it when it has ended, until the source is closed.
    fn watch(&self, first: Peer, ended: io::PipeReader) {
        let mut peer = first;
        loop {
            let event = peer.wait(&ended, || self.sweep());
            self.end_staging();
            drop(peer);
            let kind = match event {
                Event::Closed => return,
                Event::HandlerEnded(source) => PagerErrorKind::Lost { source },
            };
            match self.connect_again(kind, &ended) {
                Some(next) => peer = next,
                None => return,
            }
        }
    }

    /// Releases what the handler has filled for the second time.
    fn sweep(&self) {
        let staging = self.present().staging.clone();
        if let Some(staging) = staging {
            staging.sweep();
        }
    }

    /// Ends the present mapping: loads that wait return zeros, which are thrown away.
    fn end_staging(&self) {
        // Threads whose loads end wait for the next mapping from then on.
        let staging = self.present().staging.take();
        if let Some(staging) = staging {
            staging.end();
        }
    }

    /// Connects to the next handler. Returns `None` when the source is closed.
    fn connect_again(&self, mut kind: PagerErrorKind, ended: &io::PipeReader) -> Option<Peer> {
        let mut pause = self.options.pause;
        let mut report: Option<(Instant, usize)> = None;
        loop {
            let waits = self.queue.waits();
            let is_due = |(last, faults): (Instant, usize)| {
                last.elapsed() >= REPORT_EVERY || (faults == 0 && waits.faults > 0)
            };
            if report.is_none_or(is_due) {
                let error = PagerError::new(&self.name, kind);
                log::warn!("{error}; connecting again; {waits}");
                report = Some((Instant::now(), waits.faults));
            }
            if peer::is_closed_within(ended, pause) {
                return None;
            }
            pause = (pause * 2).min(self.options.longest_pause);
            kind = match self.connect() {
                Ok((peer, staging)) => {
                    log::info!("connected to {} again; {}", self.name, self.queue.waits());
                    let mut present = self.present();
                    if present.closed {
                        drop(present);
                        staging.end();
                        return None;
                    }
                    present.staging = Some(staging);
                    drop(present);
                    self.changed.notify_all();
                    return Some(peer);
                }
                Err(kind) => kind,
            };
        }
    }

    fn connect(&self) -> Result<(Peer, Arc<Staging>), PagerErrorKind> {
        let staging = Staging::new(self.size).map_err(|source| PagerErrorKind::Local { source })?;
        let staging = Arc::new(staging);
        Ok((Peer::connect(&self.socket, &staging, self.options.connect)?, staging))
    }
}

impl PageSource for FirecrackerSource {
    fn size(&self) -> u64 {
        self.shared.size
    }

    /// All is data: a handler says nothing of holes.
    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        all_data(offset, self.size(), &self.shared.name)
    }

    fn submit(&self, request: Request) -> Completion {
        self.shared.queue.submit(request, MOST, self.size(), &self.shared.name)
    }

    fn raise(&self, offset: u64, len: u64) {
        self.shared.queue.raise(offset, len);
    }
}

impl Drop for FirecrackerSource {
    fn drop(&mut self) {
        if !self.process.is_current() {
            // The handler is still the parent's.
            return;
        }
        self.shared.queue.close();
        self.shared.present().closed = true;
        self.shared.changed.notify_all();
        drop(self.wake.take());
        self.shared.end_staging();
        let _ = join_within(std::mem::take(&mut self.threads), END_WITHIN);
        drop(self.shared.queue.take_all());
    }
}

impl fmt::Debug for FirecrackerSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FirecrackerSource")
            .field("name", &self.shared.name)
            .field("size", &self.shared.size)
            .finish_non_exhaustive()
    }
}
