// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Publishing populated pages, and retrying those that could not be populated or mapped.

use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use demand_source::Retry;

use crate::errand::{Errand, Left, Role, has_more_probes, probe_of};
use crate::error::PopulateError;
use crate::retry::{Attempts, Due, Failed};
use crate::touches::FirstTouches;
use crate::{FaultPath, PageRange, Pager, Published};

impl Pager {
    /// Makes pages present whose content is complete, or holds them until their first touch if they
    /// are background fill's. Returns whether they are present.
    pub(crate) fn publish(
        self: &Arc<Self>,
        run: PageRange,
        errand: Errand,
        bytes_read: u64,
    ) -> bool {
        if errand.path == FaultPath::Fill
            && let Some(touches) = self.touches.get()
        {
            return self.hold(touches, run, errand, bytes_read);
        }
        self.publish_now(run, errand, bytes_read)
    }

    /// Holds those of the pages whose first touch is to be seen, and makes the others present.
    #[cold]
    fn hold(
        self: &Arc<Self>,
        touches: &FirstTouches,
        run: PageRange,
        errand: Errand,
        bytes_read: u64,
    ) -> bool {
        // Before the bits that let another thread publish the pages.
        self.bitmap.mark_populated(run);
        self.stats.read(errand.path, bytes_read);
        self.set_aside.take_back(run);
        let mut present = self.publish_taken(touches.hold(run));
        // Pairs with the fences in `end_touches` and of a waiter that is listed: either this finds
        // the end or the waiter, or that thread finds the held pages.
        fence(Ordering::SeqCst);
        if touches.has_ended() || self.bitmap.is_wanted(run) {
            present += self.publish_held(run);
        }
        self.bitmap.tell_populated(run);
        self.populate_rest(run, errand);
        present == run.count
    }

    /// Publishes the held pages of the range. Returns how many are present now.
    pub(super) fn publish_held(self: &Arc<Self>, range: PageRange) -> u64 {
        self.touches.get().map_or(0, |touches| self.publish_taken(touches.take(range)))
    }

    /// Publishes populated pages, whose content was counted before. Returns how many are present.
    pub(super) fn publish_taken(self: &Arc<Self>, runs: Vec<PageRange>) -> u64 {
        let errand = Errand::new(FaultPath::Fill);
        let publish = |run: &PageRange| self.publish_now(*run, errand, 0);
        runs.into_iter().filter(publish).map(|run| run.count).sum()
    }

    /// Makes pages present whose content is complete. Returns false if they could not be mapped;
    /// the retrier then tries again. The order keeps readers from seeing incomplete pages, and
    /// their writes from being lost: content, populated mark, the guest's armed mapping, missing
    /// bit, waiters.
    fn publish_now(self: &Arc<Self>, run: PageRange, errand: Errand, bytes_read: u64) -> bool {
        if let Some(trap) = self.guest_trap.get() {
            self.bitmap.mark_populated(run);
            if let Err(error) = trap.map_present(run) {
                // Some of the pages may be mapped, and the guest may already have written to them:
                // their content must not be fetched again.
                let left = Left::Publish { bytes_read };
                self.failed(run, left, errand, &PopulateError::Map(error));
                return false;
            }
        }
        let expected = || self.touches.get().map_or(0, |touches| touches.expected_in(run));
        self.stats.arrived(errand.path, run.count, bytes_read, expected);
        self.set_aside.take_back(run);
        if self.bitmap.publish(run) == Published::Last {
            if let Some(loader) = self.unit_loader.get() {
                loader.finish();
            }
            let callbacks = std::mem::take(
                &mut *self.on_complete.lock().unwrap_or_else(PoisonError::into_inner),
            );
            for callback in callbacks {
                // The other callbacks must still run, and the thread serves more than this.
                let _ = panic::catch_unwind(AssertUnwindSafe(callback));
            }
        }
        self.populate_rest(run, errand);
        true
    }

    /// Populates the rest of a failed run once one of its pages has arrived: the source answers, so
    /// it fails only on some of the pages.
    fn populate_rest(self: &Arc<Self>, probe: PageRange, errand: Errand) {
        let Role::Probe { of } = errand.role else { return };
        let rest = Errand { role: Role::Part, ..errand };
        for part in [
            PageRange::new(of.first, probe.first - of.first),
            PageRange::new(probe.end(), of.end() - probe.end()),
        ] {
            if !part.is_empty() {
                self.populate(part, rest);
            }
        }
    }

