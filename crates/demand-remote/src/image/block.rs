// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The blocks of an index: where each chunk of the image is stored.

use super::chunk::{Coding, hash_bytes};
use super::error::LayoutError;
use super::layout::{Digest, ENTRY_BYTES, Fields, Head, digest};

/// Alignment of a stored chunk in its pack, in bytes.
pub(crate) const ALIGNMENT: u32 = 16;

/// The place of a stored chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Number of the pack in the index's table.
    pub pack: u32,
    /// Offset in the pack, in bytes.
    pub offset: u32,
    /// Length of the stored bytes: the hashes of the pages, and the frame.
    pub len: u32,
    /// Coding of the frame.
    pub coding: Coding,
    /// Number of the chunk among those that the pack was written with.
    pub ordinal: u16,
    /// Digest of the stored bytes.
    pub digest: Digest,
}

impl Entry {
    /// Encodes the entry.
    pub fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..4].copy_from_slice(&self.pack.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.offset.to_le_bytes());
        let len_and_coding = self.len | u32::from(self.coding.number()) << 24;
        bytes[8..12].copy_from_slice(&len_and_coding.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.ordinal.to_le_bytes());
        bytes[16..].copy_from_slice(&self.digest);
        bytes
    }

    /// Decodes the entry of a chunk and checks it against the table of packs. `None` stands for a
    /// chunk of zeros.
    fn decode(bytes: &[u8], head: &Head, chunk: u64) -> Result<Option<Self>, LayoutError> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let mut fields = Fields(bytes);
        let (pack, offset, len_and_coding) = (fields.u32(), fields.u32(), fields.u32());
        let (ordinal, flags) = (fields.u16(), fields.u16());
        let bad = |what, value| LayoutError::Bounds { what, value };
        let coding = Coding::of_number((len_and_coding >> 24) as u8)
            .ok_or(bad("the coding of a chunk", u64::from(len_and_coding >> 24)))?;
        let len = len_and_coding & 0xff_ffff;
        let entry = Entry { pack, offset, len, coding, ordinal, digest: fields.bytes() };
        if flags != 0 {
            return Err(bad("a reserved flag of a chunk", u64::from(flags)));
        }
        let packs = &head.packs;
        let pack = usize::try_from(pack).ok().and_then(|pack| packs.get(pack));
        let pack = pack.ok_or(bad("the number of a chunk's pack", u64::from(entry.pack)))?;
        let end = u64::from(offset) + u64::from(len);
        if !offset.is_multiple_of(ALIGNMENT) || end > u64::from(pack.len) {
            return Err(bad("the offset of a chunk in its pack", u64::from(offset)));
        }
        if ordinal >= pack.chunks {
            return Err(bad("the ordinal of a chunk in its pack", u64::from(ordinal)));
        }
        let content = head.geometry.chunk_len(chunk);
        let (hashes, len) = (hash_bytes(content), len as usize);
        let right = match coding {
            Coding::None => len == hashes + content,
            _ => len > hashes && len < hashes + content,
        };
        if right { Ok(Some(entry)) } else { Err(bad("the stored length of a chunk", len as u64)) }
    }
}

/// A block of the index, whose entries are checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    entries: Vec<Option<Entry>>,
}

impl Block {
    /// Decodes block number `block` of an index after checking its digest, and then checks all
    /// entries. For a block that is all zeros `bytes` is empty.
    ///
    /// # Errors
    ///
    /// [`LayoutError`].
    pub fn decode(bytes: &[u8], head: &Head, block: u64) -> Result<Self, LayoutError> {
        let (what, value) = ("the number of a block", block);
        let bad = LayoutError::Bounds { what, value };
        let at = usize::try_from(block).ok().and_then(|block| head.blocks.get(block)).ok_or(bad)?;
        let expected = at.map_or(0, |_| head.geometry.block_len(block) as u64);
        let len = bytes.len() as u64;
        if len != expected {
            return Err(LayoutError::Length { what: "a block of the index", len, expected });
        }
        let chunks = head.geometry.chunks_of(block);
        let Some(at) = at else {
            return Ok(Block { entries: chunks.map(|_| None).collect() });
        };
        if digest(bytes) != at.digest {
            return Err(LayoutError::Digest { what: "a block of the index" });
        }
        let entries = chunks.zip(bytes.chunks_exact(ENTRY_BYTES));
        let entries = entries.map(|(chunk, bytes)| Entry::decode(bytes, head, chunk));
        Ok(Block { entries: entries.collect::<Result<_, _>>()? })
    }

    /// Encodes entries as a block; `None` if all of them are.
    pub(crate) fn encode(entries: &[Option<Entry>]) -> Option<Vec<u8>> {
        entries.iter().any(Option::is_some).then(|| {
            let bytes = entries
                .iter()
                .flat_map(|entry| entry.as_ref().map_or([0; ENTRY_BYTES], Entry::encode));
            bytes.collect()
        })
    }

    /// Returns the entries of the block's chunks, in order; `None` stands for a chunk of zeros.
    pub fn entries(&self) -> &[Option<Entry>] {
        &self.entries
    }

    /// Returns the entry at `index` in the block.
    pub(crate) fn entry(&self, index: usize) -> Option<Entry> {
        self.entries.get(index).copied().flatten()
    }

    /// Returns the number of chunks, from `index` in the block on, that are all zeros or all data,
    /// as the first of them is.
    pub(crate) fn run(&self, index: usize) -> (bool, usize) {
        let rest = self.entries.get(index..).unwrap_or_default();
        let zero = rest.first().is_none_or(Option::is_none);
        (zero, rest.iter().take_while(|entry| entry.is_none() == zero).count())
    }
}
