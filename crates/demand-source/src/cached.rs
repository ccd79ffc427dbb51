// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Predicts whether a read of a file has to wait for its storage.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

const PAGE: u64 = 4096;

/// The kind of storage behind a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Storage {
    /// Memory: no read waits.
    Memory,
    /// A local disk behind the page cache: reads of cached pages do not wait.
    Cached,
    /// Anything else, such as a network or FUSE file system. Every read may wait, even of cached
    /// pages: such a file system may first revalidate them.
    Away,
}

/// Magic numbers of the file systems in memory: tmpfs, ramfs, hugetlbfs. Source:
/// include/uapi/linux/magic.h.
const IN_MEMORY: [i64; 3] = [0x0102_1994, 0x8584_58f6, 0x9584_58f6];

/// Magic numbers of the file systems on local disks that support `RWF_NOWAIT`: ext2 to ext4, XFS,
/// Btrfs, F2FS.
const ON_DISK: [i64; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010];

impl Storage {
    /// Returns the kind of storage behind a regular file.
    ///
    /// # Errors
    ///
    /// The system's error.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let mut statfs = MaybeUninit::<libc::statfs64>::uninit();
        // SAFETY: the pointer is valid for a write of the whole structure, which is all that the
        // call writes.
        if unsafe { libc::fstatfs64(file.as_raw_fd(), statfs.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has succeeded, so the kernel has filled the structure.
        let kind = unsafe { statfs.assume_init() }.f_type & 0xffff_ffff;
        Ok(if IN_MEMORY.contains(&kind) {
            Storage::Memory
        } else if ON_DISK.contains(&kind) {
            Storage::Cached
        } else {
            Storage::Away
        })
    }
}

/// The range argument of `cachestat` (Linux 6.5, include/uapi/linux/mman.h).
#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// The system call number of `cachestat`, the same on all architectures that use the common table.
const CACHESTAT: libc::c_long = 451;

/// Set once the kernel has answered that it lacks `cachestat`; the call is not made again.
static REFUSED: AtomicBool = AtomicBool::new(false);

/// Returns whether all bytes of the range are in the page cache. Also returns `true` where the
/// kernel gives no answer (before Linux 6.5, or if another user owns the file). A read that then
/// follows does not wait for content, but may start a read-ahead, which a failing disk can delay.
///
/// This check comes before a read with `RWF_NOWAIT` because that flag alone starts a read-ahead of
/// pages that are not cached, and the read-ahead waits for the file system's own metadata.
pub(crate) fn is_cached(file: &File, offset: u64, len: u64) -> bool {
    if len == 0 || REFUSED.load(Ordering::Relaxed) {
        return true;
    }
    let range = Range { offset, len };
    let mut answer = Cachestat::default();
    // SAFETY: the call reads `range` and writes `answer`, which both live through the call and have
    // the layout of the kernel's ABI.
    let result = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), &range, &mut answer, 0) };
    if result != 0 {
        if io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS) {
            REFUSED.store(true, Ordering::Relaxed);
        }
        return true;
    }
    answer.cached >= (offset + len).div_ceil(PAGE) - offset / PAGE
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn only_memory_and_known_disks_are_near() {
        let storage = |path| Storage::of(&File::open(path).unwrap()).unwrap();
        // SAFETY: the name is a valid C string.
        let fd = unsafe { libc::memfd_create(c"memory".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        assert_eq!(storage(format!("/proc/self/fd/{fd}")), Storage::Memory);
        // SAFETY: this test opened the descriptor, and closes it exactly once.
        unsafe { libc::close(fd) };
        assert_eq!(storage("/proc/self/maps".into()), Storage::Away);
    }

    #[test]
    fn dropped_pages_are_not_cached() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 1 << 16], 0).unwrap();
        file.sync_all().unwrap();
        if Storage::of(&file).unwrap() != Storage::Cached {
            return;
        }
        assert!(is_cached(&file, 0, 1 << 16));
        assert!(is_cached(&file, 4095, 2));
        // SAFETY: the call accesses no memory of this process.
        let dropped =
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        assert_eq!(dropped, 0);
        // Where the kernel gives no answer, everything counts as cached.
        assert!(!is_cached(&file, 0, 4096) || REFUSED.load(Ordering::Relaxed));
    }
}
