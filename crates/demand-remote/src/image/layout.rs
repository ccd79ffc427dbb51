// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The head of an index: its header, the table of packs and the directory of blocks.
//!
//! `docs/image-format.md` of the repository is the specification.

use std::ops::Range;

use demand_source::to_usize;

use super::error::LayoutError;
use super::names::ObjectId;

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;
/// Bytes of the header, which the table of packs follows.
pub(crate) const HEADER_BYTES: usize = 4096;
/// Chunks that one block of the index describes.
pub(crate) const BLOCK_CHUNKS: u64 = 2048;
/// Bytes of one entry of a block.
pub(crate) const ENTRY_BYTES: usize = 32;
/// Bytes of one entry of the table of packs.
pub(crate) const PACK_ENTRY_BYTES: usize = 40;
/// Bytes of one entry of the directory of blocks.
pub(crate) const BLOCK_ENTRY_BYTES: usize = 32;
/// Maximum number of chunks of a pack.
pub(crate) const MOST_PACK_CHUNKS: u16 = 512;
/// Maximum length of a pack, in bytes.
pub(crate) const MOST_PACK_BYTES: u32 = 64 << 20;
/// Maximum length of a head, in bytes.
pub(crate) const MOST_HEAD: u64 = 512 << 20;
/// Maximum size of an image, in bytes: 256 TiB.
pub(crate) const MOST_IMAGE: u64 = 1 << 48;
/// The sizes that chunks may have, in bytes, of which only powers of two are valid.
pub(crate) const CHUNK_SIZES: std::ops::RangeInclusive<u32> = (16 << 10)..=(1 << 20);

const MAGIC: [u8; 8] = *b"DPCHUNKS";
const VERSION: u32 = 1;
/// Offset of the header's digest.
const DIGEST: Range<usize> = 96..112;

/// The first 16 bytes of the BLAKE3 of some bytes.
pub type Digest = [u8; 16];

/// Computes the first 16 bytes of the BLAKE3 of `bytes`.
pub fn digest(bytes: &[u8]) -> Digest {
    let mut digest = [0; 16];
    digest.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    digest
}

/// Reads little-endian numbers, and zeros past the end.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl Fields<'_> {
    pub(crate) fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let (here, rest) = self.0.split_at(N.min(self.0.len()));
        bytes[..here.len()].copy_from_slice(here);
        self.0 = rest;
        bytes
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }
}

/// The sizes of an image and its chunks, which determine all other numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    size: u64,
    chunk: u32,
}

impl Geometry {
    /// Checks an image's size and its chunks' size, both in bytes.
    ///
    /// # Errors
    ///
    /// [`LayoutError::Bounds`].
    pub fn new(size: u64, chunk: u32) -> Result<Self, LayoutError> {
        if size == 0 || !size.is_multiple_of(PAGE) || size > MOST_IMAGE {
            return Err(LayoutError::Bounds { what: "the image's size", value: size });
        }
        if !chunk.is_power_of_two() || !CHUNK_SIZES.contains(&chunk) {
            let value = u64::from(chunk);
            return Err(LayoutError::Bounds { what: "the size of a chunk", value });
        }
        Ok(Geometry { size, chunk })
    }

    /// Returns the image's size, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the size of all chunks but the last, in bytes.
    pub fn chunk_size(&self) -> u64 {
        u64::from(self.chunk)
    }

    /// Returns the number of chunks.
    pub fn chunks(&self) -> u64 {
        self.size.div_ceil(self.chunk_size())
    }

    /// Returns the number of blocks of the index.
    pub fn blocks(&self) -> u64 {
        self.chunks().div_ceil(BLOCK_CHUNKS)
    }

    /// Returns the offset of a chunk in the image, in bytes.
    pub fn offset(&self, chunk: u64) -> u64 {
        chunk.saturating_mul(self.chunk_size())
    }

    /// Returns the length of a chunk's content, in bytes: 0 for a chunk past the image's end.
    pub fn chunk_len(&self, chunk: u64) -> usize {
        to_usize(self.chunk_size().min(self.size.saturating_sub(self.offset(chunk))))
    }

    /// Returns the chunks of a block: none for a block past the index's end.
    pub fn chunks_of(&self, block: u64) -> Range<u64> {
        let chunks = self.chunks();
        let first = block.saturating_mul(BLOCK_CHUNKS).min(chunks);
        first..first.saturating_add(BLOCK_CHUNKS).min(chunks)
    }

    /// Returns the length of a block, in bytes.
    pub fn block_len(&self, block: u64) -> usize {
        let chunks = self.chunks_of(block);
        to_usize(chunks.end - chunks.start) * ENTRY_BYTES
    }

