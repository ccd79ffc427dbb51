// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The purpose for which a run of claimed pages is fetched, and its failures so far.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::retry::Attempts;
use crate::{FaultPath, PageRange};

/// The purpose for which claimed pages are fetched.
#[derive(Clone, Copy)]
pub(crate) struct Errand {
    pub(crate) path: FaultPath,
    /// The attempts so far, if one has failed.
    pub(crate) tried: Option<Attempts>,
    pub(crate) role: Role,
}

impl Errand {
    pub(crate) fn new(path: FaultPath) -> Self {
        Errand { path, tried: None, role: Role::Whole }
    }

    /// Returns whether an accessor other than background fill wants the pages.
    pub(crate) fn is_wanted(&self) -> bool {
        self.path != FaultPath::Fill || self.tried.is_some_and(|attempts| attempts.wanted.is_some())
    }
}

/// The role of a run in the search for the pages that the source cannot deliver.
#[derive(Clone, Copy)]
pub(crate) enum Role {
    /// All pages that were claimed, or handed to the retrier, together.
    Whole,
    /// One page of a failed run, to learn whether the source answers.
    Probe {
        /// The failed run.
        of: PageRange,
    },
    /// A part of a failed run of which another part has arrived.
    Part,
}

/// Returns the page that tests whether the source answers. It differs between attempts, so that one
/// page that always fails is not mistaken for an unavailable source.
pub(crate) fn probe_of(run: PageRange, tried: Option<Attempts>) -> PageRange {
    let attempts = tried.map_or(0, |attempts| attempts.count);
    // The fractions 0, 1/2, 1/4, 3/4, 1/8 and so on of the run, one for each attempt.
    let fraction = u64::from(attempts.reverse_bits());
    let within = (u128::from(fraction) * u128::from(run.count)) >> 32;
    PageRange::page(run.first + u64::try_from(within).expect("a fraction of a count"))
}

/// Returns whether another page of a failed run is worth a probe, after the page that belongs to
/// `attempts`: a source that will never deliver the first ones may deliver others. Eight pages
/// stand for the run.
pub(crate) fn has_more_probes(run: PageRange, attempts: u32) -> bool {
    let probes = run.count.next_power_of_two().min(8);
    !(u64::from(attempts) + 1).is_multiple_of(probes)
}

/// Pages that have failed when fetched one by one, or that the source will never deliver.
#[derive(Default)]
pub(crate) struct SetAside {
    count: AtomicU64,
    pages: Mutex<BTreeSet<u64>>,
}

impl SetAside {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, range: PageRange) {
        let mut pages = self.lock();
        pages.extend(range.first..range.end());
        self.count.store(pages.len() as u64, Ordering::Relaxed);
    }

    /// Forgets pages that have arrived. The set is nearly always empty, and then nothing is
    /// written.
    pub(crate) fn take_back(&self, range: PageRange) {
        if self.count.load(Ordering::Relaxed) > 0 {
            let mut pages = self.lock();
            pages.retain(|page| !range.contains(*page));
            self.count.store(pages.len() as u64, Ordering::Relaxed);
        }
    }

    pub(crate) fn has_all(&self, range: PageRange, is_wanted: impl Fn(u64) -> bool) -> bool {
        if self.count.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let pages = self.lock();
        (range.first..range.end()).all(|page| pages.contains(&page) || !is_wanted(page))
    }
}

/// The steps that claimed pages still need.
#[derive(Clone, Copy)]
pub(crate) enum Left {
    /// All steps, from their content on.
    Populate,
    /// Mapping and publishing: their content is complete.
    Publish { bytes_read: u64 },
}
