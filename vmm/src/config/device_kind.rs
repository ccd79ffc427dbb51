// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kinds of virtio devices that back-ends serve, with their features, queues and config spaces.

use std::fmt;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids as ids;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Size of the largest queue that virtio allows, in descriptors.
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// A kind of device. The VMM refuses all others, because their back-ends keep state that cannot be
/// handed over (for example open files), or need more than this transport has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// A disk (virtio 1.2, section 5.2).
    Blk,
    /// A network card (section 5.1), with one pair of queues.
    Net,
    /// A source of random numbers (section 5.4).
    Rng,
    /// A console (section 5.3) with one port.
    Console,
    /// Sockets between guest and host (section 5.10).
    Vsock,
}

/// Transport and ring features that pass through unchanged. Packed rings are not among them, nor
/// are features that need more registers or address translation.
const TRANSPORT: u64 = 1 << VIRTIO_F_VERSION_1 | RINGS;

/// Features of split rings.
const RINGS: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Feature bits of a disk, with their names.
const BLK: &[(u32, &str)] = &[
    (blk::VIRTIO_BLK_F_SIZE_MAX, "SIZE_MAX"),
    (blk::VIRTIO_BLK_F_SEG_MAX, "SEG_MAX"),
    (blk::VIRTIO_BLK_F_GEOMETRY, "GEOMETRY"),
    (blk::VIRTIO_BLK_F_RO, "RO"),
    (blk::VIRTIO_BLK_F_BLK_SIZE, "BLK_SIZE"),
    (blk::VIRTIO_BLK_F_FLUSH, "FLUSH"),
    (blk::VIRTIO_BLK_F_TOPOLOGY, "TOPOLOGY"),
    (blk::VIRTIO_BLK_F_CONFIG_WCE, "CONFIG_WCE"),
    (blk::VIRTIO_BLK_F_MQ, "MQ"),
    (blk::VIRTIO_BLK_F_DISCARD, "DISCARD"),
    (blk::VIRTIO_BLK_F_WRITE_ZEROES, "WRITE_ZEROES"),
];

/// Feature bit: the network card has a MAC address (section 5.1.3). The VMM supplies the address if
/// the back-end does not.
pub(crate) const NET_F_MAC: u32 = 5;
const NET_F_MTU: u32 = 3;
const NET_F_STATUS: u32 = 16;

/// Feature bits of a network card, without those that need a control queue.
const NET: &[(u32, &str)] = &[
    (0, "CSUM"),
    (1, "GUEST_CSUM"),
    (NET_F_MTU, "MTU"),
    (NET_F_MAC, "MAC"),
    (7, "GUEST_TSO4"),
    (8, "GUEST_TSO6"),
    (9, "GUEST_ECN"),
    (10, "GUEST_UFO"),
    (11, "HOST_TSO4"),
    (12, "HOST_TSO6"),
    (13, "HOST_ECN"),
    (14, "HOST_UFO"),
    (15, "MRG_RXBUF"),
    (NET_F_STATUS, "STATUS"),
    (54, "GUEST_USO4"),
    (55, "GUEST_USO6"),
    (56, "HOST_USO"),
    (59, "GUEST_HDRLEN"),
];

const CONSOLE_F_EMERG_WRITE: u32 = 2;

/// Feature bits of a console, without multiple ports, whose state a back-end would have to keep.
const CONSOLE: &[(u32, &str)] = &[(0, "SIZE"), (CONSOLE_F_EMERG_WRITE, "EMERG_WRITE")];

const VSOCK: &[(u32, &str)] = &[(0, "STREAM"), (1, "SEQPACKET"), (2, "NO_IMPLIED_STREAM")];

/// Feature bits of all devices, with their names.
const COMMON: &[(u32, &str)] = &[
    (VIRTIO_RING_F_INDIRECT_DESC, "INDIRECT_DESC"),
    (VIRTIO_RING_F_EVENT_IDX, "EVENT_IDX"),
    (VIRTIO_F_VERSION_1, "VERSION_1"),
];

