// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests: from a descriptor chain to what the driver asks for, and where the answer goes.
//!
//! Nothing is assumed of how the driver cut a request into descriptors (virtio 1.3, 2.7.4.1): the
//! header is the first 16 bytes that the device may read, the status the last byte it may write.

use std::ops::Deref;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::DescriptorChain;
use vm_memory::bitmap::{BitmapSlice, WithBitmapSlice};
use vm_memory::{GuestAddress, GuestMemory, Permissions, VolatileSlice};

use crate::range::Action;

/// Bytes in a request's header: type, reserved, sector.
const HEADER_SIZE: usize = 16;

/// What the driver asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Read from the disk, starting at this sector of 512 bytes.
    Read(u64),
    /// Write to the disk, starting at this sector of 512 bytes.
    Write(u64),
    /// Put what was written on stable storage.
    Flush,
    /// Say the serial number.
    GetId,
    /// Something about ranges of the disk, which the data names.
    Ranges(Action),
    /// Something this device does not offer; the request's type.
    Unsupported(u32),
}

/// A request.
#[derive(Debug)]
pub struct Request<'m, B> {
    /// What the driver asks for.
    pub kind: Kind,
    /// The data: what to write to the disk or which ranges, or where to put what was read.
    pub data: Vec<VolatileSlice<'m, B>>,
    /// Bytes in `data`.
    pub data_len: u64,
    /// Bytes the device may write before the status; for requests that read, that is `data`.
    pub before_status: u64,
    /// Where the answer goes.
    pub status: Status<'m, B>,
}

/// The byte that the device answers with.
#[derive(Debug)]
pub struct Status<'m, B>(VolatileSlice<'m, B>);

impl<B: BitmapSlice> Status<'_, B> {
    /// Writes the answer, one of `VIRTIO_BLK_S_*`.
    pub fn write(&self, status: u8) {
        self.0.copy_from(&[status]);
    }
}

/// Why a chain is not a request.
#[derive(Debug)]
pub enum Malformed<'m, B> {
    /// There is a place to answer "I/O error": the header is short, or a buffer is not in memory.
    Answerable(Status<'m, B>),
    /// The chain is broken (a loop, an index or table out of range, a buffer to read after one to
    /// write) or has no room for an answer.
    Broken,
}

impl<'m, B: BitmapSlice> Request<'m, B> {
    /// Takes `chain` apart. Reads the descriptors and the header, no data; what is missing under
    /// them is waited for.
    ///
    /// # Errors
    /// [`Malformed`] says whether the driver can be told.
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
        // An iterator over a chain that goes wrong just ends, with one more descriptor promised.
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

/// Bytes in `slices`.
fn total<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>]) -> u64 {
    slices.iter().map(|s| s.len() as u64).sum()
}

/// Appends the memory from `addr` on to `list`; all of it, or nothing and `false`.
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

/// Takes the last byte off `slices`, none of which is empty.
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

/// Takes as many bytes off the front of `slices` as `buf` holds; `false` if there are too few.
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
