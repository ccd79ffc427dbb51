// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device as vhost-user-backend drives it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
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
use crate::queue;

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
    executor: Executor,
    options: DeviceOptions,
    config: ConfigSpace,
    read_only: bool,
    mem: AtomicMemory,
    stopping: AtomicBool,
    /// Held by a queue's thread while it has requests in hand.
    busy: Vec<Mutex<()>>,
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
            config,
            read_only: disk.read_only(),
            executor: Executor::new(disk, counters, options.clone()),
            mem,
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
        config::virtio_features(self.read_only, self.options.num_queues > 1)
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
        let served = queue::process(&self.executor, thread_id, vring, &self.mem, &self.stopping);
        if let Err(e) = served {
            log::error!("queue {thread_id}: {e}; the driver's ring is not usable as it is");
        }
        Ok(())
    }
}
