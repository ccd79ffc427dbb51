// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Execution of a request, from its descriptor chain to its status byte.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use virtio_queue::DescriptorChain;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{GuestMemoryLoadGuard, VolatileSlice};

use crate::advice;
use crate::counters::{Counters, QueueCounters};
use crate::disk::Disk;
use crate::faults;
use crate::memory::Memory;
use crate::options::{DeviceOptions, MIN_BLOCK_SIZE};
use crate::present::make_present;
use crate::range::{self, Action, Bounds, MAX_RANGES, RANGE_SIZE};
use crate::rate::OncePerSecond;
use crate::request::{Kind, Malformed, Request};

/// A request as taken from a queue. It holds a reference to its memory, which stays mapped until
/// the request is done even if the front-end replaces it meanwhile.
pub(crate) type Chain = DescriptorChain<GuestMemoryLoadGuard<Memory>>;

/// Executes requests of all queues, on any thread.
pub(crate) struct Executor {
    disk: Arc<Disk>,
    counters: Arc<Counters>,
    options: DeviceOptions,
    acked_features: AtomicU64,
    write_cache: AtomicBool,
    /// Whether pages of guest memory may be missing.
    pages_may_miss: AtomicBool,
    /// Requests whose data is all present and which are now inside the host's file system.
    at_the_disk: AtomicUsize,
}

/// Counts as a request at the disk until it is dropped.
struct AtTheDisk<'a>(&'a AtomicUsize);

impl Drop for AtTheDisk<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The outcome of a request.
struct Answer {
    status: u32,
    /// Bytes written, from the start of the device-writable buffers.
    written: u64,
    /// Bytes of the disk that the request covered.
    moved: u64,
}

impl Answer {
    fn of(status: u32) -> Self {
        Answer { status, written: 0, moved: 0 }
    }

    /// Returns the answer for an operation on `bytes` bytes of the disk, and logs a failure.
    fn done(what: &str, result: io::Result<()>, bytes: u64) -> Self {
        match result {
            Ok(()) => Answer { moved: bytes, ..Answer::of(VIRTIO_BLK_S_OK) },
            Err(error) => {
                report(what, &error);
                Answer::of(VIRTIO_BLK_S_IOERR)
            }
        }
    }
}

/// Logs a disk failure, at most once a second because the guest can retry as often as it likes.
fn report(what: &str, error: &io::Error) {
    static LIMIT: Mutex<OncePerSecond> = Mutex::new(OncePerSecond::new());
    let left_out = LIMIT.lock().unwrap_or_else(PoisonError::into_inner).pass();
    if let Some(left_out) = left_out {
        let advice = advice::for_error(error).map_or(String::new(), |it| format!("; {it}"));
        log::error!(
            "cannot {what} the disk: {error}; the guest gets an I/O error{advice}{left_out}"
        );
    }
}

impl Executor {
    pub(crate) fn new(disk: Arc<Disk>, counters: Arc<Counters>, options: DeviceOptions) -> Self {
        Executor {
            disk,
            counters,
            write_cache: AtomicBool::new(options.write_cache),
            options,
            acked_features: AtomicU64::new(0),
            pages_may_miss: AtomicBool::new(false),
            at_the_disk: AtomicUsize::new(0),
        }
    }

    /// Notes that the front-end has shared memory.
    pub(crate) fn memory_was_shared(&self) {
        let may_miss = self.options.postcopy && faults::userfaultfd_is_open();
        self.pages_may_miss.store(may_miss, Ordering::Relaxed);
    }

    /// Records the negotiated features.
    pub(crate) fn set_acked_features(&self, features: u64) {
        self.acked_features.store(features, Ordering::Relaxed);
        if self.acked(VIRTIO_BLK_F_CONFIG_WCE) && !self.acked(VIRTIO_BLK_F_FLUSH) {
            // Required by the specification (virtio 1.3, 5.2.5.2): a driver without FLUSH would
            // never flush the cache.
            self.write_cache.store(false, Ordering::SeqCst);
        }
    }

    /// Returns the number of requests that no longer wait for memory and are not yet done with the
    /// disk.
    pub(crate) fn at_the_disk(&self) -> usize {
        self.at_the_disk.load(Ordering::SeqCst)
    }

