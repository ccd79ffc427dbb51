// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The layout of a pack's file, and the record that a chunk has in it.
//!
//! | part | bytes |
//! |---|---|
//! | 512 records, by ordinal | a digest of 16 bytes, and the hashes of the chunk's pages, 8 bytes each |
//! | zeros, up to a multiple of 4096 | |
//! | 512 contents, by ordinal | the size of a chunk |
//!
//! The digest covers the chunk's identity and the hashes. A record is therefore right for one chunk
//! only, wherever its bytes come from, and the hashes of a right record are right for the content.

use demand_source::page_hash;

use super::chunk_key::{ChunkKey, PackKey};

/// Maximum number of the chunks of a pack.
pub(crate) const PACK_CHUNKS: u16 = 512;
/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
/// Bytes of a page's hash.
const HASH: usize = 8;
/// Bytes of a record's digest.
const DIGEST: usize = 16;

/// The places in a pack's file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    chunk_size: u64,
}

impl Layout {
    pub(crate) fn of(pack: &PackKey) -> Self {
        Layout { chunk_size: u64::from(pack.chunk_size) }
    }

    fn record_len(self) -> u64 {
        DIGEST as u64 + self.chunk_size / PAGE as u64 * HASH as u64
    }

    /// Returns the offset of a chunk's record, in bytes.
    pub(crate) fn record(self, ordinal: u16) -> u64 {
        u64::from(ordinal) * self.record_len()
    }

    /// Returns the offset of a chunk's content, in bytes.
    pub(crate) fn content(self, ordinal: u16) -> u64 {
        let records = self.record(PACK_CHUNKS).next_multiple_of(PAGE as u64);
        records + u64::from(ordinal) * self.chunk_size
    }

    /// Returns the length of the file, in bytes.
    pub(crate) fn file_len(self) -> u64 {
        self.content(PACK_CHUNKS)
    }
}

/// The hashes of a chunk's pages, from a record that is right for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hashes {
    bytes: Box<[u8]>,
}

impl Hashes {
    /// Returns the length of a chunk's record, in bytes.
    pub(crate) fn record_len(chunk: &ChunkKey) -> usize {
        DIGEST + chunk.len as usize / PAGE * HASH
    }

    /// Returns the hashes in a chunk's record, if it is right for the chunk.
    pub(crate) fn of_record(chunk: &ChunkKey, record: &[u8]) -> Option<Self> {
        let (digest, hashes) = record.split_at_checked(DIGEST)?;
        let right = record.len() == Hashes::record_len(chunk) && digest_of(chunk, hashes) == digest;
        right.then(|| Hashes { bytes: hashes.into() })
    }

    /// Encodes a chunk's record.
    pub(crate) fn encode_record(chunk: &ChunkKey, hashes: &[u8]) -> Vec<u8> {
        [&digest_of(chunk, hashes)[..], hashes].concat()
    }

    /// Returns whether these are the hashes of whole pages of the chunk, from page `first` on.
    pub(crate) fn match_pages(&self, first: usize, pages: &[u8]) -> bool {
        let Some(hashes) = self.bytes.get(first * HASH..) else { return false };
        let pages = pages.chunks_exact(PAGE);
        pages.len() * HASH <= hashes.len()
            && pages
                .zip(hashes.chunks_exact(HASH))
                .all(|(page, hash)| page_hash(page).to_le_bytes() == hash)
    }
}

fn digest_of(chunk: &ChunkKey, hashes: &[u8]) -> [u8; DIGEST] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&chunk.pack.id).update(&chunk.pack.chunk_size.to_le_bytes());
    hasher.update(&chunk.ordinal.to_le_bytes()).update(&chunk.len.to_le_bytes());
    hasher.update(&chunk.digest).update(hashes);
    let mut digest = [0; DIGEST];
    digest.copy_from_slice(&hasher.finalize().as_bytes()[..DIGEST]);
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk() -> ChunkKey {
        let pack = PackKey { id: [7; 32], chunk_size: 16 << 10 };
        ChunkKey { pack, ordinal: 3, digest: [9; 16], len: 8192 }
    }

    #[test]
    fn places_do_not_overlap() {
        for chunk_size in [16 << 10, 64 << 10, 1 << 20] {
            let layout = Layout::of(&PackKey { id: [0; 32], chunk_size });
            let chunk = ChunkKey { len: chunk_size, ..chunk() };
            assert_eq!(layout.record(1), Hashes::record_len(&chunk) as u64);
            assert!(layout.record(PACK_CHUNKS) <= layout.content(0));
            assert_eq!(layout.content(1) - layout.content(0), u64::from(chunk_size));
            assert!(layout.content(0).is_multiple_of(PAGE as u64));
        }
    }

    #[test]
    fn record_is_right_for_one_chunk() {
        let pages = [[1; PAGE], [0; PAGE]].concat();
        let hashes: Vec<u8> =
            pages.chunks(PAGE).flat_map(|page| page_hash(page).to_le_bytes()).collect();
        let record = Hashes::encode_record(&chunk(), &hashes);
        let read = Hashes::of_record(&chunk(), &record).unwrap();
        assert!(read.match_pages(0, &pages) && read.match_pages(1, &pages[PAGE..]));
        assert!(!read.match_pages(1, &pages) && !read.match_pages(0, &pages[PAGE..]));
        assert!(!read.match_pages(3, &pages[PAGE..]));
        for other in [
            ChunkKey { ordinal: 4, ..chunk() },
            ChunkKey { digest: [8; 16], ..chunk() },
            ChunkKey { len: 4096, ..chunk() },
            ChunkKey { pack: PackKey { id: [8; 32], ..chunk().pack }, ..chunk() },
            ChunkKey { pack: PackKey { chunk_size: 32 << 10, ..chunk().pack }, ..chunk() },
        ] {
            assert_eq!(Hashes::of_record(&other, &record), None);
        }
        // All zeros, as in a hole, is no record of a page of zeros.
        assert_eq!(Hashes::of_record(&chunk(), &[0; 32]), None);
        for bit in 0..record.len() * 8 {
            let mut torn = record.clone();
            torn[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Hashes::of_record(&chunk(), &torn), None, "bit {bit}");
        }
    }
}