    /// Checks the length of a head, in bytes, and returns its number of packs.
    pub(crate) fn packs_of(&self, head_len: u64) -> Result<u64, LayoutError> {
        let least = HEADER_BYTES as u64 + self.blocks() * BLOCK_ENTRY_BYTES as u64;
        let bad = LayoutError::Bounds { what: "the length of the index's head", value: head_len };
        let tables = head_len.checked_sub(least).ok_or(bad)?;
        let packs = tables / PACK_ENTRY_BYTES as u64;
        let whole = tables.is_multiple_of(PACK_ENTRY_BYTES as u64);
        let right = whole && packs <= self.chunks() && head_len <= MOST_HEAD;
        if right { Ok(packs) } else { Err(bad) }
    }
}

/// An entry of the table of packs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pack {
    /// The SHA-256 of the pack, which is its name.
    pub id: ObjectId,
    /// Length, in bytes.
    pub len: u32,
    /// Number of the chunks that it was written with.
    pub chunks: u16,
}

/// An entry of the directory of blocks, for a block that is not all zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRef {
    /// Offset in the index, in bytes.
    pub offset: u64,
    /// Digest of the block.
    pub digest: Digest,
}

/// The head of an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The image's size and its chunks'.
    pub geometry: Geometry,
    /// Generation id of the image: see [`demand_source::HashedImage`].
    pub generation: [u8; 16],
    /// Number of chunks that are not all zeros.
    pub stored: u64,
    /// The packs that the chunks are in, in the order of their first chunks.
    pub packs: Vec<Pack>,
    /// The blocks; `None` stands for one whose chunks are all zeros.
    pub blocks: Vec<Option<BlockRef>>,
}

impl Head {
    /// Returns the length of the encoded head, in bytes.
    pub fn head_len(&self) -> usize {
        HEADER_BYTES + self.packs.len() * PACK_ENTRY_BYTES + self.blocks.len() * BLOCK_ENTRY_BYTES
    }

    /// Returns the length of the index, in bytes.
    pub fn index_len(&self) -> u64 {
        let blocks = (0..).zip(&self.blocks).filter(|(_, block)| block.is_some());
        self.head_len() as u64
            + blocks.map(|(block, _)| self.geometry.block_len(block) as u64).sum::<u64>()
    }

    /// Sets the blocks from their encoded content, in order; `None` stands for all zeros.
    pub(crate) fn place_blocks(&mut self, blocks: &[Option<Vec<u8>>]) {
        self.blocks = vec![None; blocks.len()];
        let mut offset = self.head_len() as u64;
        for (at, block) in self.blocks.iter_mut().zip(blocks) {
            let Some(block) = block else { continue };
            *at = Some(BlockRef { offset, digest: digest(block) });
            offset += block.len() as u64;
        }
    }

