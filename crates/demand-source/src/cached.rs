// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which reads of a file do not wait for its storage.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

const PAGE: u64 = 4096;

/// How a file is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Storage {
    /// In memory: no read of it waits.
    Memory,
    /// Behind the page cache of a file system of this machine: reads of cached pages do not wait.
    Cached,
    /// Anywhere else, for one on a network or in another process: every read may wait, also one
    /// of cached pages, before which such file systems ask whether these are still right.
    Away,
}

/// File systems that live in memory. Source: include/uapi/linux/magic.h.
const IN_MEMORY: [i64; 3] = [0x0102_1994, 0x8584_58f6, 0x9584_58f6];

/// File systems on local disks whose files take `RWF_NOWAIT`: ext2 to ext4, XFS, Btrfs, F2FS.
const ON_DISK: [i64; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010];

impl Storage {
    /// How a regular file is stored.
    ///
    /// # Errors
    ///
    /// The system's.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let mut statfs = MaybeUninit::<libc::statfs64>::uninit();
        // SAFETY: the kernel fills the structure, or the call fails.
        if unsafe { libc::fstatfs64(file.as_raw_fd(), statfs.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has succeeded.
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

/// The range and the answer of `cachestat` (Linux 6.5, include/uapi/linux/mman.h).
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

/// The number of `cachestat` on all architectures that use the common table.
const CACHESTAT: libc::c_long = 451;

/// Whether the kernel has refused the call: it is then not asked again.
static REFUSED: AtomicBool = AtomicBool::new(false);

/// Whether all of these bytes of a file are in the page cache. True also where the kernel does not
/// tell (before Linux 6.5, or where the file belongs to somebody else): the read that follows does
/// not wait for content, but may start a read-ahead, which a failing disk can hold up.
///
/// Asked first because `RWF_NOWAIT` alone starts a read-ahead of what is not cached, and that
/// waits for a file system's own tables.
pub(crate) fn is_cached(file: &File, offset: u64, len: u64) -> bool {
    if len == 0 || REFUSED.load(Ordering::Relaxed) {
        return true;
    }
    let range = Range { offset, len };
    let mut answer = Cachestat::default();
    // SAFETY: the call reads one structure and writes the other, both of which the kernel's ABI
    // describes as they are here.
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
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"memory".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        assert_eq!(storage(format!("/proc/self/fd/{fd}")), Storage::Memory);
        // SAFETY: this test has opened it, and closes it once.
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
        // SAFETY: the call touches no memory.
        let dropped =
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        assert_eq!(dropped, 0);
        // Where the kernel does not tell, everything counts as cached.
        assert!(!is_cached(&file, 0, 4096) || REFUSED.load(Ordering::Relaxed));
    }
}
