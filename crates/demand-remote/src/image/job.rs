// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests of a pager, divided into parts of one chunk each.

use std::sync::{Arc, Mutex, PoisonError};

use demand_source::{Completer, Destination, Priority, SourceError, to_usize};

use super::error::ImageError;

/// A request whose parts are in progress. It completes when the last part is dropped.
struct Job {
    completer: Mutex<Option<Completer>>,
    failure: Mutex<Option<SourceError>>,
}

impl Drop for Job {
    fn drop(&mut self) {
        let completer = self.completer.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let failure = self.failure.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(completer) = completer {
            completer.complete(failure.map_or(Ok(()), Err));
        }
    }
}

/// A part of a request: bytes of one chunk, and the memory that receives them.
///
/// Dropping the last part of a request completes the request, which calls the pager: no lock may be
/// held. A part that is dropped without an outcome fails its request.
pub(crate) struct Part {
    /// Number of the chunk.
    pub(crate) chunk: u64,
    /// Offset of the bytes in the chunk.
    start: usize,
    pub(crate) priority: Priority,
    /// The memory; it is returned before the request completes.
    destination: Option<Destination<'static>>,
    job: Arc<Job>,
}

impl Part {
    /// Divides a request's ranges, each an offset in the image (bytes) and a destination, into parts
    /// of one chunk.
    pub(crate) fn divide(
        ranges: impl IntoIterator<Item = (u64, Destination<'static>)>,
        chunk_size: u64,
        priority: Priority,
        completer: Completer,
    ) -> Vec<Part> {
        let completer = Mutex::new(Some(completer));
        let job = Arc::new(Job { completer, failure: Mutex::default() });
        let mut parts = Vec::new();
        for (offset, destination) in ranges {
            split(offset, destination, chunk_size, &mut |offset, destination| {
                let (chunk, start) = (offset / chunk_size, to_usize(offset % chunk_size));
                let destination = Some(destination);
                parts.push(Part { chunk, start, priority, destination, job: job.clone() });
            });
        }
        parts
    }

    /// Returns the length of the part, in bytes.
    pub(crate) fn len(&self) -> usize {
        self.destination.as_ref().map_or(0, Destination::len)
    }

    /// Returns the offset of the part in its chunk, in bytes.
    #[cfg(feature = "cache")]
    pub(crate) fn start(&self) -> usize {
        self.start
    }

    /// Returns whether the bytes are still awaited.
    pub(crate) fn is_wanted(&self) -> bool {
        let completer = self.job.completer.lock().unwrap_or_else(PoisonError::into_inner);
        completer.as_ref().is_some_and(Completer::is_awaited)
            && self.destination.as_ref().is_some_and(Destination::is_wanted)
    }

    /// Delivers the part from its chunk's content.
    pub(crate) fn deliver(self, content: &[u8]) {
        let bytes = content.get(self.start..).unwrap_or_default();
        let bytes = bytes.get(..self.len()).unwrap_or_default();
        self.deliver_exactly(bytes);
    }

    /// Delivers the part, which consists of `bytes`.
    pub(crate) fn deliver_exactly(mut self, bytes: &[u8]) {
        if let Some(mut destination) = self.destination.take() {
            destination.write_at(0, bytes);
        }
    }

    /// Delivers zeros.
    pub(crate) fn deliver_zeros(mut self) {
        if let Some(mut destination) = self.destination.take() {
            let len = destination.len();
            write_zeros(&mut destination, 0, len);
        }
    }

    /// Fails the request.
    pub(crate) fn fail(mut self, error: &Arc<ImageError>) {
        let retry = error.retry();
        self.set_failure(SourceError::other(error.clone(), retry));
    }

    /// Reports that the part was withdrawn before it was read.
    pub(crate) fn withdraw(mut self) {
        self.set_failure(SourceError::Withdrawn);
    }

    fn set_failure(&mut self, error: SourceError) {
        self.destination = None;
        self.job.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }
}

/// Divides a destination at the borders of chunks. It halves what is left, since each division adds
/// a level to the destination's lenders.
fn split(
    offset: u64,
    mut destination: Destination<'static>,
    chunk_size: u64,
    each: &mut impl FnMut(u64, Destination<'static>),
) {
    if destination.is_empty() {
        return;
    }
    let first = offset / chunk_size;
    let last = (offset + destination.len() as u64 - 1) / chunk_size;
    if first == last {
        return each(offset, destination);
    }
    let middle = (first + (last - first).div_ceil(2)) * chunk_size;
    let rest = destination.split_off(to_usize(middle - offset));
    split(offset, destination, chunk_size, each);
    split(middle, rest, chunk_size, each);
}

impl Drop for Part {
    fn drop(&mut self) {
        if self.destination.is_some() {
            self.set_failure(SourceError::Abandoned);
        }
    }
}

/// Writes `len` zeros at `offset` (bytes) of a destination.
pub(crate) fn write_zeros(destination: &mut Destination<'_>, offset: usize, len: usize) {
    const ZEROS: [u8; 4096] = [0; 4096];
    for at in (0..len).step_by(ZEROS.len()) {
        destination.write_at(offset + at, &ZEROS[..ZEROS.len().min(len - at)]);
    }
}
