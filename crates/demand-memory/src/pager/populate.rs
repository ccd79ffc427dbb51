// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Populating claimed pages: reads their content from the source into memory.

use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, TryLockError};

use demand_source::{Chunk, Destination, Priority, Request, SourceError, to_usize};

use crate::arrival::Arrival;
use crate::errand::{Errand, Left};
use crate::error::PopulateError;
use crate::extents::{extent_now, pages_of};
use crate::{BackingError, PageRange, Pager};

impl Pager {
    /// Populates claimed pages and returns how many are present on return. The source still works
    /// on the others, or they will be retried.
    pub(super) fn populate(self: &Arc<Self>, run: PageRange, errand: Errand) -> u64 {
        let mut left = run;
        let mut present = 0;
        while !left.is_empty() {
            // This thread holds the claims: a panic in the source's code must not lose them.
            let populate = AssertUnwindSafe(|| self.populate_extent(left, errand));
            let outcome = panic::catch_unwind(populate)
                .unwrap_or(Err(PopulateError::Source(SourceError::Panicked)));
            match outcome {
                Ok((done, bytes_read)) => {
                    // Outside the part that catches panics: present pages must not be retried.
                    let pages = PageRange::new(left.first, done);
                    let arrived = bytes_read.is_some_and(|read| self.publish(pages, errand, read));
                    left = PageRange::new(pages.end(), left.count - done);
                    present += if arrived { done } else { 0 };
                }
                Err(error) => {
                    self.failed(left, Left::Populate, errand, &error);
                    break;
                }
            }
        }
        present
    }

    /// Populates the pages at the beginning of `run` that lie in one extent of the image. Returns
    /// their number and, if their content is already complete, how many bytes of it were read.
    fn populate_extent(
        self: &Arc<Self>,
        run: PageRange,
        errand: Errand,
    ) -> Result<(u64, Option<u64>), PopulateError> {
        let offset = self.image_offset + run.offset();
        let extent = extent_now(&*self.source, offset)?;
        let (pages, hole) = pages_of(extent, offset, run.count);
        let pages = pages.min(self.to_unit_border(run.first).unwrap_or(pages));
        let run = PageRange::new(run.first, pages);
        if hole {
            // New memory reads as zeros, as a hole does.
            self.allocate(run, true)?;
            return Ok((pages, Some(0)));
        }
        if let Some(unit) = self.load_unit(run) {
            return Ok((unit.count, Some(unit.bytes())));
        }
        self.allocate(run, false)?;
        let (address, len) = (self.populate.at(run.offset()), to_usize(run.bytes()));
        // SAFETY: `at` and the range check in `fetch` keep the loan within the populate mapping,
        // which `self` keeps mapped writable during this call. No Rust reference to guest memory is
        // ever created, and this call holds the claims on the pages, so no other thread writes
        // them.
        let mut destination = unsafe { Destination::new(address, len, None) };
        if let Some(read) = self.source.read_now(offset, &mut destination) {
            read.and_then(|()| destination.check_filled())?;
            return Ok((pages, Some(run.bytes())));
        }
        // A page that cannot be allocated must fail here, not as a signal in a thread of the
        // source.
        self.allocate(run, true)?;
        let arrival = Arc::new(Arrival::new(self.clone(), run, errand));
        // SAFETY: as above; `arrival` keeps the mapping alive, and the pages stay claimed until it
        // is dropped, which happens after the loan has ended.
        let destination = unsafe { Destination::new(address, len, Some(arrival.clone())) };
        let priority = if errand.is_wanted() { Priority::Demand } else { Priority::Fill };
        let request = Request { priority, chunks: vec![Chunk { offset, destination }] };
        let recorder = arrival.recorder();
        let record = move |outcome| recorder.record(outcome);
        // A panic drops the request and `record`, and so the arrival, which reports it.
        let submit = AssertUnwindSafe(|| self.source.submit(request).then(record));
        let _ = panic::catch_unwind(submit);
        if !self.looked_at.is_completed() && self.bitmap.first_missing(run).is_some() {
            // The source may never answer.
            self.looked_at.call_once(|| self.retrier.look_at(self));
        }
        // A fault that came after the claim has raised nothing yet.
        if priority == Priority::Fill && self.bitmap.is_wanted(run) {
            self.raise(run);
        }
        Ok((pages, None))
    }

    /// Returns the number of pages up to the next unit, which may be created as a whole. `None` at
    /// the beginning of a unit, and without a loader.
    fn to_unit_border(&self, first: u64) -> Option<u64> {
        self.unit_loader.get()?;
        match first % self.unit_pages() {
            0 => None,
            within => Some(self.unit_pages() - within),
        }
    }

    /// Creates the unit at the beginning of `run` together with its content. Returns `None` if the
    /// run, which is data throughout, does not begin with a whole unit, or if the unit cannot be
    /// created like this, for example because it exists.
    fn load_unit(&self, run: PageRange) -> Option<PageRange> {
        let (loader, allocated) = (self.unit_loader.get()?, self.allocated.as_ref()?);
        let unit = PageRange::new(run.first, self.unit_pages());
        if !unit.first.is_multiple_of(unit.count) || run.count < unit.count {
            return None;
        }
        let index = unit.first / unit.count;
        let (word, bit) = (&allocated[to_usize(index / 64)], 1 << (index % 64));
        if word.load(Ordering::Relaxed) & bit != 0 {
            return None;
        }
        let content = self.source.mapped(self.image_offset + unit.offset(), unit.bytes())?;
        // Longer content would reach into pages that other threads have claimed.
        if content.len() as u64 != unit.bytes() {
            return None;
        }
        let _loading = self.loading.read().unwrap_or_else(PoisonError::into_inner);
        loader.load(unit.offset(), content).ok()?;
        word.fetch_or(bit, Ordering::Relaxed);
        // Checked after the last byte was read. If the source has changed, the bits stay set, and
        // the ordinary read reports the cause.
        self.source.is_intact().then(|| {
            self.bitmap.mark_populated(unit);
            unit
        })
    }

    /// Ensures that memory for `run` exists. Without `always`, pages of ordinary shared memory are
    /// left to their first write.
    fn allocate(&self, run: PageRange, always: bool) -> Result<(), BackingError> {
        let Some(allocated) = &self.allocated else {
            return if always { self.backing.allocate(run) } else { Ok(()) };
        };
        let unit = self.unit_pages();
        for index in run.first / unit..run.end().div_ceil(unit) {
            let (word, bit) = (&allocated[to_usize(index / 64)], 1 << (index % 64));
            if word.load(Ordering::Relaxed) & bit == 0 {
                // Two threads may both get here: allocating an existing unit changes nothing.
                self.backing.allocate(PageRange::new(index * unit, unit))?;
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Returns whether no unit is being created at this moment. If so, every page that was written
    /// in a unit created earlier is found by [`BitmapReader::is_populated`].
    pub(crate) fn is_no_unit_loading(&self) -> bool {
        !matches!(self.loading.try_write(), Err(TryLockError::WouldBlock))
    }
}
