// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The virtio-blk device, as an implementation of vhost-user-backend's trait.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::Level;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::config::{self, ConfigSpace};
use crate::counters::Counters;
use crate::disk::Disk;
use crate::execute::Executor;
use crate::memory::{AtomicMemory, Vring};
use crate::options::DeviceOptions;
use crate::pool::{Pool, drain_all};
use crate::queue::Queue;

/// A virtio-blk device.
///
/// With post-copy, the program that runs the device must ensure that the device's threads end,
/// together with their process, if the front-end disconnects while they wait for a page;
/// [`crate::serve`] does this. The `VhostUserDaemon` must also hold the last reference to
/// the device: dropping the device waits for the requests in flight while the userfaultfd is still
/// open. A reference kept elsewhere prevents that, and a request that waits for a page then writes
/// zeros to the disk. To stop the device, keep its [`requests`](Self::requests) instead.
pub struct BlkBackend {
    executor: Arc<Executor>,
    options: DeviceOptions,
    config: ConfigSpace,
    features: u64,
    queues: Vec<Queue>,
}

impl BlkBackend {
    /// Creates a device on `disk`. `mem` must be the memory passed to the `VhostUserDaemon`;
    /// `counters` must cover at least as many queues.
    pub fn new(
        disk: Arc<Disk>,
        counters: Arc<Counters>,
        mem: AtomicMemory,
        options: DeviceOptions,
    ) -> Self {
        let config = ConfigSpace::new(&disk, options.queue_size, options.num_queues);
        let features = config::virtio_features(&disk, options.num_queues > 1);
        log::debug!(
            "features on offer: {features:#x} ({}), protocol features: {:?}",
            config::feature_names(features),
            config::protocol_features(options.postcopy, options.mem_slots),
        );
        let executor = Arc::new(Executor::new(disk, counters, options.clone()));
        let queue = |index| {
            let threads = usize::from(options.threads);
            Queue::new(usize::from(index), executor.clone(), mem.clone(), threads)
        };
        let queues = (0..options.num_queues).map(queue).collect();
        BlkBackend { executor, options, config, features, queues }
    }

    /// Returns a handle on the requests in flight, for code that must not keep the device itself.
    pub fn requests(&self) -> Requests {
        let pools = self.queues.iter().map(|queue| queue.pool().clone()).collect();
        Requests { executor: self.executor.clone(), pools }
    }
}

/// The requests that a [`BlkBackend`] has in flight. It does not keep the device alive.
pub struct Requests {
    executor: Arc<Executor>,
    pools: Vec<Arc<Pool>>,
}

impl Requests {
    /// Stops taking requests and waits until those in flight are answered. Gives up after
    /// `patience` without progress, but never while a request is at the disk: an abandoned request
    /// waits for missing memory and has not started its I/O. Returns whether all requests are
    /// answered.
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
    /// Waits for the requests in flight. The library drops the device before the userfaultfd, and
    /// once that is closed, a request that waits for a page would continue over zeros.
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
        // Some front-ends accept VERSION_1 alone before the driver has negotiated.
        let preliminary =
            1 << VIRTIO_F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let level = if features & !preliminary == 0 { Level::Debug } else { Level::Info };
        let names = config::feature_names(features);
        log::log!(level, "features negotiated: {features:#x} ({names})");
        self.executor.set_acked_features(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        config::protocol_features(self.options.postcopy, self.options.mem_slots)
    }

    // The library has already informed the rings.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.config.read(offset, size, self.executor.write_cache())
    }

    fn set_config(&self, offset: u32, buf: &[u8]) -> io::Result<()> {
        match config::written_write_back(offset, buf) {
            Some(on) => self.executor.set_write_cache(on),
            None => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "only the field `writeback` of this device can be written, with 0 or 1",
            )),
        }
    }

    // The memory is shared with the library, which has already replaced it.
    fn update_memory(&self, mem: AtomicMemory) -> io::Result<()> {
        self.executor.memory_was_shared();
        let mem = mem.memory();
        let bytes: u64 = mem.iter().map(GuestMemoryRegion::len).sum();
        log::info!("guest memory: {bytes} bytes in {} regions", mem.num_regions());
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.options.num_queues).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
            .inspect_err(|error| {
                log::error!("cannot create an exit event for a queue's thread: {error}")
            })
            .ok()
    }

    /// Returns when the requests in flight are on the used ring, so that the ring base that the
    /// front-end reads next does not count an unanswered request.
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
        // Each thread serves one queue, so the thread's index is also the queue's.
        match (vrings.get(usize::from(device_event)), self.queues.get(thread_id)) {
            (Some(vring), Some(queue)) => queue.process(vring),
            _ => log::warn!("event {device_event} ({evset:?}) belongs to no queue: ignored"),
        }
        Ok(())
    }
}

impl fmt::Debug for BlkBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlkBackend").field("options", &self.options).finish_non_exhaustive()
    }
}

impl fmt::Debug for Requests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Requests").field("queues", &self.pools.len()).finish_non_exhaustive()
    }
}
