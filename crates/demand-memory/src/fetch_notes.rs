// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A pager's notes on its fetches: nearly always none, at the cost of one load.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::{FaultPath, PageRange};

/// No page was fetched so far: note that one is.
const FIRST: u8 = 1;
/// The page of each fault is noted.
const FAULTS: u8 = 2;
/// Pages are fetched ahead of sequential faults.
const AHEAD: u8 = 4;
/// The first touch of each page is noted.
const TOUCHES: u8 = 8;

/// The value of `fault` if no fault came since it was taken.
const NONE: u64 = u64::MAX;

/// The notes on the fetches of one region.
pub(crate) struct FetchNotes {
    /// The notes that the next fetch must take. Threads on disjoint pages share its line, so it is
    /// written once or twice in all.
    wanted: AtomicU8,
    /// The page of the latest fault.
    fault: AtomicU64,
}

impl Default for FetchNotes {
    fn default() -> Self {
        FetchNotes { wanted: AtomicU8::new(FIRST), fault: AtomicU64::new(NONE) }
    }
}

impl FetchNotes {
    /// Returns whether a fetch has to call [`take`](Self::take).
    #[inline]
    pub(crate) fn are_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) != 0
    }

    /// Notes a fetch.
    pub(crate) fn take(&self, range: PageRange, path: FaultPath) {
        if !self.has_begun() {
            self.wanted.fetch_and(!FIRST, Ordering::Relaxed);
        }
        if self.wanted.load(Ordering::Relaxed) & FAULTS != 0 && path != FaultPath::Fill {
            self.fault.store(range.first, Ordering::Relaxed);
        }
    }

    /// Returns whether any page was ever requested.
    pub(crate) fn has_begun(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) & FIRST == 0
    }

    pub(crate) fn note_faults(&self) {
        self.wanted.fetch_or(FAULTS, Ordering::Relaxed);
    }

    pub(crate) fn read_ahead(&self) {
        self.wanted.fetch_or(AHEAD, Ordering::Relaxed);
    }

    pub(crate) fn note_touches(&self) {
        self.wanted.fetch_or(TOUCHES, Ordering::Relaxed);
    }

    pub(crate) fn end_touches(&self) {
        self.wanted.fetch_and(!TOUCHES, Ordering::Relaxed);
    }

    pub(crate) fn take_fault(&self) -> Option<u64> {
        let page = self.fault.swap(NONE, Ordering::Relaxed);
        (page != NONE).then_some(page)
    }
}
