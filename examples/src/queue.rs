// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's part of the disk: a virtqueue with two requests.

use std::path::Path;

use bare_guest::summing::{self, Driver};
use demand_memory::DemandMemory;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};

use crate::Result;

/// Number of entries of the queue. Each part of it has a separate page: all of them are missing
/// when it is laid out.
pub const QUEUE_SIZE: u16 = 16;
/// Size of the guest's memory, in bytes.
pub const MEMORY: u64 = 16 << 20;
/// Guest address of the descriptors.
pub const DESCRIPTORS: u64 = 0x20_0000;
/// Guest address of the available ring.
pub const AVAILABLE: u64 = 0x20_1000;
/// Guest address of the used ring.
pub const USED: u64 = 0x20_2000;
const HEADERS: u64 = 0x20_3000;
const STATUSES: u64 = 0x20_4000;
/// Guest address of the data written to the disk, which comes from the image.
const OUT: u64 = 4 << 20;
/// Guest address of the destination of the read; it holds bytes of the image until then.
const IN: u64 = 8 << 20;
/// Length of either, in bytes.
const LEN: u64 = 1 << 20;
const REQUESTS: u16 = 2;

/// Writes the image of memory, with the guest that makes the two requests and then sums what the
/// second has read.
///
/// # Errors
///
/// The error of the failed system call.
pub fn write_image(image: &Path) -> std::io::Result<()> {
    let (available, used) = (AVAILABLE + 2, USED + 2);
    let driver = Driver { size: MEMORY, available, used, requests: REQUESTS, data: (IN, LEN) };
    summing::write_driver(image, &driver)
}

/// Checks that the disk has completed both requests, and that the guest has summed what the image
/// has where the first took its data.
///
/// # Errors
///
/// The request that failed, or both sums.
pub fn check(memory: &DemandMemory, image: &Path, sum: u32) -> Result<()> {
    for request in 0..u64::from(REQUESTS) {
        let status: u8 = memory.read_obj(GuestAddress(STATUSES + request))?;
        if u32::from(status) != VIRTIO_BLK_S_OK {
            return Err(format!("request {request} of the disk ended with status {status}").into());
        }
    }
    summing::check(image, OUT..OUT + LEN, sum)?;
    Ok(())
}

/// Lays out two requests, as a driver does (virtio 1.2, 2.7 and 5.2.6): one writes a MiB of
/// memory to the first sectors, one reads it back elsewhere. The guest makes them available.
///
/// Uses vm-memory, which fetches exactly the pages that it touches: without a fault, and without a
/// raw pointer that could reach a missing page.
///
/// # Errors
///
/// Fails if the memory is stopped.
pub fn lay_out(memory: &DemandMemory) -> Result<()> {
    let kinds = [(VIRTIO_BLK_T_OUT, OUT, 0), (VIRTIO_BLK_T_IN, IN, VRING_DESC_F_WRITE)];
    for (request, (kind, data, device_writes)) in (0..).zip(kinds) {
        let (header, status) = (HEADERS + request * 16, STATUSES + request);
        // Type, then the first sector: 0.
        memory.write_obj([u64::from(kind), 0], GuestAddress(header))?;
        memory.write_obj(0xffu8, GuestAddress(status))?;
        let first = request * 3;
        for (index, address, len, flags) in [
            (first, header, 16, VRING_DESC_F_NEXT),
            (first + 1, data, LEN, VRING_DESC_F_NEXT | device_writes),
            (first + 2, status, 1, VRING_DESC_F_WRITE),
        ] {
            let rest = len | u64::from(flags) << 32 | (index + 1) << 48;
            memory.write_obj([address, rest], GuestAddress(DESCRIPTORS + index * 16))?;
        }
        memory.write_obj(u16::try_from(first)?, GuestAddress(AVAILABLE + 4 + request * 2))?;
    }
    // Flags and index of both rings: a driver expects zeros, but the image has other bytes.
    memory.write_obj(0u32, GuestAddress(AVAILABLE))?;
    Ok(memory.write_obj(0u32, GuestAddress(USED))?)
}
