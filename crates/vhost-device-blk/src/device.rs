// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device as vhost-user-backend drives it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringState, VringT};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap, VolatileSlice,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::config::{self, ConfigSpace};
use crate::counters::{Counters, QueueCounters};
use crate::disk::{Disk, make_present};
use crate::request::{Kind, Malformed, Request};

/// The guest's memory, with the log of written pages that a migrating front-end may ask for.
pub type Memory = GuestMemoryMmap<BitmapMmapRegion>;
/// The guest's memory as it is now; front-ends replace it.
pub type AtomicMemory = GuestMemoryAtomic<Memory>;
/// A queue, locked for its own thread and the messages that are about it.
pub type Vring = VringMutex<AtomicMemory>;

type Chain = DescriptorChain<GuestMemoryLoadGuard<Memory>>;

/// What a [`BlkBackend`] offers.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// Number of queues, 1 to 64.
    pub num_queues: u16,
    /// Largest queue size, in descriptors; a power of two.
    pub queue_size: u16,
    /// The serial number, of which 20 bytes are used.
    pub id: String,
    /// Offer `PAGEFAULT`. See [`crate::postcopy::probe`] for whether it will work.
    pub postcopy: bool,
    /// Offer `CONFIGURE_MEM_SLOTS`.
    pub mem_slots: bool,
}

/// A virtio-blk device.
///
/// With post-copy, whoever runs it must see to it that its threads end, with their process, when
/// the front-end goes away while they wait for a page; [`crate::server::serve`] does.
pub struct BlkBackend {
    disk: Arc<Disk>,
    counters: Arc<Counters>,
    options: DeviceOptions,
    config: ConfigSpace,
    mem: AtomicMemory,
    acked_features: AtomicU64,
    stopping: AtomicBool,
    /// Held by a queue's thread while it has requests in hand.
    busy: Vec<Mutex<()>>,
}

/// An answer: the status, and the bytes written from the start of what the device may write.
struct Answer {
    status: u32,
    written: u64,
}

impl BlkBackend {
    /// A device on `disk`. `mem` must be the memory that the `VhostUserDaemon` is given;
    /// `counters` must count at least as many queues.
    pub fn new(
        disk: Arc<Disk>,
        counters: Arc<Counters>,
        mem: AtomicMemory,
        options: DeviceOptions,
    ) -> Self {
        let config = ConfigSpace::new(disk.sectors(), options.queue_size, options.num_queues);
        BlkBackend {
            disk,
            counters,
            config,
            mem,
            acked_features: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            busy: (0..options.num_queues).map(|_| Mutex::new(())).collect(),
            options,
        }
    }

