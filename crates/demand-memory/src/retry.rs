// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Retries of failed fetches: the pages stay claimed, and are tried again after growing pauses.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use demand_source::Retry;

use crate::failure_log::FailureLog;
use crate::unanswered::{LOOK_EVERY, Look, Looks, NoAnswer};
use crate::{PageRange, PageWait, Pager};

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

/// A failed attempt, or one that its source has left unanswered for ten seconds.
#[derive(Debug)]
pub struct Failure<'a> {
    /// The error.
    pub error: &'a (dyn Error + 'a),
    /// Offset of the pages in the image, in bytes.
    pub image_offset: u64,
    /// The pages, by their index in the region.
    pub pages: PageRange,
    /// Number of failed attempts so far; 0 if the source has left the attempt unanswered.
    pub attempts: u32,
    /// Time since the first attempt.
    pub waiting: Duration,
    /// Whether an accessor other than background fill has asked for the pages.
    pub wanted: bool,
    /// Whether the pages are wanted, and either the policy's limit has passed since they became so,
    /// or the source will [never](Retry::Never) deliver them.
    pub given_up: bool,
    /// Whether the pages are tried again after a pause, or only when
    /// [`Retrier::retry_now`] is called.
    pub retry: Retry,
}

/// A failed attempt to fetch pages.
pub(crate) struct Failed<'a> {
    pub(crate) error: &'a dyn Error,
    pub(crate) retry: Retry,
    pub(crate) pages: PageRange,
    /// Offset of the pages in the image, in bytes.
    pub(crate) image_offset: u64,
}

impl fmt::Display for Failure<'_> {
    /// Writes one line: the error, the pages, the attempts so far, and whether a thread waits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Failure { error, image_offset, pages, attempts, waiting, .. } = self;
        write!(f, "{error} (")?;
        if pages.count > 1 {
            write!(f, "{} pages from ", pages.count)?;
        }
        write!(f, "offset {image_offset}")?;
        if *attempts > 0 {
            write!(f, ", attempt {attempts}")?;
        }
        if *attempts > 1 {
            write!(f, " in {:.1} s", waiting.as_secs_f64())?;
        }
        f.write_str(match (self.wanted, self.retry) {
            (true, Retry::Later) => "; a thread waits)",
            (true, Retry::Never) => "; a thread waits, and no further attempt is made)",
            (false, _) => "; no thread waits)",
        })
    }
}

type Observer = Arc<dyn Fn(&Failure<'_>) + Send + Sync>;
type Next = Box<dyn FnOnce(Due) + Send>;

/// The step that is due for some pages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    /// The next attempt to fetch them.
    Attempt,
    /// A look whether an accessor wants them; if none does, no attempt.
    Look,
}

/// The next attempt to fetch some pages.
struct Job {
    /// Offsets of the pages in the image, in bytes.
    image: Range<u64>,
    due: Due,
    next: Next,
}

#[derive(Default)]
struct Queue {
    jobs: BTreeMap<(Instant, u64), Job>,
    /// Steps that are made only on request.
    parked: Vec<Job>,
    next: u64,
    running: bool,
    /// Whether a job is running.
    busy: bool,
    closed: bool,
}

impl Queue {
    fn add(&mut self, due: Instant, job: Job) {
        self.jobs.insert((due, self.next), job);
        self.next += 1;
    }
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

/// Retries failed fetches, on a thread that exists only while some are pending. All pagers of a VM
/// share one, through clones of this handle. A pending retry keeps its pager, and with it the
/// retrier, until the pages arrive or the pager is stopped.
///
/// A source can say that another attempt is useless ([`Retry::Never`]). The pages then stay missing
/// and the threads that need them wait, without further attempts, until
/// [`retry_now`](Self::retry_now) is called. Pages of which only background fill has asked are
/// tried once more when another accessor needs them, so that its wait is reported.
#[derive(Clone)]
pub struct Retrier(Arc<Shared>);

struct Shared {
    inner: Arc<Inner>,
    policy: RetryPolicy,
    observer: Observer,
    looks: Looks,
    /// Whether a page was unanswered for too long at the last look.
    is_late: Arc<AtomicBool>,
}

impl Retrier {
    /// Creates a retrier that logs failures as warnings: for each MiB of the image at most once in
    /// ten seconds, and eight in all.
    pub fn logging(policy: RetryPolicy) -> Self {
        let log = Mutex::new(FailureLog::default());
        Retrier::new(policy, move |failure| {
            let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
            match log.admit(failure, Instant::now()) {
                None => {}
                Some(0) => log::warn!("{failure}"),
                Some(hidden) => log::warn!("{failure}; {hidden} more failures were not logged"),
            }
        })
    }