    /// Counts a chain taken from a queue; `in_hand` requests, including it, are now in flight.
    pub(crate) fn count_taken(&self, queue: usize, in_hand: usize) {
        let counters = self.counters.queue(queue);
        counters.requests.fetch_add(1, Ordering::Relaxed);
        counters.most_in_hand.fetch_max(in_hand as u64, Ordering::Relaxed);
    }

    /// Serves one request of a queue. Returns the length for the used ring.
    pub(crate) fn serve(&self, queue: usize, chain: Chain, mem: &Memory) -> u32 {
        let counters = self.counters.queue(queue);
        let parsed = self.count_faults(counters, || Request::parse(mem, chain));
        let request = match parsed {
            Ok(request) => request,
            Err(Malformed::Answerable(status)) => {
                add(&counters.io_errors, 1);
                status.write(VIRTIO_BLK_S_IOERR);
                return 0;
            }
            Err(Malformed::Broken) => {
                add(&counters.dropped, 1);
                return 0;
            }
        };
        let answer = self.execute(&request, counters);
        count(counters, request.kind, &answer);
        request.status.write(answer.status);
        // The used length promises that many bytes from the start (virtio 1.3, 2.7.8.2), so the
        // status counts only if everything before it has been written.
        let all = answer.written == request.before_status;
        let written = answer.written + u64::from(all);
        u32::try_from(written).unwrap_or(u32::MAX)
    }

