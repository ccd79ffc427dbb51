// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Benchmarks of request processing: parsing a descriptor chain, and reading from the disk.
#![allow(missing_docs)] // criterion's macros make public items.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a bench are small")]

use std::os::unix::fs::FileExt;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use vhost_device_blk::request::{Kind, Request};
use vhost_device_blk::{Disk, DiskOptions};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const HEADER: u64 = 0x8000;
const DATA: u64 = 0x9000;
const STATUS: u64 = 0xf000;

fn request(criterion: &mut Criterion) {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    // A read of 4096 bytes: type 0, sector 8.
    memory.write_obj(0u64, GuestAddress(HEADER)).unwrap();
    memory.write_obj(8u64.to_le(), GuestAddress(HEADER + 8)).unwrap();
    let ring = MockSplitQueue::new(&memory, 16);
    let descriptors = [(HEADER, 16, NEXT, 1), (DATA, 4096, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)];
    for (index, (address, len, flags, next)) in descriptors.into_iter().enumerate() {
        let descriptor = RawDescriptor::from(Descriptor::new(address, len, flags, next));
        ring.desc_table().store(index as u16, descriptor).unwrap();
    }
    ring.avail().ring().ref_at(0).unwrap().store(0u16.to_le());
    ring.avail().idx().store(1u16.to_le());
    let mut queue: Queue = ring.create_queue().unwrap();
    queue.set_ready(true);
    let mut pop = || {
        queue.set_next_avail(0);
        queue.pop_descriptor_chain(&memory).unwrap()
    };
    criterion.bench_function("vhost-device-blk: take a request apart", |b| {
        b.iter(|| {
            let request = Request::parse(&memory, pop()).expect("it is well formed");
            assert_eq!(request.kind, Kind::Read(8));
            request.status.write(0);
        });
    });

    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().write_all_at(&[7; 16384], 0).unwrap();
    criterion.bench_function("vhost-device-blk: take a read apart and read 4K", |b| {
        let file =
            Disk::open(disk.path(), &DiskOptions { read_only: true, ..DiskOptions::default() })
                .unwrap();
        b.iter(|| {
            let request = Request::parse(&memory, pop()).expect("it is well formed");
            file.read(&request.data, 4096).unwrap();
            request.status.write(0);
        });
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    targets = request
}
criterion_main!(benches);
