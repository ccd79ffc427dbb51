// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Discards and zeroes ranges of the disk, by the best method that the host supports.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::ioctl_io_nr;

const BLK: libc::c_uint = 0x12;
ioctl_io_nr!(BLKDISCARD, BLK, 119);

const PUNCH_HOLE: libc::c_int = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO_RANGE: libc::c_int = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// The buffer for writing zeros when the host supports no better method.
static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// The methods that the host supports for a disk, as far as known.
#[derive(Debug)]
pub(crate) struct Means {
    /// For a block device: its block size in bytes, of which its ranges must be multiples.
    device_block: Option<u64>,
    /// Whether space may and can be returned to the host.
    discard: AtomicBool,
    punch_hole: AtomicBool,
    zero_range: AtomicBool,
}

impl Means {
    /// Probes the operations that the host supports on `file`, of `len` bytes, which must be open
    /// for writing if `discard` is set. `device_block` is the block size if the file is a block
    /// device.
    pub(crate) fn probe(file: &File, len: u64, device_block: Option<u64>, discard: bool) -> Self {
        // Neither call changes anything: one covers 0 bytes, the other lies behind the end.
        let discard = discard
            && match device_block {
                Some(_) => !discard_device(file, 0, 0).is_err_and(|error| unsupported(&error)),
                None => fallocate(file, PUNCH_HOLE, len.next_multiple_of(4096), 4096).is_ok(),
            };
        Means {
            device_block,
            discard: AtomicBool::new(discard),
            punch_hole: AtomicBool::new(true),
            zero_range: AtomicBool::new(true),
        }
    }

    /// Returns whether space can be returned to the host.
    pub(crate) fn can_discard(&self) -> bool {
        self.discard.load(Ordering::Relaxed)
    }

    /// Returns the space of a range to the host, or does nothing if that turns out to be
    /// impossible: a discard is a hint (virtio 1.3, 5.2.6.2).
    pub(crate) fn discard(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        if !self.can_discard() {
            return Ok(());
        }
        let result = match self.device_block {
            None => fallocate(file, PUNCH_HOLE, offset, len),
            Some(block) => {
                // Partly covered blocks at the start and the end stay unchanged.
                let start = offset.next_multiple_of(block);
                let end = (offset + len) / block * block;
                match end.checked_sub(start) {
                    None | Some(0) => Ok(()),
                    Some(len) => discard_device(file, start, len),
                }
            }
        };
        match result {
            Err(error) if unsupported(&error) => {
                self.discard.store(false, Ordering::Relaxed);
                Ok(())
            }
            result => result,
        }
    }

    /// Makes the range read as zeros. Returns its space to the host only if `unmap` permits it.
    pub(crate) fn write_zeroes(
        &self,
        file: &File,
        offset: u64,
        len: u64,
        unmap: bool,
    ) -> io::Result<()> {
        let means = [
            (PUNCH_HOLE, &self.punch_hole, unmap && self.can_discard()),
            (ZERO_RANGE, &self.zero_range, true),
        ];
        for (mode, works, wanted) in means {
            if !wanted || !works.load(Ordering::Relaxed) {
                continue;
            }
            match fallocate(file, mode, offset, len) {
                Err(error) if unsupported(&error) => works.store(false, Ordering::Relaxed),
                // A block device refuses ranges that cover parts of its blocks.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                result => return result,
            }
        }
        let (mut offset, mut rest) = (offset, len);
        while rest > 0 {
            let part =
                &ZEROS[..usize::try_from(rest).map_or(ZEROS.len(), |rest| rest.min(ZEROS.len()))];
            file.write_all_at(part, offset)?;
            offset += part.len() as u64;
            rest -= part.len() as u64;
        }
        Ok(())
    }
}

/// Returns whether the host does not support the operation, at all or for this file.
fn unsupported(error: &io::Error) -> bool {
    let unsupported = [libc::EOPNOTSUPP, libc::ENOSYS, libc::ENOTTY, libc::ENODEV];
    error.raw_os_error().is_some_and(|error| unsupported.contains(&error))
}

fn fallocate(file: &File, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let len = libc::off_t::try_from(len).map_err(io::Error::other)?;
    uninterrupted(|| {
        // SAFETY: the call accesses no memory.
        unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) }
    })
}

fn discard_device(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    uninterrupted(|| {
        // SAFETY: the kernel reads the two numbers of `range`, as this ioctl expects.
        unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD() as _, range.as_ptr()) }
    })
}

fn uninterrupted(call: impl Fn() -> libc::c_int) -> io::Result<()> {
    loop {
        if call() == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    const LEN: u64 = 4 << 20;

    fn full_file() -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![0xaa; LEN as usize]).unwrap();
        file.sync_all().unwrap();
        file
    }

    fn assert_zeros(file: &File, offset: u64, len: u64) {
        let mut all = vec![0; LEN as usize];
        file.read_exact_at(&mut all, 0).unwrap();
        for (i, byte) in all.into_iter().enumerate() {
            let inside = (offset..offset + len).contains(&(i as u64));
            assert_eq!(byte, if inside { 0 } else { 0xaa }, "at {i}");
        }
    }

    fn means(file: &File, discard: bool, punch_hole: bool, zero_range: bool) -> Means {
        let means = Means::probe(file, LEN, None, discard);
        means.punch_hole.store(punch_hole, Ordering::Relaxed);
        means.zero_range.store(zero_range, Ordering::Relaxed);
        means
    }

    #[test]
    fn zeros_by_each_means() {
        for (punch_hole, zero_range) in [(true, true), (false, true), (false, false)] {
            for unmap in [true, false] {
                let file = full_file();
                let means = means(&file, true, punch_hole, zero_range);
                // Longer than one buffer of zeros, and not aligned to pages.
                means.write_zeroes(&file, 1536, (2 << 20) + 512, unmap).unwrap();
                assert_zeros(&file, 1536, (2 << 20) + 512);
            }
        }
    }

    #[test]
    fn space_is_freed_only_if_allowed() {
        let file = full_file();
        let before = file.metadata().unwrap().blocks();
        means(&file, true, true, true).write_zeroes(&file, 0, 1 << 20, false).unwrap();
        means(&file, false, true, true).write_zeroes(&file, 0, 1 << 20, true).unwrap();
        means(&file, false, true, true).discard(&file, 0, 1 << 20).unwrap();
        assert_zeros(&file, 0, 1 << 20);
        assert_eq!(file.metadata().unwrap().blocks(), before);

        let means = means(&file, true, true, true);
        assert!(means.can_discard(), "tempfiles are where holes are possible");
        means.write_zeroes(&file, 0, 1 << 20, true).unwrap();
        let after = file.metadata().unwrap().blocks();
        assert_eq!(before - after, (1 << 20) / 512);
        means.discard(&file, 1 << 20, 1 << 20).unwrap();
        assert_eq!(after - file.metadata().unwrap().blocks(), (1 << 20) / 512);
        assert_eq!(file.metadata().unwrap().len(), LEN);
    }

    #[test]
    fn unsupported_discard_is_not_offered() {
        let (pipe, _other) = std::io::pipe().unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(pipe));
        assert!(!Means::probe(&file, LEN, None, true).can_discard());
        assert!(!Means::probe(&file, LEN, Some(512), true).can_discard());
        assert!(!Means::probe(&full_file(), LEN, None, false).can_discard());
    }
}
