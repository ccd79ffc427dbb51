// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the device says of itself: features and the configuration space.

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

/// Bytes of the configuration space that have a meaning here; what follows reads as zeros.
pub const CONFIG_SIZE: usize = 60;
/// Most bytes a front-end may ask for, from offset 0 on.
pub const MAX_CONFIG_SIZE: usize = 256;
/// The block size the guest is told, in bytes: requests may have any multiple of a sector.
pub const BLOCK_SIZE: u32 = 512;
/// Most data segments asked for in one request: what one system call takes, less header and status.
const MAX_SEGMENTS: u16 = 1022;

// Offsets in `struct virtio_blk_config` (virtio 1.3, 5.2.4).
const CAPACITY: usize = 0;
const SEG_MAX: usize = 12;
const BLK_SIZE: usize = 20;
const NUM_QUEUES: usize = 34;

/// The virtio features on offer, and vhost-user's own among them.
///
/// `mq`: whether the device has more than one queue.
pub fn virtio_features(read_only: bool, mq: bool) -> u64 {
    let mut features = (1 << VIRTIO_F_VERSION_1)
        | (1 << VIRTIO_RING_F_EVENT_IDX)
        | (1 << VIRTIO_RING_F_INDIRECT_DESC)
        | (1 << VIRTIO_BLK_F_FLUSH)
        | (1 << VIRTIO_BLK_F_SEG_MAX)
        | (1 << VIRTIO_BLK_F_BLK_SIZE)
        | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
        | VhostUserVirtioFeatures::LOG_ALL.bits();
    if mq {
        features |= 1 << VIRTIO_BLK_F_MQ;
    }
    if read_only {
        features |= 1 << VIRTIO_BLK_F_RO;
    }
    features
}

/// The vhost-user protocol features on offer.
pub fn protocol_features(postcopy: bool, mem_slots: bool) -> VhostUserProtocolFeatures {
    let mut features = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG;
    if postcopy {
        features |= VhostUserProtocolFeatures::PAGEFAULT;
    }
    if mem_slots {
        features |= VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    }
    features
}

/// The configuration space.
#[derive(Clone, Debug)]
pub struct ConfigSpace([u8; CONFIG_SIZE]);

impl ConfigSpace {
    /// `sectors`: capacity in sectors of 512 bytes. `queue_size`: in descriptors.
    pub fn new(sectors: u64, queue_size: u16, num_queues: u16) -> Self {
        let seg_max = queue_size.saturating_sub(2).clamp(1, MAX_SEGMENTS);
        let mut bytes = [0; CONFIG_SIZE];
        bytes[CAPACITY..CAPACITY + 8].copy_from_slice(&sectors.to_le_bytes());
        bytes[SEG_MAX..SEG_MAX + 4].copy_from_slice(&u32::from(seg_max).to_le_bytes());
        bytes[BLK_SIZE..BLK_SIZE + 4].copy_from_slice(&BLOCK_SIZE.to_le_bytes());
        bytes[NUM_QUEUES..NUM_QUEUES + 2].copy_from_slice(&num_queues.to_le_bytes());
        ConfigSpace(bytes)
    }

    /// `size` bytes from `offset` on, zeros where nothing is defined; none at all (which makes
    /// vhost-user report an error) if the range leaves [`MAX_CONFIG_SIZE`].
    pub fn read(&self, offset: u32, size: u32) -> Vec<u8> {
        let (offset, size) = (offset as usize, size as usize);
        match offset.checked_add(size) {
            Some(end) if end <= MAX_CONFIG_SIZE => {}
            _ => return Vec::new(),
        }
        let mut bytes = vec![0; size];
        if let Some(defined) = self.0.get(offset..) {
            let n = defined.len().min(size);
            bytes[..n].copy_from_slice(&defined[..n]);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};
    use virtio_bindings::bindings::virtio_blk::virtio_blk_config;

    #[test]
    fn offsets_are_those_of_the_structure() {
        assert_eq!(CAPACITY, offset_of!(virtio_blk_config, capacity));
        assert_eq!(SEG_MAX, offset_of!(virtio_blk_config, seg_max));
        assert_eq!(BLK_SIZE, offset_of!(virtio_blk_config, blk_size));
        assert_eq!(NUM_QUEUES, offset_of!(virtio_blk_config, num_queues));
        assert!(size_of::<virtio_blk_config>() >= CONFIG_SIZE);
    }

    #[test]
    fn reads() {
        let config = ConfigSpace::new(0x1122_3344_5566, 128, 4);
        assert_eq!(config.read(0, 8), 0x1122_3344_5566u64.to_le_bytes());
        assert_eq!(config.read(12, 4), 126u32.to_le_bytes());
        assert_eq!(config.read(20, 4), 512u32.to_le_bytes());
        assert_eq!(config.read(34, 2), 4u16.to_le_bytes());
        assert_eq!(config.read(0, 96).len(), 96);
        assert_eq!(config.read(200, 8), [0; 8]);
        assert_eq!(config.read(0, 256).len(), 256);
        assert!(config.read(0, 257).is_empty());
        assert!(config.read(u32::MAX, 2).is_empty());
    }

    #[test]
    fn segments_fit_the_queue_and_a_system_call() {
        assert_eq!(ConfigSpace::new(1, 4, 1).read(12, 4), 2u32.to_le_bytes());
        let large = ConfigSpace::new(1, 32768, 1);
        assert_eq!(large.read(12, 4), 1022u32.to_le_bytes());
    }

    #[test]
    fn features() {
        assert_eq!(virtio_features(false, false) & (1 << VIRTIO_BLK_F_RO), 0);
        assert_ne!(virtio_features(true, false) & (1 << VIRTIO_BLK_F_RO), 0);
        assert_eq!(virtio_features(false, false) & (1 << VIRTIO_BLK_F_MQ), 0);
        assert_ne!(virtio_features(false, true) & (1 << VIRTIO_BLK_F_MQ), 0);
        assert!(protocol_features(true, false).contains(VhostUserProtocolFeatures::PAGEFAULT));
        assert!(!protocol_features(false, true).contains(VhostUserProtocolFeatures::PAGEFAULT));
    }
}
