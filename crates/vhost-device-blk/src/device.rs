// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device as vhost-user-backend drives it.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::config::{self, ConfigSpace};
use crate::counters::Counters;
use crate::disk::Disk;
use crate::execute::Executor;
use crate::pool::{Pool, drain_all};
use crate::queue::Queue;

/// The guest's memory, with the log of written pages that a migrating front-end may ask for.
pub type Memory = GuestMemoryMmap<BitmapMmapRegion>;
/// The guest's memory as it is now; front-ends replace it.
pub type AtomicMemory = GuestMemoryAtomic<Memory>;
/// A queue, locked for its own thread and the messages that are about it.
pub type Vring = VringMutex<AtomicMemory>;

/// What a [`BlkBackend`] offers.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// Number of queues, 1 to 64.
    pub num_queues: u16,
    /// Largest queue size, in descriptors; a power of two.
    pub queue_size: u16,
    /// Requests of one queue that are carried out at once, at most; 1 keeps them in order.
    pub threads: u16,
    /// Start with the write cache on: writes are stable when flushed, not when answered. The
    /// driver may change it (`VIRTIO_BLK_F_CONFIG_WCE`).
    pub write_cache: bool,
    /// The serial number, of which 20 bytes are used.
    pub serial: String,
    /// Offer `PAGEFAULT`. See [`crate::postcopy::probe`] for whether it will work.
    pub postcopy: bool,
    /// Offer `CONFIGURE_MEM_SLOTS`.
    pub mem_slots: bool,
}

/// A virtio-blk device.
///
/// With post-copy, whoever runs it must see to it that its threads end, with their process, when
/// the front-end goes away while they wait for a page; [`crate::server::serve`] does. And the
/// `VhostUserDaemon` must hold the last reference to the device: dropping it waits for the
/// requests in hand, while the userfaultfd is still open. A reference that is kept elsewhere keeps
/// the daemon from that, and a request that waits for a page then writes zeros to the disk. To stop
/// the device keep its [`requests`](Self::requests) instead.
pub struct BlkBackend {
    executor: Arc<Executor>,
    options: DeviceOptions,
    config: ConfigSpace,
    features: u64,
    queues: Vec<Queue>,
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
        let config = ConfigSpace::new(&disk, options.queue_size, options.num_queues);
        let features = config::virtio_features(&disk, options.num_queues > 1);
        let executor = Arc::new(Executor::new(disk, counters, options.clone()));
        let queue = |index| {
            let threads = usize::from(options.threads);
            Queue::new(usize::from(index), executor.clone(), mem.clone(), threads)
        };
        let queues = (0..options.num_queues).map(queue).collect();
        BlkBackend { executor, options, config, features, queues }
    }

    /// A handle on the requests in hand, to be kept where the device itself must not be.
    pub fn requests(&self) -> Requests {
        let pools = self.queues.iter().map(|queue| queue.pool().clone()).collect();
        Requests { executor: self.executor.clone(), pools }
    }
}

/// The requests that a [`BlkBackend`] has in hand. It does not keep the device.
pub struct Requests {
    executor: Arc<Executor>,
    pools: Vec<Arc<Pool>>,
}

impl Requests {
    /// Takes no request from now on, and waits until those in hand are answered. Gives up when
    /// nothing has happened for `patience`, though never while a request is at the disk: so what
    /// is given up waits for missing memory, and has not begun. Returns whether all are answered.
    pub fn stop(&self, patience: Duration) -> bool {
        for pool in &self.pools {
            pool.close();
        }
        let start = Instant::now();
        drain_all(&self.pools, patience, || match self.executor.at_the_disk() {
            0 => 0,
            _ => start.elapsed().as_nanos(),
        })
    }
}

impl Drop for BlkBackend {
    /// Waits for the requests in hand. The library drops the device before the userfaultfd, and
    /// once that is closed, a request that waits for a page would go on over zeros.
    fn drop(&mut self) {
        for queue in &self.queues {
            queue.pool().close();
            queue.pool().drain();
        }
    }
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
        self.features
    }

    fn acked_features(&self, features: u64) {
        self.executor.set_acked_features(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        config::protocol_features(self.options.postcopy, self.options.mem_slots)
    }

    // The library has told the rings already.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.config.read(offset, size, self.executor.write_cache())
    }

    fn set_config(&self, offset: u32, buf: &[u8]) -> io::Result<()> {
        match config::written_write_back(offset, buf) {
            Some(on) => self.executor.set_write_cache(on),
            None => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "of this device's fields only `writeback` can be written, with 0 or 1",
            )),
        }
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

    /// Returns when the requests in hand are on the used ring: so the ring's base that the
    /// front-end gets next counts no request that is not answered.
    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        if let Some(queue) = self.queues.get(queue_index as usize) {
            queue.drain();
        }
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
        // Each thread has one queue, so the thread's number is the queue's.
        match (vrings.get(usize::from(device_event)), self.queues.get(thread_id)) {
            (Some(vring), Some(queue)) => queue.process(vring),
            _ => log::warn!("event {device_event} ({evset:?}) is no queue's, ignored"),
        }
        Ok(())
    }
}
