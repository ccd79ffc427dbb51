// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The trait that every source of pages implements.

use crate::{Completion, Destination, MappedBytes, SourceError};

/// How urgent a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Background fill: nobody waits for it.
    Fill,
    /// Somebody waits: a demand request overtakes all queued fill.
    Demand,
}

/// A stretch of an image with one nature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Bytes that must be read, up to this offset in the image (bytes, exclusive).
    Data {
        /// First byte after the extent.
        end: u64,
    },
    /// Bytes known to be zero without reading them, up to this offset (bytes, exclusive).
    Hole {
        /// First byte after the extent.
        end: u64,
    },
}

impl Extent {
    /// First byte after the extent, as an offset in the image.
    pub fn end(&self) -> u64 {
        match *self {
            Extent::Data { end } | Extent::Hole { end } => end,
        }
    }

    /// Whether the extent is known to be zero.
    pub fn is_hole(&self) -> bool {
        matches!(self, Extent::Hole { .. })
    }
}

/// One range of the image, and where its bytes go.
#[derive(Debug)]
pub struct Chunk {
    /// Offset in the image, in bytes. The length is the destination's.
    pub offset: u64,
    /// The memory that receives the bytes.
    pub destination: Destination<'static>,
}

/// What a pager asks of a source: some ranges, all or nothing.
#[derive(Debug)]
pub struct Request {
    /// How urgent the request is.
    pub priority: Priority,
    /// The ranges to read.
    pub chunks: Vec<Chunk>,
}

/// Where pages come from.
///
/// An image is an immutable array of bytes: nobody writes to it while a source serves it.
///
/// Implement [`submit`](Self::submit) so that it returns quickly: it is called by the threads
/// that serve faults. A source that can only block is wrapped in [`Threaded`](crate::Threaded).
///
/// # Examples
///
/// A source that invents its content:
///
/// ```
/// use demand_source::{Completion, Destination, Extent, PageSource, Request, SourceError};
///
/// struct Ones(u64);
///
/// impl PageSource for Ones {
///     fn size(&self) -> u64 {
///         self.0
///     }
///     fn extent(&self, _offset: u64) -> Result<Extent, SourceError> {
///         Ok(Extent::Data { end: self.0 })
///     }
///     fn submit(&self, request: Request) -> Completion {
///         for mut chunk in request.chunks {
///             let ones = vec![1; chunk.destination.len()];
///             chunk.destination.write_at(0, &ones);
///         }
///         Completion::ready(Ok(()))
///     }
/// }
///
/// let mut page = [0u8; 4096];
/// let source = Ones(1 << 20);
/// source.read_through(0, &mut Destination::from(&mut page[..])).unwrap();
/// assert_eq!(page, [1; 4096]);
/// ```
pub trait PageSource: Send + Sync {
    /// The image's size, in bytes.
    fn size(&self) -> u64;

    /// The extent at `offset` (bytes) of the image, and where it ends. It may wait for the storage:
    /// threads that must not ask [`extent_now`](Self::extent_now).
    ///
    /// # Errors
    ///
    /// Those of the source; the caller treats them like a failed read.
    fn extent(&self, offset: u64) -> Result<Extent, SourceError>;

    /// As [`extent`](Self::extent), without waiting for the storage, for threads that serve
    /// faults; `None` where the answer is not at hand: such a range is read, holes included. A
    /// source whose `extent` may wait must implement it.
    ///
    /// # Errors
    ///
    /// As for `extent`.
    fn extent_now(&self, offset: u64) -> Option<Result<Extent, SourceError>> {
        Some(self.extent(offset))
    }

    /// Starts a request. Its outcome arrives through the completion, from any thread, once every
    /// destination has been filled and dropped, or has failed. It counts once all destinations are
    /// dropped; if one was not filled then, success is [`SourceError::Short`].
    fn submit(&self, request: Request) -> Completion;

    /// Reads on the calling thread what is as near as a function call; `None` (as here) from all
    /// other sources, and wherever the storage would have to be waited for: threads that serve
    /// faults call it. It spares near bytes the bookkeeping of a request. After `None` nothing may
    /// be assumed of the destination's bytes.
    fn read_now(
        &self,
        _offset: u64,
        _destination: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        None
    }

    /// The `len` bytes at `offset` where they lie in this process, if they do and are at hand, or
    /// a copy that the source had to make anyhow; `None` (as here) from all other sources, and
    /// where they cannot be had like that without waiting for the storage. `offset` and `len` are
    /// multiples of 4096.
    fn mapped(&self, _offset: u64, _len: u64) -> Option<MappedBytes<'_>> {
        None
    }

    /// Whether the bytes that [`mapped`](Self::mapped) has given, and that were read since, are
    /// the image's. They are not if a file has shrunk: what remains of its last page is followed by
    /// zeros.
    fn is_intact(&self) -> bool {
        true
    }

    /// Reads `destination.len()` bytes at `offset` and waits for them: for checks and tools, not
    /// for threads that serve faults.
    ///
    /// # Errors
    ///
    /// Those of the source.
    fn read_through(
        &self,
        offset: u64,
        destination: &mut Destination<'_>,
    ) -> Result<(), SourceError> {
        if let Some(result) = self.read_now(offset, destination) {
            return result.and_then(|()| destination.check_filled());
        }
        let (bounce, bytes) = Destination::owned(vec![0; destination.len()]);
        let chunks = vec![Chunk { offset, destination: bounce }];
        self.submit(Request { priority: Priority::Demand, chunks }).wait()?;
        destination.write_at(0, &bytes.take()?);
        Ok(())
    }
}
