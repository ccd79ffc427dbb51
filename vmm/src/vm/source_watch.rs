// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reports a page source that fails or does not answer, and gives it up after the user's limit.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use demand_memory::{Failure, PageWait, Retrier, RetryPolicy};

use crate::api::events::{EventKind, EventLog};
use crate::sync::LockExt;

/// How long a source must not fail until it counts as back.
const QUIET: Duration = Duration::from_secs(1);

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
    /// Whether the latest event about the source says that it fails.
    is_logged: bool,
    /// The time since which it has seemed to be back.
    quiet_since: Option<Instant>,
}

/// The last error of the page source.
#[derive(Clone, Debug, Default)]
pub struct LastError {
    trouble: Arc<Mutex<Trouble>>,
    log: Arc<EventLog>,
}

impl LastError {
    /// Creates one without an error, which adds events to `log` when the source begins to fail and
    /// when it is back.
    pub(crate) fn new(log: Arc<EventLog>) -> Self {
        LastError { trouble: Arc::default(), log }
    }

    /// Stores the error of a failed fetch: one line.
    fn set(&self, failure: impl Into<String>) {
        let failure = failure.into();
        let mut trouble = self.trouble.lock_always();
        trouble.quiet_since = None;
        trouble.failure = Some(failure.clone());
        self.log_failure(&mut trouble, failure);
    }

    /// Stores the page that was not answered for too long, if any.
    fn set_unanswered(&self, page: Option<Unanswered>) {
        let mut trouble = self.trouble.lock_always();
        if let Some(page) = &page {
            self.log_failure(&mut trouble, page.to_string());
        }
        trouble.unanswered = page;
    }

    fn log_failure(&self, trouble: &mut Trouble, error: String) {
        if !std::mem::replace(&mut trouble.is_logged, true) {
            self.log.add(EventKind::SourceFailing { error });
        }
    }

    /// Adds an event if the source is back: it is not `failing`, and answers.
    pub(crate) fn look(&self, failing: bool) {
        let mut trouble = self.trouble.lock_always();
        let answers = trouble.unanswered.as_ref().is_none_or(|page| page.wait.is_over());
        if !trouble.is_logged || !answers || failing {
            trouble.quiet_since = None;
            return;
        }
        // While an attempt is under way, its failure is not known yet.
        let since = *trouble.quiet_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= QUIET {
            trouble.is_logged = false;
            trouble.quiet_since = None;
            self.log.add(EventKind::SourceBack);
        }
    }

    /// Returns the page that has been waited for too long without an answer, else the last failure
    /// if the source is still `failing`: one line.
    pub(crate) fn get(&self, failing: bool) -> Option<String> {
        let trouble = self.trouble.lock_always();
        let unanswered = trouble.unanswered.as_ref().filter(|page| !page.wait.is_over());
        unanswered
            .map(|page| format!("{page}; {HINT}"))
            .or_else(|| trouble.failure.clone().filter(|_| failing))
    }
}

const HINT: &str = "check that the storage it lies on responds";

/// Reports failures and long waits, and gives the source up after the user's limit.
pub struct SourceWatch {
    image: PathBuf,
    limit: Option<Duration>,
    last_error: LastError,
    give_up: Box<dyn Fn(String) + Send + Sync>,
    /// Image offset of the page in the last report of a long wait.
    told: Mutex<Option<u64>>,
}

impl fmt::Debug for SourceWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut watch = f.debug_struct("SourceWatch");
        watch.field("image", &self.image).field("limit", &self.limit);
        watch.field("last_error", &self.last_error).finish_non_exhaustive()
    }
}

impl SourceWatch {
    /// Creates a watch of the source that reads `image`. It calls `give_up` with the reason, again
    /// and again, while a wanted page has not arrived for longer than `limit`. The callback must
    /// not block.
    pub fn new(
        image: PathBuf,
        limit: Option<Duration>,
        last_error: LastError,
        give_up: impl Fn(String) + Send + Sync + 'static,
    ) -> Arc<Self> {
        let (give_up, told) = (Box::new(give_up), Mutex::default());
        Arc::new(SourceWatch { image, limit, last_error, give_up, told })
    }

    /// Creates a retrier that reports failed fetches and long waits here.
    pub fn retrier(self: &Arc<Self>) -> Retrier {
        let policy = RetryPolicy { limit: self.limit, ..RetryPolicy::default() };
        let (watch, looking) = (self.clone(), self.clone());
        let failed = move |failure: &Failure<'_>| {
            watch.last_error.set(failure.error.to_string());
            if failure.given_up {
                // Each time, because the VM may have been resumed before the source was back.
                (watch.give_up)(format!("{} ({} attempts)", failure.error, failure.attempts));
            } else if failure.attempts.is_power_of_two() {
                // Only attempts 1, 2, 4 and so on, because the pauses between attempts are short at
                // first.
                log::warn!("{} (attempt {})", failure.error, failure.attempts);
            }
        };
        Retrier::with_look(policy, failed, move |longest| looking.look(longest))
    }

    /// Reports the longest wait for a page if it is too long.
    fn look(&self, longest: Option<PageWait>) {
        let waiting = longest.as_ref().map_or(Duration::ZERO, PageWait::waiting);
        let given_up = self.limit.is_some_and(|limit| waiting >= limit);
        let late = longest.filter(|wait| given_up || wait.is_long());
        let late = late.map(|wait| Unanswered { wait, image: self.image.clone() });
        self.last_error.set_unanswered(late.clone());
        let Some(page) = late else { return };
        let offset = Some(page.wait.image_offset());
        let mut told = self.told.lock_always();
        if std::mem::replace(&mut *told, offset) != offset {
            log::warn!("{page}; {HINT}");
        }
        if given_up {
            (self.give_up)(page.to_string());
        }
    }
}
