// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Configuration of the daemon and of its device.

use std::path::PathBuf;
use std::time::Duration;

use crate::endpoint::Endpoint;

/// The maximum number of queues of a device: vhost-user-backend assigns queues to threads with a
/// 64-bit mask.
pub const MAX_QUEUES: u16 = 64;

/// The minimum logical block size: a sector.
pub const MIN_BLOCK_SIZE: u32 = 512;
/// The maximum logical block size: the smallest page.
pub const MAX_BLOCK_SIZE: u32 = 4096;

/// Whether to offer post-copy.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Postcopy {
    /// Offers it if the host permits it; otherwise warns and continues without it.
    On,
    /// Never offers it.
    Off,
    /// Fails if the host does not permit it.
    Require,
}

/// Configuration of the daemon.
#[derive(Debug)]
pub struct Options {
    /// The place where front-ends connect.
    pub socket: Endpoint,
    /// The raw image or block device to serve.
    pub disk: PathBuf,
    /// Whether other processes may write to the image, which is then not locked.
    pub share_disk: bool,
    /// The number of queues, 1 to 64.
    pub num_queues: u16,
    /// The maximum queue size, in descriptors; a power of two.
    pub queue_size: u16,
    /// The maximum number of requests of one queue that are executed at once.
    pub threads: u16,
    /// Whether writes are refused.
    pub read_only: bool,
    /// The logical block size in bytes, if different from the disk's own.
    pub block_size: Option<u32>,
    /// Whether the space of discarded ranges stays allocated.
    pub keep_space: bool,
    /// Whether the write cache is on at the start.
    pub write_cache: bool,
    /// The serial number, up to 20 bytes.
    pub serial: String,
    /// Whether to offer post-copy.
    pub postcopy: Postcopy,
    /// Whether to offer `CONFIGURE_MEM_SLOTS`.
    pub mem_slots: bool,
    /// Whether to return after the first front-end.
    pub once: bool,
    /// The file for the counters.
    pub stats: Option<PathBuf>,
    /// The time after which the counters are reported again, besides on SIGUSR1.
    pub stats_interval: Option<Duration>,
}

/// Configuration of a [`BlkBackend`](crate::BlkBackend).
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// The number of queues, 1 to 64.
    pub num_queues: u16,
    /// The maximum queue size, in descriptors; a power of two.
    pub queue_size: u16,
    /// The maximum number of requests of one queue that are executed at once; 1 keeps them in
    /// order.
    pub threads: u16,
    /// Whether the write cache is on at the start: writes are then stable when flushed, not when
    /// answered. The driver may change it (`VIRTIO_BLK_F_CONFIG_WCE`).
    pub write_cache: bool,
    /// The serial number, of which 20 bytes are used.
    pub serial: String,
    /// Whether to offer `PAGEFAULT`. [`crate::postcopy::probe`] tells whether the host permits it.
    pub postcopy: bool,
    /// Whether to offer `CONFIGURE_MEM_SLOTS`.
    pub mem_slots: bool,
}
