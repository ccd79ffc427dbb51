// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A gate that delays new claims while unclaimed pages are inspected.

use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering, fence};

/// The gate that each claim passes. While it is closed, either the thread that closed it sees a new
/// claim, or the claimant waits until the gate is open.
pub(crate) struct Gate {
    closed: AtomicBool,
    closing: Mutex<()>,
}

/// A guard that keeps the gate closed until it is dropped.
pub(crate) struct Closed<'a> {
    gate: &'a Gate,
    _closing: MutexGuard<'a, ()>,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Gate { closed: AtomicBool::new(false), closing: Mutex::new(()) }
    }

    /// Closes the gate. The caller must read claims only after this.
    pub(crate) fn close(&self) -> Closed<'_> {
        let closing = self.closing.lock().unwrap_or_else(|error| error.into_inner());
        self.closed.store(true, Ordering::Relaxed);
        // Pairs with the fence in `pass`: either this thread sees the claim from here on, or the
        // claimant sees that the gate is closed.
        fence(Ordering::SeqCst);
        Closed { gate: self, _closing: closing }
    }

    /// Waits while the gate is closed. Must follow a claim and precede the first access to the
    /// claimed pages.
    #[inline]
    pub(crate) fn pass(&self) {
        // Pairs with the fence in `close`.
        fence(Ordering::SeqCst);
        // Acquire: sees everything that was done while the gate was closed.
        if self.closed.load(Ordering::Acquire) {
            self.wait();
        }
    }

    #[cold]
    fn wait(&self) {
        drop(self.closing.lock().unwrap_or_else(|error| error.into_inner()));
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.gate.closed.store(false, Ordering::Release);
    }
}