    /// Handles claimed pages that could not be populated or mapped. They stay missing and claimed,
    /// and faults on them stay open.
    ///
    /// A run on which the source fails is split into halves, down to the pages that fail alone, so
    /// that no other page waits for them. One page is tried first, to learn whether the source
    /// delivers anything: an unavailable source is asked only for the run and for this page. If it
    /// will never deliver that page, a few others are tried before all are given up.
    pub(crate) fn failed(
        self: &Arc<Self>,
        run: PageRange,
        left: Left,
        errand: Errand,
        error: &PopulateError,
    ) {
        if self.bitmap.is_stopped() {
            return;
        }
        self.stats.failed();
        if run.count > 1 && matches!(error, PopulateError::Source(_)) {
            match errand.role {
                Role::Whole => {
                    let probe = Errand { role: Role::Probe { of: run }, ..errand };
                    self.populate(probe_of(run, errand.tried), probe);
                    return;
                }
                Role::Part => {
                    let half = run.count / 2;
                    self.populate(PageRange::new(run.first, half), errand);
                    self.populate(PageRange::new(run.first + half, run.count - half), errand);
                    return;
                }
                Role::Probe { .. } => {}
            }
        }
        if let Role::Probe { of } = errand.role
            && error.retry() == Retry::Never
        {
            let tried = self.attempt(run, errand);
            if has_more_probes(of, tried.count - 1) {
                let errand = Errand { tried: Some(tried), ..errand };
                self.populate(probe_of(of, errand.tried), errand);
                return;
            }
        }
        match (left, errand.role) {
            (Left::Populate, Role::Probe { of }) => self.retry(of, left, errand, error),
            _ => {
                self.retry(run, left, errand, error);
                // The probe has arrived, and only its mapping has failed.
                self.populate_rest(run, errand);
            }
        }
    }

    /// Returns the attempts so far, with the one that has just failed.
    fn attempt(&self, run: PageRange, errand: Errand) -> Attempts {
        let now = Instant::now();
        let mut attempts = errand.tried.unwrap_or(Attempts { count: 0, since: now, wanted: None });
        attempts.count = attempts.count.saturating_add(1);
        if attempts.wanted.is_none()
            && (errand.path != FaultPath::Fill || self.bitmap.is_wanted(run))
        {
            attempts.wanted = Some(if attempts.count == 1 { attempts.since } else { now });
        }
        attempts
    }

    /// Hands claimed pages to the retrier.
    fn retry(self: &Arc<Self>, run: PageRange, left: Left, errand: Errand, error: &PopulateError) {
        let (attempts, retry) = (self.attempt(run, errand), error.retry());
        if matches!(left, Left::Populate) && (run.count == 1 || retry == Retry::Never) {
            self.set_aside.add(run);
        }
        let errand = Errand { tried: Some(attempts), role: Role::Whole, ..errand };
        let failed =
            Failed { error, retry, pages: run, image_offset: self.image_offset_of(run.first) };
        let pager = self.clone();
        self.retrier.failed(failed, attempts, move |due| pager.again(run, left, errand, due));
        // `stop` may have come before the attempt was queued, and must not leave it.
        if self.bitmap.is_stopped() {
            self.retrier.retry_now();
        }
    }

    /// Tries claimed pages again. If the source will never deliver them, it is asked only once an
    /// accessor wants them.
    fn again(self: &Arc<Self>, run: PageRange, left: Left, errand: Errand, due: Due) {
        if self.bitmap.is_stopped() {
            return;
        }
        if due == Due::Look && !self.bitmap.is_wanted(run) {
            let (pager, offset) = (self.clone(), self.image_offset_of(run.first));
            self.retrier.look_later(run, offset, move |due| pager.again(run, left, errand, due));
            return;
        }
        self.stats.retried();
        match left {
            Left::Populate => self.populate(run, errand),
            // The guest may have reached some of the pages: none is held now.
            Left::Publish { bytes_read } => u64::from(self.publish_now(run, errand, bytes_read)),
        };
    }
}
