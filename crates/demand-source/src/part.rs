// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests divided into parts that are read one by one, in any order.

use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::{Completer, Completion, Destination, Priority, Request, SourceError};

/// A part of a request, such as one message of a protocol can ask for.
///
/// The request succeeds with its last part, and fails with the first part that fails; a part that
/// is dropped fails it, too. Its outcome takes effect when all parts are over.
///
/// # Examples
///
/// ```
/// use demand_source::{Chunk, Destination, Part, Priority, Request};
///
/// let (destination, bytes) = Destination::owned(vec![0; 10_000]);
/// let chunks = vec![Chunk { offset: 4096, destination }];
/// let request = Request { priority: Priority::Demand, chunks };
/// let (parts, completion) = Part::all_of(request, 4096);
/// assert_eq!(parts.iter().map(Part::len).collect::<Vec<_>>(), [4096, 4096, 1808]);
/// for mut part in parts.into_iter().rev() {
///     let content = vec![7; part.len()];
///     part.destination().write_at(0, &content);
///     part.succeed();
/// }
/// completion.wait().unwrap();
/// assert_eq!(bytes.take().unwrap(), [7; 10_000]);
/// ```
pub struct Part {
    // Dropped before `whole`: the memory goes back before the outcome takes effect.
    destination: Destination<'static>,
    offset: u64,
    priority: Priority,
    whole: Arc<Whole>,
}

/// The request that a part belongs to.
struct Whole {
    completer: Option<Completer>,
    /// Number of parts that have not succeeded.
    left: AtomicUsize,
    /// The first failure.
    failure: Mutex<Option<SourceError>>,
}

impl Whole {
    fn fail(&self, error: SourceError) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(error);
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        let Some(completer) = self.completer.take() else { return };
        let failure = self.failure.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let outcome = match failure {
            Some(error) => Err(error),
            None if *self.left.get_mut() == 0 => Ok(()),
            None => Err(SourceError::Abandoned),
        };
        // The panic hook has already reported a panic of the callback.
        let _ = panic::catch_unwind(AssertUnwindSafe(|| completer.complete(outcome)));
    }
}

impl Part {
    /// Divides a request into parts of at most `most` bytes each.
    pub fn all_of(request: Request, most: usize) -> (Vec<Part>, Completion) {
        let Request { priority, chunks } = request;
        let mut pieces = Vec::new();
        for chunk in chunks {
            divide(chunk.offset, chunk.destination, most, &mut pieces);
        }
        let (completer, completion) = Completion::pair();
        let whole = Arc::new(Whole {
            completer: Some(completer),
            left: AtomicUsize::new(pieces.len()),
            failure: Mutex::default(),
        });
        (Part::of(pieces, priority, &whole), completion)
    }

    fn of(
        pieces: Vec<(u64, Destination<'static>)>,
        priority: Priority,
        whole: &Arc<Whole>,
    ) -> Vec<Part> {
        let part = |(offset, destination)| {
            let whole = whole.clone();
            Part { destination, offset, priority, whole }
        };
        pieces.into_iter().map(part).collect()
    }

    /// Divides a part that is not written yet into parts of demand, of at most `most` bytes each.
    ///
    /// # Panics
    ///
    /// If the part has to be divided, and bytes of it are written.
    pub fn raise(self, most: usize) -> Vec<Part> {
        let Part { destination, offset, whole, .. } = self;
        let mut pieces = Vec::new();
        divide(offset, destination, most, &mut pieces);
        whole.left.fetch_add(pieces.len() - 1, Ordering::Relaxed);
        Part::of(pieces, Priority::Demand, &whole)
    }

    /// Gives the part, which may be written in part, the priority of demand.
    pub fn set_demand(&mut self) {
        self.priority = Priority::Demand;
    }

    /// Returns the offset in the image, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the number of bytes.
    pub fn len(&self) -> usize {
        self.destination.len()
    }

    /// Returns whether the part has no bytes.
    pub fn is_empty(&self) -> bool {
        self.destination.is_empty()
    }

    /// Returns the urgency.
    pub fn priority(&self) -> Priority {
        self.priority
    }

    /// Returns the memory that receives the bytes.
    pub fn destination(&mut self) -> &mut Destination<'static> {
        &mut self.destination
    }

