// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lock on the image, in the form that QEMU and its tools use and respect.
//!
//! Each permission has two bytes in the file, far from any meaning of its content: one is locked by
//! the processes that use the permission, the other by those that do not share it. All locks are
//! shared ones; a conflict is found by asking whether another process holds the counterpart. So a
//! process that locks the whole file, as other programs do, conflicts as well.
//!
//! The locks belong to the open file description. The processes that serve front-ends inherit
//! it, and the host releases the locks when the last of them has ended.

use std::fs::File;
use std::io;
use std::mem::zeroed;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

/// The first byte of those locked by processes that use a permission.
const USED: libc::off_t = 100;
/// The first byte of those locked by processes that do not share a permission.
const UNSHARED: libc::off_t = 200;

// The permissions of QEMU's block layer, as offsets from these bytes.
const CONSISTENT_READ: libc::off_t = 0;
const WRITE: libc::off_t = 1;
const RESIZE: libc::off_t = 3;

/// The permissions not shared: the content of the disk must not change behind the guest's back.
const NOT_SHARED: [libc::off_t; 2] = [WRITE, RESIZE];

/// Longer than the kernel needs to end the processes of a daemon that was killed.
const PATIENCE: Duration = Duration::from_secs(1);

/// The outcome of an attempt to lock an image.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Lock {
    /// The image is locked.
    Held,
    /// Another process uses the image in a way that excludes this one.
    Busy,
}

/// Locks an image for reading, or for writing as well, until its last descriptor is closed. Waits
/// up to a second for the lock.
///
/// # Errors
/// The host's error, for example if the file system supports no locks.
pub(crate) fn lock(file: &File, write: bool) -> io::Result<Lock> {
    let used: &[_] = if write { &[CONSISTENT_READ, WRITE] } else { &[CONSISTENT_READ] };
    let deadline = Instant::now() + PATIENCE;
    loop {
        if try_lock(file, used)? {
            return Ok(Lock::Held);
        }
        // While it waits, it is in the way of no other process.
        let mut all = of(USED, libc::F_UNLCK);
        all.l_len = UNSHARED + RESIZE + 1 - USED;
        control(file, libc::F_OFD_SETLK, &mut all)?;
        if Instant::now() >= deadline {
            return Ok(Lock::Busy);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Locks the bytes first and asks for their counterparts then, so that one of two processes that
/// do so at once finds the other.
fn try_lock(file: &File, used: &[libc::off_t]) -> io::Result<bool> {
    for byte in used.iter().map(|p| USED + p).chain(NOT_SHARED.map(|p| UNSHARED + p)) {
        match control(file, libc::F_OFD_SETLK, &mut of(byte, libc::F_RDLCK)) {
            // A process that locks the whole file for writing refuses even this lock.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Ok(false);
            }
            result => result?,
        }
    }
    for byte in used.iter().map(|p| UNSHARED + p).chain(NOT_SHARED.map(|p| USED + p)) {
        let mut lock = of(byte, libc::F_WRLCK);
        control(file, libc::F_OFD_GETLK, &mut lock)?;
        if i32::from(lock.l_type) != libc::F_UNLCK {
            return Ok(false);
        }
    }
    Ok(true)
}

fn of(byte: libc::off_t, kind: libc::c_int) -> libc::flock {
    // SAFETY: the structure consists of integers, for which zeros are valid.
    let mut lock: libc::flock = unsafe { zeroed() };
    lock.l_type = libc::c_short::try_from(kind).expect("the kinds are small");
    lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).expect("it is 0");
    lock.l_start = byte;
    lock.l_len = 1;
    lock
}

fn control(file: &File, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: both commands read and write one `flock`, which is borrowed exclusively.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    /// Each opened file has locks of its own, as that of another process has.
    #[test]
    fn a_writer_excludes_all_others() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = |write| OpenOptions::new().read(true).write(write).open(image.path()).unwrap();
        let (first, second) = (open(false), open(false));
        assert_eq!(lock(&first, false).unwrap(), Lock::Held);
        assert_eq!(lock(&second, false).unwrap(), Lock::Held, "readers share the image");
        let writer = open(true);
        assert_eq!(lock(&writer, true).unwrap(), Lock::Busy);
        drop((first, second, writer));
        let writer = open(true);
        assert_eq!(lock(&writer, true).unwrap(), Lock::Held);
        for write in [true, false] {
            assert_eq!(lock(&open(true), write).unwrap(), Lock::Busy, "write: {write}");
        }
    }

    #[test]
    fn lock_of_the_whole_file_excludes_all_others() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || OpenOptions::new().read(true).write(true).open(image.path()).unwrap();
        let other = open();
        let mut whole = of(0, libc::F_WRLCK);
        whole.l_len = 0;
        control(&other, libc::F_OFD_SETLK, &mut whole).unwrap();
        for write in [true, false] {
            assert_eq!(lock(&open(), write).unwrap(), Lock::Busy, "write: {write}");
        }
        drop(other);
        assert_eq!(lock(&open(), true).unwrap(), Lock::Held);
    }

    /// A daemon that is started after one was killed waits for the end of its processes.
    #[test]
    fn lock_of_an_ending_process_is_awaited() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || OpenOptions::new().read(true).write(true).open(image.path()).unwrap();
        let first = open();
        assert_eq!(lock(&first, true).unwrap(), Lock::Held);
        let ends = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            drop(first);
        });
        assert_eq!(lock(&open(), true).unwrap(), Lock::Held);
        ends.join().unwrap();
    }
}
