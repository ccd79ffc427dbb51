// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A block device as the disk: a loop device with blocks of 4096 bytes. The tests print SKIPPED and
//! pass where no loop device can be set up.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use common::*;

// <linux/loop.h>
const LOOP_SET_FD: libc::Ioctl = 0x4c00;
const LOOP_CLR_FD: libc::Ioctl = 0x4c01;
const LOOP_SET_BLOCK_SIZE: libc::Ioctl = 0x4c09;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;

/// A loop device; detached when dropped.
struct Loop {
    device: File,
    path: PathBuf,
}

fn ioctl(file: &File, request: libc::Ioctl, argument: libc::c_ulong) -> io::Result<libc::c_int> {
    // SAFETY: the loop device requests used here take a number, not a pointer.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

impl Loop {
    /// Attaches a loop device to a file; prints SKIPPED and returns `None` if that is impossible.
    fn set_up(backing: &File) -> Option<Self> {
        match Self::try_set_up(backing) {
            Ok(device) => Some(device),
            Err(error) => {
                eprintln!("SKIPPED: no loop device: {error}");
                None
            }
        }
    }

    fn try_set_up(backing: &File) -> io::Result<Self> {
        let control = open(Path::new("/dev/loop-control"))?;
        loop {
            let number = ioctl(&control, LOOP_CTL_GET_FREE, 0)?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = open(&path)?;
            match ioctl(&device, LOOP_SET_FD, backing.as_raw_fd() as libc::c_ulong) {
                // Another process took the device first.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => return Err(error),
                Ok(_) => {
                    let this = Loop { device, path };
                    ioctl(&this.device, LOOP_SET_BLOCK_SIZE, 4096)?;
                    return Ok(this);
                }
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = ioctl(&self.device, LOOP_CLR_FD, 0);
    }
}

#[test]
fn a_loop_device() {
    let dir = tempfile::tempdir().unwrap();
    let backing = dir.path().join("backing");
    let mut wanted = vec![0xaa; 4 << 20];
    fs::write(&backing, &wanted).unwrap();
    let Some(device) = Loop::set_up(&open(&backing).unwrap()) else { return };
    symlink(&device.path, dir.path().join("disk")).unwrap();
    let process = spawn(dir.path(), &[]);
    let mut daemon = Daemon { process, dir };
    daemon.await_socket();
    let space = || fs::metadata(&backing).unwrap().blocks();

    // The disk reports the device's block size.
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.config(0, 8), 8192u64.to_le_bytes());
    assert_eq!(guest.config(20, 4), 4096u32.to_le_bytes());
    assert_eq!(guest.request(0, T_IN, 1, DATA, 4096), (IOERR, 0));
    guest.fill(DATA, 4096, 0xbb);
    assert_eq!(guest.request(0, T_OUT, 8, DATA, 4096), (OK, 1));
    assert_eq!(guest.request(0, T_FLUSH, 0, 0, 0), (OK, 1));
    wanted[4096..8192].fill(0xbb);
    assert!(fs::read(&backing).unwrap() == wanted);

    // Discards and write zeroes requests reach the file behind the device.
    let full = space();
    assert_eq!(guest.ranges(T_DISCARD, &[(2048, 1024, 0)]), (OK, 1));
    assert_eq!(full - space(), 1024);
    assert_eq!(guest.ranges(T_WRITE_ZEROES, &[(4096, 512, 0), (0, 8, 0)]), (OK, 1));
    assert_eq!(guest.ranges(T_WRITE_ZEROES, &[(6144, 512, 1)]), (OK, 1));
    assert_eq!(guest.request(0, T_FLUSH, 0, 0, 0), (OK, 1));
    for sectors in [2048..3072, 4096..4608, 0..8, 6144..6656] {
        wanted[sectors.start * 512..sectors.end * 512].fill(0);
    }
    assert!(daemon.disk() == wanted);
    assert!(fs::read(&backing).unwrap() == wanted);
    drop(guest);
    daemon.signal(libc::SIGTERM);
    assert!(daemon.wait().success());

    // Blocks smaller than the device's: they are zeroed by writing, and not discarded.
    fs::remove_file(daemon.dir.path().join("stats")).unwrap();
    daemon.process = spawn(daemon.dir.path(), &["--block-size", "512"]);
    daemon.await_socket();
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.request(0, T_IN, 9, DATA, 512), (OK, 513));
    assert_eq!(guest.bytes(DATA, 512), [0xbb; 512]);
    assert_eq!(guest.ranges(T_WRITE_ZEROES, &[(9, 2, 1)]), (OK, 1));
    assert_eq!(guest.ranges(T_DISCARD, &[(11, 4, 0)]), (OK, 1));
    assert_eq!(guest.ranges(T_DISCARD, &[(20, 20, 0)]), (OK, 1));
    assert_eq!(guest.request(0, T_FLUSH, 0, 0, 0), (OK, 1));
    wanted[9 * 512..11 * 512].fill(0);
    // Of sectors 20 to 40, the two device blocks that are fully covered.
    wanted[24 * 512..40 * 512].fill(0);
    assert!(daemon.disk() == wanted);
    assert!(fs::read(&backing).unwrap() == wanted);
    assert_eq!(daemon.stderr(), "");
}

/// A device that starts to fail loses written data, which the host reports to one flush only. All
/// later flushes must fail too, including those of later front-ends.
#[test]
fn lost_write_fails_flushes_of_later_front_ends() {
    // SAFETY: the name is a C string; the descriptor is new and has no other owner.
    let backing = unsafe {
        let fd = libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    backing.set_len(4 << 20).unwrap();
    let Some(device) = Loop::set_up(&backing) else { return };
    let dir = tempfile::tempdir().unwrap();
    symlink(&device.path, dir.path().join("disk")).unwrap();
    let process = spawn(dir.path(), &[]);
    let mut daemon = Daemon { process, dir };
    daemon.await_socket();
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.request(0, T_OUT, 8, DATA, 4096), (OK, 1));
    assert_eq!(guest.request(0, T_FLUSH, 0, 0, 0), (OK, 1));

    // From now on the device refuses writes, but the host's cache accepts them.
    // SAFETY: fcntl with this command accesses no memory.
    let sealed = unsafe { libc::fcntl(backing.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
    assert_eq!(sealed, 0, "{}", io::Error::last_os_error());
    assert_eq!(guest.request(0, T_OUT, 8, DATA, 4096), (OK, 1));
    assert_eq!(guest.request(0, T_FLUSH, 0, 0, 0).0, IOERR);
    assert_eq!(guest.request(0, T_FLUSH, 0, 0, 0).0, IOERR);
    for _ in 0..2 {
        drop(guest);
        guest = Guest::connect(&daemon.socket(), 1);
        assert_eq!(guest.request(0, T_FLUSH, 0, 0, 0).0, IOERR, "to a later front-end");
        assert_eq!(guest.request(0, T_IN, 16, DATA, 4096), (OK, 4097), "what is there is read");
    }
    drop(guest);
    daemon.signal(libc::SIGTERM);
    assert!(daemon.wait().success());
}

/// The host opens a read-only device for writing, and then fails the writes.
#[test]
fn read_only_device_is_refused_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let backing = dir.path().join("backing");
    fs::write(&backing, vec![0xaa; 1 << 20]).unwrap();
    // The backing file is open read-only, so the device is read-only too.
    let Some(device) = Loop::set_up(&File::open(&backing).unwrap()) else { return };
    symlink(&device.path, dir.path().join("disk")).unwrap();
    let process = spawn(dir.path(), &[]);
    let mut daemon = Daemon { process, dir };
    assert_eq!(daemon.wait().code(), Some(1));
    let said = daemon.stderr();
    assert!(said.contains("the block device is read-only; use --read-only"), "{said}");
    daemon.process = spawn(daemon.dir.path(), &["--read-only"]);
    daemon.await_socket();
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.request(0, T_IN, 8, DATA, 4096), (OK, 4097));
    assert_eq!(guest.request(0, T_OUT, 8, DATA, 4096).0, IOERR);
}

/// Another process has the device's file open for writing.
#[test]
fn device_in_use_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let backing = dir.path().join("backing");
    fs::write(&backing, vec![0xaa; 1 << 20]).unwrap();
    let Some(device) = Loop::set_up(&open(&backing).unwrap()) else { return };
    symlink(&device.path, dir.path().join("disk")).unwrap();
    let process = spawn(dir.path(), &[]);
    let daemon = Daemon { process, dir };
    daemon.await_socket();
    for args in [&[][..], &["--read-only"]] {
        let dir = tempfile::tempdir().unwrap();
        symlink(&device.path, dir.path().join("disk")).unwrap();
        let mut second = Daemon { process: spawn(dir.path(), args), dir };
        assert_eq!(second.wait().code(), Some(1));
        let said = second.stderr();
        assert!(said.contains("another process is using it"), "{said}");
    }
}
