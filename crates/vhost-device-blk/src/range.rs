// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ranges of discard and write zeroes requests, all checked before any is executed.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

/// The size in bytes of a sector, the unit of a request's position and length.
pub(crate) const SECTOR_SIZE: u64 = MIN_BLOCK_SIZE as u64;
use crate::options::MIN_BLOCK_SIZE;

/// The size in bytes of `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
pub(crate) const RANGE_SIZE: usize = 16;
/// The maximum number of ranges in one request.
pub(crate) const MAX_RANGES: u32 = 32;
/// The maximum number of sectors in one discarded range: 1 GiB, because only metadata of the file
/// changes.
pub(crate) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// The maximum number of sectors in one zeroed range: 64 MiB, because zeros may have to be written.
pub(crate) const MAX_ZEROES_SECTORS: u32 = 1 << 17;

/// The operation on the ranges.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Action {
    /// Returns the space to the host; reads there are undefined afterwards.
    Discard,
    /// Makes the ranges read as zeros.
    WriteZeroes,
}

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Range {
    /// The offset of its first byte.
    pub(crate) offset: u64,
    /// Its length.
    pub(crate) len: u64,
    /// For write zeroes only: whether the space may be returned to the host.
    pub(crate) unmap: bool,
}

/// The bounds of a driver's requests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// The capacity of the disk, in sectors.
    pub(crate) sectors: u64,
    /// The size in bytes of which requests are multiples.
    pub(crate) block_size: u32,
}

impl Bounds {
    /// Returns the byte offset of `sector` if the `len` bytes from there are whole blocks and lie
    /// within the disk.
    pub(crate) fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        let block_size = u64::from(self.block_size);
        let offset = sector.checked_mul(SECTOR_SIZE)?;
        let end = offset.checked_add(len)?;
        let whole = offset.is_multiple_of(block_size) && len.is_multiple_of(block_size);
        (whole && end <= self.sectors * SECTOR_SIZE).then_some(offset)
    }
}

/// Parses a request's data.
///
/// # Errors
/// The status for the driver (virtio 1.3, 5.2.6.2): unsupported for flags that are unknown or not
/// allowed for this request; I/O error for data that is not a whole number of ranges, and for too
/// many ranges or ranges that are too long, not aligned to blocks or past the end.
pub(crate) fn parse(data: &[u8], action: Action, bounds: &Bounds) -> Result<Vec<Range>, u32> {
    let count = data.len() / RANGE_SIZE;
    if count == 0 || !data.len().is_multiple_of(RANGE_SIZE) || count > MAX_RANGES as usize {
        return Err(VIRTIO_BLK_S_IOERR);
    }
    let (known, max_sectors) = match action {
        Action::Discard => (0, MAX_DISCARD_SECTORS),
        Action::WriteZeroes => (VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, MAX_ZEROES_SECTORS),
    };
    let (raw, _) = data.as_chunks::<RANGE_SIZE>();
    let raw = raw.iter().map(|raw| {
        let field = |at| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        (u64::from(field(0)) | u64::from(field(4)) << 32, field(8), field(12))
    });
    if raw.clone().any(|(_, _, flags)| flags & !known != 0) {
        return Err(VIRTIO_BLK_S_UNSUPP);
    }
    raw.map(|(sector, sectors, flags)| {
        let len = u64::from(sectors) * SECTOR_SIZE;
        let offset = bounds.offset(sector, len).filter(|_| sectors <= max_sectors);
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        offset.map(|offset| Range { offset, len, unmap }).ok_or(VIRTIO_BLK_S_IOERR)
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(ranges: &[(u64, u32, u32)]) -> Vec<u8> {
        ranges
            .iter()
            .flat_map(|&(sector, sectors, flags)| {
                let mut bytes = sector.to_le_bytes().to_vec();
                bytes.extend(sectors.to_le_bytes());
                bytes.extend(flags.to_le_bytes());
                bytes
            })
            .collect()
    }

    #[test]
    fn requests_lie_within_the_disk() {
        let bounds = |block_size| Bounds { sectors: 16, block_size };
        let offset = |sector, len| bounds(512).offset(sector, len);
        assert_eq!(offset(0, 8192), Some(0));
        assert_eq!(offset(15, 512), Some(7680));
        assert_eq!(offset(16, 0), Some(8192));
        assert_eq!(offset(16, 512), None);
        assert_eq!(offset(15, 1024), None);
        assert_eq!(offset(0, 511), None);
        assert_eq!(offset(u64::MAX, 512), None);
        assert_eq!(offset(u64::MAX / 512 + 1, 512), None);
        assert_eq!(offset(u64::MAX / 512, 1024), None);
        assert_eq!(bounds(4096).offset(8, 4096), Some(4096));
        assert_eq!(bounds(4096).offset(8, 512), None);
        assert_eq!(bounds(4096).offset(1, 4096), None);
    }

    #[test]
    fn ranges() {
        use Action::{Discard, WriteZeroes};
        let end = 16 << 20;
        let bounds = |block_size| Bounds { sectors: end, block_size };
        let parse = |ranges: &[_], action, block| parse(&raw(ranges), action, &bounds(block));

        let two = parse(&[(8, 16, 1), (end - 1, 1, 0)], WriteZeroes, 512).unwrap();
        assert_eq!(two[0], Range { offset: 4096, len: 8192, unmap: true });
        assert_eq!(two[1], Range { offset: (end - 1) * 512, len: 512, unmap: false });
        assert_eq!(parse(&[(8, 16, 0)], Discard, 4096).unwrap()[0].len, 8192);
        assert!(parse(&[(0, MAX_DISCARD_SECTORS, 0)], Discard, 512).is_ok());
        assert!(parse(&[(0, MAX_ZEROES_SECTORS, 0)], WriteZeroes, 512).is_ok());
        assert!(parse(&[(0, 8, 0); MAX_RANGES as usize], Discard, 512).is_ok());

        // Flags are checked first: with an unknown flag, the meaning of the other fields is
        // unknown.
        for (ranges, action) in [
            (&[(8, 16, 1)][..], Discard),
            (&[(8, 16, 2)], WriteZeroes),
            (&[(8, 16, 0), (end, 1, 1 << 31)], Discard),
        ] {
            assert_eq!(parse(ranges, action, 512), Err(VIRTIO_BLK_S_UNSUPP), "{ranges:?}");
        }
        for (ranges, action, block) in [
            (&[][..], Discard, 512),
            (&[(0, 8, 0); MAX_RANGES as usize + 1], Discard, 512),
            (&[(0, MAX_DISCARD_SECTORS + 1, 0)], Discard, 512),
            (&[(0, MAX_ZEROES_SECTORS + 1, 0)], WriteZeroes, 512),
            (&[(0, 8, 0), (end, 1, 0)], WriteZeroes, 512),
            (&[(u64::MAX, 8, 0)], Discard, 512),
            (&[(1 << 63, 8, 0)], Discard, 512),
            (&[(0, u32::MAX, 0)], Discard, 512),
            (&[(1, 8, 0)], Discard, 4096),
            (&[(8, 7, 0)], WriteZeroes, 4096),
        ] {
            assert_eq!(parse(ranges, action, block), Err(VIRTIO_BLK_S_IOERR), "{ranges:?}");
        }
        let mut cut = raw(&[(8, 16, 0)]);
        cut.pop();
        assert_eq!(super::parse(&cut, Discard, &bounds(512)), Err(VIRTIO_BLK_S_IOERR));
    }
}
