// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `Threaded`, which turns a blocking source into a `PageSource` by running it on threads.

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

/// A source whose reads block the calling thread.
pub trait BlockingSource: Send + Sync {
    /// Returns the image's size, in bytes.
    fn size(&self) -> u64;

    /// Returns the extent at `offset` (bytes) of the image. It must not block: unlike
    /// [`read`](Self::read), [`Threaded`] calls it on the calling thread, which may serve faults. A
    /// source that does not know its holes returns data.
    ///
    /// # Errors
    ///
    /// The source's errors.
    fn extent(&self, offset: u64) -> Result<Extent, SourceError>;

    /// Fills the whole destination with the bytes at `offset` (bytes) of the image, zeros included.
    /// If it reports success after writing less, the caller gets [`SourceError::Short`].
    ///
    /// # Errors
    ///
    /// The source's errors. After an error the content of the destination is unspecified.
    fn read(&self, offset: u64, destination: &mut Destination<'_>) -> Result<(), SourceError>;
}

/// Time without a request after which a thread ends.
const IDLE: Duration = Duration::from_secs(1);

/// Time that dropping a source waits for reads in progress.
const END_WITHIN: Duration = Duration::from_secs(1);

struct Job {
    request: Request,
    completer: Completer,
}

impl Job {
    /// Returns whether the request touches these bytes.
    fn touches(&self, offset: u64, len: u64) -> bool {
        self.request.chunks.iter().any(|chunk| {
            let end = chunk.offset.saturating_add(chunk.destination.len() as u64);
            chunk.offset < offset.saturating_add(len) && offset < end
        })
    }
}

#[derive(Default)]
struct Queues {
    demand: VecDeque<Job>,
    fill: VecDeque<Job>,
    /// Threads that were started. Those that have ended are removed when another is started.
    threads: Vec<JoinHandle<()>>,
    /// Number in the name of the next thread.
    next: usize,
    /// Number of threads that have not ended.
    running: usize,
    /// Number of threads that wait for a request.
    idle: usize,
    /// Number of threads that serve fill.
    filling: usize,
    closed: bool,
}

impl Queues {
    /// Removes and returns the next request to serve. Returns no fill request if too many threads
    /// already serve fill.
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

    /// Returns the number of requests that could be served now.
    fn ready(&self, most_fill: usize) -> usize {
        self.demand.len() + self.fill.len().min(most_fill.saturating_sub(self.filling))
    }
}

struct Shared<S> {
    source: S,
    /// Maximum number of threads.
    most: usize,
    /// Maximum number of threads that serve fill at the same time.
    most_fill: usize,
    /// Called with the offset at which a request ended, after the request was answered.
    afterwards: fn(&S, u64),
    queues: Mutex<Queues>,
    changed: Condvar,
}

impl<S> Shared<S> {
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs a [`BlockingSource`] on a pool of threads.
///
/// Each thread serves one request at a time. A demand request overtakes all fill requests that have
/// not begun, and a queued fill request becomes one once a thread waits for its bytes
/// ([`PageSource::raise`]). Half of the threads serve no fill, so fill in progress never delays a
/// demand request, even if it hangs. (With a single thread, one fill request in progress may delay
/// it.) Threads exist only while there are requests. A panic of the source counts as a failed read
/// ([`SourceError::Panicked`]), and its thread serves the next request.
///
/// A queued request whose [`Completion`] is dropped, or whose destinations are not
/// [wanted](Destination::is_wanted) any more, is not read. It ends as
/// [`SourceError::Withdrawn`].
///
/// Dropping it ends the threads. Queued requests are reported as [`SourceError::Abandoned`];
/// requests in progress are waited for, for at most a second. A thread that hangs in a read for
/// longer ends when the read returns, or with the process, and keeps the source alive until then.
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
    /// Serves `source` with at most `threads` threads; 0 counts as 1.
    ///
    /// # Errors
    ///
    /// The system's error if a thread cannot be started.
    pub fn new(source: S, threads: usize) -> io::Result<Self> {
        let this = Self::lazy(source, threads, |_, _| {});
        start(&this.shared, &mut this.shared.queues())?;
        Ok(this)
    }

