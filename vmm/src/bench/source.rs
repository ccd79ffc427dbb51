// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The source of the measured pages.

use std::path::PathBuf;
use std::sync::Arc;

use demand_memory::{PAGE_SIZE, to_usize};
use demand_source::{
    Completion, Destination, Extent, LocalFile, PageSource, Request, SourceError, ZeroPadded,
};

use super::touches::scatter;

/// Number of pages in the hot buffer: few enough for a cache, and prime, so that pages at the same
/// offset in two units differ.
const HOT_PAGES: u64 = 61;

/// The source of the measured pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceOption {
    /// A small buffer in memory, used repeatedly, so that the cost of the fault dominates.
    Hot,
    /// A raw image.
    File(PathBuf),
}

impl SourceOption {
    /// Returns the source's name in reports.
    pub fn name(&self) -> String {
        match self {
            SourceOption::Hot => "hot".into(),
            SourceOption::File(path) => path.display().to_string(),
        }
    }

    /// Opens the source with a size of `size` bytes; an image has its own, in whole pages.
    ///
    /// # Errors
    ///
    /// If the image cannot be opened.
    pub(crate) fn open(&self, size: u64) -> Result<Arc<dyn PageSource>, SourceError> {
        Ok(match self {
            SourceOption::Hot => Arc::new(HotBuffer::new(size)),
            SourceOption::File(path) => ZeroPadded::to_pages(Arc::new(LocalFile::open(path)?)),
        })
    }
}

/// A source that copies from a buffer that stays in the processor's cache.
struct HotBuffer {
    size: u64,
    bytes: Box<[u8]>,
}

impl HotBuffer {
    fn new(size: u64) -> Self {
        let words = 1..=HOT_PAGES * PAGE_SIZE / 8;
        let bytes = words.flat_map(|word| scatter(word).to_le_bytes()).collect();
        HotBuffer { size, bytes }
    }
}

impl PageSource for HotBuffer {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent(&self, _offset: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: self.size })
    }

    fn submit(&self, mut request: Request) -> Completion {
        for chunk in &mut request.chunks {
            let _ = self.read_now(chunk.offset, &mut chunk.destination);
        }
        Completion::ready(Ok(()))
    }

    fn read_now(
        &self,
        offset: u64,
        destination: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        let mut at = 0;
        while at < destination.len() {
            let from = to_usize((offset + at as u64) % self.bytes.len() as u64);
            let len = (self.bytes.len() - from).min(destination.len() - at);
            destination.write_at(at, &self.bytes[from..from + len]);
            at += len;
        }
        Some(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hot_buffer_pages_differ_and_repeat() {
        let source = HotBuffer::new(1 << 20);
        let page = |index: u64| {
            let mut bytes = vec![0; 4096];
            let mut destination = Destination::from(&mut bytes[..]);
            source.read_through(index * PAGE_SIZE, &mut destination).unwrap();
            drop(destination);
            bytes
        };
        assert!(page(0) != page(1) && page(0) != page(512) && page(0) == page(HOT_PAGES));
        let mut two = vec![0; 8192];
        source.read_through(60 * PAGE_SIZE, &mut Destination::from(&mut two[..])).unwrap();
        assert!(two[..4096] == page(60) && two[4096..] == page(61));
    }
}
