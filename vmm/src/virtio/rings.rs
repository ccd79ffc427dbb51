// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VMM's accesses to a device's rings in guest memory.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use demand_memory::{DemandMemory, FaultPath, PAGE_SIZE, PageRange};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::virtio::error::{QueueError, RingError};
use crate::virtio::mmio::QueueState;

/// Interval at which a used ring is polled for requests in flight.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Checks that each of a queue's rings lies within one region of memory, before a back-end gets
/// them.
pub(crate) fn check_rings(memory: &DemandMemory, queue: &QueueState) -> Result<(), RingError> {
    for (address, len) in queue.extents()? {
        let region = memory.find_region(GuestAddress(address));
        let last = address.checked_add(len - 1);
        let inside = region.zip(last).is_some_and(|(region, last)| last <= region.last_addr().0);
        if !inside {
            return Err(RingError::Outside { len, address });
        }
    }
    Ok(())
}

/// Waits until the back-end has answered a queue's requests up to the index `taken`.
pub(crate) fn await_used(
    memory: &DemandMemory,
    (index, queue): (usize, &QueueState),
    taken: u16,
    begun: Instant,
    within: Duration,
) -> Result<(), QueueError> {
    loop {
        let used = ring_index(memory, queue.used, begun, within)?;
        if used == taken {
            return Ok(());
        }
        if begun.elapsed() >= within {
            return Err(QueueError::InFlight { index, taken, used, within });
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// Reads a ring's index: the number of its entries so far, modulo 2^16 (virtio 1.2, sections 2.7.6
/// and 2.7.8). Waits for the ring's page until `within` has passed since `begun`.
pub(crate) fn ring_index(
    memory: &DemandMemory,
    ring: u64,
    begun: Instant,
    within: Duration,
) -> Result<u16, QueueError> {
    let at = GuestAddress(ring.wrapping_add(2));
    if let Some((region, offset)) = memory.to_region_addr(at) {
        let (pager, page) = (region.pager(), PageRange::new(offset.0 / PAGE_SIZE, 1));
        while pager.bitmap().is_missing(page.first) {
            pager.fetch(page, FaultPath::Vmm)?;
            if begun.elapsed() >= within {
                return Err(QueueError::Late { address: at.0, within });
            }
            thread::sleep(LOOK_EVERY);
        }
    }
    memory.load(at, Ordering::Acquire).map_err(QueueError::Read)
}
