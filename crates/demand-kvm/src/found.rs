// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The outcome of the trial of KVM Userfault in this process. Memslots rely on that alone, and
//! never on an outcome that another process has kept.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use crate::scratch::{self, Ending, Userfault};
use crate::{KvmError, Trial, open_kvm};

/// The outcome of the first trial in this process that had one.
static FOUND: OnceLock<Userfault> = OnceLock::new();

/// Whether a start in this process relies on a kept outcome, which must hold.
static RELIES_ON_KEPT: AtomicBool = AtomicBool::new(false);

/// The thread that makes the trial beside a start.
static CHECK: Mutex<Option<JoinHandle<()>>> = Mutex::new(None);

/// Notes the outcome of a trial in this process. A failure, as for lack of file descriptors, says
/// nothing about later ones.
pub(crate) fn note(outcome: Userfault) {
    if outcome.is_known() {
        let _ = FOUND.set(outcome);
    }
}

/// Returns what this process has found out so far.
pub(crate) fn known() -> Option<Userfault> {
    FOUND.get().copied()
}

/// Makes the trial on another thread, because a start relies on the outcome `kept`. If it differs,
/// `on_difference` is called there, and no memslot is created that would rely on it. Returns
/// whether there is such a thread.
pub(crate) fn check_beside(kept: Userfault, on_difference: impl FnOnce() + Send + 'static) -> bool {
    let check = move || {
        if learn().is_some_and(|found| found != kept) {
            on_difference();
        }
    };
    let mut running = CHECK.lock().unwrap_or_else(PoisonError::into_inner);
    let Ok(thread) = thread::Builder::new().name("probe".into()).spawn(check) else { return false };
    RELIES_ON_KEPT.store(true, Ordering::Release);
    *running = Some(thread);
    true
}

/// Waits for the trial that is being made, if there is one.
fn await_check() {
    // Locked meanwhile, so that others wait as well.
    let mut check = CHECK.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(thread) = check.take() {
        // A panic there leaves the outcome unknown.
        let _ = thread.join();
    }
}

/// Returns the outcome of a trial in this process. It is made until it has an outcome.
fn found() -> Option<Userfault> {
    await_check();
    known().or_else(learn)
}

fn learn() -> Option<Userfault> {
    let tried = open_kvm().and_then(|kvm| scratch::try_userfault(&kvm, Ending::Beside));
    note(tried.unwrap_or(Userfault::UNTRIED));
    known()
}

/// Returns whether this host's KVM respects the bitmap in its own accesses.
pub(crate) fn own_accesses_stop() -> bool {
    found().is_some_and(|found| found.own_accesses == Some(true))
}

/// Returns whether vCPUs stop at missing pages, if a start in this process relies on a kept outcome
/// that says so.
pub(crate) fn kept_outcome_holds() -> bool {
    !RELIES_ON_KEPT.load(Ordering::Acquire) || found().is_some_and(|found| found.trial.works())
}

impl Userfault {
    /// Nothing was found out.
    pub(crate) const UNTRIED: Self = Userfault { trial: Trial::Untried, own_accesses: None };

    /// Returns whether both parts of the outcome are known.
    pub(crate) fn is_known(self) -> bool {
        match self.trial {
            Trial::Works => self.own_accesses.is_some(),
            trial => trial.is_lasting() && self.own_accesses.is_none(),
        }
    }
}

/// Tries KVM Userfault, and notes the outcome.
pub(crate) fn try_userfault(kvm: &kvm_ioctls::Kvm, ending: Ending) -> Result<Userfault, KvmError> {
    let outcome = scratch::try_userfault(kvm, ending)?;
    note(outcome);
    Ok(outcome)
}