impl DeviceKind {
    /// All kinds.
    pub const ALL: [DeviceKind; 5] =
        [DeviceKind::Blk, DeviceKind::Net, DeviceKind::Rng, DeviceKind::Console, DeviceKind::Vsock];

    /// Returns the kind's name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            DeviceKind::Blk => "blk",
            DeviceKind::Net => "net",
            DeviceKind::Rng => "rng",
            DeviceKind::Console => "console",
            DeviceKind::Vsock => "vsock",
        }
    }

    /// Returns the virtio device ID (virtio 1.2, section 5).
    pub fn virtio_id(self) -> u32 {
        match self {
            DeviceKind::Blk => ids::VIRTIO_ID_BLOCK,
            DeviceKind::Net => ids::VIRTIO_ID_NET,
            DeviceKind::Rng => ids::VIRTIO_ID_RNG,
            DeviceKind::Console => ids::VIRTIO_ID_CONSOLE,
            DeviceKind::Vsock => ids::VIRTIO_ID_VSOCK,
        }
    }

    /// Returns the number of queues, if the kind has a fixed number.
    pub fn fixed_queues(self) -> Option<u16> {
        match self {
            DeviceKind::Blk => None,
            DeviceKind::Rng => Some(1),
            DeviceKind::Net | DeviceKind::Console => Some(2),
            DeviceKind::Vsock => Some(3),
        }
    }

    /// Returns the default maximum queue size, in descriptors: the one that the usual back-ends
    /// accept.
    pub(crate) fn queue_size(self) -> u16 {
        if self == DeviceKind::Console { 64 } else { 256 }
    }

    /// Returns how many of `queues` queues, from the first on, the back-end serves. The VMM serves
    /// a vsock's event queue, as QEMU does, to tell the guest that it was moved.
    pub(crate) fn served_queues(self, queues: usize) -> usize {
        if self == DeviceKind::Vsock { queues.min(2) } else { queues }
    }

    /// Returns whether the VMM may ask the back-end for its number of queues. For a network card
    /// some back-ends return pairs, others queues.
    pub(crate) fn counts_queues(self) -> bool {
        self != DeviceKind::Net
    }

    /// Returns whether the device answers every request without waiting for an outside event.
    pub(crate) fn answers_all(self) -> bool {
        self == DeviceKind::Blk
    }

    /// Returns the length of the config space in bytes.
    pub(crate) fn config_len(self) -> usize {
        match self {
            // Up to `write_zeroes_may_unmap`. Older back-ends refuse a request for more.
            DeviceKind::Blk => 60,
            // Up to `mtu`.
            DeviceKind::Net => 12,
            DeviceKind::Rng => 0,
            DeviceKind::Console => 12,
            DeviceKind::Vsock => 8,
        }
    }

    /// Returns whether the back-end must provide a config space.
    pub(crate) fn needs_config(self) -> bool {
        self == DeviceKind::Blk
    }

    fn named_features(self) -> &'static [(u32, &'static str)] {
        match self {
            DeviceKind::Blk => BLK,
            DeviceKind::Net => NET,
            DeviceKind::Rng => &[],
            DeviceKind::Console => CONSOLE,
            DeviceKind::Vsock => VSOCK,
        }
    }

    /// Returns the features to offer to the guest: those of the back-end's that a transparent
    /// transport can pass on. `config` says whether the back-end has a config space.
    pub(crate) fn features(self, offered: u64, config: bool) -> u64 {
        let bits = |names: &[(u32, &str)]| names.iter().fold(0, |bits, (bit, _)| bits | 1 << bit);
        let known = bits(self.named_features());
        // Features about config fields that the VMM cannot fill in.
        let fields = match self {
            DeviceKind::Net => 1 << NET_F_MTU | 1 << NET_F_STATUS,
            DeviceKind::Console => known,
            DeviceKind::Blk | DeviceKind::Rng | DeviceKind::Vsock => 0,
        };
        let without = if config { 0 } else { fields };
        let ours = if self == DeviceKind::Net { 1 << NET_F_MAC } else { 0 };
        offered & (known | TRANSPORT) & !without | ours
    }

    /// Returns the names of features, for people.
    pub(crate) fn name_features(self, features: u64) -> String {
        let name = |bit: u32| {
            let mut all = self.named_features().iter().chain(COMMON);
            all.find(|(known, _)| *known == bit)
                .map_or(format!("bit {bit}"), |(_, name)| (*name).into())
        };
        let set = (0..64).filter(|bit| features & 1 << bit != 0);
        set.map(name).collect::<Vec<_>>().join(", ")
    }

    /// Returns whether the driver may write these bytes to the config space. The VMM does not pass
    /// other writes on: many back-ends respond to an invalid write by hanging up.
    pub(crate) fn may_write(self, offset: usize, bytes: &[u8], driver_features: u64) -> bool {
        match self {
            DeviceKind::Blk => {
                driver_features & 1 << blk::VIRTIO_BLK_F_CONFIG_WCE != 0
                    && offset == BLK_WRITE_BACK
                    && matches!(bytes, [0 | 1])
            }
            // `emerg_wr`
            DeviceKind::Console => {
                driver_features & 1 << CONSOLE_F_EMERG_WRITE != 0 && offset == 8 && bytes.len() == 4
            }
            DeviceKind::Net | DeviceKind::Rng | DeviceKind::Vsock => false,
        }
    }

    /// Returns the config fields that must not change when another back-end takes over, given the
    /// features that the driver has accepted. The guest has read these fields and does not read
    /// them again.
    pub(crate) fn fixed_fields(self, driver_features: u64) -> impl Iterator<Item = &'static Field> {
        let fields: &[Field] = match self {
            DeviceKind::Blk => BLK_FIELDS,
            DeviceKind::Net => NET_FIELDS,
            // A vsock driver reads its address again after the event that tells it of a move.
            DeviceKind::Rng | DeviceKind::Console | DeviceKind::Vsock => &[],
        };
        let accepted = move |bit: u32| driver_features & 1 << bit != 0;
        fields.iter().filter(move |field| field.feature.is_none_or(accepted))
    }
}