    /// Returns whether the part touches these bytes of the image.
    pub fn touches(&self, offset: u64, len: u64) -> bool {
        let end = self.offset.saturating_add(self.destination.len() as u64);
        self.offset < offset.saturating_add(len) && offset < end
    }

    /// Returns a number that all living parts of the same request share, and no others.
    pub fn request(&self) -> usize {
        Arc::as_ptr(&self.whole).addr()
    }

    /// Returns whether the bytes are still wanted, and can still make the request succeed.
    pub fn is_wanted(&self) -> bool {
        let failed = || self.whole.failure.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        self.whole.completer.as_ref().is_some_and(Completer::is_awaited)
            && self.destination.is_wanted()
            && !failed()
    }

    /// Ends the part, which is written. The callback of the request's completion may be called.
    pub fn succeed(self) {
        let Part { destination, whole, .. } = self;
        let filled = destination.check_filled();
        drop(destination);
        match filled {
            Ok(()) => drop(whole.left.fetch_sub(1, Ordering::AcqRel)),
            Err(error) => whole.fail(error),
        }
    }

    /// Ends the part with a failure, which is the request's if it is the first. The callback of the
    /// request's completion may be called.
    pub fn fail(self, error: SourceError) {
        self.whole.fail(error);
    }
}

impl fmt::Debug for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut part = f.debug_struct("Part");
        part.field("offset", &self.offset).field("len", &self.len());
        part.field("priority", &self.priority).finish_non_exhaustive()
    }
}

/// Divides a range into pieces of at most `most` bytes.
fn divide(
    offset: u64,
    mut destination: Destination<'static>,
    most: usize,
    pieces: &mut Vec<(u64, Destination<'static>)>,
) {
    if destination.len() <= most {
        pieces.push((offset, destination));
        return;
    }
    // In halves: each division adds a layer to the loan.
    let at = destination.len().div_ceil(most) / 2 * most;
    let rest = destination.split_off(at);
    divide(offset, destination, most, pieces);
    divide(offset + at as u64, rest, most, pieces);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Chunk, OwnedBytes};

    fn request(priority: Priority, offset: u64, len: usize) -> (Request, OwnedBytes) {
        let (destination, bytes) = Destination::owned(vec![0; len]);
        (Request { priority, chunks: vec![Chunk { offset, destination }] }, bytes)
    }

    #[test]
    fn request_succeeds_with_its_last_part() {
        let (asked, bytes) = request(Priority::Fill, 100, 3 << 20);
        let (parts, completion) = Part::all_of(asked, 1 << 20);
        let parts: Vec<_> = parts.into_iter().flat_map(|part| part.raise(256 << 10)).collect();
        assert_eq!(parts.len(), 12);
        let mut at = 100;
        for mut part in parts {
            assert_eq!((part.offset(), part.priority()), (at, Priority::Demand));
            at += part.len() as u64;
            let content = vec![7; part.len()];
            part.destination().write_at(0, &content);
            part.succeed();
        }
        completion.wait().unwrap();
        assert_eq!(bytes.take().unwrap(), vec![7; 3 << 20]);
    }

    #[test]
    fn request_fails_with_its_first_failure() {
        let (asked, _bytes) = request(Priority::Demand, 0, 1 << 20);
        let (mut parts, completion) = Part::all_of(asked, 256 << 10);
        let last = parts.pop().unwrap();
        parts.pop().unwrap().fail(SourceError::Withdrawn);
        assert!(!last.is_wanted());
        last.fail(SourceError::Panicked);
        drop(parts);
        assert!(matches!(completion.wait(), Err(SourceError::Withdrawn)));
    }

    #[test]
    fn unfinished_parts_are_no_success() {
        let (asked, _bytes) = request(Priority::Demand, 0, 4096);
        let (parts, completion) = Part::all_of(asked, 4096);
        parts.into_iter().for_each(Part::succeed);
        assert!(matches!(completion.wait(), Err(SourceError::Short { .. })));
        let (asked, _bytes) = request(Priority::Demand, 0, 4096);
        let (parts, completion) = Part::all_of(asked, 4096);
        drop(parts);
        assert!(matches!(completion.wait(), Err(SourceError::Abandoned)));
    }
}
