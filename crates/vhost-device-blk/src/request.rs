// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Parses a descriptor chain into a request and the place for its answer.
//!
//! The parser assumes nothing about how the driver split a request into descriptors (virtio 1.3,
//! 2.7.4.1): the header is the first 16 bytes that the device may read, the status the last byte
//! that it may write.

use std::ops::Deref;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::DescriptorChain;
use vm_memory::bitmap::{BitmapSlice, WithBitmapSlice};
use vm_memory::{GuestAddress, GuestMemory, Permissions, VolatileSlice};

use crate::range::Action;

/// The size in bytes of a request's header: type, reserved, sector.
const HEADER_SIZE: usize = 16;

/// The operation that the driver requests.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Read from the disk, starting at this sector of 512 bytes.
    Read(u64),
    /// Write to the disk, starting at this sector of 512 bytes.
    Write(u64),
    /// Put all written data on stable storage.
    Flush,
    /// Return the serial number.
    GetId,
    /// An operation on ranges of the disk, which are listed in the data.
    Ranges(Action),
    /// An operation that this device does not offer, with the request's type.
    Unsupported(u32),
}

/// A request.
#[derive(Debug)]
pub struct Request<'m, B> {
    /// The operation that the driver requests.
    pub kind: Kind,
    /// The buffers: the data to write to the disk, the ranges, or the place for the data read.
    pub data: Vec<VolatileSlice<'m, B>>,
    /// Bytes in `data`.
    pub data_len: u64,
    /// Bytes that the device may write before the status; for requests that read, the length of
    /// `data`.
    pub before_status: u64,
    /// The place for the answer.
    pub status: Status<'m, B>,
}

/// The byte that holds the device's answer.
#[derive(Debug)]
pub struct Status<'m, B>(VolatileSlice<'m, B>);

impl<B: BitmapSlice> Status<'_, B> {
    /// Writes the answer, one of `VIRTIO_BLK_S_*`.
    pub fn write(&self, status: u32) {
        let status = u8::try_from(status).expect("a status is a byte");
        self.0.copy_from(&[status]);
    }
}

/// The reason why a chain is not a valid request.
#[derive(Debug)]
pub enum Malformed<'m, B> {
    /// A status byte exists, for the answer "I/O error": the header is short, or a buffer is not in
    /// memory.
    Answerable(Status<'m, B>),
    /// The chain is broken (a loop, an index or table out of range, a readable buffer after a
    /// writable one) or has no status byte.
    Broken,
}

impl<'m, B: BitmapSlice> Request<'m, B> {
    /// Parses `chain`. Reads the descriptors and the header, but no data; waits for their pages if
    /// they are missing.
    ///
    /// # Errors
    /// [`Malformed`] states whether the driver can be answered.
    pub fn parse<M, D>(mem: &'m M, chain: DescriptorChain<D>) -> Result<Self, Malformed<'m, B>>
    where
        M: GuestMemory,
        M::Bitmap: WithBitmapSlice<'m, S = B>,
        D: Deref,
        D::Target: GuestMemory,
    {
        let mut readable = Vec::new();
        let mut writable: Vec<VolatileSlice<'m, B>> = Vec::new();
        let mut seen_writable = false;
        let mut all_mapped = true;
        let mut last_mapped = false;
        // The iterator over a broken chain just ends, although the last descriptor promised
        // another.
        let mut promised = true;
        for desc in chain {
            promised = desc.has_next();
            if !desc.is_write_only() && seen_writable {
                return Err(Malformed::Broken);
            }
            seen_writable |= desc.is_write_only();
            if desc.len() == 0 {
                continue;
            }
            let (list, access) = if desc.is_write_only() {
                (&mut writable, Permissions::Write)
            } else {
                (&mut readable, Permissions::Read)
            };
            last_mapped = append(list, mem, desc.addr(), desc.len() as usize, access);
            all_mapped &= last_mapped;
        }
        if promised || !last_mapped {
            return Err(Malformed::Broken);
        }
        let status = take_last_byte(&mut writable).map(Status).ok_or(Malformed::Broken)?;

        let mut header = [0; HEADER_SIZE];
        if !all_mapped || !take_front(&mut readable, &mut header) {
            return Err(Malformed::Answerable(status));
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let kind = match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => Kind::Read(sector),
            VIRTIO_BLK_T_OUT => Kind::Write(sector),
            VIRTIO_BLK_T_FLUSH => Kind::Flush,
            VIRTIO_BLK_T_GET_ID => Kind::GetId,
            VIRTIO_BLK_T_DISCARD => Kind::Ranges(Action::Discard),
            VIRTIO_BLK_T_WRITE_ZEROES => Kind::Ranges(Action::WriteZeroes),
            other => Kind::Unsupported(other),
        };
        let before_status = total(&writable);
        let data = match kind {
            Kind::Write(_) | Kind::Ranges(_) => readable,
            _ => writable,
        };
        let data_len = total(&data);
        Ok(Request { kind, data, data_len, before_status, status })
    }
}

/// Returns the number of bytes in `slices`.
fn total<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>]) -> u64 {
    slices.iter().map(|s| s.len() as u64).sum()
}

/// Appends the memory at `addr` to `list`. Appends nothing and returns `false` if some of it is not
/// mapped.
fn append<'m, M, B>(
    list: &mut Vec<VolatileSlice<'m, B>>,
    mem: &'m M,
    addr: GuestAddress,
    len: usize,
    access: Permissions,
) -> bool
where
    M: GuestMemory,
    M::Bitmap: WithBitmapSlice<'m, S = B>,
    B: BitmapSlice,
{
    let before = list.len();
    let Ok(slices) = mem.get_slices(addr, len, access) else {
        return false;
    };
    for slice in slices {
        match slice {
            Ok(slice) => list.push(slice),
            Err(_) => {
                list.truncate(before);
                return false;
            }
        }
    }
    true
}

/// Removes the last byte of `slices`, none of which may be empty.
fn take_last_byte<'m, B: BitmapSlice>(
    slices: &mut Vec<VolatileSlice<'m, B>>,
) -> Option<VolatileSlice<'m, B>> {
    let last = slices.pop()?;
    let (rest, byte) = last.split_at(last.len().checked_sub(1)?).ok()?;
    if !rest.is_empty() {
        slices.push(rest);
    }
    Some(byte)
}

/// Moves bytes from the front of `slices` into `buf` until it is full; returns `false` if there are
/// too few.
fn take_front<B: BitmapSlice>(slices: &mut Vec<VolatileSlice<'_, B>>, buf: &mut [u8]) -> bool {
    let mut filled = 0;
    let mut used_up = 0;
    for slice in slices.iter_mut() {
        let n = slice.copy_to(&mut buf[filled..]);
        filled += n;
        if n < slice.len() {
            let Ok(rest) = slice.offset(n) else {
                return false;
            };
            *slice = rest;
            break;
        }
        used_up += 1;
    }
    slices.drain(..used_up);
    filled == buf.len()
}

#[cfg(test)]
mod tests;
