// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The threads that execute the requests of one queue, so that none waits for another.
//!
//! It uses threads instead of io_uring, because a request must be able to wait for a missing page.
//! Within io_uring the kernel would wait on the request's behalf, in the middle of the file system
//! with the file's lock held; touching the page beforehand needs a thread that may wait. So
//! io_uring would save no thread.

use std::collections::VecDeque;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

type Job = Box<dyn FnOnce() + Send>;

/// A bounded number of threads, started on demand.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    name: String,
    limit: usize,
}

struct Shared {
    state: Mutex<State>,
    /// Signalled when a job is queued or the pool is closed.
    work: Condvar,
    /// Signalled when a place becomes free or the pool is closed.
    freed: Condvar,
}

struct State {
    jobs: VecDeque<Job>,
    /// Places taken, by jobs that are queued or run and by callers about to submit one.
    taken: usize,
    threads: usize,
    idle: usize,
    closed: bool,
}

/// The right to run one job; dropping it frees the place.
pub(crate) struct Place(Arc<Shared>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.lock().taken -= 1;
        self.0.freed.notify_all();
    }
}

impl Pool {
    /// Creates a pool that runs at most `limit` jobs at once, in threads with this name.
    pub(crate) fn new(name: String, limit: usize) -> Self {
        let state = State { jobs: VecDeque::new(), taken: 0, threads: 0, idle: 0, closed: false };
        let shared =
            Shared { state: Mutex::new(state), work: Condvar::new(), freed: Condvar::new() };
        Pool { shared: Arc::new(shared), name, limit: limit.max(1) }
    }

    /// Waits for a place. Returns `None` once the pool is closed.
    pub(crate) fn reserve(&self) -> Option<Place> {
        let mut state = self.shared.lock();
        while state.taken >= self.limit && !state.closed {
            state = wait(&self.shared.freed, state);
        }
        if state.closed {
            return None;
        }
        state.taken += 1;
        Some(Place(self.shared.clone()))
    }

    /// Runs `job` on a thread of the pool, or on the calling thread if the pool has no thread and
    /// the host refuses to create one. The job holds its place until it is done.
    pub(crate) fn run(&self, place: Place, job: impl FnOnce() + Send + 'static) {
        let job = move || {
            let _place = place;
            job();
        };
        let mut state = self.shared.lock();
        if state.idle <= state.jobs.len() && state.threads < self.limit {
            let shared = self.shared.clone();
            match thread::Builder::new().name(self.name.clone()).spawn(move || work(&shared)) {
                Ok(_) => state.threads += 1,
                Err(error) if state.threads == 0 => {
                    drop(state);
                    log::warn!(
                        "cannot spawn a thread for {}: {error}; serving its requests one by one",
                        self.name
                    );
                    return job();
                }
                Err(_) => {}
            }
        }
        state.jobs.push_back(Box::new(job));
        drop(state);
        self.shared.work.notify_one();
    }

    /// Returns the number of places taken.
    pub(crate) fn taken(&self) -> usize {
        self.shared.lock().taken
    }

    /// Waits until no place is taken.
    pub(crate) fn drain(&self) {
        let mut state = self.shared.lock();
        while state.taken > 0 {
            state = wait(&self.shared.freed, state);
        }
    }

    /// Stops handing out places. Jobs already submitted still run, and the threads end after them.
    pub(crate) fn close(&self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_all();
        self.shared.freed.notify_all();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.close();
    }
}

fn work(shared: &Shared) {
    let mut state = shared.lock();
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            // The panic has already been reported and has freed its place; the thread can be
            // reused.
            let _ = panic::catch_unwind(AssertUnwindSafe(job));
            state = shared.lock();
        } else if state.closed {
            return;
        } else {
            state.idle += 1;
            state = wait(&shared.work, state);
            state.idle -= 1;
        }
    }
}

fn wait<'a>(condition: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    condition.wait(state).unwrap_or_else(PoisonError::into_inner)
}

/// Waits until no place of `pools` is taken. Returns `false` after `patience` without a change in
/// the number of places taken or in the value of `progress`.
pub(crate) fn drain_all(
    pools: &[Arc<Pool>],
    patience: Duration,
    progress: impl Fn() -> u128,
) -> bool {
    let mut last = None;
    let mut deadline = Instant::now();
    loop {
        let taken: usize = pools.iter().map(|pool| pool.taken()).sum();
        if taken == 0 {
            return true;
        }
        let now = Some((taken, progress()));
        if now != last {
            last = now;
            deadline = Instant::now() + patience;
        } else if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn waiting_job_delays_no_other() {
        let pool = Pool::new("test".into(), 2);
        let (release, held) = mpsc::channel::<()>();
        pool.run(pool.reserve().unwrap(), move || {
            let _ = held.recv();
        });
        let (sender, done) = mpsc::channel();
        for i in 0..100 {
            let sender = sender.clone();
            pool.run(pool.reserve().unwrap(), move || sender.send(i).unwrap());
        }
        assert_eq!(done.iter().take(100).collect::<Vec<_>>(), (0..100).collect::<Vec<_>>());
        assert!(pool.shared.lock().threads <= 2);
        drop(release);
        pool.drain();
        assert_eq!(pool.taken(), 0);
    }

    #[test]
    fn full_pool_waits_and_closed_pool_refuses() {
        let pool = Pool::new("test".into(), 1);
        let place = pool.reserve().unwrap();
        thread::scope(|scope| {
            let waits = scope.spawn(|| pool.reserve().is_some());
            thread::sleep(Duration::from_millis(20));
            assert!(!waits.is_finished());
            drop(place);
            assert!(waits.join().unwrap());

            let _place = pool.reserve().unwrap();
            let waits = scope.spawn(|| pool.reserve().is_none());
            thread::sleep(Duration::from_millis(20));
            pool.close();
            assert!(waits.join().unwrap());
        });
    }

    #[test]
    fn accepted_jobs_finish_after_closing_despite_a_panic() {
        let pool = Arc::new(Pool::new("test".into(), 3));
        let (sender, done) = mpsc::channel();
        pool.run(pool.reserve().unwrap(), || std::panic::resume_unwind(Box::new(())));
        for _ in 0..2 {
            let sender = sender.clone();
            pool.run(pool.reserve().unwrap(), move || {
                thread::sleep(Duration::from_millis(20));
                sender.send(()).unwrap();
            });
        }
        pool.close();
        assert!(drain_all(&[pool], PATIENCE, || 0));
        assert_eq!(done.try_iter().count(), 2);
    }

    #[test]
    fn draining_is_given_up_without_progress_only() {
        let pool = [Arc::new(Pool::new("test".into(), 1))];
        let place = pool[0].reserve().unwrap();
        assert!(!drain_all(&pool, Duration::from_millis(20), || 0));
        let start = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(100));
                drop(place);
            });
            let millis = || start.elapsed().as_millis();
            assert!(drain_all(&pool, Duration::from_millis(50), millis));
        });
    }
}
