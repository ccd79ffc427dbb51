// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests of the pager, divided into pieces that each take one message.

use std::ops::Range;

use demand_source::{Completion, Part, Priority, Request, SourceError, to_usize};

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
    part: Part,
    /// The range to ask for: all of the piece, and what its blocks have around it.
    pub(crate) range: Range<u64>,
}

impl Piece {
    /// Divides a request into pieces. The caller has checked that its ranges lie in the image.
    pub(crate) fn all_of(request: Request, geometry: &Geometry) -> (Vec<Piece>, Completion) {
        let most = geometry.most(request.priority);
        let (parts, completion) = Part::all_of(request, most);
        (Piece::of(parts, geometry), completion)
    }

    /// Divides the piece of a request that is wanted now into pieces of demand.
    pub(crate) fn raise(self, geometry: &Geometry) -> Vec<Piece> {
        Piece::of(self.part.raise(geometry.demand), geometry)
    }

    fn of(parts: Vec<Part>, geometry: &Geometry) -> Vec<Piece> {
        let piece = |part: Part| {
            let range = geometry.blocks(part.offset(), part.len() as u64);
            Piece { part, range }
        };
        parts.into_iter().map(piece).collect()
    }

    /// Returns the part of the request.
    pub(crate) fn part(&self) -> &Part {
        &self.part
    }

    /// Writes bytes at `offset` (bytes) of the image, without those that lie outside the piece.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let first = self.part.offset();
        let start = offset.max(first);
        let end = (offset + bytes.len() as u64).min(first + self.part.len() as u64);
        if start < end {
            let bytes = &bytes[to_usize(start - offset)..to_usize(end - offset)];
            self.part.destination().write_at(to_usize(start - first), bytes);
        }
    }

    /// Ends the piece, which is written.
    pub(crate) fn succeed(self) {
        self.part.succeed();
    }

    /// Ends the piece with a failure, which is the request's if it is the first.
    pub(crate) fn fail(self, error: SourceError) {
        self.part.fail(error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::handshake::Blocks;
    use demand_source::{Chunk, Destination, OwnedBytes};

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
            assert_eq!(pieces[0].part.len(), len);
            let mut at = 4096;
            for piece in &pieces {
                assert_eq!(piece.part.offset(), at);
                at += piece.part.len() as u64;
                assert!(piece.range.start <= piece.part.offset() && at <= piece.range.end);
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
}
