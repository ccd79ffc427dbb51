// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Takes pages whose content has not arrived out of the page tables of other processes.

use std::sync::Arc;

use crate::{BackingError, FetchError, PAGE_SIZE, PageRange, Pager, Path, Waiter};

/// Pages that claims are held off for at a time, unless a unit has more: 64 MiB.
const CHUNK: u64 = (64 << 20) / PAGE_SIZE;

/// Why missing pages may still be mapped somewhere.
#[derive(Debug, thiserror::Error)]
pub enum UnmapError {
    /// They could not be removed from the memory object.
    #[error(transparent)]
    Remove(#[from] BackingError),
    /// They belong to a unit that exists rightly, and its other pages did not arrive.
    #[error(transparent)]
    Fetch(#[from] FetchError),
}

impl Pager {
    /// Unmaps each missing page from every process that has the memory object mapped, so that the
    /// next access to it there is a fault.
    ///
    /// It is for a mapping that is trapped from now on and was not before: another process may have
    /// touched pages there (`mlockall` and `MAP_POPULATE` do), which are zeros that nothing traps
    /// any more. Units of which no page is present or claimed are removed from the memory object.
    /// The pages of others are fetched, and waited for: only units that exist already are
    /// concerned, so where no process has touched any, nothing is done.
    ///
    /// # Errors
    ///
    /// [`UnmapError`]; missing pages may then still be mapped.
    pub fn unmap_missing(self: &Arc<Self>, waiter: &Arc<Waiter>) -> Result<(), UnmapError> {
        if self.bitmap().is_complete() {
            return Ok(());
        }
        let (unit, pages) = (self.unit_pages(), self.pages());
        let mut kept = Vec::new();
        let mut from = 0;
        while let Some(existing) = self.backing().next_existing(from)? {
            let existing = existing.intersect(PageRange::new(from, pages - from));
            if existing.is_empty() {
                break;
            }
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
            self.ensure(units, Path::BackEnd, waiter)?;
        }
        Ok(())
    }
}
