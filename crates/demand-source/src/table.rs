// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table of page hashes beside an image: reads and checks the format that
//! [`HashedImage`](crate::HashedImage) describes.

use twox_hash::XxHash3_64;

use crate::convert::to_usize;
use crate::hash::PAGE_BYTES;
use crate::image_file::ImageFile;
use crate::{Destination, ImageSizeError, SourceError, TableError};

/// Bytes of the header, which is also the offset of the first hash.
pub(crate) const HEADER_BYTES: usize = 4096;
/// Bytes of one hash.
pub(crate) const HASH_BYTES: u64 = 8;
/// Number of hashes that are read at once: those of 2 MiB of the image.
pub(crate) const BLOCK: usize = 512;

const MAGIC: [u8; 8] = *b"DPHASHES";
pub(crate) const VERSION: u32 = 1;

/// The decoded header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Bytes of the image.
    pub(crate) size: u64,
    pub(crate) generation: [u8; 16],
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&u32::try_from(PAGE_BYTES).expect("4096").to_le_bytes());
        bytes[16..24].copy_from_slice(&self.size.to_le_bytes());
        bytes[24..40].copy_from_slice(&self.generation);
        let checksum = XxHash3_64::oneshot(&bytes);
        bytes[40..48].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, TableError> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Err(TableError::Unfinished);
        }
        if bytes[..8] != MAGIC {
            return Err(TableError::NotATable);
        }
        let mut version = [0; 4];
        version.copy_from_slice(&bytes[8..12]);
        let version = u32::from_le_bytes(version);
        let (mut size, mut generation) = ([0; 8], [0; 16]);
        size.copy_from_slice(&bytes[16..24]);
        generation.copy_from_slice(&bytes[24..40]);
        let header = Header { size: u64::from_le_bytes(size), generation };
        if version == VERSION && header.encode() != *bytes {
            return Err(TableError::Damaged);
        }
        if version != VERSION {
            return Err(TableError::Version { version, readable: VERSION });
        }
        check_size(header.size)?;
        Ok(header)
    }
}

/// Checks an image's size, in bytes.
pub(crate) fn check_size(size: u64) -> Result<(), ImageSizeError> {
    if size == 0 || !size.is_multiple_of(PAGE_BYTES as u64) {
        return Err(ImageSizeError::NotPages { size });
    }
    // File offsets are signed.
    if i64::try_from(size).is_err() {
        return Err(ImageSizeError::TooLong { size });
    }
    Ok(())
}

/// Returns the length of the table for an image of `size` bytes, in bytes.
pub(crate) fn table_len(size: u64) -> u64 {
    hash_offset(size / PAGE_BYTES as u64)
}

/// Returns the offset of a page's hash in the table, in bytes.
pub(crate) fn hash_offset(page: u64) -> u64 {
    HEADER_BYTES as u64 + page * HASH_BYTES
}

/// The table of an image's page hashes.
///
/// It is read in pieces as they are needed. It is not mapped, because reading a mapped table that
/// has become shorter would kill the process with `SIGBUS`.
#[derive(Debug)]
pub(crate) struct HashTable {
    file: ImageFile,
    header: Header,
}

impl HashTable {
    /// Opens the table of `image` from `file`.
    pub(crate) fn of(file: ImageFile, image: &ImageFile) -> Result<Self, SourceError> {
        let unfit = |source| SourceError::Table { image: image.name(), table: file.name(), source };
        let len = file.size();
        let mut bytes = [0; HEADER_BYTES];
        if len < HEADER_BYTES as u64 {
            return Err(unfit(TableError::NoHeader { len }));
        }
        file.read(0, &mut Destination::from(&mut bytes[..]))?;
        let header = Header::decode(&bytes).map_err(unfit)?;
        let (expected, size) = (header.size, image.size());
        if expected != size {
            return Err(unfit(TableError::OtherImage { expected, size }));
        }
        let expected = table_len(header.size);
        if len != expected {
            return Err(unfit(TableError::Length { len, expected }));
        }
        Ok(HashTable { file, header })
    }

    pub(crate) fn generation(&self) -> [u8; 16] {
        self.header.generation
    }

    /// Returns whether the table is stored in memory, so that no read of it waits for storage.
    pub(crate) fn is_memory(&self) -> bool {
        self.file.is_memory()
    }

    /// Reads bytes of the table; may wait for the storage.
    pub(crate) fn read(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        self.file.read(offset, to)
    }

    /// Reads bytes of the table, or returns `None` if that would have to wait for the storage.
    pub(crate) fn read_now(
        &self,
        offset: u64,
        to: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        self.file.read_now(offset, to)
    }

    /// Calls `each` with every page number from `first` on, `count` in all, and the page's hash,
    /// until `each` returns `false`. It may wait for the storage.
    pub(crate) fn look(
        &self,
        first: u64,
        count: u64,
        each: impl FnMut(u64, u64) -> bool,
    ) -> Result<(), SourceError> {
        self.look_with(first, count, |at, to| Some(self.read(at, to)), each).unwrap_or(Ok(()))
    }

    /// Like [`look`](Self::look), but reads the table through `read`. Returns `None` as soon as
    /// `read` does.
    pub(crate) fn look_with(
        &self,
        first: u64,
        count: u64,
        mut read: impl FnMut(u64, &mut Destination<'_>) -> Option<Result<(), SourceError>>,
        mut each: impl FnMut(u64, u64) -> bool,
    ) -> Option<Result<(), SourceError>> {
        let mut hashes = [[0; to_usize(HASH_BYTES)]; BLOCK];
        let mut done = 0;
        while done < count {
            let now = (count - done).min(BLOCK as u64);
            let bytes = hashes[..to_usize(now)].as_flattened_mut();
            if let Err(error) = read(hash_offset(first + done), &mut Destination::from(bytes))? {
                return Some(Err(error));
            }
            for (page, hash) in (first + done..).zip(&hashes[..to_usize(now)]) {
                if !each(page, u64::from_le_bytes(*hash)) {
                    return Some(Ok(()));
                }
            }
            done += now;
        }
        Some(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header { size: 3 << 20, generation: *b"sixteen bytes..." };

    #[test]
    fn header_is_read_back_and_each_bit_counts() {
        let bytes = HEADER.encode();
        assert_eq!(Header::decode(&bytes), Ok(HEADER));
        for bit in 0..HEADER_BYTES * 8 {
            let mut bytes = bytes;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn header_errors_name_the_cause() {
        let refused = |bytes| Header::decode(&bytes).unwrap_err();
        assert_eq!(refused([0; HEADER_BYTES]), TableError::Unfinished);
        assert_eq!(refused([7; HEADER_BYTES]), TableError::NotATable);
        let mut damaged = HEADER.encode();
        damaged[50] = 1;
        assert_eq!(refused(damaged), TableError::Damaged);
        let mut newer = HEADER.encode();
        newer[8] = 2;
        assert_eq!(refused(newer), TableError::Version { version: 2, readable: VERSION });
        let of_size = |size| refused(Header { size, ..HEADER }.encode());
        for size in [0, 4097] {
            assert_eq!(of_size(size), TableError::Size(ImageSizeError::NotPages { size }));
        }
        let size = !4095;
        assert_eq!(of_size(size), TableError::Size(ImageSizeError::TooLong { size }));
    }
}
