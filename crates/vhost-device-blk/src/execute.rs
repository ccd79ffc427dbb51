// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Carrying out a request: from a descriptor chain to its status byte.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
};
use virtio_queue::DescriptorChain;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{GuestMemoryLoadGuard, VolatileSlice};

use crate::counters::{Counters, QueueCounters};
use crate::device::{DeviceOptions, Memory};
use crate::disk::Disk;
use crate::present::make_present;
use crate::request::{Kind, Malformed, Request};

/// A request as it comes from a queue, with the memory it is about: that stays mapped until the
/// request is done, even if the front-end replaces it meanwhile.
pub type Chain = DescriptorChain<GuestMemoryLoadGuard<Memory>>;

/// Carries out requests of all queues, from any thread.
pub struct Executor {
    disk: Arc<Disk>,
    counters: Arc<Counters>,
    options: DeviceOptions,
    acked_features: AtomicU64,
    /// Requests whose data is all there, and which are with the host's file system now.
    at_the_disk: AtomicUsize,
}

/// Counts as a request at the disk until it is dropped.
struct AtTheDisk<'a>(&'a AtomicUsize);

impl Drop for AtTheDisk<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// An answer: the status, and the bytes written from the start of what the device may write.
struct Answer {
    status: u32,
    written: u64,
}

impl Executor {
    pub fn new(disk: Arc<Disk>, counters: Arc<Counters>, options: DeviceOptions) -> Self {
        Executor {
            disk,
            counters,
            options,
            acked_features: AtomicU64::new(0),
            at_the_disk: AtomicUsize::new(0),
        }
    }

    /// What the driver and the device have agreed on.
    pub fn set_acked_features(&self, features: u64) {
        self.acked_features.store(features, Ordering::Relaxed);
    }

    /// Requests that are past waiting for memory, and not done with the disk.
    pub fn at_the_disk(&self) -> usize {
        self.at_the_disk.load(Ordering::SeqCst)
    }

    /// Counts a chain taken from a queue, when as many are in hand with it.
    pub fn count_taken(&self, queue: usize, in_hand: usize) {
        let counters = self.counters.queue(queue);
        counters.requests.fetch_add(1, Ordering::Relaxed);
        counters.most_in_hand.fetch_max(in_hand as u64, Ordering::Relaxed);
    }

    /// Serves one request of a queue. Returns the length for the used ring.
    pub fn serve(&self, queue: usize, chain: Chain, mem: &Memory) -> u32 {
        let counters: &QueueCounters = self.counters.queue(queue);
        let add = |counter: &AtomicU64, n: u64| counter.fetch_add(n, Ordering::Relaxed);
        let request = match Request::parse(mem, chain) {
            Ok(request) => request,
            Err(Malformed::Answerable(status)) => {
                add(&counters.io_errors, 1);
                status.write(VIRTIO_BLK_S_IOERR as u8);
                return 0;
            }
            Err(Malformed::Broken) => {
                add(&counters.dropped, 1);
                return 0;
            }
        };
        let answer = self.execute(&request);
        match (answer.status, request.kind) {
            (VIRTIO_BLK_S_OK, Kind::Read(_)) => {
                add(&counters.bytes_read, request.data_len);
                add(&counters.reads, 1)
            }
            (VIRTIO_BLK_S_OK, Kind::Write(_)) => {
                add(&counters.bytes_written, request.data_len);
                add(&counters.writes, 1)
            }
            (VIRTIO_BLK_S_OK, Kind::Flush) => add(&counters.flushes, 1),
            (VIRTIO_BLK_S_OK, _) => add(&counters.get_ids, 1),
            (VIRTIO_BLK_S_UNSUPP, _) => add(&counters.unsupported, 1),
            _ => add(&counters.io_errors, 1),
        };
        request.status.write(answer.status as u8);
        // The used length promises that many bytes from the start on (virtio 1.3, 2.7.8.2), so the
        // status counts only where everything before it has been written.
        let all = answer.written == request.before_status;
        let written = answer.written + u64::from(all);
        u32::try_from(written).unwrap_or(u32::MAX)
    }

    fn execute<B: BitmapSlice>(&self, request: &Request<'_, B>) -> Answer {
        let io_error = Answer { status: VIRTIO_BLK_S_IOERR, written: 0 };
        let done = |what: &str, result: io::Result<u64>| match result {
            Ok(written) => Answer { status: VIRTIO_BLK_S_OK, written },
            Err(e) => {
                log::error!("{what} the disk: {e}; the guest is told of an I/O error");
                Answer { status: VIRTIO_BLK_S_IOERR, written: 0 }
            }
        };
        match request.kind {
            Kind::Read(sector) => {
                let Some(offset) = self.disk.offset(sector, request.data_len) else {
                    return io_error;
                };
                self.make_present(&request.data);
                let _at_the_disk = self.go_to_the_disk();
                let result = self.disk.read(&request.data, offset);
                done("reading from", result.map(|()| request.data_len))
            }
            Kind::Write(sector) => {
                let Some(offset) = self.disk.offset(sector, request.data_len) else {
                    return io_error;
                };
                if self.disk.read_only() {
                    return io_error;
                }
                self.make_present(&request.data);
                let _at_the_disk = self.go_to_the_disk();
                let mut result = self.disk.write(&request.data, offset);
                if result.is_ok() && !self.write_back() {
                    result = self.disk.flush();
                }
                done("writing to", result.map(|()| 0))
            }
            Kind::Flush => {
                let _at_the_disk = self.go_to_the_disk();
                done("flushing", self.disk.flush().map(|()| 0))
            }
            Kind::GetId => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                for (to, from) in id.iter_mut().zip(self.options.id.bytes()) {
                    *to = from;
                }
                let mut rest = &id[..];
                for slice in &request.data {
                    let n = rest.len().min(slice.len());
                    slice.copy_from(&rest[..n]);
                    rest = &rest[n..];
                }
                Answer { status: VIRTIO_BLK_S_OK, written: (id.len() - rest.len()) as u64 }
            }
            Kind::Unsupported(_) => Answer { status: VIRTIO_BLK_S_UNSUPP, written: 0 },
        }
    }

    fn go_to_the_disk(&self) -> AtTheDisk<'_> {
        self.at_the_disk.fetch_add(1, Ordering::SeqCst);
        AtTheDisk(&self.at_the_disk)
    }

    /// Memory can be missing only for a front-end that was offered post-copy.
    fn make_present<B: BitmapSlice>(&self, data: &[VolatileSlice<'_, B>]) {
        if self.options.postcopy {
            make_present(data);
        }
    }

    /// Whether the driver knows how to flush; if not, every write must be stable when answered.
    fn write_back(&self) -> bool {
        self.acked_features.load(Ordering::Relaxed) & (1 << VIRTIO_BLK_F_FLUSH) != 0
    }
}
