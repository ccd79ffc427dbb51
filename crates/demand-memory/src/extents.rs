// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The extents of a source's image and of a memory object, in pages.

use std::io;
use std::panic::{self, AssertUnwindSafe};

use demand_source::{Extent, PageSource, SourceError, extent_of_file};

use crate::{Backing, PAGE_SIZE, PageRange};

/// Returns the extent at `offset` (bytes) of a memory object, up to `end`; `None` if no data
/// follows.
pub(crate) fn extent_of(
    backing: &dyn Backing,
    offset: u64,
    end: u64,
) -> io::Result<Option<Extent>> {
    if let Some(file) = backing.readable_file() {
        return extent_of_file(file, offset, end);
    }
    let existing = backing.next_existing(PageRange::of_bytes(offset, end - offset));
    Ok(existing.map_err(io::Error::other)?.map(|run| match run.offset() {
        first if first > offset => Extent::Hole { end: first },
        _ => Extent::Data { end: run.offset() + run.bytes() },
    }))
}

/// Returns the extent at `offset` (bytes) of the image; data without an end if only waiting for the
/// source could tell.
pub(crate) fn extent_now(source: &dyn PageSource, offset: u64) -> Result<Extent, SourceError> {
    panic::catch_unwind(AssertUnwindSafe(|| source.extent_now(offset)))
        .unwrap_or(Some(Err(SourceError::Panicked)))
        .unwrap_or(Ok(Extent::Data { end: u64::MAX }))
}

/// Returns how many of the `len` bytes at `offset` were data. They have been read, so the source
/// knows its holes by now.
pub(crate) fn data_bytes(source: &dyn PageSource, offset: u64, len: u64) -> u64 {
    let (mut at, mut data, end) = (offset, 0, offset + len);
    while at < end {
        let extent = extent_now(source, at).unwrap_or(Extent::Data { end });
        let until = extent.end().min(end).max(at + 1);
        data += if extent.is_hole() { 0 } else { until - at };
        at = until;
    }
    data
}

/// Returns how many of the `most` pages from `offset` (bytes in the image) lie in the extent found
/// there, and whether they are a hole. If the extent ends within the first page, that page is data,
/// to be read as a whole.
pub(crate) fn pages_of(extent: Extent, offset: u64, most: u64) -> (u64, bool) {
    let pages = extent.end().saturating_sub(offset) / PAGE_SIZE;
    (pages.clamp(1, most), extent.is_hole() && pages > 0)
}
