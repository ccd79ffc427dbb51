// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reports a page source that fails or does not answer, and gives it up after the user's limit.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use demand_memory::{DemandMemory, PageWait, Retrier, RetryPolicy, WaitWatch};

/// A longer wait for a page is reported.
const LONG: Duration = Duration::from_secs(10);

/// A page that the source leaves unanswered.
#[derive(Clone, Debug)]
struct Unanswered {
    wait: PageWait,
    image: PathBuf,
}

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (offset, image) = (self.wait.image_offset(), self.image.display());
        let seconds = self.wait.waiting().as_secs();
        write!(f, "cannot read the page at offset {offset} of {image}: no answer for {seconds} s")
    }
}

#[derive(Debug, Default)]
struct Trouble {
    failure: Option<String>,
    unanswered: Option<Unanswered>,
}

/// The last error of the page source.
#[derive(Clone, Debug, Default)]
pub struct LastError(Arc<Mutex<Trouble>>);

impl LastError {
    fn lock(&self) -> MutexGuard<'_, Trouble> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores the error of a failed fetch: one line.
    fn set(&self, failure: impl Into<String>) {
        self.lock().failure = Some(failure.into());
    }

    /// Returns the page that has been waited for too long without an answer, else the last failure
    /// if the source is still `failing`: one line.
    pub(crate) fn get(&self, failing: bool) -> Option<String> {
        let trouble = self.lock();
        let unanswered = trouble.unanswered.as_ref().filter(|page| !page.wait.is_over());
        unanswered
            .map(|page| format!("{page}; {HINT}"))
            .or_else(|| trouble.failure.clone().filter(|_| failing))
    }
}

const HINT: &str = "check that the storage it lies on responds";

/// Reports failures and long waits, and gives the source up after the user's limit.
pub(crate) struct SourceWatch {
    image: PathBuf,
    limit: Option<Duration>,
    last_error: LastError,
    give_up: Box<dyn Fn(String) + Send + Sync>,
    /// Image offset of the page in the last report of a long wait.
    told: Mutex<Option<u64>>,
}

impl SourceWatch {
    /// Creates a watch of the source that reads `image`. It calls `give_up` with the reason, again
    /// and again, while a wanted page has not arrived for longer than `limit`. The callback must
    /// not block.
    pub(crate) fn new(
        image: PathBuf,
        limit: Option<Duration>,
        last_error: LastError,
        give_up: impl Fn(String) + Send + Sync + 'static,
    ) -> Arc<Self> {
        let (give_up, told) = (Box::new(give_up), Mutex::default());
        Arc::new(SourceWatch { image, limit, last_error, give_up, told })
    }

    /// Creates a retrier that reports failed fetches here.
    pub(crate) fn retrier(self: &Arc<Self>) -> Arc<Retrier> {
        let policy = RetryPolicy { limit: self.limit, ..RetryPolicy::default() };
        let watch = self.clone();
        Retrier::new(policy, move |failure| {
            watch.last_error.set(failure.error.to_string());
            if failure.given_up {
                // Each time, because the VM may have been resumed before the source was back.
                (watch.give_up)(format!("{} ({} attempts)", failure.error, failure.attempts));
            } else if failure.attempts.is_power_of_two() {
                // Only attempts 1, 2, 4 and so on, because the pauses between attempts are short at
                // first.
                log::warn!("{} (attempt {})", failure.error, failure.attempts);
            }
        })
    }

    /// Reports the longest wait for a page if it is too long.
    fn look(&self, longest: Option<PageWait>) {
        let waiting = longest.as_ref().map_or(Duration::ZERO, PageWait::waiting);
        let given_up = self.limit.is_some_and(|limit| waiting >= limit);
        let late = longest.filter(|_| given_up || waiting >= LONG);
        let late = late.map(|wait| Unanswered { wait, image: self.image.clone() });
        self.last_error.lock().unanswered = late.clone();
        let Some(page) = late else { return };
        let offset = Some(page.wait.image_offset());
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut *told, offset) != offset {
            log::warn!("{page}; {HINT}");
        }
        if given_up {
            (self.give_up)(page.to_string());
        }
    }
}

/// The memory of a run, whose pages its threads may wait for.
pub(crate) struct Awaited {
    pub(crate) memory: DemandMemory,
    /// `None` if no page is ever missing.
    pub(crate) source: Option<Arc<SourceWatch>>,
}

impl Awaited {
    /// Looks for long waits. Must be called regularly, with the same `waits`.
    pub(crate) fn look(&self, waits: &mut WaitWatch) {
        if let Some(source) = &self.source {
            source.look(waits.look(self.memory.pagers()));
        }
    }
}
