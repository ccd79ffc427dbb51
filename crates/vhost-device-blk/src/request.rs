// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests: from a descriptor chain to what the driver asks for, and where the answer goes.
//!
//! Nothing is assumed of how the driver cut a request into descriptors (virtio 1.3, 2.7.4.1): the
//! header is the first 16 bytes that the device may read, the status the last byte it may write.

use std::ops::Deref;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_queue::DescriptorChain;
use vm_memory::bitmap::{BitmapSlice, WithBitmapSlice};
use vm_memory::{GuestAddress, GuestMemory, Permissions, VolatileSlice};

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
    /// Something this device does not offer; the request's type.
    Unsupported(u32),
}

/// A request.
#[derive(Debug)]
pub struct Request<'m, B> {
    /// What the driver asks for.
    pub kind: Kind,
    /// The data: what to write to the disk, or where to put what was read.
    pub data: Vec<VolatileSlice<'m, B>>,
    /// Bytes in `data`.
    pub data_len: u64,
    /// Bytes the device may write before the status; for all but writes, that is `data`.
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
            other => Kind::Unsupported(other),
        };
        let before_status = total(&writable);
        let data = match kind {
            Kind::Write(_) => readable,
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
mod tests {
    use super::*;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use virtio_queue::{Queue, QueueOwnedT, QueueT};
    use vm_memory::{Bytes, GuestMemoryMmap};

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    const HEADER: u64 = 0x8000;
    const DATA: u64 = 0x9000;
    const STATUS: u64 = 0xf000;
    /// Where the first of the two regions ends.
    const SEAM: u64 = 0xa000;

    type Memory = GuestMemoryMmap<()>;
    type Parsed<'m> = Result<Request<'m, ()>, Malformed<'m, ()>>;

    fn memory() -> Memory {
        Memory::from_ranges(&[
            (GuestAddress(0), SEAM as usize),
            (GuestAddress(SEAM), 0x10000 - SEAM as usize),
        ])
        .unwrap()
    }

    fn header(mem: &Memory, kind: u32, sector: u64) {
        mem.write_obj(kind.to_le(), GuestAddress(HEADER)).unwrap();
        mem.write_obj(sector.to_le(), GuestAddress(HEADER + 8)).unwrap();
    }

    /// Descriptors as (address, length, flags, next), the first at index 0.
    fn parse<'m>(mem: &'m Memory, descriptors: &[(u64, u32, u16, u16)]) -> Parsed<'m> {
        let vq = MockSplitQueue::new(mem, 16);
        for (i, &(addr, len, flags, next)) in descriptors.iter().enumerate() {
            let desc = RawDescriptor::from(Descriptor::new(addr, len, flags, next));
            vq.desc_table().store(i as u16, desc).unwrap();
        }
        vq.avail().ring().ref_at(0).unwrap().store(0u16.to_le());
        vq.avail().idx().store(1u16.to_le());
        let mut queue: Queue = vq.create_queue().unwrap();
        queue.set_ready(true);
        let chain = queue.iter(mem).unwrap().next().unwrap();
        Request::parse(mem, chain)
    }

    fn lengths(request: &Request<'_, ()>) -> Vec<usize> {
        request.data.iter().map(VolatileSlice::len).collect()
    }

    #[test]
    fn the_usual_three_descriptors() {
        let mem = memory();
        header(&mem, VIRTIO_BLK_T_IN, 7);
        let read = parse(
            &mem,
            &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)],
        )
        .unwrap();
        assert_eq!(read.kind, Kind::Read(7));
        assert_eq!((read.data_len, read.before_status), (512, 512));
        read.status.write(9);
        assert_eq!(mem.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 9);

        header(&mem, VIRTIO_BLK_T_OUT, 1 << 40);
        let write =
            parse(&mem, &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT, 2), (STATUS, 1, WRITE, 0)])
                .unwrap();
        assert_eq!(write.kind, Kind::Write(1 << 40));
        assert_eq!((write.data_len, write.before_status), (512, 0));
    }

    #[test]
    fn any_layout() {
        let mem = memory();
        header(&mem, VIRTIO_BLK_T_OUT, 3);
        // The header in two pieces, the second with data behind it; data across the seam.
        let write = parse(
            &mem,
            &[
                (HEADER, 5, NEXT, 1),
                (HEADER + 5, 11 + 100, NEXT, 2),
                (SEAM - 12, 412, NEXT, 3),
                (STATUS, 1, WRITE, 0),
            ],
        )
        .unwrap();
        assert_eq!(write.kind, Kind::Write(3));
        assert_eq!(lengths(&write), [100, 12, 400]);
        assert_eq!(write.data_len, 512);

        // The status behind the data in one descriptor, and an empty descriptor after it.
        header(&mem, VIRTIO_BLK_T_IN, 0);
        let read =
            parse(&mem, &[(HEADER, 16, NEXT, 1), (DATA, 513, NEXT | WRITE, 2), (0, 0, WRITE, 0)])
                .unwrap();
        assert_eq!(lengths(&read), [512]);
        read.status.write(5);
        assert_eq!(mem.read_obj::<u8>(GuestAddress(DATA + 512)).unwrap(), 5);
    }

    #[test]
    fn indirect_tables() {
        let mem = memory();
        header(&mem, VIRTIO_BLK_T_GET_ID, 0);
        let table = 0xb000;
        for (i, d) in [
            Descriptor::new(HEADER, 16, NEXT, 1),
            Descriptor::new(DATA, 20, NEXT | WRITE, 2),
            Descriptor::new(STATUS, 1, WRITE, 0),
        ]
        .into_iter()
        .enumerate()
        {
            mem.write_obj(d, GuestAddress(table + 16 * i as u64)).unwrap();
        }
        let request = parse(&mem, &[(table, 48, INDIRECT, 0)]).unwrap();
        assert_eq!((request.kind, request.data_len), (Kind::GetId, 20));
        // A length that is no number of descriptors; a table cut short; a table out of memory.
        for broken in [(table, 47, INDIRECT, 0), (table, 32, INDIRECT, 0), (1 << 40, 48, 4, 0)] {
            assert!(matches!(parse(&mem, &[broken]), Err(Malformed::Broken)), "{broken:?}");
        }
    }

    #[test]
    fn other_kinds() {
        let mem = memory();
        for (number, kind) in [
            (VIRTIO_BLK_T_FLUSH, Kind::Flush),
            (11, Kind::Unsupported(11)),
            (u32::MAX, Kind::Unsupported(u32::MAX)),
        ] {
            header(&mem, number, 0);
            let r = parse(&mem, &[(HEADER, 16, NEXT, 1), (STATUS, 1, WRITE, 0)]).unwrap();
            assert_eq!((r.kind, r.data_len), (kind, 0));
        }
    }

    #[test]
    fn broken_chains() {
        let mem = memory();
        header(&mem, VIRTIO_BLK_T_IN, 0);
        let head = (HEADER, 16, NEXT, 1);
        let broken: &[&[(u64, u32, u16, u16)]] = &[
            // No status.
            &[(HEADER, 16, 0, 0)],
            &[head, (DATA, 512, 0, 0)],
            &[head, (STATUS, 0, WRITE, 0)],
            // Goes nowhere, or round in circles.
            &[head, (STATUS, 1, NEXT | WRITE, 16)],
            &[head, (STATUS, 1, NEXT | WRITE, 1)],
            // To read after to write.
            &[head, (DATA, 512, NEXT | WRITE, 2), (DATA, 16, NEXT, 3), (STATUS, 1, WRITE, 0)],
            // The status is not in memory.
            &[head, (DATA, 512, NEXT | WRITE, 2), (0x10000, 1, WRITE, 0)],
            &[head, (u64::MAX, 1, WRITE, 0)],
            // Longer than any chain may be.
            &[head, (DATA, u32::MAX, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)],
        ];
        for descriptors in broken {
            assert!(matches!(parse(&mem, descriptors), Err(Malformed::Broken)), "{descriptors:?}");
        }
    }

    #[test]
    fn answerable_nonsense() {
        let mem = memory();
        header(&mem, VIRTIO_BLK_T_IN, 0);
        let status = (STATUS, 1, WRITE, 0);
        let nonsense: &[&[(u64, u32, u16, u16)]] = &[
            // A header too short, or none.
            &[(HEADER, 15, NEXT, 1), status],
            &[status],
            // A header or data out of memory, at its end or altogether.
            &[(0x10000 - 8, 16, NEXT, 1), status],
            &[(HEADER, 16, NEXT, 1), (1 << 50, 512, NEXT | WRITE, 2), status],
            &[(HEADER, 16, NEXT, 1), (u64::MAX - 5, 512, NEXT | WRITE, 2), status],
        ];
        for descriptors in nonsense {
            let parsed = parse(&mem, descriptors);
            let Err(Malformed::Answerable(status)) = parsed else {
                panic!("{descriptors:?}: {parsed:?}");
            };
            status.write(1);
            assert_eq!(mem.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 1);
        }
    }
}
