// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A block device as the disk: a loop device with blocks of 4096 bytes. Says so and passes where
//! none may be set up.

mod common;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use common::*;

// <linux/loop.h>
const LOOP_SET_FD: libc::Ioctl = 0x4c00;
const LOOP_CLR_FD: libc::Ioctl = 0x4c01;
const LOOP_SET_BLOCK_SIZE: libc::Ioctl = 0x4c09;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;

/// A loop device; taken down when dropped.
struct Loop {
    device: File,
    path: PathBuf,
}

fn ioctl(file: &File, request: libc::Ioctl, argument: libc::c_ulong) -> io::Result<libc::c_int> {
    // SAFETY: the requests of a loop device that are used here take a number.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl Loop {
    fn set_up(backing: &Path) -> io::Result<Self> {
        let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
        let control = open(Path::new("/dev/loop-control"))?;
        let backing = open(backing)?;
        loop {
            let number = ioctl(&control, LOOP_CTL_GET_FREE, 0)?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = open(&path)?;
            match ioctl(&device, LOOP_SET_FD, backing.as_raw_fd() as libc::c_ulong) {
                // Somebody was faster.
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                Err(e) => return Err(e),
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
    let device = match Loop::set_up(&backing) {
        Ok(device) => device,
        Err(e) => {
            eprintln!("SKIPPED: no loop device: {e}");
            return;
        }
    };
    symlink(&device.path, dir.path().join("disk")).unwrap();
    let process = spawn(dir.path(), &[]);
    let mut daemon = Daemon { process, dir };
    daemon.await_socket();
    let space = || fs::metadata(&backing).unwrap().blocks();

    // The device's blocks are the disk's.
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.config(0, 8), 8192u64.to_le_bytes());
    assert_eq!(guest.config(20, 4), 4096u32.to_le_bytes());
    assert_eq!(guest.request(0, T_IN, 1, DATA, 4096), (IOERR, 0));
    guest.fill(DATA, 4096, 0xbb);
    assert_eq!(guest.request(0, T_OUT, 8, DATA, 4096), (OK, 1));
    assert_eq!(guest.request(0, T_FLUSH, 0, 0, 0), (OK, 1));
    wanted[4096..8192].fill(0xbb);
    assert!(fs::read(&backing).unwrap() == wanted);

    // Discards and zeroes go through to the file behind the device.
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

    // Blocks that are smaller than the device's: zeroed by writing, and not discarded.
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
    // Of sectors 20 to 40, the two blocks that are whole.
    wanted[24 * 512..40 * 512].fill(0);
    assert!(daemon.disk() == wanted);
    assert!(fs::read(&backing).unwrap() == wanted);
    assert_eq!(daemon.stderr(), "");
}
