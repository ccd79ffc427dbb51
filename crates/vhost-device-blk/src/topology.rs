// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The block sizes of a disk, as reported to the guest.

use std::fs::{File, Metadata};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use crate::options::{MAX_BLOCK_SIZE, MIN_BLOCK_SIZE};

/// The ioctl that reads whether the device is read-only (`<linux/fs.h>`).
const BLKROGET: libc::Ioctl = 0x125e;

/// Sizes above this express a file system's preference for large transfers, not its block size.
const MAX_PHYSICAL: u32 = 64 << 10;

/// The sizes, in bytes; all but `opt_io` are powers of two.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Topology {
    /// The size of which requests must be multiples.
    pub(crate) block_size: u32,
    /// The size that the disk writes without reading first; a multiple of `block_size`.
    pub(crate) physical: u32,
    /// The best size for small requests.
    pub(crate) min_io: u32,
    /// The best size for large requests, 0 if there is none.
    pub(crate) opt_io: u32,
}

impl Topology {
    /// Returns the topology of a file: a write of less than a block of its file system needs a read
    /// first.
    pub(crate) fn of_file(metadata: &Metadata, block_size: Option<u32>) -> Self {
        let own = u32::try_from(metadata.blksize()).unwrap_or(u32::MAX);
        Topology::new(block_size.unwrap_or(MIN_BLOCK_SIZE), own, 0, 0)
    }

    /// Returns the topology of a block device, and the size of the device's own logical blocks.
    pub(crate) fn of_device(file: &File, block_size: Option<u32>) -> (Self, u64) {
        let ask = |request| ask(file, request);
        let own = ask(libc::BLKSSZGET).filter(|n| n.is_power_of_two()).unwrap_or(MIN_BLOCK_SIZE);
        let physical = ask(libc::BLKPBSZGET).unwrap_or(own);
        let block_size = block_size.unwrap_or(own.clamp(MIN_BLOCK_SIZE, MAX_BLOCK_SIZE));
        let (min_io, opt_io) = (ask(libc::BLKIOMIN), ask(libc::BLKIOOPT));
        let physical = physical.max(own);
        let this = Topology::new(block_size, physical, min_io.unwrap_or(0), opt_io.unwrap_or(0));
        (this, u64::from(own))
    }

    fn new(block_size: u32, physical: u32, min_io: u32, opt_io: u32) -> Self {
        let unit = |n: u32| n.is_power_of_two() && (block_size..=MAX_PHYSICAL).contains(&n);
        let physical = if unit(physical) { physical } else { block_size };
        let min_io = if unit(min_io) { min_io.max(physical) } else { physical };
        let opt_io = if opt_io.is_multiple_of(min_io) { opt_io } else { 0 };
        Topology { block_size, physical, min_io, opt_io }
    }
}

/// Returns whether a block device refuses writes, by its own flag or that of the disk of which it
/// is a partition.
pub(crate) fn is_read_only(device: &File) -> bool {
    ask(device, BLKROGET).is_some_and(|read_only| read_only != 0)
}

/// Reads a number from a block device by ioctl.
fn ask(device: &File, request: libc::Ioctl) -> Option<libc::c_uint> {
    let mut answer: libc::c_uint = 0;
    // SAFETY: the requests used here write one int to `answer`, and nothing else.
    let ok = unsafe { libc::ioctl(device.as_raw_fd(), request, &raw mut answer) } == 0;
    ok.then_some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_valid_for_any_host_values() {
        let sizes = |t: Topology| (t.block_size, t.physical, t.min_io, t.opt_io);
        assert_eq!(sizes(Topology::new(512, 4096, 0, 0)), (512, 4096, 4096, 0));
        assert_eq!(sizes(Topology::new(4096, 4096, 0, 0)), (4096, 4096, 4096, 0));
        assert_eq!(sizes(Topology::new(4096, 512, 512, 0)), (4096, 4096, 4096, 0));
        assert_eq!(sizes(Topology::new(512, 512, 16384, 1 << 20)), (512, 512, 16384, 1 << 20));
        assert_eq!(sizes(Topology::new(512, 3000, 7, 1000)), (512, 512, 512, 0));
        assert_eq!(sizes(Topology::new(512, 1 << 20, 1 << 31, 0)), (512, 512, 512, 0));
    }

    #[test]
    fn a_file_has_sectors_by_default() {
        let metadata = tempfile::tempfile().unwrap().metadata().unwrap();
        assert_eq!(Topology::of_file(&metadata, None).block_size, 512);
        let blocks = Topology::of_file(&metadata, Some(4096));
        assert_eq!(blocks.block_size, 4096);
        assert!(blocks.physical >= 4096);
    }
}
