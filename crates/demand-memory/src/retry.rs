// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Retries of failed fetches: the pages stay claimed, and are tried again after growing pauses.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::PageRange;

/// The pauses between attempts to fetch a page, and the limit after which it is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Pause before the second attempt; it doubles with each further attempt.
    pub first: Duration,
    /// The longest pause.
    pub longest: Duration,
    /// The time after which a failure of pages that a thread waits for is reported as given up, so
    /// that the VM can be paused. The attempts continue: if the source recovers, the VM can be
    /// resumed. Pages that only background fill asks for are never given up.
    pub limit: Option<Duration>,
}

impl Default for RetryPolicy {
    /// Returns pauses of 10 ms, doubling up to one second, without a limit.
    fn default() -> Self {
        RetryPolicy {
            first: Duration::from_millis(10),
            longest: Duration::from_secs(1),
            limit: None,
        }
    }
}

impl RetryPolicy {
    fn pause(&self, attempts: u32) -> Duration {
        self.first.saturating_mul(1 << (attempts - 1).min(20)).min(self.longest)
    }
}

/// A failed attempt.
#[derive(Debug)]
pub struct Failure<'a> {
    /// The error.
    pub error: &'a (dyn Error + 'a),
    /// Offset of the pages in the image, in bytes.
    pub image_offset: u64,
    /// The pages, by their index in the region.
    pub pages: PageRange,
    /// Number of attempts so far.
    pub attempts: u32,
    /// Time since the first attempt.
    pub waiting: Duration,
    /// Whether an accessor other than background fill has asked for the pages.
    pub wanted: bool,
    /// Whether the policy's limit has passed since the pages became wanted.
    pub given_up: bool,
}

type Observer = Box<dyn Fn(&Failure<'_>) + Send + Sync>;
type Attempt = Box<dyn FnOnce() + Send>;

/// The next attempt to fetch some pages.
struct Job {
    /// Offsets of the pages in the image, in bytes.
    image: Range<u64>,
    attempt: Attempt,
}

#[derive(Default)]
struct Queue {
    jobs: BTreeMap<(Instant, u64), Job>,
    next: u64,
    running: bool,
    /// Whether a job is running.
    busy: bool,
    closed: bool,
}

struct Inner {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state of a fetch that has failed at least once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attempts {
    pub(crate) count: u32,
    pub(crate) since: Instant,
    /// The time since which an accessor other than background fill wants the pages.
    pub(crate) wanted: Option<Instant>,
}

/// Retries failed fetches, on a thread that exists only while some are pending.
pub struct Retrier {
    inner: Arc<Inner>,
    policy: RetryPolicy,
    observer: Observer,
}

impl Retrier {
    /// Creates a retrier that reports each failed attempt to `observer`. The observer runs on
    /// threads that serve faults: it must not block.
    pub fn new(
        policy: RetryPolicy,
        observer: impl Fn(&Failure<'_>) + Send + Sync + 'static,
    ) -> Arc<Self> {
        let inner = Arc::new(Inner { queue: Mutex::default(), changed: Condvar::new() });
        Arc::new(Retrier { inner, policy, observer: Box::new(observer) })
    }

    /// Reports a failure and runs `job` when the next attempt is due.
    pub(crate) fn failed(
        &self,
        error: &dyn Error,
        pages: PageRange,
        image_offset: u64,
        attempts: Attempts,
        job: impl FnOnce() + Send + 'static,
    ) {
        let waiting = attempts.since.elapsed();
        let wanted = attempts.wanted.map(|since| since.elapsed());
        let given_up =
            wanted.is_some_and(|since| self.policy.limit.is_some_and(|limit| since >= limit));
        let count = attempts.count;
        let failure = Failure {
            error,
            image_offset,
            pages,
            attempts: count,
            waiting,
            wanted: wanted.is_some(),
            given_up,
        };
        // The pages must be retried even if the observer panics.
        let _ = panic::catch_unwind(AssertUnwindSafe(|| (self.observer)(&failure)));
        let mut queue = self.inner.lock();
        if queue.closed {
            return;
        }
        let key = (Instant::now() + self.policy.pause(count), queue.next);
        queue.next += 1;
        let image = image_offset..image_offset + pages.bytes();
        queue.jobs.insert(key, Job { image, attempt: Box::new(job) });
        if !queue.running {
            let inner = self.inner.clone();
            let spawned = thread::Builder::new().name("retry".into()).spawn(move || run(&inner));
            queue.running = spawned.is_ok();
            if let Err(error) = spawned {
                log::error!(
                    "cannot spawn the retry thread: {error}; retrying on the current thread"
                );
                // Without a retry thread, this thread must wait and retry.
                queue.running = true;
                drop(queue);
                run(&self.inner);
                return;
            }
        }
        drop(queue);
        self.inner.changed.notify_all();
    }

    /// Returns whether some pages could not be fetched and will be retried. It is false again once
    /// the source has delivered them.
    pub fn is_failing(&self) -> bool {
        let queue = self.inner.lock();
        queue.busy || !queue.jobs.is_empty()
    }

    /// Returns whether the page at `image_offset` (bytes) waits for its next attempt.
    pub(crate) fn is_failing_at(&self, image_offset: u64) -> bool {
        self.inner.lock().jobs.values().any(|job| job.image.contains(&image_offset))
    }

    /// Drops all jobs, and every later one.
    fn stop(&self) {
        let jobs = {
            let mut queue = self.inner.lock();
            queue.closed = true;
            std::mem::take(&mut queue.jobs)
        };
        self.inner.changed.notify_all();
        // Outside the lock: a job may hold the last reference to the owner of this retrier.
        drop(jobs);
    }
}

fn run(inner: &Inner) {
    let mut queue = inner.lock();
    while let Some((&(due, _), _)) = queue.jobs.first_key_value() {
        let now = Instant::now();
        if due > now {
            queue = inner
                .changed
                .wait_timeout(queue, due - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            continue;
        }
        let job = queue.jobs.pop_first().map(|(_, job)| job);
        queue.busy = true;
        drop(queue);
        if let Some(job) = job {
            // A panic of a job is a bug, and has been reported; the other jobs continue.
            let _ = panic::catch_unwind(AssertUnwindSafe(job.attempt));
        }
        queue = inner.lock();
        queue.busy = false;
    }
    queue.running = false;
}

impl Drop for Retrier {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for Retrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retrier").field("policy", &self.policy).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let policy = RetryPolicy::default();
        let pauses: Vec<_> = (1..10).map(|n| policy.pause(n).as_millis()).collect();
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        assert_eq!(policy.pause(u32::MAX), policy.longest);
    }

    #[test]
    fn retrier_is_failing_until_its_last_job_ends() {
        let retrier = Retrier::new(RetryPolicy::default(), |_| {});
        assert!(!retrier.is_failing());
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let attempts = Attempts { count: 1, since: Instant::now(), wanted: None };
        let wait = move || {
            // Ends when the sender is dropped.
            let _ = receiver.recv();
        };
        retrier.failed(&fmt::Error, PageRange::new(0, 1), 0, attempts, wait);
        thread::sleep(Duration::from_millis(50));
        assert!(retrier.is_failing(), "the job waits, or is under way");
        drop(sender);
        let begun = Instant::now();
        while retrier.is_failing() {
            assert!(begun.elapsed() < Duration::from_secs(30));
            thread::sleep(Duration::from_millis(1));
        }
    }
}
