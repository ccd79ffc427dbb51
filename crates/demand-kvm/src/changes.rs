// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Marks the times at which memslots and the regions of a fault handler disagree.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Sleeps for a moment, in which a change that is under way may end.
pub(crate) fn pause() {
    thread::sleep(Duration::from_micros(50));
}

/// The changes of a VM's regions: odd while one is under way. A vCPU whose exit fits no region, and
/// during which the number changed or was odd, has met a change, and runs again.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    number: AtomicU64,
    one: Mutex<()>,
}

/// A change that is under way until this is dropped.
pub(crate) struct Changing<'a> {
    changes: &'a Changes,
    _one: MutexGuard<'a, ()>,
}

impl Changes {
    /// Begins a change; waits for another one to end.
    pub(crate) fn begin(&self) -> Changing<'_> {
        let _one = self.one.lock().unwrap_or_else(PoisonError::into_inner);
        self.number.fetch_add(1, Ordering::SeqCst);
        // The change follows.
        fence(Ordering::SeqCst);
        Changing { changes: self, _one }
    }

    /// Returns the number, for [`since`](Self::since).
    #[inline]
    pub(crate) fn number(&self) -> u64 {
        self.number.load(Ordering::Acquire)
    }

    /// Waits for the end of a change that is under way, if any.
    pub(crate) fn settle(&self) {
        let number = self.number();
        while !number.is_multiple_of(2) && self.number() == number {
            pause();
        }
    }

    /// Returns whether a change was under way at any time since the number was read.
    pub(crate) fn since(&self, number: u64) -> bool {
        let now = self.number.load(Ordering::SeqCst);
        now != number || !now.is_multiple_of(2)
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.changes.number.fetch_add(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn change_is_seen_during_and_after() {
        let changes = Changes::default();
        let before = changes.number();
        assert!(!changes.since(before));
        let changing = changes.begin();
        let during = changes.number();
        assert!(changes.since(before) && changes.since(during));
        drop(changing);
        assert!(changes.since(before) && changes.since(during));
        assert!(!changes.since(changes.number()));
    }

    #[test]
    fn change_under_way_is_awaited() {
        let changes = Changes::default();
        changes.settle();
        let changing = changes.begin();
        let before = changes.number();
        thread::scope(|scope| {
            let settled = scope.spawn(|| {
                changes.settle();
                changes.number()
            });
            thread::sleep(Duration::from_millis(20));
            assert!(!settled.is_finished());
            drop(changing);
            assert_eq!(settled.join().unwrap(), before + 1);
        });
    }
}