/// Offset of a disk's `writeback` in its config space.
pub(crate) const BLK_WRITE_BACK: usize = 32;

/// Offset of a disk's number of queues (2 bytes).
pub(crate) const BLK_NUM_QUEUES: usize = 34;

/// Offset of a disk's maximum number of segments per request (4 bytes).
pub(crate) const BLK_SEG_MAX: usize = 12;

/// A field of a config space.
#[derive(Debug)]
pub(crate) struct Field {
    pub(crate) name: &'static str,
    offset: usize,
    len: usize,
    /// The feature without which drivers do not read the field.
    feature: Option<u32>,
    /// Whether a larger value than before is also acceptable.
    limit: bool,
}

const BLK_FIELDS: &[Field] = &[
    Field { name: "capacity", offset: 0, len: 8, feature: None, limit: false },
    Field { limit: true, ..field("size_max", 8, 4, blk::VIRTIO_BLK_F_SIZE_MAX) },
    Field { limit: true, ..field("seg_max", BLK_SEG_MAX, 4, blk::VIRTIO_BLK_F_SEG_MAX) },
    field("blk_size", 20, 4, blk::VIRTIO_BLK_F_BLK_SIZE),
    Field { limit: true, ..field("max_discard_sectors", 36, 4, blk::VIRTIO_BLK_F_DISCARD) },
    Field { limit: true, ..field("max_discard_seg", 40, 4, blk::VIRTIO_BLK_F_DISCARD) },
    Field {
        limit: true,
        ..field("max_write_zeroes_sectors", 48, 4, blk::VIRTIO_BLK_F_WRITE_ZEROES)
    },
    Field { limit: true, ..field("max_write_zeroes_seg", 52, 4, blk::VIRTIO_BLK_F_WRITE_ZEROES) },
];

