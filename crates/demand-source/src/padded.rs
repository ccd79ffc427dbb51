// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image that continues with zeros behind the end of its source.

use std::fmt;
use std::sync::Arc;

use crate::convert::to_usize;
use crate::hash::PAGE_BYTES;
use crate::{
    Completion, Destination, Extent, MappedBytes, MissingPages, PageSource, Request, SourceError,
};

/// A source whose image continues with a hole, which reads as zeros, behind the end of another's.
///
/// A pager pads an image whose length is not a multiple of 4096 bytes to whole pages by itself. It
/// refuses memory that is longer than that, because a truncated image would otherwise start a guest
/// with part of its memory lost: a VMM whose user wants zeros there says so with this type.
///
/// Only the end that the source had at first counts. If its file shrinks later, reads fail, as
/// always.
///
/// # Examples
///
/// ```
/// use demand_source::{Destination, LocalFile, PageSource, ZeroPadded};
/// use std::sync::Arc;
///
/// let file = tempfile::NamedTempFile::new().unwrap();
/// std::fs::write(file.path(), [7; 5000]).unwrap();
/// let image = Arc::new(LocalFile::open(file.path()).unwrap());
/// let image = ZeroPadded::new(image, 1 << 20);
///
/// let mut page = [1; 4096];
/// image.read_through(4096, &mut Destination::from(&mut page[..])).unwrap();
/// assert_eq!(page[..904], [7; 904]);
/// assert_eq!(page[904..], [0; 4096 - 904]);
/// assert!(image.extent(8192).unwrap().is_hole());
/// ```
pub struct ZeroPadded {
    source: Arc<dyn PageSource>,
    /// Size of the source, in bytes.
    end: u64,
    size: u64,
}

impl ZeroPadded {
    /// Pads `source` to `size` bytes. If it has as many by itself, nothing changes.
    pub fn new(source: Arc<dyn PageSource>, size: u64) -> Self {
        let end = source.size();
        ZeroPadded { source, end, size: size.max(end) }
    }

    /// Pads `source` to a multiple of 4096 bytes. Returns `source` itself if that is its size.
    pub fn to_pages(source: Arc<dyn PageSource>) -> Arc<dyn PageSource> {
        let size = source.size();
        match size.checked_next_multiple_of(PAGE_BYTES as u64) {
            Some(padded) if padded > size => Arc::new(ZeroPadded::new(source, padded)),
            _ => source,
        }
    }

    /// Returns how many of the `len` bytes at `offset` lie in the source. Bytes that lie outside
    /// the whole image count as the source's, which refuses them.
    fn inside(&self, offset: u64, len: usize) -> usize {
        let fits = offset.checked_add(len as u64).is_some_and(|end| end <= self.size);
        let inside = self.end.saturating_sub(offset).min(len as u64);
        if fits { to_usize(inside) } else { len }
    }

    fn pad(&self, extent: Extent) -> Extent {
        match extent {
            Extent::Hole { end } if end >= self.end => Extent::Hole { end: self.size },
            Extent::Data { end } => Extent::Data { end: end.min(self.end) },
            hole => hole,
        }
    }

    fn is_padding(&self, offset: u64) -> bool {
        (self.end..self.size).contains(&offset)
    }
}

impl PageSource for ZeroPadded {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        if self.is_padding(offset) {
            return Ok(Extent::Hole { end: self.size });
        }
        self.source.extent(offset).map(|extent| self.pad(extent))
    }

    fn extent_now(&self, offset: u64) -> Option<Result<Extent, SourceError>> {
        if self.is_padding(offset) {
            return Some(Ok(Extent::Hole { end: self.size }));
        }
        Some(self.source.extent_now(offset)?.map(|extent| self.pad(extent)))
    }

    fn submit(&self, mut request: Request) -> Completion {
        for chunk in &mut request.chunks {
            let inside = self.inside(chunk.offset, chunk.destination.len());
            chunk.destination.cut_zeros(inside);
        }
        request.chunks.retain(|chunk| !chunk.destination.is_empty());
        if request.chunks.is_empty() {
            return Completion::ready(Ok(()));
        }
        self.source.submit(request)
    }

    fn raise(&self, offset: u64, len: u64) {
        self.source.raise(offset, len);
    }

    fn share_missing(&self, missing: &MissingPages) {
        self.source.share_missing(missing);
    }

    fn read_now(
        &self,
        offset: u64,
        destination: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        let len = destination.len();
        let inside = self.inside(offset, len);
        if inside == len {
            return self.source.read_now(offset, destination);
        }
        if inside > 0 {
            let mut waits = false;
            let read = destination.fill_part(0, inside, |part| {
                self.source.read_now(offset, part).unwrap_or_else(|| {
                    waits = true;
                    Ok(())
                })
            });
            if waits {
                return None;
            }
            if read.is_err() {
                return Some(read);
            }
        }
        Some(destination.fill_part(inside, len - inside, |part| {
            part.fill_zeros();
            Ok(())
        }))
    }

    fn mapped(&self, offset: u64, len: u64) -> Option<MappedBytes<'_>> {
        let ours = offset.checked_add(len).is_some_and(|end| end <= self.end);
        if ours { self.source.mapped(offset, len) } else { None }
    }

    fn is_intact(&self) -> bool {
        self.source.is_intact()
    }
}

