// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The requests in flight on a connection, and how much of each has arrived.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use demand_source::{Priority, SourceError};

use super::error::{self, Errno, NbdError, NbdErrorKind, violation};
use super::extents::Query;
use super::piece::Piece;
use super::protocol::Command;

/// Bytes of a read for each of which the server may send a chunk, on average.
const BYTES_PER_CHUNK: u64 = 512;

/// A request to the server.
pub(crate) enum Work {
    Read(Piece),
    Status(Query),
}

impl Work {
    pub(crate) fn command(&self) -> Command {
        match self {
            Work::Read(_) => Command::Read,
            Work::Status(_) => Command::BlockStatus,
        }
    }

    pub(crate) fn range(&self) -> &Range<u64> {
        match self {
            Work::Read(piece) => &piece.range,
            Work::Status(query) => &query.range,
        }
    }

    pub(crate) fn is_wanted(&self) -> bool {
        match self {
            Work::Read(piece) => piece.part().is_wanted(),
            Work::Status(_) => true,
        }
    }

    pub(crate) fn withdraw(self) {
        match self {
            Work::Read(piece) => piece.fail(SourceError::Withdrawn),
            Work::Status(_) => {}
        }
    }

    pub(crate) fn fail(self, error: &Arc<NbdError>) {
        match self {
            Work::Read(piece) => piece.fail(error::shared(error)),
            Work::Status(query) => query.fail(|| error::shared(error)),
        }
    }
}

/// The parts of a range that have arrived, in order.
#[derive(Debug, Default)]
struct Arrived(Vec<Range<u64>>);

impl Arrived {
    /// Adds a range. Returns `false` if a part of it has already arrived.
    fn add(&mut self, range: Range<u64>) -> bool {
        let at = self.0.partition_point(|before| before.end <= range.start);
        if self.0.get(at).is_some_and(|after| after.start < range.end) {
            return false;
        }
        // Chunks mostly arrive in order.
        match at.checked_sub(1).and_then(|before| self.0.get_mut(before)) {
            Some(before) if before.end == range.start => before.end = range.end,
            _ => self.0.insert(at, range),
        }
        true
    }

    fn bytes(&self) -> u64 {
        self.0.iter().map(|range| range.end - range.start).sum()
    }
}

/// A request in flight.
pub(crate) struct Sent {
    pub(crate) work: Work,
    arrived: Arrived,
    /// Chunks that may still arrive.
    chunks: u64,
    /// Whether the answer to a look-up has arrived.
    answered: bool,
    failure: Option<(Errno, String)>,
}

impl Sent {
    fn new(work: Work) -> Self {
        let range = work.range();
        let chunks = 8 + (range.end - range.start).div_ceil(BYTES_PER_CHUNK);
        Sent { work, arrived: Arrived::default(), chunks, answered: false, failure: None }
    }

    /// Counts a chunk.
    pub(crate) fn count(&mut self) -> Result<(), NbdErrorKind> {
        match self.chunks.checked_sub(1) {
            Some(left) => {
                self.chunks = left;
                Ok(())
            }
            None => violation("it divides an answer into too many chunks"),
        }
    }

    /// Accepts a part of the range, which is written next.
    pub(crate) fn accept(&mut self, offset: u64, len: u64) -> Result<(), NbdErrorKind> {
        let Work::Read(piece) = &self.work else {
            return violation("it answers a look-up of extents with data");
        };
        let end = offset.checked_add(len);
        let Some(end) = end.filter(|end| piece.range.start <= offset && *end <= piece.range.end)
        else {
            return violation("it sends bytes outside the range that was asked for");
        };
        if len == 0 {
            return violation("it sends a chunk without bytes");
        }
        if self.arrived.add(offset..end) {
            Ok(())
        } else {
            violation("it sends the same bytes twice")
        }
    }

    /// Writes bytes of a part that was accepted.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        if let Work::Read(piece) = &mut self.work {
            piece.write(offset, bytes);
        }
    }

    /// Returns the look-up, whose answer is about to arrive.
    pub(crate) fn answer(&mut self) -> Result<&mut Query, NbdErrorKind> {
        match &mut self.work {
            Work::Status(_) if self.answered => violation("it answers a look-up of extents twice"),
            Work::Status(query) => {
                self.answered = true;
                Ok(query)
            }
            Work::Read(_) => violation("it answers a read with extents"),
        }
    }

    /// Records an error of the server; the first one counts.
    pub(crate) fn fail(&mut self, error: Errno, message: String) {
        self.failure.get_or_insert((error, message));
    }

    /// Checks the answer as a whole. Returns the server's error, if it sent one.
    pub(crate) fn check(&mut self) -> Result<Option<NbdErrorKind>, NbdErrorKind> {
        let (offset, len) = {
            let range = self.work.range();
            (range.start, range.end - range.start)
        };
        if let Some((error, message)) = self.failure.take() {
            return Ok(Some(NbdErrorKind::Failed { offset, len, error, message }));
        }
        let whole = match self.work {
            Work::Read(_) => self.arrived.bytes() == len,
            Work::Status(_) => self.answered,
        };
        if whole { Ok(None) } else { violation("it ends an answer before it is whole") }
    }
}

/// The requests in flight on a connection.
#[derive(Default)]
pub(crate) struct Flight {
    sent: BTreeMap<u64, Sent>,
    next: u64,
}

impl Flight {
    /// Adds a request, and returns the cookie that its answer must have.
    pub(crate) fn add(&mut self, work: Work) -> u64 {
        let cookie = self.next;
        // It cannot overflow within a million years.
        self.next += 1;
        self.sent.insert(cookie, Sent::new(work));
        cookie
    }

    pub(crate) fn get(&mut self, cookie: u64) -> Result<&mut Sent, NbdErrorKind> {
        match self.sent.get_mut(&cookie) {
            Some(sent) => Ok(sent),
            None => violation("it answers a request that was not made"),
        }
    }

    pub(crate) fn remove(&mut self, cookie: u64) -> Option<Sent> {
        self.sent.remove(&cookie)
    }

    pub(crate) fn len(&self) -> usize {
        self.sent.len()
    }

    /// Returns the number of reads for fill.
    pub(crate) fn fills(&self) -> usize {
        let fill = |sent: &&Sent| match &sent.work {
            Work::Read(piece) => piece.part().priority() == Priority::Fill,
            Work::Status(_) => false,
        };
        self.sent.values().filter(fill).count()
    }

    /// Returns the cookie of the oldest request.
    pub(crate) fn oldest(&self) -> Option<u64> {
        self.sent.first_key_value().map(|(cookie, _)| *cookie)
    }

    /// Removes all requests.
    #[must_use = "requests are failed with no lock held"]
    pub(crate) fn take(&mut self) -> Vec<Work> {
        std::mem::take(&mut self.sent).into_values().map(|sent| sent.work).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_parts_are_found() {
        let mut arrived = Arrived::default();
        for (range, fits) in [
            (10..20, true),
            (30..40, true),
            (20..30, true),
            (0..10, true),
            (39..41, false),
            (5..6, false),
            (0..100, false),
            (40..50, true),
        ] {
            assert_eq!(arrived.add(range.clone()), fits, "{range:?}");
        }
        assert_eq!(arrived.bytes(), 50);
    }
}
