// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `PageSource`, the trait that every source of pages implements, and the types of its requests.

use crate::{Completion, Destination, MappedBytes, MissingPages, OtherSources, SourceError};

/// The urgency of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Background fill: no thread waits for it.
    Fill,
    /// A fault: a thread waits for the pages. A demand request overtakes all queued fill.
    Demand,
}

/// A stretch of an image that is all data or all hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Bytes that must be read.
    Data {
        /// First byte after the extent.
        end: u64,
    },
    /// Bytes known to be zero without a read.
    Hole {
        /// First byte after the extent.
        end: u64,
    },
}

impl Extent {
    /// Returns the first byte after the extent, as an offset in the image.
    pub fn end(&self) -> u64 {
        match *self {
            Extent::Data { end } | Extent::Hole { end } => end,
        }
    }

    /// Returns whether the extent is known to be zero.
    pub fn is_hole(&self) -> bool {
        matches!(self, Extent::Hole { .. })
    }
}

/// One range of the image, and the memory that receives its bytes.
#[derive(Debug)]
pub struct Chunk {
    /// Offset in the image, in bytes. The length of the range is the destination's.
    pub offset: u64,
    /// The memory that receives the bytes.
    pub destination: Destination<'static>,
}

/// A pager's request to a source: ranges that succeed or fail together.
#[derive(Debug)]
pub struct Request {
    /// The urgency of the request.
    pub priority: Priority,
    /// The ranges to read.
    pub chunks: Vec<Chunk>,
}

/// A source of pages: the image that demand-paged memory is filled from.
///
/// An image is an array of bytes that does not change while a source serves it.
///
/// [`submit`](Self::submit) must return quickly: the threads that serve faults call it. A source
/// that can only block is wrapped in [`Threaded`](crate::Threaded).
///
/// # Examples
///
/// A source that generates its content:
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
    /// Returns the image's size, in bytes.
    fn size(&self) -> u64;

    /// Returns the extent at `offset` (bytes) of the image. It may wait for the storage: threads
    /// that must not wait call [`extent_now`](Self::extent_now).
    ///
    /// # Errors
    ///
    /// The source's errors; the caller treats them like a failed read.
    fn extent(&self, offset: u64) -> Result<Extent, SourceError>;

    /// Returns the [`extent`](Self::extent) without waiting for the storage, for threads that serve
    /// faults, or `None` if that is not possible. After `None` the caller reads the range, even if
    /// it is a hole. A source whose `extent` may wait must implement this method.
    ///
    /// # Errors
    ///
    /// The same as those of `extent`.
    fn extent_now(&self, offset: u64) -> Option<Result<Extent, SourceError>> {
        Some(self.extent(offset))
    }

    /// Starts a request. Its outcome arrives through the completion, from any thread, after every
    /// destination has been filled and dropped, or the request has failed. The outcome takes effect
    /// only when all destinations are dropped; if one of them was not filled by then, success
    /// becomes [`SourceError::Short`].
    fn submit(&self, request: Request) -> Completion;

    /// Gives the queued fill requests that touch these `len` bytes the priority of demand: a thread
    /// waits for them now. It must return as quickly as [`submit`](Self::submit). The default does
    /// nothing, which suits a source that queues no fill behind other requests. A source that wraps
    /// another one passes the call on.
    fn raise(&self, _offset: u64, _len: u64) {}

    /// Gives the source the others of its image, of which [`Replicas`](crate::Replicas) consists:
    /// it may ask one of them once more for what a thread waits for unusually long. The default
    /// ignores them.
    fn set_others(&self, _others: OtherSources) {}

    /// Gives the source a view of the missing pages of a region that is filled from it. A pager calls
    /// it for each region, before its first request. The default does nothing. A source that wraps
    /// another one of the same image passes the call on.
    fn share_missing(&self, _missing: &MissingPages) {}

    /// Reads on the calling thread if that takes no longer than a function call, which avoids the
    /// bookkeeping of a request. The threads that serve faults call it, so it returns `None`
    /// wherever it would have to wait for the storage; the default always returns `None`. After
    /// `None` the content of the destination is unspecified.
    fn read_now(
        &self,
        _offset: u64,
        _destination: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        None
    }

    /// Returns the `len` bytes at `offset` where they are mapped in this process, or a copy that
    /// the source had to make anyway. Returns `None` if neither is possible without waiting for the
    /// storage; the default always returns `None`. `offset` and `len` are multiples of 4096.
    fn mapped(&self, _offset: u64, _len: u64) -> Option<MappedBytes<'_>> {
        None
    }

    /// Returns whether the bytes that [`mapped`](Self::mapped) returned, and that have been read
    /// since, are the image's. They are not if the file has shrunk: the remainder of its last page
    /// then reads as zeros.
    fn is_intact(&self) -> bool {
        true
    }

    /// Reads `destination.len()` bytes at `offset` and waits for them. It is for checks and tools,
    /// not for threads that serve faults.
    ///
    /// # Errors
    ///
    /// The source's errors.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A source that writes one byte at once, or later, and reports success.
    struct OneByte {
        now: bool,
    }

    impl PageSource for OneByte {
        fn size(&self) -> u64 {
            4096
        }
        fn extent(&self, _: u64) -> Result<Extent, SourceError> {
            Ok(Extent::Data { end: 4096 })
        }
        fn submit(&self, mut request: Request) -> Completion {
            request.chunks[0].destination.write_at(7, &[1]);
            Completion::ready(Ok(()))
        }
        fn read_now(&self, _: u64, to: &mut Destination<'_>) -> Option<Result<(), SourceError>> {
            to.write_at(7, &[1]);
            self.now.then_some(Ok(()))
        }
    }

    #[test]
    fn short_success_is_found_by_read_through() {
        for now in [true, false] {
            let mut page = [0; 4096];
            let read = OneByte { now }.read_through(0, &mut Destination::from(&mut page[..]));
            assert!(matches!(read, Err(SourceError::Short { wrote: 1, len: 4096 })), "{read:?}");
        }
    }
}
