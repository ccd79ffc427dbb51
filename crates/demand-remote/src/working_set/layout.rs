// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The layout of a working set: its head, and its table of frames.
//!
//! `docs/working-set-format.md` of the repository is the specification.

use std::collections::HashSet;
use std::ops::Range;

use demand_source::to_usize;

use super::history::Entry;
use crate::image::format::{Coding, Digest, digest};
use crate::image::layout::{Fields, MOST_IMAGE, PAGE};
use crate::image::{LayoutError, ObjectId};

/// Bytes of the head, which the table follows.
pub const HEAD_BYTES: usize = 112;
/// Maximum length of a table, in bytes.
pub(crate) const MOST_TABLE: u64 = 64 << 20;
/// Maximum number of pages of a frame with content: 256 KiB.
pub(crate) const FRAME_PAGES: usize = 64;
/// Maximum number of pages of a frame of zeros: 2 MiB.
pub(crate) const ZERO_PAGES: usize = 512;

const MAGIC: [u8; 8] = *b"DPWRKSET";
const VERSION: u32 = 1;
/// The coding of a frame of zeros.
const ZEROS: u8 = 255;
/// Offset of the head's digest.
const DIGEST: Range<usize> = 96..112;
/// Bytes of a page's hash.
const HASH: u64 = 8;

/// The identity of an image, to which a working set is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageId {
    binding: u32,
    id: [u8; 32],
    size: u64,
}

impl ImageId {
    /// Returns the identity of an image of `size` bytes that was pushed: the digest of its index.
    pub fn of_index(index: ObjectId, size: u64) -> Self {
        ImageId { binding: 1, id: index.0, size }
    }

    /// Returns the identity of another image of `size` bytes: its generation id, which its table of
    /// hashes has.
    pub fn of_generation(generation: [u8; 16], size: u64) -> Self {
        let mut id = [0; 32];
        id[..16].copy_from_slice(&generation);
        ImageId { binding: 2, id, size }
    }

    /// Returns the number of pages of the image.
    pub(crate) fn pages(&self) -> u64 {
        self.size / PAGE
    }
}

/// The head of a working set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The image.
    pub image: ImageId,
    /// Number of runs that were recorded.
    pub runs: u32,
    /// Number of frames.
    pub frames: u32,
    /// Length of the table, in bytes.
    pub table_len: u64,
    /// Length of the object, in bytes.
    pub len: u64,
    /// Digest of the table.
    pub table: Digest,
}

impl Head {
    /// Encodes the head.
    pub fn encode(&self) -> [u8; HEAD_BYTES] {
        let mut bytes = Vec::with_capacity(HEAD_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.image.binding.to_le_bytes());
        bytes.extend(self.image.id);
        bytes.extend(self.image.size.to_le_bytes());
        bytes.extend(self.runs.to_le_bytes());
        bytes.extend(self.frames.to_le_bytes());
        bytes.extend(self.table_len.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.table);
        bytes.resize(HEAD_BYTES, 0);
        let digest = digest(&bytes);
        bytes[DIGEST].copy_from_slice(&digest);
        bytes.try_into().expect("it has the head's length")
    }

    /// Decodes and checks a head.
    ///
    /// # Errors
    ///
    /// [`LayoutError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, LayoutError> {
        let Ok(bytes) = <[u8; HEAD_BYTES]>::try_from(bytes) else {
            let (len, expected) = (bytes.len() as u64, HEAD_BYTES as u64);
            return Err(LayoutError::Length { what: "the head of a working set", len, expected });
        };
        let mut fields = Fields(&bytes);
        if fields.bytes() != MAGIC {
            return Err(LayoutError::NotAWorkingSet);
        }
        let version = fields.u32();
        if version != VERSION {
            return Err(LayoutError::Version { version, readable: VERSION });
        }
        let mut unsigned = bytes;
        unsigned[DIGEST].fill(0);
        if digest(&unsigned) != bytes[DIGEST] {
            return Err(LayoutError::Digest { what: "the head of the working set" });
        }
        let binding = fields.u32();
        bounds("the binding", binding.into(), (1..=2).contains(&binding))?;
        let (id, size) = (fields.bytes(), fields.u64());
        let whole = size != 0 && size.is_multiple_of(PAGE) && size <= MOST_IMAGE;
        bounds("the image's size", size, whole)?;
        let (runs, frames) = (fields.u32(), fields.u32());
        bounds("the number of runs", runs.into(), runs > 0)?;
        let (table_len, len) = (fields.u64(), fields.u64());
        bounds("the length of the table", table_len, table_len <= MOST_TABLE)?;
        // A frame takes several bytes of the table.
        bounds("the number of frames", frames.into(), u64::from(frames) <= table_len)?;
        let table = fields.bytes();
        let image = ImageId { binding, id, size };
        Ok(Head { image, runs, frames, table_len, len, table })
    }
}

fn bounds(what: &'static str, value: u64, right: bool) -> Result<(), LayoutError> {
    if right { Ok(()) } else { Err(LayoutError::Bounds { what, value }) }
}

/// A frame of a working set: pages that are read together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The pages, by number.
    pub entries: Vec<Entry>,
    /// The content; `None` if all of it is zeros.
    pub stored: Option<Stored>,
}