    /// Encodes the head.
    pub fn encode(&self) -> Vec<u8> {
        let directory = HEADER_BYTES + self.packs.len() * PACK_ENTRY_BYTES;
        let mut bytes = Vec::with_capacity(self.head_len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(4096_u32.to_le_bytes());
        bytes.extend(self.geometry.size.to_le_bytes());
        bytes.extend(self.generation);
        bytes.extend(self.geometry.chunk.to_le_bytes());
        bytes.extend(2048_u32.to_le_bytes());
        bytes.extend(self.stored.to_le_bytes());
        bytes.extend((self.packs.len() as u64).to_le_bytes());
        bytes.extend((self.blocks.len() as u64).to_le_bytes());
        bytes.extend((HEADER_BYTES as u64).to_le_bytes());
        bytes.extend((directory as u64).to_le_bytes());
        bytes.extend((self.head_len() as u64).to_le_bytes());
        debug_assert_eq!(bytes.len(), DIGEST.start, "the digest follows");
        bytes.resize(HEADER_BYTES, 0);
        for pack in &self.packs {
            bytes.extend(pack.id.0);
            bytes.extend(pack.len.to_le_bytes());
            bytes.extend(pack.chunks.to_le_bytes());
            bytes.extend([0; 2]);
        }
        for (number, block) in (0..).zip(&self.blocks) {
            let Some(block) = block else {
                bytes.extend([0; BLOCK_ENTRY_BYTES]);
                continue;
            };
            bytes.extend(block.offset.to_le_bytes());
            bytes.extend((self.geometry.block_len(number) as u64).to_le_bytes());
            bytes.extend(block.digest);
        }
        let digest = digest(&bytes);
        bytes[DIGEST].copy_from_slice(&digest);
        bytes
    }

    /// Decodes and checks a head, whose bytes are all of `bytes`.
    ///
    /// # Errors
    ///
    /// [`LayoutError`]. Nothing is allocated but what has the length of `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<Self, LayoutError> {
        if bytes.get(..8) != Some(&MAGIC[..]) {
            return Err(LayoutError::NotAnIndex);
        }
        let mut fields = Fields(&bytes[8..]);
        let version = fields.u32();
        if version != VERSION {
            return Err(LayoutError::Version { version, readable: VERSION });
        }
        check_digest(bytes)?;
        let bounds = |what, value, right: bool| match right {
            true => Ok(()),
            false => Err(LayoutError::Bounds { what, value }),
        };
        let page = u64::from(fields.u32());
        bounds("the size of a page", page, page == PAGE)?;
        let (size, generation) = (fields.u64(), fields.bytes());
        let geometry = Geometry::new(size, fields.u32())?;
        let block_chunks = u64::from(fields.u32());
        bounds("the number of chunks of a block", block_chunks, block_chunks == BLOCK_CHUNKS)?;
        let stored = fields.u64();
        bounds("the number of stored chunks", stored, stored <= geometry.chunks())?;
        let packs = geometry.packs_of(bytes.len() as u64)?;
        let directory = HEADER_BYTES as u64 + packs * PACK_ENTRY_BYTES as u64;
        for (what, right) in [
            ("the number of packs", packs),
            ("the number of blocks", geometry.blocks()),
            ("the offset of the packs", HEADER_BYTES as u64),
            ("the offset of the directory", directory),
            ("the offset of the blocks", bytes.len() as u64),
        ] {
            let value = fields.u64();
            bounds(what, value, value == right)?;
        }
        let rest = bytes.get(DIGEST.end..HEADER_BYTES).unwrap_or_default();
        bounds("a reserved byte of the header", 1, rest.iter().all(|byte| *byte == 0))?;
        let (packs, blocks) = bytes.split_at(to_usize(directory).min(bytes.len()));
        let packs = decode_packs(packs.get(HEADER_BYTES..).unwrap_or_default())?;
        let blocks = decode_directory(blocks, geometry, bytes.len() as u64)?;
        Ok(Head { geometry, generation, stored, packs, blocks })
    }
}

/// Checks the digest of a head, which counts as zeros itself.
fn check_digest(bytes: &[u8]) -> Result<(), LayoutError> {
    let len = bytes.len() as u64;
    let expected = HEADER_BYTES as u64;
    if len < expected {
        return Err(LayoutError::Length { what: "the index's header", len, expected });
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..DIGEST.start]).update(&[0; 16]).update(&bytes[DIGEST.end..]);
    if hasher.finalize().as_bytes()[..16] == bytes[DIGEST] {
        return Ok(());
    }
    Err(LayoutError::Digest { what: "the index's head" })
}

fn decode_packs(bytes: &[u8]) -> Result<Vec<Pack>, LayoutError> {
    let pack = |entry: &[u8]| {
        let mut fields = Fields(entry);
        let pack = Pack { id: ObjectId(fields.bytes()), len: fields.u32(), chunks: fields.u16() };
        let bounds = |what, value| Err(LayoutError::Bounds { what, value });
        if pack.len == 0 || pack.len > MOST_PACK_BYTES {
            return bounds("the length of a pack", u64::from(pack.len));
        }
        if pack.chunks == 0 || pack.chunks > MOST_PACK_CHUNKS {
            return bounds("the number of chunks of a pack", u64::from(pack.chunks));
        }
        let reserved = fields.u16();
        if reserved != 0 {
            return bounds("a reserved number of a pack", u64::from(reserved));
        }
        Ok(pack)
    };
    bytes.chunks_exact(PACK_ENTRY_BYTES).map(pack).collect()
}

/// Decodes the directory. The blocks lie back to back behind it, in order, so none overlaps.
fn decode_directory(
    bytes: &[u8],
    geometry: Geometry,
    head_len: u64,
) -> Result<Vec<Option<BlockRef>>, LayoutError> {
    let mut next = head_len;
    let block = |(number, entry): (u64, &[u8])| {
        if entry.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let mut fields = Fields(entry);
        let (offset, len) = (fields.u64(), fields.u64());
        let expected = geometry.block_len(number) as u64;
        if offset != next {
            return Err(LayoutError::Bounds { what: "the offset of a block", value: offset });
        }
        if len != expected {
            return Err(LayoutError::Length { what: "a block of the index", len, expected });
        }
        next += len;
        Ok(Some(BlockRef { offset, digest: fields.bytes() }))
    };
    (0..).zip(bytes.chunks_exact(BLOCK_ENTRY_BYTES)).map(block).collect()
}
