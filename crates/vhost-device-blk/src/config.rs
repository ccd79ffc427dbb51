// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The features that the device offers, and its configuration space.

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

use crate::disk::Disk;
use crate::options::MIN_BLOCK_SIZE;
use crate::range::{MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZEROES_SECTORS};

/// The size in bytes of the fields defined here; the bytes after them read as zeros.
pub(crate) const CONFIG_SIZE: usize = 60;
/// The maximum number of bytes that a front-end may read, counted from offset 0.
pub(crate) const MAX_CONFIG_SIZE: usize = 256;
/// The maximum number of data segments of a request: the limit of one system call, less the header
/// and the status.
const MAX_SEGMENTS: u16 = 1022;

// Offsets in `struct virtio_blk_config` (virtio 1.3, 5.2.4).
const CAPACITY: usize = 0;
const SEG_MAX: usize = 12;
const BLK_SIZE: usize = 20;
const PHYSICAL_BLOCK_EXP: usize = 24;
const MIN_IO_SIZE: usize = 26;
const OPT_IO_SIZE: usize = 28;
const WCE: usize = 32;
const NUM_QUEUES: usize = 34;
const MAX_DISCARD_SECTORS_AT: usize = 36;
const MAX_DISCARD_SEG: usize = 40;
const DISCARD_SECTOR_ALIGNMENT: usize = 44;
const MAX_WRITE_ZEROES_SECTORS: usize = 48;
const MAX_WRITE_ZEROES_SEG: usize = 52;
const WRITE_ZEROES_MAY_UNMAP: usize = 56;

/// Returns the virtio features on offer, including vhost-user's own.
///
/// `mq` states whether the device has more than one queue.
///
/// `VIRTIO_BLK_F_SIZE_MAX` is not offered: a segment may have any size.
pub(crate) fn virtio_features(disk: &Disk, mq: bool) -> u64 {
    let mut features = (1 << VIRTIO_F_VERSION_1)
        | (1 << VIRTIO_RING_F_EVENT_IDX)
        | (1 << VIRTIO_RING_F_INDIRECT_DESC)
        | (1 << VIRTIO_BLK_F_FLUSH)
        | (1 << VIRTIO_BLK_F_CONFIG_WCE)
        | (1 << VIRTIO_BLK_F_SEG_MAX)
        | (1 << VIRTIO_BLK_F_BLK_SIZE)
        | (1 << VIRTIO_BLK_F_TOPOLOGY)
        | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
        | VhostUserVirtioFeatures::LOG_ALL.bits();
    if mq {
        features |= 1 << VIRTIO_BLK_F_MQ;
    }
    if disk.read_only() {
        features |= 1 << VIRTIO_BLK_F_RO;
    } else {
        features |= 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        if disk.can_discard() {
            features |= 1 << VIRTIO_BLK_F_DISCARD;
        }
    }
    features
}

/// The names of the features that this device offers, by their bits.
const NAMES: [(u32, &str); 13] = [
    (VIRTIO_BLK_F_SEG_MAX, "SEG_MAX"),
    (VIRTIO_BLK_F_RO, "RO"),
    (VIRTIO_BLK_F_BLK_SIZE, "BLK_SIZE"),
    (VIRTIO_BLK_F_FLUSH, "FLUSH"),
    (VIRTIO_BLK_F_TOPOLOGY, "TOPOLOGY"),
    (VIRTIO_BLK_F_CONFIG_WCE, "CONFIG_WCE"),
    (VIRTIO_BLK_F_MQ, "MQ"),
    (VIRTIO_BLK_F_DISCARD, "DISCARD"),
    (VIRTIO_BLK_F_WRITE_ZEROES, "WRITE_ZEROES"),
    (VhostUserVirtioFeatures::LOG_ALL.bits().trailing_zeros(), "LOG_ALL"),
    (VIRTIO_RING_F_INDIRECT_DESC, "INDIRECT_DESC"),
    (VIRTIO_RING_F_EVENT_IDX, "EVENT_IDX"),
    (VIRTIO_F_VERSION_1, "VERSION_1"),
];