    /// Like [`new`](Self::new), but starts the first thread only when it is needed. After each
    /// request that was read and answered, its thread calls `afterwards` with the end of the last
    /// chunk.
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

    /// Returns the source, for calls that do not block.
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
        let all_are_busy = queues.ready(self.shared.most_fill) > queues.idle;
        if all_are_busy
            && queues.running < self.shared.most
            && let Err(error) = start(&self.shared, &mut queues)
            && queues.running == 0
        {
            log::warn!("cannot spawn a thread that reads pages: {error}; the reads fail");
            failed.extend(queues.demand.drain(..));
            failed.extend(queues.fill.drain(..));
        }
        drop(queues);
        for job in failed {
            job.completer.complete(Err(SourceError::Abandoned));
        }
        // One thread for one request. A busy one looks into the queues when it is done.
        if !all_are_busy {
            self.shared.changed.notify_one();
        }
        completion
    }

    /// Moves the queued fill requests that touch these bytes behind the demand requests. They move
    /// as a whole: a request owns the destinations of all its pages.
    pub(crate) fn raise_queued(&self, offset: u64, len: u64) {
        let mut queues = self.shared.queues();
        if !queues.fill.iter().any(|job| job.touches(offset, len)) {
            return;
        }
        let fill = std::mem::take(&mut queues.fill);
        for mut job in fill {
            if !job.touches(offset, len) {
                queues.fill.push_back(job);
                continue;
            }
            job.request.priority = Priority::Demand;
            queues.demand.push_back(job);
            if queues.ready(self.shared.most_fill) <= queues.idle {
                self.shared.changed.notify_one();
            } else if queues.running < self.shared.most {
                // Threads run, because fill was queued. If none can be added, they serve it next.
                let _ = start(&self.shared, &mut queues);
            }
        }
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

/// Returns whether the outcome is awaited and any of the destinations still wanted.
fn is_wanted(request: &Request, completer: &Completer) -> bool {
    let chunks = &request.chunks;
    completer.is_awaited()
        && (chunks.is_empty() || chunks.iter().any(|chunk| chunk.destination.is_wanted()))
}

/// Serves one request. A panic in the source or in the caller's callback does not end the thread.
fn answer<S: BlockingSource>(shared: &Shared<S>, Job { request, completer }: Job) {
    let source = &shared.source;
    if !is_wanted(&request, &completer) {
        // Destinations go back before the outcome takes effect.
        drop(request);
        let _ = panic::catch_unwind(AssertUnwindSafe(|| {
            completer.complete(Err(SourceError::Withdrawn));
        }));
        return;
    }
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
    // The panic hook has already reported a panic of the callback.
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

    fn raise(&self, offset: u64, len: u64) {
        self.raise_queued(offset, len);
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
        // Dropping the completers reports `Abandoned` and may run the callers' callbacks, so it
        // happens outside the lock.
        drop(abandoned);
        // `join_within` skips the calling thread: a completion may drop the last reference on one
        // of these threads.
        let hanging = join_within(threads, END_WITHIN);
        if hanging > 0 {
            log::warn!(
                "cannot end {hanging} threads that read pages: the storage does not answer; they \
                 remain until it does, or until the process ends"
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
    use crate::{Chunk, ZeroPadded};
    use std::sync::mpsc;

    /// A source that reports when a read begins, and ends the read on request.
    struct Gate {
        begun: Mutex<mpsc::Sender<u64>>,
        may_continue: Mutex<mpsc::Receiver<()>>,
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
            self.may_continue.lock().unwrap().recv().map_err(|_| SourceError::Abandoned)
        }
    }

    fn gate() -> (Gate, mpsc::Receiver<u64>, mpsc::Sender<()>) {
        let (begun, begins) = mpsc::channel();
        let (go, may_continue) = mpsc::channel();
        (Gate { begun: Mutex::new(begun), may_continue: Mutex::new(may_continue) }, begins, go)
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
    fn raised_fill_overtakes_queued_fill() {
        let (gate, begins, go) = gate();
        let source = ZeroPadded::new(Arc::new(Threaded::new(gate, 1).unwrap()), 2 << 20);
        let at = |page: u64| source.submit(request(page * 4096, Priority::Fill));
        let fill: Vec<_> = (0..5).map(at).collect();
        assert_eq!(begins.recv().unwrap(), 0);
        // The last byte of one request and the first of the next; then none.
        source.raise(4 * 4096 - 1, 2);
        source.raise(5 * 4096, 4096);
        for page in [3, 4, 1, 2] {
            go.send(()).unwrap();
            assert_eq!(begins.recv().unwrap(), page * 4096);
        }
        go.send(()).unwrap();
        for completion in fill {
            completion.wait().unwrap();
        }
    }

    #[test]
    fn raised_fill_gets_a_thread() {
        let (gate, begins, go) = gate();
        let source = Threaded::new(gate, 2).unwrap();
        let fill: Vec<_> =
            (0..3).map(|i| source.submit(request(i << 12, Priority::Fill))).collect();
        assert_eq!(begins.recv().unwrap(), 0);
        source.raise(2 << 12, 1);
        // No read has been allowed to end.
        assert_eq!(begins.recv_timeout(20 * END_WITHIN).expect("it begins"), 2 << 12);
        (0..3).for_each(|_| go.send(()).unwrap());
        for completion in fill {
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
        // No read has been allowed to end, but the demand read begins.
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

    #[test]
    fn end_waits_for_no_hanging_read() {
        let (gate, begins, go) = gate();
        let source = Threaded::new(gate, 1).unwrap();
        let hanging = source.submit(request(1, Priority::Demand));
        assert_eq!(begins.recv().unwrap(), 1);
        let (tell, ended) = mpsc::channel();
        thread::spawn(move || {
            drop(source);
            tell.send(())
        });
        ended.recv_timeout(20 * END_WITHIN).expect("the source ends");
        go.send(()).unwrap();
        hanging.wait().unwrap();
    }

    #[test]
    fn withdrawn_requests_are_not_read() {
        struct Stopped;
        impl crate::Lender for Stopped {
            fn take_back(&self, wrote: usize) {
                assert_eq!(wrote, 0);
            }
            fn is_wanted(&self) -> bool {
                false
            }
        }
        let (gate, begins, go) = gate();
        let source = Threaded::new(gate, 1).unwrap();
        let first = source.submit(request(1, Priority::Demand));
        assert_eq!(begins.recv().unwrap(), 1);
        drop(source.submit(request(2, Priority::Demand)));
        let mut stopped = request(3, Priority::Demand);
        let mut bytes = vec![0; 4096];
        let address = std::ptr::NonNull::from(&mut bytes[..]).cast();
        // SAFETY: `bytes` outlives the request, whose outcome is awaited below.
        let loan = unsafe { Destination::new(address, 4096, Some(Arc::new(Stopped))) };
        stopped.chunks[0].destination = loan;
        let stopped = source.submit(stopped);
        let last = source.submit(request(4, Priority::Demand));
        (0..4).for_each(|_| go.send(()).unwrap());
        first.wait().unwrap();
        assert!(matches!(stopped.wait(), Err(SourceError::Withdrawn)));
        assert_eq!(begins.recv().unwrap(), 4, "the two between are not read");
        last.wait().unwrap();
        drop(bytes);
    }

    #[test]
    fn panic_of_read_ends_no_thread() {
        struct Odd(Mutex<Vec<thread::ThreadId>>);
        impl BlockingSource for Odd {
            fn size(&self) -> u64 {
                1 << 20
            }
            fn extent(&self, _: u64) -> Result<Extent, SourceError> {
                Ok(Extent::Data { end: 1 << 20 })
            }
            fn read(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
                self.0.lock().unwrap().push(thread::current().id());
                assert!(offset != 1, "on purpose");
                to.write_at(0, &[7; 4096]);
                Ok(())
            }
        }
        let source = Threaded::new(Odd(Mutex::default()), 1).unwrap();
        let panicked = source.submit(request(1, Priority::Demand)).wait();
        assert!(matches!(panicked, Err(SourceError::Panicked)));
        source.submit(request(3, Priority::Fill)).wait().unwrap();
        let threads = source.source().0.lock().unwrap();
        assert!(threads.len() == 2 && threads.iter().all(|id| *id == threads[0]), "{threads:?}");
    }

    /// A source that writes half of the requested bytes and reports success.
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
