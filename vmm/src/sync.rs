// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Locks that outlive a panic of the thread that held them.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locking without regard to poison: the data that this crate keeps under a mutex is consistent
/// after each statement, and the end of a VM must not fail because a thread has panicked.
pub(crate) trait LockExt<T> {
    /// Locks the mutex, even if a thread has panicked while it held the lock.
    fn lock_always(&self) -> MutexGuard<'_, T>;
}

impl<T> LockExt<T> for Mutex<T> {
    fn lock_always(&self) -> MutexGuard<'_, T> {
        self.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
