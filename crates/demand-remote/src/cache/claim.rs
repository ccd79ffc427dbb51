// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Claims: the right to fetch a chunk, of one process of the host at a time.
//!
//! A claim is a write lock on one byte of the pack's file, of the kind that belongs to an open file
//! description (fcntl(2), "Open file description locks"). The kernel releases it with the last
//! descriptor, so a killed owner never leaves one behind. A stopped owner keeps its claim; the
//! processes that have waited for it long enough compete for a claim of the next rank, so that one
//! of them fetches the chunk for the others.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::pack_file::PackFile;
use super::record::PACK_CHUNKS;

/// The bytes that this process has locked through one open file: such locks do not exclude each
/// other.
#[derive(Debug, Default)]
pub(crate) struct Claimed(Mutex<HashSet<u32>>);

impl Claimed {
    fn bytes(&self) -> MutexGuard<'_, HashSet<u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Number of ranks, each of which is another claim on the same chunk.
pub(crate) const RANKS: u32 = 3;

/// The right to fetch a chunk, until it is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    pack: Arc<PackFile>,
    byte: u32,
}

impl Claim {
    /// Claims a chunk, or returns `None` if there is a claim of the same rank. It does not wait.
    ///
    /// # Errors
    ///
    /// The system's error.
    pub(crate) fn take(pack: &Arc<PackFile>, ordinal: u16, rank: u32) -> io::Result<Option<Self>> {
        let byte = byte_of(ordinal, rank);
        let mut bytes = pack.claimed().bytes();
        if bytes.contains(&byte) || !lock(pack.file(), byte, libc::F_WRLCK)? {
            return Ok(None);
        }
        bytes.insert(byte);
        Ok(Some(Claim { pack: pack.clone(), byte }))
    }

    /// Returns whether there is a claim of this rank. It does not wait.
    pub(crate) fn is_taken(pack: &PackFile, ordinal: u16, rank: u32) -> bool {
        let byte = byte_of(ordinal, rank);
        pack.claimed().bytes().contains(&byte) || is_locked(pack.file(), byte)
    }

    /// Returns the number of other claims that this one overrules.
    pub(crate) fn rank(&self) -> u32 {
        self.byte / u32::from(PACK_CHUNKS)
    }

    /// Returns the file of the claimed chunk's pack.
    pub(crate) fn pack(&self) -> &PackFile {
        &self.pack
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut bytes = self.pack.claimed().bytes();
        // Unlocking does not fail on a lock that is held.
        let _ = lock(self.pack.file(), self.byte, libc::F_UNLCK);
        bytes.remove(&self.byte);
    }
}

/// Returns the byte that stands for a claim.
fn byte_of(ordinal: u16, rank: u32) -> u32 {
    rank * u32::from(PACK_CHUNKS) + u32::from(ordinal)
}

/// Returns whether another open file has a byte locked.
fn is_locked(file: &File, byte: u32) -> bool {
    let mut lock = lock_of(byte, libc::F_WRLCK);
    // SAFETY: the call reads and writes the structure, which lives through it, and accesses no other
    // memory.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) };
    result == 0 && libc::c_int::from(lock.l_type) != libc::F_UNLCK
}

/// Locks or unlocks a byte. Returns `false` if another open file has it locked.
fn lock(file: &File, byte: u32, kind: libc::c_int) -> io::Result<bool> {
    let lock = lock_of(byte, kind);
    // SAFETY: the call reads the structure, which lives through it, and accesses no other memory.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        error if error.raw_os_error() == Some(libc::EACCES) => Ok(false),
        error => Err(error),
    }
}

#[allow(clippy::cast_possible_truncation, reason = "the constants are small")]
fn lock_of(byte: u32, kind: libc::c_int) -> libc::flock64 {
    libc::flock64 {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: libc::off64_t::from(byte),
        l_len: 1,
        l_pid: 0,
    }
}
