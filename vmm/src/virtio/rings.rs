// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VMM's accesses to a device's rings in guest memory.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use demand_memory::{DemandMemory, PAGE_SIZE, PageRange, Path};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::virtio::mmio::QueueState;

/// Interval at which a used ring is polled for requests in flight.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Checks that each of a queue's rings lies within one region of memory, before a back-end gets
/// them.
pub(crate) fn check_rings(memory: &DemandMemory, queue: &QueueState) -> Result<(), String> {
    for (address, len) in queue.extents()? {
        let region = memory.find_region(GuestAddress(address));
        let last = address.checked_add(len - 1);
        let inside = region.zip(last).is_some_and(|(region, last)| last <= region.last_addr().0);
        if !inside {
            return Err(format!("its {len} bytes at {address:#x} are outside of guest memory"));
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
) -> Result<(), String> {
    loop {
        let used = ring_index(memory, queue.used, begun, within)?;
        if used == taken {
            return Ok(());
        }
        if begun.elapsed() >= within {
            return Err(format!(
                "queue {index} has requests in flight: taken up to index {taken}, answered up to \
                 {used} within {} ms; retry when it is idle, or use a back-end that answers what \
                 it takes",
                within.as_millis()
            ));
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
) -> Result<u16, String> {
    let at = GuestAddress(ring.wrapping_add(2));
    if let Some((region, offset)) = memory.to_region_addr(at) {
        let (pager, page) = (region.pager(), PageRange::new(offset.0 / PAGE_SIZE, 1));
        while pager.bitmap().is_missing(page.first) {
            pager.fetch(page, Path::Vmm).map_err(|error| format!("cannot read a ring: {error}"))?;
            if begun.elapsed() >= within {
                return Err(format!(
                    "cannot read a ring: its page at {:#x} did not arrive within {} ms; check the \
                     page source",
                    at.0,
                    within.as_millis()
                ));
            }
            thread::sleep(LOOK_EVERY);
        }
    }
    memory.load(at, Ordering::Acquire).map_err(|error| format!("cannot read a ring: {error}"))
}
