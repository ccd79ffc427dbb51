// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Holds claims off while pages that no thread has claimed are looked at.

use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering, fence};

/// The gate that each claim passes. While it is closed, a new claim is either seen by the thread
/// that has closed it, or its claimant waits until the gate is open.
pub(crate) struct Gate {
    closed: AtomicBool,
    closing: Mutex<()>,
}

/// Keeps the gate closed until it is dropped.
pub(crate) struct Closed<'a> {
    gate: &'a Gate,
    _closing: MutexGuard<'a, ()>,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Gate { closed: AtomicBool::new(false), closing: Mutex::new(()) }
    }

    /// Closes the gate. Claims are read after this.
    pub(crate) fn close(&self) -> Closed<'_> {
        let closing = self.closing.lock().unwrap_or_else(|error| error.into_inner());
        self.closed.store(true, Ordering::Relaxed);
        // Pairs with the fence in `pass`: either the claim is seen after this, or its claimant
        // sees that the gate is closed.
        fence(Ordering::SeqCst);
        Closed { gate: self, _closing: closing }
    }

    /// Waits while the gate is closed. It follows a claim, and precedes the first touch of what was
    /// claimed.
    #[inline]
    pub(crate) fn pass(&self) {
        // Pairs with the fence in `close`.
        fence(Ordering::SeqCst);
        // Acquire: what was done while the gate was closed is done.
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
