// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finds long waits for pages that the source leaves unanswered, for example when its storage
//! hangs.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::Pager;

/// A longer wait for a page is reported.
const LONG: Duration = Duration::from_secs(10);

/// Measures waits for pages by polling. A [`Retrier`](crate::Retrier) does that for its pagers.
///
/// A wait records no time itself, so that faults get no slower. A failed fetch counts as an answer:
/// the [`Retrier`](crate::Retrier) reports it.
#[derive(Debug, Default)]
pub struct WaitWatch {
    /// The waits, by region and page.
    waits: HashMap<(usize, u64), Seen>,
}

#[derive(Debug)]
struct Seen {
    wait: PageWait,
    /// Whether the fetch had failed, and waited for its next attempt, at the last look.
    failing: bool,
}

impl WaitWatch {
    /// Looks at the waits for pages of these regions, except those of background fill, and returns
    /// the longest of which no failed fetch is known since the previous look. A wait lasts from the
    /// first look that finds it until the page is present, even while its thread is kicked. Each
    /// call must be given the same regions. It does not block.
    pub fn look<'a>(
        &mut self,
        pagers: impl IntoIterator<Item = &'a Arc<Pager>>,
    ) -> Option<PageWait> {
        self.forget_ended();
        let since = Instant::now();
        for pager in pagers {
            for page in pager.bitmap().waited_for() {
                let wait = || PageWait { pager: pager.clone(), page, since };
                self.waits
                    .entry((Arc::as_ptr(pager) as usize, page))
                    .or_insert_with(|| Seen { wait: wait(), failing: false });
            }
        }
        let unanswered = self.waits.values_mut().filter_map(|seen| {
            let failing = seen.wait.pager.is_to_retry(seen.wait.page);
            let failed = std::mem::replace(&mut seen.failing, failing);
            // The next attempt may be running at this moment.
            (!failing && !failed).then_some(&seen.wait)
        });
        unanswered.min_by_key(|wait| wait.since).cloned()
    }

    /// Forgets the waits that have ended, and with them their regions.
    pub(crate) fn forget_ended(&mut self) {
        self.waits.retain(|_, seen| !seen.wait.is_over());
    }
}

/// A wait for a page.
#[derive(Clone, Debug)]
pub struct PageWait {
    pager: Arc<Pager>,
    page: u64,
    since: Instant,
}

impl PageWait {
    /// Returns the offset of the page in the image, in bytes.
    pub fn image_offset(&self) -> u64 {
        self.pager.image_offset_of(self.page)
    }

    /// Returns the time since the wait was first seen.
    pub fn waiting(&self) -> Duration {
        self.since.elapsed()
    }

    /// Returns whether the wait has lasted so long that it should be reported: ten seconds.
    pub fn is_long(&self) -> bool {
        self.waiting() >= LONG
    }

    /// Returns the index of the page in its region.
    pub(crate) fn page(&self) -> u64 {
        self.page
    }

    /// Returns whether the page has become present, or the memory was stopped.
    pub fn is_over(&self) -> bool {
        let bitmap = self.pager.bitmap();
        !bitmap.is_missing(self.page) || bitmap.is_stopped()
    }
}