const NET_FIELDS: &[Field] =
    &[field("mac", 0, 6, NET_F_MAC), Field { limit: true, ..field("mtu", 10, 2, NET_F_MTU) }];

const fn field(name: &'static str, offset: usize, len: usize, feature: u32) -> Field {
    Field { name, offset, len, feature: Some(feature), limit: false }
}

impl Field {
    /// Returns the field's value in a config space; bytes beyond its end count as zeros.
    pub(crate) fn value(&self, config: &[u8]) -> u64 {
        let bytes = (0..self.len).map(|at| config.get(self.offset + at).copied().unwrap_or(0));
        bytes.rev().fold(0, |value, byte| value << 8 | u64::from(byte))
    }

    /// Formats a value of the field for people.
    pub(crate) fn show(&self, value: u64) -> String {
        if self.feature != Some(NET_F_MAC) {
            return value.to_string();
        }
        let bytes = value.to_le_bytes();
        bytes[..self.len].iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
    }

    /// Returns whether a guest that has read `before` can work with `now`.
    pub(crate) fn fits(&self, before: u64, now: u64) -> bool {
        now == before || self.limit && now > before
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl DeviceKind {
    /// Returns the names of all kinds, for messages.
    pub(crate) fn names() -> String {
        DeviceKind::ALL.map(DeviceKind::name).join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_forwardable_features_are_offered() {
        let all = u64::MAX;
        for kind in DeviceKind::ALL {
            let offered = kind.features(all, true);
            // Packed rings, in-order use, platform addresses, data in notifications, queue reset.
            for bit in [30, 33, 34, 35, 38, 40] {
                assert_eq!(offered & 1 << bit, 0, "{kind}: {bit}");
            }
            assert_eq!(offered & TRANSPORT, TRANSPORT);
            let ours = if kind == DeviceKind::Net { 1 << NET_F_MAC } else { 0 };
            assert_eq!(kind.features(0, true), ours, "{kind}");
        }
        assert_eq!(DeviceKind::Net.features(all, true) & (1 << 17 | 1 << 22), 0, "control queue");
        assert_eq!(DeviceKind::Net.features(all, false) & 1 << NET_F_STATUS, 0);
        assert_eq!(DeviceKind::Console.features(all, true) & 0b10, 0, "more ports");
    }

    #[test]
    fn fields_and_features_have_names() {
        let lacking = 1 << 9 | 1 << 32 | 1 << 21;
        assert_eq!(DeviceKind::Blk.name_features(lacking), "FLUSH, bit 21, VERSION_1");
        let mut config = vec![0; 60];
        config[..2].copy_from_slice(&[1, 2]);
        let names = |features| {
            let fields = DeviceKind::Blk.fixed_fields(features);
            fields.map(|field| (field.name, field.value(&config))).collect::<Vec<_>>()
        };
        assert_eq!(names(0), [("capacity", 0x201)]);
        assert_eq!(names(1 << 2)[1], ("seg_max", 0));
        let [capacity, seg_max] = [&BLK_FIELDS[0], &BLK_FIELDS[2]];
        assert!(seg_max.fits(3, 4) && !seg_max.fits(3, 2));
        assert!(capacity.fits(3, 3) && !capacity.fits(3, 4));
        let mac = &NET_FIELDS[0];
        assert_eq!(mac.show(mac.value(&[2, 0, 0, 0x5e, 0, 1, 9])), "02:00:00:5e:00:01");
        assert_eq!(capacity.show(513), "513");
    }

    #[test]
    fn driver_writes_only_writable_fields() {
        let blk = DeviceKind::Blk;
        assert!(blk.may_write(32, &[1], 1 << 11));
        assert!(!blk.may_write(32, &[1], 0) && !blk.may_write(32, &[2], 1 << 11));
        assert!(!blk.may_write(0, &[1], u64::MAX) && !DeviceKind::Rng.may_write(0, &[1], u64::MAX));
    }
}