    fn execute<B: BitmapSlice>(
        &self,
        request: &Request<'_, B>,
        counters: &QueueCounters,
    ) -> Answer {
        let refused = Answer::of(VIRTIO_BLK_S_IOERR);
        match request.kind {
            Kind::Read(sector) => {
                let Some(offset) = self.offset(sector, request.data_len) else {
                    return refused;
                };
                self.make_present(&request.data, counters);
                let _at_the_disk = self.go_to_the_disk();
                let result = self.disk.read(&request.data, offset);
                let answer = Answer::done("read from", result, request.data_len);
                Answer { written: answer.moved, ..answer }
            }
            Kind::Write(sector) => {
                let Some(offset) = self.offset(sector, request.data_len) else {
                    return refused;
                };
                if self.disk.read_only() {
                    return refused;
                }
                self.make_present(&request.data, counters);
                let _at_the_disk = self.go_to_the_disk();
                let result = self.disk.write(&request.data, offset);
                let result = result.and_then(|()| self.make_stable(counters));
                Answer::done("write to", result, request.data_len)
            }
            Kind::Flush => {
                let _at_the_disk = self.go_to_the_disk();
                Answer::done("flush", self.sync(counters), 0)
            }
            Kind::GetId => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                for (to, from) in id.iter_mut().zip(self.options.serial.bytes()) {
                    *to = from;
                }
                let mut rest = &id[..];
                for slice in &request.data {
                    let n = rest.len().min(slice.len());
                    slice.copy_from(&rest[..n]);
                    rest = &rest[n..];
                }
                Answer { written: (id.len() - rest.len()) as u64, ..Answer::of(VIRTIO_BLK_S_OK) }
            }
            Kind::Ranges(action) => self.treat_ranges(action, request, counters),
            Kind::Unsupported(_) => Answer::of(VIRTIO_BLK_S_UNSUPP),
        }
    }

    fn treat_ranges<B: BitmapSlice>(
        &self,
        action: Action,
        request: &Request<'_, B>,
        counters: &QueueCounters,
    ) -> Answer {
        let offered = match action {
            Action::Discard => self.disk.can_discard(),
            Action::WriteZeroes => !self.disk.read_only(),
        };
        if !offered {
            return Answer::of(VIRTIO_BLK_S_UNSUPP);
        }
        let most = RANGE_SIZE * MAX_RANGES as usize;
        let Some(len) = usize::try_from(request.data_len).ok().filter(|len| *len <= most) else {
            return Answer::of(VIRTIO_BLK_S_IOERR);
        };
        let mut data = vec![0; len];
        let mut at = 0;
        for slice in &request.data {
            at += slice.copy_to(&mut data[at..]);
        }
        let ranges = match range::parse(&data, action, &self.bounds()) {
            Ok(ranges) => ranges,
            Err(status) => return Answer::of(status),
        };
        let _at_the_disk = self.go_to_the_disk();
        let bytes = ranges.iter().map(|range| range.len).sum();
        match action {
            Action::Discard => {
                let result = ranges.iter().try_for_each(|range| self.disk.discard(range));
                Answer::done("discard ranges of", result, bytes)
            }
            Action::WriteZeroes => {
                let result = ranges.iter().try_for_each(|range| self.disk.write_zeroes(range));
                let result = result.and_then(|()| self.make_stable(counters));
                Answer::done("zero ranges of", result, bytes)
            }
        }
    }

    /// Turns the write cache on or off, as the driver requests. When it is turned off, everything
    /// written before is stable.
    pub(crate) fn set_write_cache(&self, on: bool) -> io::Result<()> {
        self.write_cache.store(on, Ordering::SeqCst);
        if on { Ok(()) } else { self.disk.flush() }
    }

    /// Returns whether the write cache is on, as shown in the configuration space.
    pub(crate) fn write_cache(&self) -> bool {
        self.write_cache.load(Ordering::SeqCst)
    }

    /// Makes written data stable before the answer, unless the write cache is on.
    fn make_stable(&self, counters: &QueueCounters) -> io::Result<()> {
        let cached = match (self.acked(VIRTIO_BLK_F_FLUSH), self.acked(VIRTIO_BLK_F_CONFIG_WCE)) {
            // A driver that cannot flush needs every write to be stable.
            (false, _) => false,
            (true, true) => self.write_cache(),
            // A driver that does not see the state of the cache assumes that it is on, and flushes.
            (true, false) => self.options.write_cache,
        };
        if cached { Ok(()) } else { self.sync(counters) }
    }

    fn sync(&self, counters: &QueueCounters) -> io::Result<()> {
        add(&counters.syncs, 1);
        self.disk.flush()
    }

    fn acked(&self, feature: u32) -> bool {
        self.acked_features.load(Ordering::Relaxed) & (1 << feature) != 0
    }

    /// Returns the size in bytes of which the driver's requests must be multiples. A driver that
    /// did not negotiate a block size knows only sectors.
    fn block_size(&self) -> u32 {
        if self.acked(VIRTIO_BLK_F_BLK_SIZE) {
            self.disk.topology().block_size
        } else {
            MIN_BLOCK_SIZE
        }
    }

    fn bounds(&self) -> Bounds {
        Bounds { sectors: self.disk.sectors(), block_size: self.block_size() }
    }

    fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        self.bounds().offset(sector, len)
    }

    fn go_to_the_disk(&self) -> AtTheDisk<'_> {
        self.at_the_disk.fetch_add(1, Ordering::SeqCst);
        AtTheDisk(&self.at_the_disk)
    }

    /// Makes the pages of `data` present. Memory can be missing only if post-copy was offered to
    /// the front-end.
    fn make_present<B: BitmapSlice>(
        &self,
        data: &[VolatileSlice<'_, B>],
        counters: &QueueCounters,
    ) {
        if self.options.postcopy {
            self.count_faults(counters, || make_present(data));
        }
    }

    /// Accesses guest memory in `access`, and counts the faults in which it waited, if pages may be
    /// missing at all: the count costs system calls.
    fn count_faults<T>(&self, counters: &QueueCounters, access: impl FnOnce() -> T) -> T {
        if !self.pages_may_miss.load(Ordering::Relaxed) {
            return access();
        }
        let (result, waits) = faults::count_waits(access);
        add(&counters.faults_waited, waits);
        result
    }
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

fn count(counters: &QueueCounters, kind: Kind, answer: &Answer) {
    if answer.status == VIRTIO_BLK_S_UNSUPP {
        return add(&counters.unsupported, 1);
    }
    let (good, bytes, bad) = match kind {
        Kind::Read(_) => (&counters.reads, Some(&counters.bytes_read), &counters.read_errors),
        Kind::Write(_) => (&counters.writes, Some(&counters.bytes_written), &counters.write_errors),
        Kind::Flush => (&counters.flushes, None, &counters.flush_errors),
        Kind::Ranges(Action::Discard) => {
            (&counters.discards, Some(&counters.bytes_discarded), &counters.discard_errors)
        }
        Kind::Ranges(Action::WriteZeroes) => {
            (&counters.write_zeroes, Some(&counters.bytes_zeroed), &counters.write_zeroes_errors)
        }
        Kind::GetId => (&counters.get_ids, None, &counters.io_errors),
        Kind::Unsupported(_) => return,
    };
    if answer.status == VIRTIO_BLK_S_OK {
        if let Some(counter) = bytes {
            add(counter, answer.moved);
        }
        add(good, 1);
    } else {
        add(bad, 1);
        add(&counters.io_errors, 1);
    }
}
