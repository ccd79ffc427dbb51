// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Removes missing pages from the page tables of other processes.

use std::sync::Arc;

use crate::{BackingError, FaultPath, FetchError, PAGE_SIZE, PageRange, Pager, Waiter, to_usize};

/// Pages swept at a time, while claims wait, unless a unit has more: 64 MiB.
const CHUNK: u64 = (64 << 20) / PAGE_SIZE;

/// Errors from unmapping missing pages, some of which may still be mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnmapError {
    /// A failure to remove them from the memory object.
    #[error(transparent)]
    Remove(#[from] BackingError),
    /// A failure to fetch the missing pages of a unit that also has present or claimed ones.
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

/// Bytes read at a time while looking for data: 2 MiB.
const LOOK: u64 = 2 << 20;

impl Pager {
    /// Calls `found` with each page that holds data, in ascending order. It reads those parts of
    /// the memory object that exist, and allocates nothing.
    pub(crate) fn for_each_written(&self, mut found: impl FnMut(u64)) -> Result<(), BackingError> {
        let kind = self.backing().kind();
        let mut bytes = Vec::new();
        let mut from = 0;
        while let Some(existing) = self.next_existing(from)? {
            from = existing.end();
            for first in (existing.first..from).step_by(to_usize(LOOK / PAGE_SIZE)) {
                let pages = PageRange::new(first, (LOOK / PAGE_SIZE).min(from - first));
                bytes.resize(to_usize(pages.bytes()), 0);
                self.read_existing(&mut bytes, pages.offset()).map_err(|source| {
                    let (offset, len) = (pages.offset(), pages.bytes());
                    BackingError::Read { offset, len, kind, source }
                })?;
                let chunks = bytes.chunks(to_usize(PAGE_SIZE));
                let written =
                    (first..).zip(chunks).filter(|(_, page)| page.iter().any(|b| *b != 0));
                written.for_each(|(page, _)| found(page));
            }
        }
        Ok(())
    }

    /// Returns the first pages from `from` on that may exist in the memory object.
    fn next_existing(&self, from: u64) -> Result<Option<PageRange>, BackingError> {
        self.backing().next_existing(PageRange::new(from, self.pages() - from))
    }

    /// Unmaps each missing page from every process that has the memory object mapped, so that the
    /// next access to it there is a fault.
    ///
    /// It serves a mapping that is trapped only from now on: another process may have touched pages
    /// there before (`mlockall` and `MAP_POPULATE` do), and these are zeros that no trap covers any
    /// more. Units of which no page is present or claimed are removed from the memory object. The
    /// missing pages of other units are fetched, and waited for. Only units that already exist are
    /// affected: if no process has touched any, nothing is done.
    ///
    /// # Errors
    ///
    /// [`UnmapError`]; missing pages may then still be mapped.
    pub fn unmap_missing(self: &Arc<Self>, waiter: &Waiter) -> Result<(), UnmapError> {
        if self.bitmap().is_complete() {
            return Ok(());
        }
        let (unit, pages) = (self.unit_pages(), self.pages());
        let mut kept = Vec::new();
        let mut from = 0;
        while let Some(existing) = self.next_existing(from)? {
            let existing = existing.grow_to_units(unit, pages);
            let mut at = existing.first;
            while at < existing.end() {
                let chunk = PageRange::new(at, CHUNK.max(unit).min(existing.end() - at));
                kept.extend(self.claims().sweep(chunk, unit, |run| self.backing().remove(run))?);
                at = chunk.end();
            }
            from = existing.end();
        }
        for units in kept {
            self.ensure(units, FaultPath::BackEnd, waiter)?;
        }
        Ok(())
    }
}
