// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests of the pager, divided into pieces that each take one message.

use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use demand_source::{Completer, Completion, Destination, Priority, Request, SourceError, to_usize};

use super::error::NbdErrorKind;
use super::handshake::Export;

/// Most bytes of a piece of demand.
const DEMAND_PIECE: u64 = 256 << 10;
/// Most bytes of a piece of fill.
const FILL_PIECE: u64 = 1 << 20;
/// Unit of the pieces, in bytes.
const PAGE: u64 = 4096;

/// The sizes of pieces.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    /// Size of the export, in bytes.
    pub(crate) size: u64,
    /// Requests begin and end at multiples of it (bytes), a power of two.
    least: u64,
    demand: usize,
    fill: usize,
}

impl Geometry {
    pub(crate) fn new(export: &Export) -> Self {
        let (least, most) = (u64::from(export.blocks.least), u64::from(export.blocks.most));
        // A piece may begin and end within a block, which is then read as a whole.
        let most = most - if least > 1 { 2 * least } else { 0 };
        let limit = |bytes: u64| to_usize(bytes.min(most) / PAGE * PAGE).max(to_usize(PAGE));
        Geometry { size: export.size, least, demand: limit(DEMAND_PIECE), fill: limit(FILL_PIECE) }
    }

    /// Checks that another connection reaches the same export, and takes the same pieces.
    pub(crate) fn check(&self, now: &Export) -> Result<(), NbdErrorKind> {
        let check = |what, was: u64, now: u64, fits| {
            if fits { Ok(()) } else { Err(NbdErrorKind::Changed { what, was, now }) }
        };
        let (least, most) = (u64::from(now.blocks.least), u64::from(now.blocks.most));
        check("size", self.size, now.size, self.size == now.size)?;
        check("least block size", self.least, least, least <= self.least)?;
        // The largest range around a piece.
        let largest = self.fill as u64 + if self.least > 1 { 2 * self.least } else { 0 };
        check("largest read", largest, most, largest <= most)
    }

    /// Returns the most bytes of a piece.
    pub(crate) fn most(&self, priority: Priority) -> usize {
        match priority {
            Priority::Demand => self.demand,
            Priority::Fill => self.fill,
        }
    }

    /// Returns the range of whole blocks around a range.
    pub(crate) fn blocks(&self, offset: u64, len: u64) -> Range<u64> {
        let start = offset & !(self.least - 1);
        // It cannot overflow: exports are no larger than files.
        let end = (offset + len).next_multiple_of(self.least);
        start..end.min(self.size)
    }
}

/// A part of a request, read by one message. Dropped unfinished, it fails its request.
pub(crate) struct Piece {
    // Dropped before `whole`: the memory goes back before the outcome takes effect.
    destination: Destination<'static>,
    /// Offset in the image, in bytes.
    offset: u64,
    /// The range to ask for: all of the piece, and what its blocks have around it.
    pub(crate) range: Range<u64>,
    pub(crate) priority: Priority,
    whole: Arc<Whole>,
}

/// The request that a piece is a part of.
struct Whole {
    completer: Option<Completer>,
    /// Number of pieces that have not succeeded.
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

impl Piece {
    /// Divides a request into pieces. The caller has checked that its ranges lie in the image.
    pub(crate) fn all_of(request: Request, geometry: &Geometry) -> (Vec<Piece>, Completion) {
        let Request { priority, chunks } = request;
        let mut parts = Vec::new();
        for chunk in chunks {
            divide(chunk.offset, chunk.destination, geometry.most(priority), &mut parts);
        }
        let (completer, completion) = Completion::pair();
        let whole = Arc::new(Whole {
            completer: Some(completer),
            left: AtomicUsize::new(parts.len()),
            failure: Mutex::default(),
        });
        let piece = |(offset, destination): (u64, Destination<'static>)| {
            let range = geometry.blocks(offset, destination.len() as u64);
            Piece { destination, offset, range, priority, whole: whole.clone() }
        };
        (parts.into_iter().map(piece).collect(), completion)
    }

    /// Divides the piece of a request that is wanted now into pieces of demand.
    pub(crate) fn raise(self, geometry: &Geometry) -> Vec<Piece> {
        let Piece { destination, offset, whole, .. } = self;
        let mut parts = Vec::new();
        divide(offset, destination, geometry.demand, &mut parts);
        whole.left.fetch_add(parts.len() - 1, Ordering::Relaxed);
        let piece = |(offset, destination): (u64, Destination<'static>)| {
            let range = geometry.blocks(offset, destination.len() as u64);
            let priority = Priority::Demand;
            Piece { destination, offset, range, priority, whole: whole.clone() }
        };
        parts.into_iter().map(piece).collect()
    }

    /// Returns whether the piece touches these bytes.
    pub(crate) fn touches(&self, offset: u64, len: u64) -> bool {
        let end = self.offset.saturating_add(self.destination.len() as u64);
        self.offset < offset.saturating_add(len) && offset < end
    }

    /// Returns the identity of the request.
    pub(crate) fn request(&self) -> usize {
        Arc::as_ptr(&self.whole).addr()
    }

    /// Returns whether the bytes are still wanted, and can still make the request succeed.
    pub(crate) fn is_wanted(&self) -> bool {
        let failed = || self.whole.failure.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        self.whole.completer.as_ref().is_some_and(Completer::is_awaited)
            && self.destination.is_wanted()
            && !failed()
    }

