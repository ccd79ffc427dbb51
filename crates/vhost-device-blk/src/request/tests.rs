// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Chains of every shape, over memory of two regions.

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
/// The end of the first of the two regions.
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

/// Parses a chain of descriptors given as (address, length, flags, next), the first at index 0.
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
    let read =
        parse(&mem, &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)])
            .unwrap();
    assert_eq!(read.kind, Kind::Read(7));
    assert_eq!((read.data_len, read.before_status), (512, 512));
    read.status.write(9);
    assert_eq!(mem.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 9);

    header(&mem, VIRTIO_BLK_T_OUT, 1 << 40);
    let write =
        parse(&mem, &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT, 2), (STATUS, 1, WRITE, 0)]).unwrap();
    assert_eq!(write.kind, Kind::Write(1 << 40));
    assert_eq!((write.data_len, write.before_status), (512, 0));
}

#[test]
fn any_layout() {
    let mem = memory();
    header(&mem, VIRTIO_BLK_T_OUT, 3);
    // The header in two pieces, the second followed by data; data across the seam.
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

    // The status after the data in one descriptor, followed by an empty descriptor.
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
    // A length that is not a multiple of a descriptor; a truncated table; a table outside memory.
    for broken in [(table, 47, INDIRECT, 0), (table, 32, INDIRECT, 0), (1 << 40, 48, 4, 0)] {
        assert!(matches!(parse(&mem, &[broken]), Err(Malformed::Broken)), "{broken:?}");
    }
}

#[test]
fn other_kinds() {
    let mem = memory();
    for (number, kind) in [
        (VIRTIO_BLK_T_FLUSH, Kind::Flush),
        (14, Kind::Unsupported(14)),
        (11, Kind::Ranges(Action::Discard)),
        (13, Kind::Ranges(Action::WriteZeroes)),
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
        // An index out of range, or a loop.
        &[head, (STATUS, 1, NEXT | WRITE, 16)],
        &[head, (STATUS, 1, NEXT | WRITE, 1)],
        // A readable buffer after a writable one.
        &[head, (DATA, 512, NEXT | WRITE, 2), (DATA, 16, NEXT, 3), (STATUS, 1, WRITE, 0)],
        // The status is outside memory.
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
        // A header that is too short, or none.
        &[(HEADER, 15, NEXT, 1), status],
        &[status],
        // A header or data outside memory, partly or altogether.
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
