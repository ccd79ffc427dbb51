// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bitmap of missing pages, as a source may see it.

use std::fs::File;
use std::sync::{Arc, Weak};

/// The missing pages of a region of memory that is filled from an image, as a memfd that can only
/// be read: see [`PageSource::share_missing`](crate::PageSource::share_missing).
///
/// The file has a little-endian word of 64 bits for each 64 pages. A bit is set while its page, of
/// 4096 bytes, is missing; once clear, it stays clear. It does not keep the memory's bitmap alive.
#[derive(Clone, Debug)]
pub struct MissingPages {
    image_offset: u64,
    pages: u64,
    words: Weak<File>,
}

impl MissingPages {
    /// Describes the bitmap of a region of this many pages, whose first one is at `image_offset`, in
    /// bytes.
    pub fn new(image_offset: u64, pages: u64, words: &Arc<File>) -> Self {
        MissingPages { image_offset, pages, words: Arc::downgrade(words) }
    }

    /// Returns the offset in the image of the region's first page, in bytes.
    pub fn image_offset(&self) -> u64 {
        self.image_offset
    }

    /// Returns the number of pages of the region.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Returns the memfd; `None` if the region is gone.
    pub fn words(&self) -> Option<Arc<File>> {
        self.words.upgrade()
    }
}