/// Returns the names of those of `features` that this device offers.
pub(crate) fn feature_names(features: u64) -> String {
    let set = NAMES.iter().filter(|(bit, _)| features & (1 << bit) != 0);
    set.map(|(_, name)| *name).collect::<Vec<_>>().join(" ")
}

/// Returns the vhost-user protocol features on offer.
pub(crate) fn protocol_features(postcopy: bool, mem_slots: bool) -> VhostUserProtocolFeatures {
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

/// The device's configuration space.
#[derive(Clone, Debug)]
pub(crate) struct ConfigSpace([u8; CONFIG_SIZE]);

impl ConfigSpace {
    /// Creates the configuration space of `disk`; `queue_size` is in descriptors.
    pub(crate) fn new(disk: &Disk, queue_size: u16, num_queues: u16) -> Self {
        let seg_max = queue_size.saturating_sub(2).clamp(1, MAX_SEGMENTS);
        let topology = disk.topology();
        let blocks = |bytes: u32| bytes / topology.block_size;
        let exponent = u8::try_from(blocks(topology.physical).ilog2()).expect("a u32 has 32 bits");
        let min_io = u16::try_from(blocks(topology.min_io)).expect("a unit has 64 KiB at most");
        let mut bytes = [0; CONFIG_SIZE];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(CAPACITY, &disk.sectors().to_le_bytes());
        put(SEG_MAX, &u32::from(seg_max).to_le_bytes());
        put(BLK_SIZE, &topology.block_size.to_le_bytes());
        put(PHYSICAL_BLOCK_EXP, &[exponent]);
        put(MIN_IO_SIZE, &min_io.to_le_bytes());
        put(OPT_IO_SIZE, &blocks(topology.opt_io).to_le_bytes());
        put(NUM_QUEUES, &num_queues.to_le_bytes());
        if disk.can_discard() {
            let alignment = topology.physical / MIN_BLOCK_SIZE;
            put(MAX_DISCARD_SECTORS_AT, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(MAX_DISCARD_SEG, &MAX_RANGES.to_le_bytes());
            put(DISCARD_SECTOR_ALIGNMENT, &alignment.to_le_bytes());
        }
        if !disk.read_only() {
            put(MAX_WRITE_ZEROES_SECTORS, &MAX_ZEROES_SECTORS.to_le_bytes());
            put(MAX_WRITE_ZEROES_SEG, &MAX_RANGES.to_le_bytes());
            put(WRITE_ZEROES_MAY_UNMAP, &[u8::from(disk.can_discard())]);
        }
        ConfigSpace(bytes)
    }

    /// Returns `size` bytes from `offset`, with zeros where no field is defined. Returns an empty
    /// vector, which makes vhost-user report an error, if the range exceeds [`MAX_CONFIG_SIZE`].
    /// `write_back` is the current state of the write cache.
    pub(crate) fn read(&self, offset: u32, size: u32, write_back: bool) -> Vec<u8> {
        let (offset, size) = (offset as usize, size as usize);
        match offset.checked_add(size) {
            Some(end) if end <= MAX_CONFIG_SIZE => {}
            _ => return Vec::new(),
        }
        let mut now = self.0;
        now[WCE] = u8::from(write_back);
        let mut bytes = vec![0; size];
        if let Some(defined) = now.get(offset..) {
            let n = defined.len().min(size);
            bytes[..n].copy_from_slice(&defined[..n]);
        }
        bytes
    }
}

/// Decodes a write to the configuration space. Only the write cache can be written: returns whether
/// the driver turns it on, or `None` for any other write.
pub(crate) fn written_write_back(offset: u32, bytes: &[u8]) -> Option<bool> {
    match (offset as usize, bytes) {
        (WCE, [on @ (0 | 1)]) => Some(*on == 1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::DiskOptions;
    use proptest::prelude::*;
    use std::mem::{offset_of, size_of};
    use virtio_bindings::bindings::virtio_blk::virtio_blk_config;

    fn disk(options: DiskOptions) -> Disk {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 40).unwrap();
        Disk::open(file.path(), &options).unwrap()
    }

    fn field(config: &ConfigSpace, offset: usize, size: u32) -> u64 {
        let mut bytes = config.read(offset as u32, size, true);
        bytes.resize(8, 0);
        u64::from_le_bytes(bytes.try_into().unwrap())
    }

    #[test]
    fn offsets_are_those_of_the_structure() {
        type C = virtio_blk_config;
        assert_eq!(CAPACITY, offset_of!(C, capacity));
        assert_eq!(SEG_MAX, offset_of!(C, seg_max));
        assert_eq!(BLK_SIZE, offset_of!(C, blk_size));
        assert_eq!(PHYSICAL_BLOCK_EXP, offset_of!(C, physical_block_exp));
        assert_eq!(MIN_IO_SIZE, offset_of!(C, min_io_size));
        assert_eq!(OPT_IO_SIZE, offset_of!(C, opt_io_size));
        assert_eq!(WCE, offset_of!(C, wce));
        assert_eq!(NUM_QUEUES, offset_of!(C, num_queues));
        assert_eq!(MAX_DISCARD_SECTORS_AT, offset_of!(C, max_discard_sectors));
        assert_eq!(MAX_DISCARD_SEG, offset_of!(C, max_discard_seg));
        assert_eq!(DISCARD_SECTOR_ALIGNMENT, offset_of!(C, discard_sector_alignment));
        assert_eq!(MAX_WRITE_ZEROES_SECTORS, offset_of!(C, max_write_zeroes_sectors));
        assert_eq!(MAX_WRITE_ZEROES_SEG, offset_of!(C, max_write_zeroes_seg));
        assert_eq!(WRITE_ZEROES_MAY_UNMAP, offset_of!(C, write_zeroes_may_unmap));
        assert!(size_of::<C>() >= CONFIG_SIZE);
    }

    #[test]
    fn reads() {
        let config = ConfigSpace::new(&disk(DiskOptions::default()), 128, 4);
        assert_eq!(field(&config, CAPACITY, 8), 1 << 31);
        assert_eq!(field(&config, SEG_MAX, 4), 126);
        assert_eq!(field(&config, BLK_SIZE, 4), 512);
        assert_eq!(field(&config, NUM_QUEUES, 2), 4);
        let exponent = field(&config, PHYSICAL_BLOCK_EXP, 1);
        assert_eq!(field(&config, MIN_IO_SIZE, 2), 1 << exponent);
        assert_eq!(field(&config, MAX_DISCARD_SECTORS_AT, 4), 1 << 21);
        assert_eq!(field(&config, DISCARD_SECTOR_ALIGNMENT, 4), 1 << exponent);
        assert_eq!(field(&config, WRITE_ZEROES_MAY_UNMAP, 1), 1);
        assert_eq!(field(&config, WCE, 1), 1);
        assert_eq!(config.read(WCE as u32, 1, false), [0]);

        assert_eq!(config.read(0, 96, true).len(), 96);
        assert_eq!(config.read(200, 8, true), [0; 8]);
        assert_eq!(config.read(0, 256, true).len(), 256);
        assert!(config.read(0, 257, true).is_empty());
        assert!(config.read(u32::MAX, 2, true).is_empty());
    }

    #[test]
    fn blocks_of_4096_bytes() {
        let options = DiskOptions { block_size: Some(4096), ..Default::default() };
        let config = ConfigSpace::new(&disk(options), 128, 1);
        assert_eq!(field(&config, CAPACITY, 8), 1 << 31);
        assert_eq!(field(&config, BLK_SIZE, 4), 4096);
    }

    #[test]
    fn segments_fit_the_queue_and_a_system_call() {
        let disk = disk(DiskOptions::default());
        assert_eq!(field(&ConfigSpace::new(&disk, 4, 1), SEG_MAX, 4), 2);
        assert_eq!(field(&ConfigSpace::new(&disk, 32768, 1), SEG_MAX, 4), 1022);
    }

    #[test]
    fn only_the_write_cache_can_be_written() {
        assert_eq!(written_write_back(32, &[1]), Some(true));
        assert_eq!(written_write_back(32, &[0]), Some(false));
        assert_eq!(written_write_back(32, &[2]), None);
        assert_eq!(written_write_back(32, &[1, 0]), None);
        assert_eq!(written_write_back(32, &[]), None);
        assert_eq!(written_write_back(0, &[1; 60]), None);
    }

    #[test]
    fn features() {
        let has = |features: u64, bit: u32| features & (1 << bit) != 0;
        let disk = |read_only, keep_space| {
            disk(DiskOptions { read_only, keep_space, ..Default::default() })
        };
        let normal = virtio_features(&disk(false, false), true);
        assert!(!has(normal, VIRTIO_BLK_F_RO) && has(normal, VIRTIO_BLK_F_MQ));
        assert!(has(normal, VIRTIO_BLK_F_DISCARD) && has(normal, VIRTIO_BLK_F_WRITE_ZEROES));
        let kept = virtio_features(&disk(false, true), false);
        assert!(!has(kept, VIRTIO_BLK_F_DISCARD) && has(kept, VIRTIO_BLK_F_WRITE_ZEROES));
        assert!(!has(kept, VIRTIO_BLK_F_MQ));
        let read_only = disk(true, false);
        let features = virtio_features(&read_only, false);
        assert!(has(features, VIRTIO_BLK_F_RO) && !has(features, VIRTIO_BLK_F_WRITE_ZEROES));
        assert!(!has(features, VIRTIO_BLK_F_DISCARD));
        let config = ConfigSpace::new(&read_only, 128, 1);
        assert_eq!(config.read(36, 21, true), [0; 21]);

        // Each feature on offer has a name, but that of vhost-user itself.
        let named = feature_names(normal | features).split(' ').count();
        assert_eq!(named, ((normal | features).count_ones() - 1) as usize);

        assert!(protocol_features(true, false).contains(VhostUserProtocolFeatures::PAGEFAULT));
        assert!(!protocol_features(false, true).contains(VhostUserProtocolFeatures::PAGEFAULT));
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 2000, failure_persistence: None, ..ProptestConfig::default()
        })]

        /// Each part that is read equals the same part of the whole, and nothing lies outside.
        #[test]
        fn config_space_parts_match_the_whole(
            sectors in 8..1u64 << 32,
            queue_size: u16,
            queues: u16,
            offset in prop_oneof![any::<u32>(), 0..300u32],
            size in prop_oneof![any::<u32>(), 0..300u32],
            write_back: bool,
        ) {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(sectors * 512).unwrap();
            let disk = Disk::open(file.path(), &DiskOptions::default()).unwrap();
            let config = ConfigSpace::new(&disk, queue_size, queues);
            let whole = config.read(0, MAX_CONFIG_SIZE as u32, write_back);
            prop_assert_eq!(whole.len(), MAX_CONFIG_SIZE);
            prop_assert_eq!(&whole[..8], &sectors.to_le_bytes()[..]);
            prop_assert_eq!(&whole[34..36], &queues.to_le_bytes()[..]);
            prop_assert!(whole[CONFIG_SIZE..].iter().all(|byte| *byte == 0));
            let part = config.read(offset, size, write_back);
            match u64::from(offset) + u64::from(size) {
                end if end <= MAX_CONFIG_SIZE as u64 => {
                    prop_assert_eq!(&part[..], &whole[offset as usize..end as usize]);
                }
                _ => prop_assert!(part.is_empty()),
            }
        }
    }
}
