// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lock on the image, between processes of this program and with QEMU's.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::*;

fn disk() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("disk"), vec![0x11; 1 << 20]).unwrap();
    dir
}

/// Starts a second back-end on the disk of the first. Returns what it says if it is refused.
fn second(first: &Path, args: &[&str]) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(first.join("disk"), dir.path().join("disk")).unwrap();
    let mut daemon = Daemon { process: spawn(dir.path(), args), dir };
    let mut status = None;
    until("the second back-end to listen or to end", || {
        status = daemon.process.try_wait().unwrap();
        status.is_some() || test_support::wait::listens(daemon.process.id())
    });
    match status {
        None => Ok(()),
        Some(status) => {
            assert_eq!(status.code(), Some(1));
            Err(daemon.stderr())
        }
    }
}

#[test]
fn image_in_use_is_refused() {
    let dir = disk();
    let mut daemon = Daemon { process: spawn(dir.path(), &[]), dir };
    daemon.await_socket();
    for args in [&[][..], &["--read-only"]] {
        let said = second(daemon.dir.path(), args).unwrap_err();
        assert!(said.contains("another process is using it; use another image"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    second(daemon.dir.path(), &["--lock", "off"]).unwrap();
    // The lock lasts as long as the processes do.
    let guest = Guest::connect(&daemon.socket(), 1);
    daemon.signal(libc::SIGKILL);
    daemon.wait();
    second(daemon.dir.path(), &[]).unwrap();
    drop(guest);
}

#[test]
fn readers_share_an_image() {
    let dir = disk();
    let daemon = Daemon { process: spawn(dir.path(), &["--read-only"]), dir };
    daemon.await_socket();
    second(daemon.dir.path(), &["--read-only"]).unwrap();
    let said = second(daemon.dir.path(), &[]).unwrap_err();
    assert!(said.contains("use --read-only in both"), "{said}");
}

/// QEMU with the disk of a folder as a guest's disk; ended when dropped.
struct Qemu(Child);

impl Qemu {
    /// Starts it, with the disk read-only or writable. Returns what it says if it refuses, or `None`
    /// if it is not installed.
    fn start(folder: &Path, write: bool) -> Option<Result<Self, String>> {
        let socket = folder.join("qmp");
        let _ = fs::remove_file(&socket);
        let read_only = if write { "off" } else { "on" };
        let disk = folder.join("disk");
        let process = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-display", "none", "-machine", "q35", "-accel", "tcg", "-S"])
            .arg("-drive")
            .arg(format!("file={},format=raw,if=none,id=d,read-only={read_only}", disk.display()))
            .args(["-device", "virtio-blk-pci,drive=d"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .stdin(Stdio::null())
            .stderr(File::create(folder.join("qemu.stderr")).unwrap())
            .spawn();
        let mut this = match process {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("SKIPPED: qemu-system-x86_64 is not installed");
                return None;
            }
            process => Qemu(process.unwrap()),
        };
        // It carries out commands once its devices are complete.
        let complete = loop {
            if let Ok(mut monitor) = UnixStream::connect(&socket) {
                monitor.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").unwrap();
                break BufReader::new(monitor)
                    .lines()
                    .map_while(Result::ok)
                    .any(|line| line.contains("return"));
            }
            if this.0.try_wait().unwrap().is_some() {
                break false;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        };
        Some(if complete {
            Ok(this)
        } else {
            this.0.wait().unwrap();
            Err(fs::read_to_string(folder.join("qemu.stderr")).unwrap())
        })
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn qemu_respects_the_lock_and_is_respected() {
    let dir = disk();
    let folder = dir.path().to_owned();
    let Some(qemu) = Qemu::start(&folder, true) else { return };
    let _dir = dir;
    // QEMU writes: no other process may read or write.
    let qemu = qemu.unwrap();
    for args in [&[][..], &["--read-only"]] {
        let said = second(&folder, args).unwrap_err();
        assert!(said.contains("another process is using it"), "{said}");
    }
    drop(qemu);
    // QEMU reads: others may read.
    let qemu = Qemu::start(&folder, false).unwrap().unwrap();
    second(&folder, &["--read-only"]).unwrap();
    let said = second(&folder, &[]).unwrap_err();
    assert!(said.contains("another process is using it"), "{said}");
    drop(qemu);

    // The other way round.
    for (args, write, allowed) in [
        (&[][..], true, false),
        (&[], false, false),
        (&["--read-only"], true, false),
        (&["--read-only"], false, true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(folder.join("disk"), dir.path().join("disk")).unwrap();
        let daemon = Daemon { process: spawn(dir.path(), args), dir };
        daemon.await_socket();
        match Qemu::start(&folder, write).unwrap() {
            Ok(_) => assert!(allowed, "{args:?}, write: {write}"),
            Err(said) => {
                assert!(!allowed && said.contains("lock"), "{args:?}, write: {write}: {said}");
            }
        }
    }
}