impl fmt::Debug for ZeroPadded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZeroPadded")
            .field("end", &self.end)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockingSource, Chunk, LocalFile, Priority, Threaded};

    /// Bytes of a number that is no multiple of 4096.
    const END: u64 = 10_001;

    fn bytes() -> Vec<u8> {
        (1..=250).cycle().take(to_usize(END)).collect()
    }

    /// A source whose reads always block.
    struct Blocking;

    impl BlockingSource for Blocking {
        fn size(&self) -> u64 {
            END
        }
        fn extent(&self, _: u64) -> Result<Extent, SourceError> {
            // Further than it reaches.
            Ok(Extent::Data { end: u64::MAX })
        }
        fn read(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
            let at = usize::try_from(offset).unwrap();
            match bytes().get(at..at + to.len()) {
                Some(bytes) => to.write_at(0, bytes),
                None => return Err(SourceError::Abandoned),
            }
            Ok(())
        }
    }

    fn sources() -> Vec<Arc<dyn PageSource>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes()).unwrap();
        let memory = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        std::fs::write(memory.path(), bytes()).unwrap();
        vec![
            Arc::new(LocalFile::open(file.path()).unwrap()),
            Arc::new(LocalFile::open(memory.path()).unwrap()),
            Arc::new(Threaded::new(Blocking, 2).unwrap()),
        ]
    }

    fn submit(source: &dyn PageSource, offset: u64, len: usize) -> Result<Vec<u8>, SourceError> {
        let (destination, bytes) = Destination::owned(vec![0xee; len]);
        let chunks = vec![Chunk { offset, destination }];
        source.submit(Request { priority: Priority::Demand, chunks }).wait()?;
        bytes.take()
    }

    #[test]
    fn bytes_behind_the_end_are_zeros() {
        for size in [12_288, 1 << 20] {
            for source in sources() {
                let source = ZeroPadded::new(source, size);
                assert_eq!(source.size(), size);
                let mut model = bytes();
                model.resize(usize::try_from(size).unwrap(), 0);
                // Before the end, across it, just behind it, to the very end.
                for (offset, len) in [(0, 4096), (4096, 8192), (8192, 4096), (END, 7), (0, 12_288)]
                    .into_iter()
                    .chain([(size - 4096, 4096)])
                {
                    let expected = &model[usize::try_from(offset).unwrap()..][..len];
                    assert!(submit(&source, offset, len).unwrap() == expected, "{offset}");
                    let mut read = vec![0xee; len];
                    let mut to = Destination::from(&mut read[..]);
                    if let Some(now) = source.read_now(offset, &mut to) {
                        now.unwrap();
                        to.check_filled().unwrap();
                        assert!(read == expected, "{offset}");
                    }
                }
                submit(&source, size - 1, 2).unwrap_err();
                assert!(source.mapped(8192, 4096).is_none());
                if size > 12_288 {
                    assert_eq!(source.extent(12_288).unwrap(), Extent::Hole { end: size });
                    assert_eq!(
                        source.extent_now(12_288).unwrap().unwrap(),
                        Extent::Hole { end: size }
                    );
                }
                assert_eq!(source.extent(END - 1).unwrap(), Extent::Data { end: END });
            }
        }
    }

    #[test]
    fn hole_at_the_end_continues() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [7; 4096]).unwrap();
        file.as_file().set_len(END).unwrap();
        let source = ZeroPadded::new(Arc::new(LocalFile::open(file.path()).unwrap()), 1 << 20);
        assert_eq!(source.extent(4096).unwrap(), Extent::Hole { end: 1 << 20 });
        assert_eq!(source.extent(0).unwrap(), Extent::Data { end: 4096 });
        // A shrunk file is an error, before and behind its former end.
        file.as_file().set_len(4096).unwrap();
        let error = submit(&source, 8192, 4096).unwrap_err();
        assert!(matches!(error, SourceError::Shrunk { .. }), "{error}");
    }

    #[test]
    fn short_success_of_the_source_is_found() {
        struct Half;
        impl PageSource for Half {
            fn size(&self) -> u64 {
                END
            }
            fn extent(&self, _: u64) -> Result<Extent, SourceError> {
                Ok(Extent::Data { end: END })
            }
            fn submit(&self, _: Request) -> Completion {
                Completion::ready(Ok(()))
            }
            fn read_now(
                &self,
                _: u64,
                to: &mut Destination<'_>,
            ) -> Option<Result<(), SourceError>> {
                to.write_at(0, &[7]);
                Some(Ok(()))
            }
        }
        let source = ZeroPadded::to_pages(Arc::new(Half));
        assert_eq!(source.size(), 12_288);
        let error = submit(&*source, 8192, 4096).unwrap_err();
        let tail = 12_288 - END;
        assert!(matches!(error, SourceError::Short { wrote, len: 4096 } if wrote == tail));
        let mut page = [0; 4096];
        let read = source.read_now(8192, &mut Destination::from(&mut page[..])).unwrap();
        assert!(matches!(read, Err(SourceError::Short { wrote: 1, .. })), "{read:?}");
        // A whole number of pages needs no padding.
        let whole = ZeroPadded::to_pages(source.clone());
        assert!(Arc::ptr_eq(&whole, &source));
    }
}
