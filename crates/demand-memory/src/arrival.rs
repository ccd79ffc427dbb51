// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What follows when a source is done with pages.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use demand_source::{Lender, SourceError};

use crate::pager::Left;
use crate::retry::Attempts;
use crate::{PageRange, Pager, Path};

/// Claimed pages that are with the source. The outcome and the destination hold it, and what
/// follows is done when both have let go: pages are published, or asked for again, only when the
/// source cannot write to them any more.
pub(crate) struct Arrival {
    pager: Arc<Pager>,
    run: PageRange,
    path: Path,
    tried: Option<Attempts>,
    outcome: OnceLock<Result<(), SourceError>>,
    /// Bytes that the source wrote.
    wrote: AtomicU64,
}

impl Arrival {
    pub(crate) fn new(
        pager: Arc<Pager>,
        run: PageRange,
        path: Path,
        tried: Option<Attempts>,
    ) -> Self {
        let (outcome, wrote) = (OnceLock::new(), AtomicU64::new(0));
        Arrival { pager, run, path, tried, outcome, wrote }
    }

    /// Notes what the source said, once.
    pub(crate) fn tell(&self, outcome: Result<(), SourceError>) {
        let _ = self.outcome.set(outcome);
    }
}

impl Lender for Arrival {
    fn take_back(&self, wrote: usize) {
        self.wrote.store(wrote as u64, Ordering::Relaxed);
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        let Arrival { ref pager, run, path, tried, .. } = *self;
        let outcome = self.outcome.take().unwrap_or(Err(SourceError::Abandoned));
        // The bytes themselves were written before the loan let go of this.
        let (wrote, len) = (*self.wrote.get_mut(), run.bytes());
        let short = || if wrote == len { Ok(()) } else { Err(SourceError::Short { wrote, len }) };
        match outcome.and_then(|()| short()) {
            Ok(()) => {
                pager.publish(run, path, len, tried);
            }
            Err(error) => pager.retry(run, Left::Populate, path, &error, tried),
        }
    }
}