    /// Writes bytes at `offset` (bytes) of the image, without those that lie outside the piece.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        let start = offset.max(self.offset);
        let end = end.min(self.offset + self.destination.len() as u64);
        if start < end {
            let bytes = &bytes[to_usize(start - offset)..to_usize(end - offset)];
            self.destination.write_at(to_usize(start - self.offset), bytes);
        }
    }

    /// Ends the piece, which is written.
    pub(crate) fn succeed(self) {
        let Piece { destination, whole, .. } = self;
        let filled = destination.check_filled();
        drop(destination);
        match filled {
            Ok(()) => drop(whole.left.fetch_sub(1, Ordering::AcqRel)),
            Err(error) => whole.fail(error),
        }
    }

    /// Ends the piece with a failure, which is the request's if it is the first.
    pub(crate) fn fail(self, error: SourceError) {
        self.whole.fail(error);
    }
}

/// Divides a range into parts of at most `most` bytes.
fn divide(
    offset: u64,
    mut destination: Destination<'static>,
    most: usize,
    parts: &mut Vec<(u64, Destination<'static>)>,
) {
    if destination.len() <= most {
        parts.push((offset, destination));
        return;
    }
    // In halves: each division adds a layer to the loan.
    let at = destination.len().div_ceil(most) / 2 * most;
    let rest = destination.split_off(at);
    divide(offset, destination, most, parts);
    divide(offset + at as u64, rest, most, parts);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::handshake::Blocks;
    use demand_source::{Chunk, OwnedBytes};

    fn geometry(least: u32, most: u32) -> Geometry {
        let blocks = Blocks { least, most };
        Geometry::new(&Export { size: (10 << 20) + 5, blocks, several: true })
    }

    fn request(priority: Priority, offset: u64, len: usize) -> (Request, OwnedBytes) {
        let (destination, bytes) = Destination::owned(vec![0; len]);
        (Request { priority, chunks: vec![Chunk { offset, destination }] }, bytes)
    }

    #[test]
    fn pieces_respect_block_sizes() {
        for (least, most, len) in
            [(1, u32::MAX, 256 << 10), (512, 64 << 10, 60 << 10), (65536, 1 << 20, 256 << 10)]
        {
            let geometry = geometry(least, most);
            let (asked, _bytes) = request(Priority::Demand, 4096, 1 << 20);
            let (pieces, _completion) = Piece::all_of(asked, &geometry);
            assert_eq!(pieces[0].destination.len(), len);
            let mut at = 4096;
            for piece in &pieces {
                assert_eq!(piece.offset, at);
                at += piece.destination.len() as u64;
                assert!(piece.range.start <= piece.offset && at <= piece.range.end);
                assert!(piece.range.start.is_multiple_of(least.into()));
                assert!(piece.range.end.is_multiple_of(least.into()));
                assert!(piece.range.end - piece.range.start <= most.into());
            }
            assert_eq!(at, 4096 + (1 << 20));
        }
        assert_eq!(geometry(4096, 1 << 20).blocks(10 << 20, 5), 10 << 20..(10 << 20) + 5);
    }

    #[test]
    fn other_export_is_noticed() {
        let geometry = geometry(512, 64 << 10);
        let export = |size, least, most| {
            let blocks = Blocks { least, most };
            geometry.check(&Export { size, blocks, several: false })
        };
        let size = (10 << 20) + 5;
        export(size, 512, 64 << 10).unwrap();
        export(size, 1, 32 << 20).unwrap();
        let error = export(4096, 512, 64 << 10).unwrap_err().to_string();
        assert!(error.contains("its size was 10485765 bytes, and is 4096"), "{error}");
        for (least, most, what) in [(4096, 64 << 10, "least block"), (512, 32 << 10, "largest")] {
            let error = export(size, least, most).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn request_succeeds_with_its_last_piece() {
        let geometry = geometry(4096, 1 << 20);
        let (asked, bytes) = request(Priority::Fill, 100, 3 << 20);
        let (pieces, completion) = Piece::all_of(asked, &geometry);
        let pieces: Vec<_> = pieces.into_iter().flat_map(|piece| piece.raise(&geometry)).collect();
        assert!(pieces.len() >= 12, "{}", pieces.len());
        for mut piece in pieces {
            let content = vec![7; to_usize(piece.range.end - piece.range.start)];
            piece.write(piece.range.start, &content);
            piece.succeed();
        }
        completion.wait().unwrap();
        assert_eq!(bytes.take().unwrap(), vec![7; 3 << 20]);
    }

    #[test]
    fn request_fails_with_its_first_failure() {
        let geometry = geometry(1, 1 << 20);
        let (asked, _bytes) = request(Priority::Demand, 0, 1 << 20);
        let (mut pieces, completion) = Piece::all_of(asked, &geometry);
        let last = pieces.pop().unwrap();
        pieces.pop().unwrap().fail(SourceError::Withdrawn);
        assert!(!last.is_wanted());
        last.fail(SourceError::Panicked);
        drop(pieces);
        assert!(matches!(completion.wait(), Err(SourceError::Withdrawn)));
        // Unwritten or unfinished pieces are no success.
        let (asked, _bytes) = request(Priority::Demand, 0, 4096);
        let (pieces, completion) = Piece::all_of(asked, &geometry);
        pieces.into_iter().for_each(Piece::succeed);
        assert!(matches!(completion.wait(), Err(SourceError::Short { .. })));
        let (asked, _bytes) = request(Priority::Demand, 0, 4096);
        let (pieces, completion) = Piece::all_of(asked, &geometry);
        drop(pieces);
        assert!(matches!(completion.wait(), Err(SourceError::Abandoned)));
    }
}
