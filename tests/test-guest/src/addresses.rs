// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Addresses and limits of the test guest that plans depend on.

/// Address of the first virtio-mmio device.
pub const MMIO_ADDRESS: u64 = 0xd000_0000;
/// The QueueNotify register of the first device, which is the disk.
pub const BLK_QUEUE_NOTIFY: u64 = MMIO_ADDRESS + 0x50;
/// Guest virtual address of the control region, and its physical address unless memory lies there:
/// 60 GiB, which 36 bits of physical address reach.
pub const CONTROL_ADDRESS: u64 = 0xf_0000_0000;
/// Maximum number of vCPUs.
pub const MAX_CPUS: u32 = 64;
