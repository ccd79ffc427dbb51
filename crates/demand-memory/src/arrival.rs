// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The end of a fetch: publishes or retries pages when their source is done with them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Instant;

use demand_source::{Lender, SourceError};

use crate::errand::{Errand, Left};
use crate::error::PopulateError;
use crate::extents::data_bytes;
use crate::{PageRange, Pager};

/// Most bytes of a request whose delay does not depend on its size.
const MOST_SMALL: u64 = 64 << 10;

/// Claimed pages that the source is working on. The outcome and the destination both hold it, and
/// its drop takes the next step after both have released it: pages are published or retried only
/// when the source can no longer write to them.
pub(crate) struct Arrival {
    pager: Arc<Pager>,
    run: PageRange,
    errand: Errand,
    begun: Instant,
    outcome: OnceLock<Result<(), SourceError>>,
    /// Number of bytes that the source wrote.
    wrote: AtomicU64,
}

impl Arrival {
    pub(crate) fn new(pager: Arc<Pager>, run: PageRange, errand: Errand) -> Self {
        let (outcome, wrote) = (OnceLock::new(), AtomicU64::new(0));
        Arrival { pager, run, errand, begun: Instant::now(), outcome, wrote }
    }

    /// Records the source's outcome, once.
    fn record(&self, outcome: Result<(), SourceError>) {
        let _ = self.outcome.set(outcome);
    }

    /// Returns the part of it that records the outcome.
    pub(crate) fn recorder(self: Arc<Self>) -> Recorder {
        Recorder(self)
    }
}

/// Records the outcome of a request.
pub(crate) struct Recorder(Arc<Arrival>);

impl Recorder {
    pub(crate) fn record(self, outcome: Result<(), SourceError>) {
        self.0.record(outcome);
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // Without effect after `record`.
        if thread::panicking() {
            self.0.record(Err(SourceError::Panicked));
        }
    }
}

impl Lender for Arrival {
    fn take_back(&self, wrote: usize) {
        self.wrote.store(wrote as u64, Ordering::Relaxed);
    }

    fn is_wanted(&self) -> bool {
        !self.pager.bitmap().is_stopped()
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        let Arrival { ref pager, run, errand, begun, .. } = *self;
        let outcome = self.outcome.take().unwrap_or(Err(SourceError::Abandoned));
        // The bytes themselves were written before the loan released this.
        let (wrote, len) = (*self.wrote.get_mut(), run.bytes());
        let short = || if wrote == len { Ok(()) } else { Err(SourceError::Short { wrote, len }) };
        match outcome.and_then(|()| short()) {
            Ok(()) => {
                if errand.is_wanted() && errand.tried.is_none() && len <= MOST_SMALL {
                    pager.stats().delayed(begun.elapsed());
                }
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
