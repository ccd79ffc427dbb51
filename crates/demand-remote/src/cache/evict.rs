// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Eviction: the removal of whole packs, by the process that finds the cache too large.
//!
//! Two processes that evict at once find the same packs in the same order, so they need no lock,
//! which a stopped process could keep.

use std::os::fd::BorrowedFd;

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, ftruncate, openat, statat, unlinkat,
};
use rustix::io::Errno;

use super::chunk_key::PackKey;

/// Bytes of a block, in which the kernel counts the space of files.
const BLOCK: u64 = 512;

/// A pack's file, by the time of its last use: seconds, nanoseconds.
type Found = (i64, i64, String, u64);

/// Removes the packs that were opened or written longest ago, until the rest occupies at most
/// `most` bytes. Returns their number.
///
/// Their space is free at once, even if other processes have them open: a read of such a file ends
/// early, which makes the chunk absent.
///
/// # Errors
///
/// The system's error from listing the folder.
pub(crate) fn evict(packs: BorrowedFd<'_>, most: u64) -> Result<u64, Errno> {
    let mut found = Vec::new();
    for entry in Dir::read_from(packs)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().to_str() else { continue };
        if PackKey::is_file_name(name)
            && let Ok(stat) = statat(packs, name, AtFlags::SYMLINK_NOFOLLOW)
            && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        {
            found.push(of(name, &stat));
        }
    }
    found.sort_unstable();
    let mut used: u64 = found.iter().map(|(.., bytes)| bytes).sum();
    let mut evicted = 0;
    for (.., name, bytes) in &found {
        if used <= most {
            break;
        }
        used -= bytes;
        evicted += u64::from(remove(packs, name));
    }
    Ok(evicted)
}

#[allow(clippy::useless_conversion, reason = "the types differ between architectures")]
fn of(name: &str, stat: &Stat) -> Found {
    let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
    // A cast, since the second type has a sign on some architectures only.
    (stat.st_mtime.into(), stat.st_mtime_nsec as i64, name.to_owned(), blocks * BLOCK)
}

/// Removes a pack's file, and returns whether this process was the one that did.
fn remove(packs: BorrowedFd<'_>, name: &str) -> bool {
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = openat(packs, name, flags, Mode::empty());
    let removed = unlinkat(packs, name, AtFlags::empty()).is_ok();
    // Not a file that has another name as well, which may be anything of another user's.
    if let Ok(file) = file
        && fstat(&file).is_ok_and(|stat| stat.st_nlink == 0)
    {
        // If that fails, the space is free once no process has the file open.
        let _ = ftruncate(&file, 0);
    }
    removed
}
