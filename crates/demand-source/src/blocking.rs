// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An adaptor that turns a source that blocks into one that does not.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::{
    Completer, Completion, Destination, Extent, PageSource, Priority, Request, SourceError,
    join_within,
};

/// A source that can only be asked and waited for.
pub trait BlockingSource: Send + Sync {
    /// The image's size, in bytes.
    fn size(&self) -> u64;

    /// What the image holds at `offset` (bytes), and how far that goes. Must not block: it is
    /// called by threads that serve faults. A source that does not know says "data".
    ///
    /// # Errors
    ///
    /// Those of the source.
    fn extent(&self, offset: u64) -> Result<Extent, SourceError>;

    /// Fills the destination with the bytes at `offset` (bytes) of the image: all of it, zeros
    /// included. Success with less is [`SourceError::Short`] to the caller.
    ///
    /// # Errors
    ///
    /// Those of the source. Nothing may be assumed of the destination's bytes after one.
    fn read(&self, offset: u64, destination: &mut Destination<'_>) -> Result<(), SourceError>;
}

/// Threads end when nothing was asked of them for this long.
const IDLE: Duration = Duration::from_secs(1);

/// How long the end of a source waits for reads under way.
const END_WITHIN: Duration = Duration::from_secs(1);

struct Job {
    request: Request,
    completer: Completer,
}

#[derive(Default)]
struct Queues {
    demand: VecDeque<Job>,
    fill: VecDeque<Job>,
    /// Threads that were started; those that have ended are taken out as others are started.
    threads: Vec<JoinHandle<()>>,
    /// Number that names the next thread.
    next: usize,
    /// Threads that have not ended.
    running: usize,
    /// Threads that wait for a request.
    idle: usize,
    /// Threads that serve fill.
    filling: usize,
    closed: bool,
}

impl Queues {
    /// Takes the request that is served next, unless it is fill and too many threads serve fill.
    fn next(&mut self, most_fill: usize) -> Option<(Job, Priority)> {
        if let Some(job) = self.demand.pop_front() {
            return Some((job, Priority::Demand));
        }
        if self.filling >= most_fill {
            return None;
        }
        let job = self.fill.pop_front()?;
        self.filling += 1;
        Some((job, Priority::Fill))
    }

    /// Requests that could be served now.
    fn ready(&self, most_fill: usize) -> usize {
        self.demand.len() + self.fill.len().min(most_fill.saturating_sub(self.filling))
    }
}

struct Shared<S> {
    source: S,
    /// Threads at most.
    most: usize,
    /// Threads that serve fill, at most.
    most_fill: usize,
    /// Called with where a request ended in the image, once it has been answered.
    afterwards: fn(&S, u64),
    queues: Mutex<Queues>,
    changed: Condvar,
}

impl<S> Shared<S> {
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs a [`BlockingSource`] on threads of its own.
///
/// As many requests are under way at once as there may be threads; a demand request overtakes all
/// fill that has not begun. Half of the threads take no fill, so that fill under way, even if it
/// hangs, never delays demand (with a single thread it may, by one request). Threads exist only
/// while there is something to read. A source that panics has failed to read, like others.
///
/// Dropping it ends the threads: queued requests are reported as [`SourceError::Abandoned`],
/// requests under way are waited for, but for no more than a second. A thread that hangs in a read
/// for longer ends when the read does, or with the process; it keeps the source.
///
/// # Examples
///
/// ```
/// use demand_source::{BlockingSource, Destination, Extent, PageSource, SourceError, Threaded};
///
/// struct Slow;
/// impl BlockingSource for Slow {
///     fn size(&self) -> u64 {
///         1 << 30
///     }
///     fn extent(&self, _: u64) -> Result<Extent, SourceError> {
///         Ok(Extent::Data { end: 1 << 30 })
///     }
///     fn read(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
///         std::thread::sleep(std::time::Duration::from_millis(1));
///         for at in (0..to.len()).step_by(8) {
///             to.write_at(at, &(offset + at as u64).to_le_bytes());
///         }
///         Ok(())
///     }
/// }
///
/// let source = Threaded::new(Slow, 4).unwrap();
/// let mut page = [0u8; 4096];
/// source.read_through(8192, &mut Destination::from(&mut page[..])).unwrap();
/// assert_eq!(page[..8], 8192u64.to_le_bytes());
/// ```
pub struct Threaded<S> {
    shared: Arc<Shared<S>>,
}

impl<S: BlockingSource + 'static> Threaded<S> {
    /// Serves `source` with at most `threads` threads (at least one).
    ///
    /// # Errors
    ///
    /// The system's, if a thread cannot be started.
    pub fn new(source: S, threads: usize) -> io::Result<Self> {
        let this = Self::lazy(source, threads, |_, _| {});
        start(&this.shared, &mut this.shared.queues())?;
        Ok(this)
    }

