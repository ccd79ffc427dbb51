// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread that looks for pages that the source leaves unanswered.

use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use crate::Pager;
use crate::wait_watch::{PageWait, WaitWatch};

/// Interval between looks.
pub(crate) const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The error of an attempt that the source has not answered yet.
#[derive(Debug)]
pub(crate) struct NoAnswer {
    pub(crate) waiting: Duration,
}

impl fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.waiting.as_secs();
        write!(
            f,
            "cannot read from the page source: no answer for {seconds} s; check that its storage \
             or server responds"
        )
    }
}

impl std::error::Error for NoAnswer {}

/// Receives the longest wait for a page that is unanswered.
pub(crate) type Look = dyn Fn(Option<PageWait>) + Send + Sync;

#[derive(Default)]
struct State {
    pagers: Vec<Weak<Pager>>,
    is_running: bool,
    /// Whether a pager may have been stopped.
    is_stale: bool,
    is_closed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks at the waits of some pagers, on a thread that exists only while pages of them are missing.
pub(crate) struct Looks {
    shared: Arc<Shared>,
    look: Arc<Look>,
}

impl Looks {
    pub(crate) fn new(look: Arc<Look>) -> Self {
        Looks { shared: Arc::default(), look }
    }

    /// Adds a pager, whose waits are looked at until all of its pages are present.
    pub(crate) fn add(&self, pager: &Arc<Pager>) {
        let mut state = self.shared.lock();
        state.pagers.push(Arc::downgrade(pager));
        if state.is_running {
            return;
        }
        let (shared, look) = (self.shared.clone(), self.look.clone());
        let spawned =
            thread::Builder::new().name("waits".into()).spawn(move || run(&shared, &*look));
        state.is_running = spawned.is_ok();
        drop(state);
        if let Err(error) = spawned {
            log::warn!("cannot start a thread to report pages that do not arrive: {error}");
        }
    }

    /// Forgets pagers that were stopped.
    pub(crate) fn forget_stopped(&self) {
        self.shared.lock().is_stale = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for Looks {
    fn drop(&mut self) {
        self.shared.lock().is_closed = true;
        self.shared.changed.notify_all();
    }
}

fn run(shared: &Shared, look: &Look) {
    let mut watch = WaitWatch::default();
    let mut known = Vec::new();
    loop {
        let mut state = shared.lock();
        known.append(&mut state.pagers);
        if state.is_closed || known.is_empty() {
            state.is_running = false;
            drop(state);
            // No page is waited for any more.
            let _ = panic::catch_unwind(AssertUnwindSafe(|| look(None)));
            return;
        }
        let idle = |state: &mut State| !state.is_closed && !state.is_stale;
        let waited = shared.changed.wait_timeout_while(state, LOOK_EVERY, idle);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let stale = std::mem::take(&mut state.is_stale);
        drop(state);
        // Without the lock: this may drop the last reference to a pager, and so to the retrier.
        if stale {
            watch.forget_ended();
        } else {
            let pagers: Vec<_> = known.iter().filter_map(Weak::upgrade).collect();
            let longest = watch.look(&pagers);
            // The next looks must come even if the observer panics.
            let _ = panic::catch_unwind(AssertUnwindSafe(|| look(longest)));
        }
        let is_open = |pager: &Pager| {
            let bitmap = pager.bitmap();
            !bitmap.is_complete() && !bitmap.is_stopped()
        };
        known.retain(|pager| pager.upgrade().is_some_and(|pager| is_open(&pager)));
    }
}
