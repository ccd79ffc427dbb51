// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The steps that follow when a source is done with pages.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use demand_source::{Lender, SourceError};

use crate::errand::{Errand, Left};
use crate::pager::{PopulateError, data_bytes};
use crate::{PageRange, Pager};

/// Claimed pages that are with the source. The outcome and the destination hold it, and what
/// follows is done when both have let go: pages are published, or asked for again, only when the
/// source cannot write to them any more.
pub(crate) struct Arrival {
    pager: Arc<Pager>,
    run: PageRange,
    errand: Errand,
    outcome: OnceLock<Result<(), SourceError>>,
    /// Bytes that the source wrote.
    wrote: AtomicU64,
}

impl Arrival {
    pub(crate) fn new(pager: Arc<Pager>, run: PageRange, errand: Errand) -> Self {
        let (outcome, wrote) = (OnceLock::new(), AtomicU64::new(0));
        Arrival { pager, run, errand, outcome, wrote }
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
        let Arrival { ref pager, run, errand, .. } = *self;
        let outcome = self.outcome.take().unwrap_or(Err(SourceError::Abandoned));
        // The bytes themselves were written before the loan let go of this.
        let (wrote, len) = (*self.wrote.get_mut(), run.bytes());
        let short = || if wrote == len { Ok(()) } else { Err(SourceError::Short { wrote, len }) };
        match outcome.and_then(|()| short()) {
            Ok(()) => {
                let (source, start) = pager.source();
                let bytes_read = data_bytes(&**source, start + run.offset(), len);
                pager.publish(run, errand, bytes_read);
            }
            Err(error) => {
                pager.failed(run, Left::Populate, errand, &PopulateError::Source(error));
            }
        }
    }
}
