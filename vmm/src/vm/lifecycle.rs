// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The states of a VM's life, and the lock that serialises its transitions.
//!
//! ```text
//!            go             pause
//! Starting -----> Running <--------> Paused
//!                  |   ^    resume    |  ^
//!         snapshot |   |              |  |
//!                  v   |    snapshot  |  |
//!               Snapshotting <--------+  |
//!                  |  then pause          |
//!                  +---------------------+
//! ```
//!
//! Each state leads to Stopped, the last one. A reset of the guest keeps the state.
//!
//! | transition | made by |
//! |---|---|
//! | go | the session, once everything is restored or loaded |
//! | pause, resume, snapshot | threads of the API; pause also a thread of the VM, when the source has failed for too long, or the guest's kernel has panicked |
//! | reset | a thread of the session, on the guest's request |
//! | Stopped | the session, at the end; by way of `supervise` after a signal |
//!
//! A transition holds the lock from its beginning to its end. One that finds the lock taken is
//! refused, except for the session's own, which wait. An end first sets `ending`, on which a
//! snapshot in progress stops, and then waits for the lock.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use crate::api::{ControlError, State};
use crate::sync::LockExt;

/// Polling interval of an end that waits for the lock.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Time from the new state of a transition to the end of its lock, on a busy host.
const ENDS_WITHIN: Duration = Duration::from_millis(100);

/// Error for a request that arrives while another lifecycle operation is in progress.
const BUSY: &str =
    "another operation (a pause, a snapshot or a reset) is in progress; retry when it is done";

/// The VM's lifecycle state, and the lock that serialises its transitions.
#[derive(Debug, Default)]
pub(crate) struct Lifecycle {
    state: AtomicU8,
    /// Locked for the whole of a transition.
    pub(super) change: Mutex<Change>,
    /// Whether the VM is ending, so that a snapshot in progress stops.
    pub(super) ending: AtomicBool,
    /// Whether the end was requested.
    pub(super) asked: AtomicBool,
    /// Whether the VM is being paused because its source fails.
    pub(super) giving_up: AtomicBool,
    /// Pages of memory that the snapshot in progress has processed.
    pub(super) copied: AtomicU64,
    /// The destination of that snapshot.
    pub(super) destination: Mutex<String>,
}

#[derive(Debug, Default)]
pub(super) struct Change {
    /// Whether a snapshot has quiesced the devices, so that a resume must start them.
    pub(super) quiesced: bool,
}

/// The states of a VM that exists.
const STATES: [State; 5] =
    [State::Starting, State::Running, State::Paused, State::Snapshotting, State::Stopped];

impl Lifecycle {
    /// Returns the state, without blocking.
    pub(crate) fn state(&self) -> State {
        STATES[usize::from(self.state.load(Ordering::Acquire))]
    }

    /// Sets the state.
    pub(crate) fn set(&self, state: State) {
        let index = (0..).zip(STATES).find(|(_, known)| *known == state);
        self.state.store(index.map_or(0, |(index, _)| index), Ordering::Release);
    }

    /// Begins a transition. The state of one that ends is seen before its lock is free, so a request
    /// that follows that state waits a moment.
    pub(super) fn change(&self) -> Result<MutexGuard<'_, Change>, ControlError> {
        let due = Instant::now() + ENDS_WITHIN;
        loop {
            match self.try_change() {
                Some(guard) => return Ok(guard),
                None if Instant::now() >= due => return Err(ControlError::wrong_state(BUSY)),
                None => thread::sleep(LOOK_EVERY),
            }
        }
    }

    fn try_change(&self) -> Option<MutexGuard<'_, Change>> {
        match self.change.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Whether the VM is ending.
    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// Whether the VM is ending because its end was requested.
    pub(crate) fn was_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// Stops a snapshot in progress, and waits until no transition is in progress. Calls `unblock`
    /// if that takes longer than `within`.
    pub(crate) fn end(&self, within: Duration, unblock: impl FnOnce()) {
        self.ending.store(true, Ordering::Release);
        let due = Instant::now() + within;
        while self.try_change().is_none() && Instant::now() < due {
            thread::sleep(LOOK_EVERY);
        }
        if self.try_change().is_none() {
            unblock();
        }
        let _change = self.change.lock_always();
        self.set(State::Stopped);
    }
}