    /// Takes no request from now on, and waits until those in hand are answered, `patience` at
    /// most. Returns whether they are; a request that waits for a missing page is not.
    pub fn stop(&self, patience: Duration) -> bool {
        self.stopping.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + patience;
        for busy in &self.busy {
            while let Err(TryLockError::WouldBlock) = busy.try_lock() {
                if Instant::now() >= deadline {
                    return false;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        true
    }

    fn busy(&self, queue: usize) -> MutexGuard<'_, ()> {
        self.busy[queue].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves `vring` until it is empty or stopped.
    ///
    /// The ring's lock is held for each single step on the ring, never while data moves; a fault
    /// under it delays messages about this ring, and no other ring.
    fn process_queue(&self, index: usize, vring: &Vring) -> Result<(), virtio_queue::Error> {
        let counters = self.counters.queue(index);
        let mut idle_rounds = 0;
        loop {
            {
                let mut state = vring.get_mut();
                if !self.may_run(&state) {
                    return Ok(());
                }
                state.disable_notification()?;
            }
            let mut served = false;
            while let Some(chain) = self.next_chain(vring)? {
                let head = chain.head_index();
                let written = self.serve(chain, counters);
                complete(vring, head, written)?;
                served = true;
            }
            let mut state = vring.get_mut();
            if !state.get_queue().ready() {
                return Ok(());
            }
            if !state.enable_notification()? {
                return Ok(());
            }
            // More has come in between. If nothing of it can be had twice in a row, the ring is
            // stopped or broken.
            idle_rounds = if served { 0 } else { idle_rounds + 1 };
            if idle_rounds > 1 {
                return Ok(());
            }
        }
    }

    fn may_run(&self, state: &VringState<AtomicMemory>) -> bool {
        state.get_queue().ready() && state.is_enabled() && !self.stopping.load(Ordering::SeqCst)
    }

    fn next_chain(&self, vring: &Vring) -> Result<Option<Chain>, virtio_queue::Error> {
        let mut state = vring.get_mut();
        if !self.may_run(&state) {
            return Ok(None);
        }
        Ok(state.get_queue_mut().iter(self.mem.memory())?.next())
    }

    /// Serves one request. Returns the length for the used ring.
    fn serve(&self, chain: Chain, counters: &QueueCounters) -> u32 {
        let add = |counter: &AtomicU64, n: u64| counter.fetch_add(n, Ordering::Relaxed);
        // One memory for the whole request, even if the front-end replaces it meanwhile.
        let mem = self.mem.memory();
        let request = match Request::parse(&*mem, chain) {
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
                let mut result = self.disk.write(&request.data, offset);
                if result.is_ok() && !self.write_back() {
                    result = self.disk.flush();
                }
                done("writing to", result.map(|()| 0))
            }
            Kind::Flush => done("flushing", self.disk.flush().map(|()| 0)),
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

/// Puts a chain on the used ring and tells the driver if it wants to know.
fn complete(vring: &Vring, head: u16, written: u32) -> Result<(), virtio_queue::Error> {
    let mut state = vring.get_mut();
    match state.add_used(head, written) {
        Ok(()) => {}
        // The driver made up a head beyond its queue: there is nothing to give back.
        Err(virtio_queue::Error::InvalidDescriptorIndex) => return Ok(()),
        Err(e) => return Err(e),
    }
    if state.needs_notification()?
        && let Err(e) = state.signal_used_queue()
    {
        log::error!("signalling the front-end: {e}; the guest may miss a completion");
    }
    Ok(())
}

impl VhostUserBackend for BlkBackend {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        usize::from(self.options.num_queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.options.queue_size)
    }

    fn features(&self) -> u64 {
        config::virtio_features(self.disk.read_only(), self.options.num_queues > 1)
    }

    fn acked_features(&self, features: u64) {
        self.acked_features.store(features, Ordering::Relaxed);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        config::protocol_features(self.options.postcopy, self.options.mem_slots)
    }

    // The library has told the rings already.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.config.read(offset, size)
    }

    fn set_config(&self, _offset: u32, _buf: &[u8]) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "no field of this device is writable"))
    }

    // The memory is shared with the library, which has replaced it already.
    fn update_memory(&self, _mem: AtomicMemory) -> io::Result<()> {
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.options.num_queues).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
            .inspect_err(|e| log::error!("no exit event for a queue's thread: {e}"))
            .ok()
    }

    /// Returns when the request in hand, if any, is on the used ring: so the ring's base that the
    /// front-end gets next counts no request that is not answered.
    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        drop(self.busy(queue_index as usize));
        Ok(())
    }

    /// Never fails: an error would silently end the queue's thread.
    fn handle_event(
        &self,
        device_event: u16,
        evset: EventSet,
        vrings: &[Vring],
        thread_id: usize,
    ) -> io::Result<()> {
        let Some(vring) = vrings.get(usize::from(device_event)) else {
            log::warn!("event {device_event} ({evset:?}) is no queue's, ignored");
            return Ok(());
        };
        // Each thread has one queue, so the thread's number is the queue's.
        let _busy = self.busy(thread_id);
        if let Err(e) = self.process_queue(thread_id, vring) {
            log::error!("queue {thread_id}: {e}; the driver's ring is not usable as it is");
        }
        Ok(())
    }
}
