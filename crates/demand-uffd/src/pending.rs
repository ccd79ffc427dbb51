// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The faults of a mapping that are being served, which later faults on the same pages join.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};

use demand_memory::PageRange;

/// The granules on which a fault is being served, by their first pages. The value tells whether
/// later faults on the granule were left to the same resolution.
#[derive(Debug, Default)]
pub(crate) struct PendingGranules(Mutex<HashMap<u64, bool>>);

/// The part of a new fault in serving its granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Begun {
    /// It is the first: its granule must be served now.
    Started,
    /// The resolution under way wakes this faulter as well.
    Joined,
}

impl PendingGranules {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, bool>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a fault on a granule. If it joins an earlier one, [`finish`](Self::finish) reports it.
    pub(crate) fn join_or_start(&self, granule: PageRange) -> Begun {
        match self.lock().entry(granule.first) {
            Entry::Occupied(mut known) => {
                known.insert(true);
                Begun::Joined
            }
            Entry::Vacant(new) => {
                new.insert(false);
                Begun::Started
            }
        }
    }

    /// Notes that a granule is about to be resolved. The resolution that follows wakes the faulters
    /// so far; a fault that is read after this counts as new. Returns whether any fault has joined:
    /// if so, a resolution must follow even if the granule was mapped before this.
    pub(crate) fn finish(&self, granule: PageRange) -> bool {
        self.lock().remove(&granule.first).unwrap_or(false)
    }

    /// Returns whether every fault that was read is resolved.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Returns whether a granule fulfils the condition, which gets its first page.
    pub(crate) fn any(&self, mut condition: impl FnMut(u64) -> bool) -> bool {
        self.lock().keys().any(|first| condition(*first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_faults_join_until_the_granule_is_finished() {
        let (pending, granule) = (PendingGranules::default(), PageRange::new(512, 512));
        for _ in 0..2 {
            assert!(!pending.finish(granule));
            assert_eq!(pending.join_or_start(granule), Begun::Started);
            assert_eq!(pending.join_or_start(PageRange::new(0, 512)), Begun::Started);
            assert!(!pending.finish(PageRange::new(0, 512)));
            assert_eq!(pending.join_or_start(granule), Begun::Joined);
            assert!(pending.any(|first| first == 512) && !pending.any(|first| first == 0));
            assert!(pending.finish(granule));
            assert!(pending.is_empty());
        }
    }
}