/// The stored bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The coding.
    pub coding: Coding,
    /// Offset in the object, in bytes.
    pub offset: u64,
    /// Length, in bytes.
    pub len: u64,
    /// Digest of the bytes.
    pub digest: Digest,
}

/// Encodes a table. The frames' offsets are not part of it: they lie one behind the other.
pub(crate) fn encode_table(frames: &[Frame]) -> Vec<u8> {
    let mut table = Vec::new();
    for Frame { entries, stored } in frames {
        table.push(stored.map_or(ZEROS, |stored| stored.coding.number()));
        put(&mut table, entries.len() as u64);
        let mut next = 0;
        for entry in entries {
            put(&mut table, entry.page - next);
            next = entry.page + 1;
        }
        table.extend(entries.iter().map(|entry| entry.seen));
        entries.iter().for_each(|entry| put(&mut table, entry.rank.into()));
        if let Some(stored) = stored {
            put(&mut table, stored.len);
            table.extend(stored.digest);
        }
    }
    table
}

/// Appends a number in groups of seven bits, the lowest first, each but the last with its high bit
/// set.
fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(u8::try_from(number & 0x7f).expect("seven bits") | 0x80);
        number >>= 7;
    }
    bytes.push(u8::try_from(number).expect("seven bits"));
}

/// Reads the fields of a table.
struct Table<'a>(&'a [u8]);

impl Table<'_> {
    fn short() -> LayoutError {
        LayoutError::Bounds { what: "the end of the table", value: 0 }
    }

    fn byte(&mut self) -> Result<u8, LayoutError> {
        let (byte, rest) = self.0.split_first().ok_or_else(Table::short)?;
        self.0 = rest;
        Ok(*byte)
    }

    fn number(&mut self) -> Result<u64, LayoutError> {
        let mut number = 0;
        for shift in (0..63).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(LayoutError::Bounds { what: "a number of the table", value: number })
    }

    fn digest(&mut self) -> Result<Digest, LayoutError> {
        let (digest, rest) = self.0.split_first_chunk::<16>().ok_or_else(Table::short)?;
        self.0 = rest;
        Ok(*digest)
    }
}

/// Decodes and checks the table that belongs to a head.
///
/// # Errors
///
/// [`LayoutError`]. The memory that is allocated is in proportion to the length of `bytes`.
pub fn decode_table(head: &Head, bytes: &[u8]) -> Result<Vec<Frame>, LayoutError> {
    let (len, expected) = (bytes.len() as u64, head.table_len);
    if len != expected {
        return Err(LayoutError::Length { what: "the table of the working set", len, expected });
    }
    if digest(bytes) != head.table {
        return Err(LayoutError::Digest { what: "the table of the working set" });
    }
    let mut table = Table(bytes);
    let mut frames = Vec::new();
    let mut known = HashSet::new();
    let mut offset = HEAD_BYTES as u64 + len;
    for _ in 0..head.frames {
        let coding = table.byte()?;
        let is_zero = coding == ZEROS;
        let coding = Coding::of_number(coding).ok_or(coding);
        let count = table.number()?;
        let most = if is_zero { ZERO_PAGES } else { FRAME_PAGES } as u64;
        bounds("the number of pages of a frame", count, (1..=most).contains(&count))?;
        let mut entries = Vec::new();
        let mut next = 0_u64;
        for _ in 0..count {
            let page = table.number()?.saturating_add(next);
            bounds("the number of a page", page, page < head.image.pages())?;
            bounds("the number of a page, which two frames have", page, known.insert(page))?;
            entries.push(Entry { page, seen: 0, rank: 0 });
            next = page + 1;
        }
        for entry in &mut entries {
            entry.seen = table.byte()?;
            bounds("the runs of a page", entry.seen.into(), entry.seen != 0)?;
        }
        for entry in &mut entries {
            let rank = table.number()?;
            let narrow = u32::try_from(rank);
            entry.rank =
                narrow.map_err(|_| LayoutError::Bounds { what: "the rank", value: rank })?;
        }
        let stored = if is_zero {
            None
        } else {
            let coding = coding.map_err(|coding| LayoutError::Bounds {
                what: "the coding of a frame",
                value: coding.into(),
            })?;
            let len = table.number()?;
            let right = (count * HASH + 1..=count * (HASH + PAGE)).contains(&len);
            bounds("the length of a frame", len, right)?;
            let stored = Stored { coding, offset, len, digest: table.digest()? };
            offset += len;
            Some(stored)
        };
        frames.push(Frame { entries, stored });
    }
    bounds("the length of the rest of the table", table.0.len() as u64, table.0.is_empty())?;
    bounds("the length of the object", head.len, head.len == offset)?;
    Ok(frames)
}

/// Returns the pages of a frame from the entry `at` on that follow one another.
pub(crate) fn run_of(entries: &[Entry], at: usize) -> u64 {
    let first = entries[at].page;
    let alike = (first..).zip(&entries[at..]).take_while(|(page, entry)| *page == entry.page);
    alike.count() as u64
}

/// Returns the length of a frame's content, in bytes.
pub(crate) fn content_len(frame: &Frame) -> usize {
    frame.entries.len() * to_usize(PAGE)
}
