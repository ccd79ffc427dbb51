// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The event queue of a vsock, which the VMM serves to tell the guest that it was moved.

use std::sync::atomic::Ordering;

use demand_memory::DemandMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::virtio::mmio::QueueState;

/// The index of the event queue.
pub(crate) const EVENT_QUEUE: usize = 2;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2, section 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Tells the guest that all connections are gone and that its address may have changed: the old
/// back-end had the connections, and this is a new one. Returns false if the guest has left no
/// buffer for the event.
///
/// # Errors
///
/// If the rings are not in memory.
pub(crate) fn tell_of_move(
    memory: &DemandMemory,
    queue: &mut QueueState,
) -> Result<bool, GuestMemoryError> {
    let at = |base: u64, offset: u64| GuestAddress(base.wrapping_add(offset));
    let available: u16 = memory.load(at(queue.available, 2), Ordering::Acquire)?;
    if available == queue.next_available || queue.size == 0 {
        return Ok(false);
    }
    let slot = u64::from(queue.next_available % queue.size);
    let head: u16 = memory.read_obj(at(queue.available, 4 + 2 * slot))?;
    let descriptor = |table: u64, index: u16| -> Result<(u64, u32, u16), GuestMemoryError> {
        let entry = 16 * u64::from(index);
        Ok((
            memory.read_obj(at(table, entry))?,
            memory.read_obj(at(table, entry + 8))?,
            memory.read_obj(at(table, entry + 12))?,
        ))
    };
    let mut buffer = descriptor(queue.descriptors, head % queue.size)?;
    if buffer.2 & INDIRECT != 0 {
        buffer = descriptor(buffer.0, 0)?;
    }
    let (address, len, flags) = buffer;
    if flags & WRITE == 0 || len < 4 {
        return Ok(false);
    }
    memory.write_obj(TRANSPORT_RESET, GuestAddress(address))?;
    let used: u16 = memory.load(at(queue.used, 2), Ordering::Acquire)?;
    let entry = 4 + 8 * u64::from(used % queue.size);
    memory.write_obj(u32::from(head), at(queue.used, entry))?;
    memory.write_obj(4u32, at(queue.used, entry + 4))?;
    memory.store(used.wrapping_add(1), at(queue.used, 2), Ordering::Release)?;
    queue.next_available = queue.next_available.wrapping_add(1);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use demand_memory::{
        BackingKind, DemandRegion, MemfdBacking, PagerConfig, Retrier, RetryPolicy, Stats,
    };
    use demand_source::LocalFile;
    use std::sync::Arc;

    fn memory() -> DemandMemory {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let config = PagerConfig {
            backing: Arc::new(MemfdBacking::new(BackingKind::Shmem, 1 << 20).unwrap()),
            source: Arc::new(LocalFile::open(image.path()).unwrap()),
            image_offset: 0,
            stats: Arc::new(Stats::new()),
            retrier: Retrier::new(RetryPolicy::default(), |_| {}),
        };
        DemandMemory::new(vec![DemandRegion::new(GuestAddress(0), config, ()).unwrap()]).unwrap()
    }

    #[test]
    fn moved_guest_is_notified_once_per_buffer() {
        let memory = memory();
        let mut queue = QueueState {
            size: 8,
            ready: true,
            descriptors: 0x1000,
            available: 0x2000,
            used: 0x3000,
            next_available: 7,
        };
        let put = |address: u64, value: u32| {
            memory.write_obj(value, GuestAddress(address)).unwrap();
        };
        let half = |address: u64, value: u16| {
            memory.write_obj(value, GuestAddress(address)).unwrap();
        };
        half(0x3002, 7);
        half(0x2002, 7);
        assert!(!tell_of_move(&memory, &mut queue).unwrap(), "there is no buffer");

        // Descriptor 5 in the ring's last entry, descriptor 6 (indirect) in its first.
        half(0x2002, 9);
        half(0x2004 + 14, 5);
        half(0x2004, 6);
        put(0x1050, 0x4000);
        put(0x1058, 8);
        half(0x105c, WRITE);
        put(0x1060, 0x5000);
        put(0x1068, 16);
        half(0x106c, INDIRECT);
        put(0x5000, 0x4008);
        put(0x5008, 4);
        half(0x500c, WRITE);
        put(0x4000, 0xffff_ffff);
        put(0x4008, 0xffff_ffff);
        assert!(tell_of_move(&memory, &mut queue).unwrap());
        assert!(tell_of_move(&memory, &mut queue).unwrap());
        assert!(!tell_of_move(&memory, &mut queue).unwrap());
        let word = |address: u64| memory.read_obj::<u32>(GuestAddress(address)).unwrap();
        assert_eq!((word(0x4000), word(0x4008)), (TRANSPORT_RESET, TRANSPORT_RESET));
        assert_eq!((word(0x3004 + 56), word(0x3004)), (5, 6));
        assert_eq!(memory.read_obj::<u16>(GuestAddress(0x3002)).unwrap(), 9);

        half(0x2002, 10);
        queue.descriptors = 1 << 40;
        assert!(tell_of_move(&memory, &mut queue).is_err());
    }
}