    /// As [`new`](Self::new); the first thread is started when it is needed. After each request that
    /// was served and answered, its thread calls `afterwards` with the end of the last chunk.
    pub(crate) fn lazy(source: S, threads: usize, afterwards: fn(&S, u64)) -> Self {
        let most = threads.max(1);
        let shared = Arc::new(Shared {
            source,
            most,
            most_fill: most.div_ceil(2),
            afterwards,
            queues: Mutex::default(),
            changed: Condvar::new(),
        });
        Threaded { shared }
    }

    /// The source, for calls that do not block.
    pub(crate) fn source(&self) -> &S {
        &self.shared.source
    }

    pub(crate) fn queue(&self, request: Request) -> Completion {
        let (completer, completion) = Completion::pair();
        let mut queues = self.shared.queues();
        let queue = match request.priority {
            Priority::Demand => &mut queues.demand,
            Priority::Fill => &mut queues.fill,
        };
        queue.push_back(Job { request, completer });
        let mut failed = Vec::new();
        if queues.ready(self.shared.most_fill) > queues.idle
            && queues.running < self.shared.most
            && let Err(error) = start(&self.shared, &mut queues)
            && queues.running == 0
        {
            log::warn!("cannot start a thread that reads pages: {error}; reads are tried again");
            failed.extend(queues.demand.drain(..));
            failed.extend(queues.fill.drain(..));
        }
        drop(queues);
        for job in failed {
            job.completer.complete(Err(SourceError::Abandoned));
        }
        self.shared.changed.notify_one();
        completion
    }
}

fn start<S: BlockingSource + 'static>(
    shared: &Arc<Shared<S>>,
    queues: &mut Queues,
) -> io::Result<()> {
    queues.threads.retain(|thread| !thread.is_finished());
    let name = format!("source-{}", queues.next);
    let thread = {
        let shared = shared.clone();
        thread::Builder::new().name(name).spawn(move || serve(&shared))?
    };
    queues.threads.push(thread);
    queues.next += 1;
    queues.running += 1;
    Ok(())
}

fn serve<S: BlockingSource>(shared: &Shared<S>) {
    let mut queues = shared.queues();
    loop {
        let Some((job, priority)) = queues.next(shared.most_fill) else {
            if queues.closed {
                break;
            }
            queues.idle += 1;
            let (back, wait) =
                shared.changed.wait_timeout(queues, IDLE).unwrap_or_else(PoisonError::into_inner);
            queues = back;
            queues.idle -= 1;
            if wait.timed_out() && queues.ready(shared.most_fill) == 0 {
                break;
            }
            continue;
        };
        drop(queues);
        answer(shared, job);
        queues = shared.queues();
        if priority == Priority::Fill {
            queues.filling -= 1;
        }
    }
    queues.running -= 1;
}

/// Serves one request. Neither the source nor the caller's code ends the thread by a panic.
fn answer<S: BlockingSource>(shared: &Shared<S>, Job { request, completer }: Job) {
    let source = &shared.source;
    let last = request.chunks.last();
    let end = last.map(|chunk| chunk.offset.saturating_add(chunk.destination.len() as u64));
    let read = move || {
        request.chunks.into_iter().try_for_each(|mut chunk| {
            source.read(chunk.offset, &mut chunk.destination)?;
            chunk.destination.check_filled()
        })
    };
    let outcome = panic::catch_unwind(AssertUnwindSafe(read));
    let outcome = outcome.unwrap_or(Err(SourceError::Panicked));
    let served = end.filter(|_| outcome.is_ok());
    // What panics here has been reported by the panic itself.
    let _ = panic::catch_unwind(AssertUnwindSafe(|| completer.complete(outcome)));
    if let Some(end) = served {
        let afterwards = || (shared.afterwards)(source, end);
        let _ = panic::catch_unwind(AssertUnwindSafe(afterwards));
    }
}

impl<S: BlockingSource + 'static> PageSource for Threaded<S> {
    fn size(&self) -> u64 {
        self.shared.source.size()
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        self.shared.source.extent(offset)
    }

    fn submit(&self, request: Request) -> Completion {
        self.queue(request)
    }
}

impl<S> Drop for Threaded<S> {
    fn drop(&mut self) {
        let (threads, abandoned) = {
            let mut queues = self.shared.queues();
            queues.closed = true;
            let abandoned = (std::mem::take(&mut queues.demand), std::mem::take(&mut queues.fill));
            (std::mem::take(&mut queues.threads), abandoned)
        };
        self.shared.changed.notify_all();
        // Their completers report it as they go, and may run the askers' code: not under the lock.
        drop(abandoned);
        // The last reference may go away in a completion, on one of these threads.
        let hanging = join_within(threads, END_WITHIN);
        if hanging > 0 {
            log::warn!(
                "cannot end {hanging} threads that read pages: the storage does not answer; they \
                 are left until it does, or the process ends"
            );
        }
    }
}