    /// Creates a retrier that reports each failed attempt to `observer`. The observer runs on
    /// threads that serve faults: it must not block.
    ///
    /// It also reports pages that a thread waits for and that the source has left unanswered for ten
    /// seconds, or for the policy's limit but at least a second: once, and once more when they are
    /// given up. A thread looks for them once a second, from the first request that is not answered
    /// at once until all pages are present.
    pub fn new(
        policy: RetryPolicy,
        observer: impl Fn(&Failure<'_>) + Send + Sync + 'static,
    ) -> Self {
        let observer: Observer = Arc::new(observer);
        let (limit, tell, told) = (policy.limit, observer.clone(), Mutex::default());
        let look = move |longest: Option<PageWait>| report(longest, limit, &*tell, &told);
        Retrier::of(policy, observer, Arc::new(look))
    }

    /// Creates a retrier like [`new`](Self::new) that reports unanswered pages to `look` instead:
    /// once a second, the longest wait, as [`WaitWatch::look`](crate::WaitWatch::look) returns it.
    /// The callback must not block.
    pub fn with_look(
        policy: RetryPolicy,
        observer: impl Fn(&Failure<'_>) + Send + Sync + 'static,
        look: impl Fn(Option<PageWait>) + Send + Sync + 'static,
    ) -> Self {
        Retrier::of(policy, Arc::new(observer), Arc::new(look))
    }

    fn of(policy: RetryPolicy, observer: Observer, look: Arc<Look>) -> Self {
        let inner = Arc::new(Inner { queue: Mutex::default(), changed: Condvar::new() });
        let is_late = Arc::new(AtomicBool::new(false));
        let late = is_late.clone();
        let looks = Looks::new(Arc::new(move |longest: Option<PageWait>| {
            late.store(longest.as_ref().is_some_and(PageWait::is_long), Ordering::Relaxed);
            look(longest);
        }));
        Retrier(Arc::new(Shared { inner, policy, observer, looks, is_late }))
    }

    /// Looks for unanswered pages of this pager until all of them are present.
    pub(crate) fn look_at(&self, pager: &Arc<Pager>) {
        self.0.looks.add(pager);
    }

    /// Reports a failure and runs `next` when the next step is due.
    pub(crate) fn failed(
        &self,
        failed: Failed<'_>,
        attempts: Attempts,
        next: impl FnOnce(Due) + Send + 'static,
    ) {
        let Shared { inner, policy, observer, .. } = &*self.0;
        let Failed { error, retry, pages, image_offset } = failed;
        let waiting = attempts.since.elapsed();
        let wanted = attempts.wanted.map(|since| since.elapsed());
        let given_up = wanted.is_some_and(|since| {
            retry == Retry::Never || policy.limit.is_some_and(|limit| since >= limit)
        });
        let count = attempts.count;
        let failure = Failure {
            error,
            image_offset,
            pages,
            attempts: count,
            waiting,
            wanted: wanted.is_some(),
            given_up,
            retry,
        };
        let image = image_offset..image_offset + pages.bytes();
        // The pages must be retried even if the observer panics.
        let tell = || _ = panic::catch_unwind(AssertUnwindSafe(|| observer(&failure)));
        let next = Box::new(next);
        match retry {
            Retry::Later => {
                tell();
                self.run_after(policy.pause(count), Job { image, due: Due::Attempt, next });
            }
            Retry::Never if wanted.is_none() => {
                tell();
                self.run_after(policy.longest, Job { image, due: Due::Look, next });
            }
            Retry::Never => {
                {
                    let mut queue = inner.lock();
                    if !queue.closed {
                        queue.parked.push(Job { image, due: Due::Attempt, next });
                    }
                }
                // Only then: the report may cause a call of `retry_now`, which must find the pages.
                tell();
            }
        }
    }

    /// Runs `next` after the policy's longest pause, to look whether the pages are wanted.
    pub(crate) fn look_later(
        &self,
        pages: PageRange,
        image_offset: u64,
        next: impl FnOnce(Due) + Send + 'static,
    ) {
        let image = image_offset..image_offset + pages.bytes();
        let job = Job { image, due: Due::Look, next: Box::new(next) };
        self.run_after(self.0.policy.longest, job);
    }

    /// Makes the next attempt for all failed pages now, including those that the source said it
    /// would [never](Retry::Never) deliver. A VMM calls it when the source may be usable again,
    /// such as when its user resumes a VM that was paused because of a failure. It does not wait.
    pub fn retry_now(&self) {
        let mut queue = self.0.inner.lock();
        let (jobs, parked) = (std::mem::take(&mut queue.jobs), std::mem::take(&mut queue.parked));
        let now = Instant::now();
        for job in jobs.into_values().chain(parked) {
            queue.add(now, Job { due: Due::Attempt, ..job });
        }
        self.wake(queue);
        self.0.looks.forget_stopped();
    }

    fn run_after(&self, pause: Duration, job: Job) {
        let mut queue = self.0.inner.lock();
        if !queue.closed {
            queue.add(Instant::now() + pause, job);
            self.wake(queue);
        }
    }

    /// Ensures that the retry thread sees the jobs.
    fn wake(&self, mut queue: MutexGuard<'_, Queue>) {
        let inner = &self.0.inner;
        if !queue.running && !queue.jobs.is_empty() {
            let shared = inner.clone();
            let spawned = thread::Builder::new().name("retry".into()).spawn(move || run(&shared));
            queue.running = spawned.is_ok();
            if let Err(error) = spawned {
                log::error!(
                    "cannot spawn the retry thread: {error}; retrying on the current thread"
                );
                // Without a retry thread, this thread must wait and retry.
                queue.running = true;
                drop(queue);
                run(inner);
                return;
            }
        }
        drop(queue);
        inner.changed.notify_all();
    }

    /// Returns whether some pages could not be fetched, or the source had left a page for which a
    /// thread waits unanswered for ten seconds at the last look, up to a second ago. It is false
    /// again once the source has delivered them, and also while their next attempt is under way: so
    /// ask more than once to learn that a source is back.
    pub fn is_failing(&self) -> bool {
        let queue = self.0.inner.lock();
        let failed = queue.busy || !queue.jobs.is_empty() || !queue.parked.is_empty();
        failed || self.0.is_late.load(Ordering::Relaxed)
    }

    /// Returns whether the page at `image_offset` (bytes) waits for its next attempt.
    pub(crate) fn is_failing_at(&self, image_offset: u64) -> bool {
        let queue = self.0.inner.lock();
        queue.jobs.values().chain(&queue.parked).any(|job| job.image.contains(&image_offset))
    }
}

/// Reports the longest unanswered wait if it is too long and was not reported.
fn report(
    longest: Option<PageWait>,
    limit: Option<Duration>,
    observer: &(dyn Fn(&Failure<'_>) + Send + Sync),
    told: &Mutex<Option<(u64, bool)>>,
) {
    let Some(wait) = longest else { return };
    let (waiting, image_offset) = (wait.waiting(), wait.image_offset());
    // A wait that is seen for the first time may be a prompt one.
    let given_up = limit.is_some_and(|limit| waiting >= limit.max(LOOK_EVERY));
    if !given_up && !wait.is_long() {
        return;
    }
    let now = Some((image_offset, given_up));
    let before = std::mem::replace(&mut *told.lock().unwrap_or_else(PoisonError::into_inner), now);
    if before != now {
        observer(&Failure {
            error: &NoAnswer { waiting },
            image_offset,
            pages: PageRange::page(wait.page()),
            attempts: 0,
            waiting,
            wanted: true,
            given_up,
            retry: Retry::Later,
        });
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
        if let Some(Job { due, next, .. }) = job {
            // A panic of a job is a bug, and has been reported; the other jobs continue.
            let _ = panic::catch_unwind(AssertUnwindSafe(|| next(due)));
        }
        queue = inner.lock();
        queue.busy = false;
    }
    queue.running = false;
}

impl Drop for Shared {
    /// Drops all jobs, and every later one.
    fn drop(&mut self) {
        let jobs = {
            let mut queue = self.inner.lock();
            queue.closed = true;
            (std::mem::take(&mut queue.jobs), std::mem::take(&mut queue.parked))
        };
        self.inner.changed.notify_all();
        // Outside the lock: a job may hold the last reference to the owner of this retrier.
        drop(jobs);
    }
}

impl fmt::Debug for Retrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retrier").field("policy", &self.0.policy).finish_non_exhaustive()
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

    /// Otherwise nothing would ever try the pages again.
    #[test]
    fn reported_refusal_can_be_retried_at_once() {
        let own = Arc::new(std::sync::OnceLock::<Retrier>::new());
        let retrier = Retrier::new(RetryPolicy::default(), {
            let own = own.clone();
            move |failure| {
                assert!(failure.given_up);
                own.get().unwrap().retry_now();
            }
        });
        own.set(retrier.clone()).unwrap();
        let now = Instant::now();
        let attempts = Attempts { count: 1, since: now, wanted: Some(now) };
        let pages = PageRange::new(0, 1);
        let failed = Failed { error: &fmt::Error, retry: Retry::Never, pages, image_offset: 0 };
        let (sender, tried) = std::sync::mpsc::channel();
        retrier.failed(failed, attempts, move |_| sender.send(()).unwrap());
        tried.recv_timeout(Duration::from_secs(20)).expect("the pages are tried again");
    }

    #[test]
    fn retrier_is_failing_until_its_last_job_ends() {
        let retrier = Retrier::new(RetryPolicy::default(), |_| {});
        assert!(!retrier.is_failing());
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let attempts = Attempts { count: 1, since: Instant::now(), wanted: None };
        let wait = move |_| {
            // Ends when the sender is dropped.
            let _ = receiver.recv();
        };
        let pages = PageRange::new(0, 1);
        let failed = Failed { error: &fmt::Error, retry: Retry::Later, pages, image_offset: 0 };
        retrier.failed(failed, attempts, wait);
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
