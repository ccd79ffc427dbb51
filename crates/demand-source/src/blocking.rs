// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An adaptor that turns a source that blocks into one that does not.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::{
    Completer, Completion, Destination, Extent, PageSource, Priority, Request, SourceError,
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

struct Job {
    request: Request,
    completer: Completer,
}

#[derive(Default)]
struct Queues {
    demand: VecDeque<Job>,
    fill: VecDeque<Job>,
    closed: bool,
}

impl Queues {
    fn next(&mut self) -> Option<Job> {
        self.demand.pop_front().or_else(|| self.fill.pop_front())
    }
}

struct Shared<S> {
    source: S,
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
/// As many requests are under way at once as there are threads; a demand request overtakes all
/// fill that has not begun. One thread takes no fill, so that fill under way never delays demand
/// (with a single thread it may, by one request).
///
/// Dropping it ends the threads: requests under way are finished, queued ones are reported as
/// [`SourceError::Abandoned`].
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
    threads: Vec<JoinHandle<()>>,
}

impl<S: BlockingSource + 'static> Threaded<S> {
    /// Starts `threads` threads (at least one) that serve `source`.
    ///
    /// # Errors
    ///
    /// The system's, if a thread cannot be started.
    pub fn new(source: S, threads: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            source,
            queues: Mutex::new(Queues::default()),
            changed: Condvar::new(),
        });
        let mut this = Threaded { shared, threads: Vec::new() };
        let threads = threads.max(1);
        for index in 0..threads {
            let shared = this.shared.clone();
            let demand_only = index == 0 && threads > 1;
            let thread = thread::Builder::new()
                .name(format!("source-{index}"))
                .spawn(move || serve(&shared, demand_only))?;
            this.threads.push(thread);
        }
        Ok(this)
    }
}

fn serve<S: BlockingSource>(shared: &Shared<S>, demand_only: bool) {
    loop {
        let mut queues = shared.queues();
        let Job { request, completer } = loop {
            let job = if demand_only { queues.demand.pop_front() } else { queues.next() };
            match job {
                Some(job) => break job,
                None if queues.closed => return,
                None => {
                    queues = shared.changed.wait(queues).unwrap_or_else(PoisonError::into_inner);
                }
            }
        };
        drop(queues);
        let mut outcome = Ok(());
        for mut chunk in request.chunks {
            outcome = outcome
                .and_then(|()| shared.source.read(chunk.offset, &mut chunk.destination))
                .and_then(|()| chunk.destination.check_filled());
        }
        completer.complete(outcome);
    }
}

impl<S: BlockingSource> PageSource for Threaded<S> {
    fn size(&self) -> u64 {
        self.shared.source.size()
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        self.shared.source.extent(offset)
    }

    fn submit(&self, request: Request) -> Completion {
        let (completer, completion) = Completion::pair();
        let mut queues = self.shared.queues();
        let queue = match request.priority {
            Priority::Demand => &mut queues.demand,
            Priority::Fill => &mut queues.fill,
        };
        queue.push_back(Job { request, completer });
        drop(queues);
        // All of them: the one that a single wake-up reaches may be the one that takes no fill.
        self.shared.changed.notify_all();
        completion
    }
}

impl<S> Drop for Threaded<S> {
    fn drop(&mut self) {
        let abandoned = {
            let mut queues = self.shared.queues();
            queues.closed = true;
            (std::mem::take(&mut queues.demand), std::mem::take(&mut queues.fill))
        };
        self.shared.changed.notify_all();
        // Their completers report it as they go, and may run the askers' code: not under the lock.
        drop(abandoned);
        let this_thread = thread::current().id();
        for handle in self.threads.drain(..) {
            // The last reference may go away in a completion, on one of these threads.
            if handle.thread().id() != this_thread {
                let _ = handle.join();
            }
        }
    }
}

impl<S> fmt::Debug for Threaded<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Threaded").field("threads", &self.threads.len()).finish_non_exhaustive()
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