impl<S> fmt::Debug for Threaded<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Threaded").field("threads", &self.shared.most).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Chunk;
    use std::sync::mpsc;

    /// Reports each read as it begins, and ends it when told to.
    struct Gate {
        begun: Mutex<mpsc::Sender<u64>>,
        go_on: Mutex<mpsc::Receiver<()>>,
    }

    impl BlockingSource for Gate {
        fn size(&self) -> u64 {
            1 << 20
        }
        fn extent(&self, _: u64) -> Result<Extent, SourceError> {
            Ok(Extent::Data { end: 1 << 20 })
        }
        fn read(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
            to.write_at(0, &vec![0; to.len()]);
            self.begun.lock().unwrap().send(offset).unwrap();
            self.go_on.lock().unwrap().recv().map_err(|_| SourceError::Abandoned)
        }
    }

    fn gate() -> (Gate, mpsc::Receiver<u64>, mpsc::Sender<()>) {
        let (begun, begins) = mpsc::channel();
        let (go, go_on) = mpsc::channel();
        (Gate { begun: Mutex::new(begun), go_on: Mutex::new(go_on) }, begins, go)
    }

    fn request(offset: u64, priority: Priority) -> Request {
        let (destination, _) = Destination::owned(vec![0; 4096]);
        Request { priority, chunks: vec![Chunk { offset, destination }] }
    }

    #[test]
    fn demand_overtakes_queued_fill() {
        let (gate, begins, go) = gate();
        let source = Threaded::new(gate, 1).unwrap();
        let first = source.submit(request(1, Priority::Fill));
        assert_eq!(begins.recv().unwrap(), 1);
        let fill = source.submit(request(2, Priority::Fill));
        let demand = source.submit(request(3, Priority::Demand));
        go.send(()).unwrap();
        assert_eq!(begins.recv().unwrap(), 3);
        go.send(()).unwrap();
        assert_eq!(begins.recv().unwrap(), 2);
        go.send(()).unwrap();
        for completion in [first, fill, demand] {
            completion.wait().unwrap();
        }
    }

    #[test]
    fn fill_under_way_does_not_hold_up_demand() {
        let (gate, begins, go) = gate();
        let source = Threaded::new(gate, 2).unwrap();
        let fill: Vec<_> = (1..4).map(|i| source.submit(request(i, Priority::Fill))).collect();
        assert_eq!(begins.recv().unwrap(), 1);
        let demand = source.submit(request(9, Priority::Demand));
        // Nothing was told to go on, and yet demand begins.
        assert_eq!(begins.recv().unwrap(), 9);
        for _ in 0..4 {
            go.send(()).unwrap();
        }
        demand.wait().unwrap();
        for completion in fill {
            completion.wait().unwrap();
        }
    }

    #[test]
    fn queued_requests_are_reported_when_the_source_ends() {
        let (gate, begins, go) = gate();
        let source = Threaded::new(gate, 1).unwrap();
        let first = source.submit(request(1, Priority::Demand));
        let second = source.submit(request(2, Priority::Demand));
        assert_eq!(begins.recv().unwrap(), 1);
        let ender = thread::spawn(move || drop(source));
        assert!(matches!(second.wait(), Err(SourceError::Abandoned)));
        go.send(()).unwrap();
        first.wait().unwrap();
        ender.join().unwrap();
    }

    /// Writes half of what it is asked for, and says that this was all.
    struct Half;

    impl BlockingSource for Half {
        fn size(&self) -> u64 {
            1 << 20
        }
        fn extent(&self, _: u64) -> Result<Extent, SourceError> {
            Ok(Extent::Data { end: 1 << 20 })
        }
        fn read(&self, _: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
            to.write_at(0, &vec![7; to.len() / 2]);
            Ok(())
        }
    }

    #[test]
    fn success_with_half_of_the_bytes_is_short() {
        let source = Threaded::new(Half, 1).unwrap();
        let error = source.submit(request(0, Priority::Demand)).wait().unwrap_err();
        assert!(matches!(error, SourceError::Short { wrote: 2048, len: 4096 }), "{error}");
        let mut page = [0; 4096];
        let error = source.read_through(0, &mut Destination::from(&mut page[..])).unwrap_err();
        assert!(matches!(error, SourceError::Short { wrote: 2048, len: 4096 }), "{error}");
    }
}
