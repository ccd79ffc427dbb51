// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The daemon around the device: its command line, successive front-ends, and its termination.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use common::*;
use test_support::program::copy_for_everybody;
use vhost::VhostBackend;

#[test]
fn one_front_end_after_another() {
    let mut daemon = Daemon::start(100, &["--num-queues", "2"]);
    for i in 0..5u8 {
        let mut guest = Guest::connect(&daemon.socket(), 2);
        guest.fill(DATA, 512, 0xc0 + i);
        assert_eq!(guest.request(1, T_OUT, u64::from(i), DATA, 512), (OK, 1));
    }
    // A front-end that sends garbage, and one that sends nothing.
    {
        use std::io::Write;
        let mut stream = std::os::unix::net::UnixStream::connect(daemon.socket()).unwrap();
        stream.write_all(&[0xff; 64]).unwrap();
    }
    drop(std::os::unix::net::UnixStream::connect(daemon.socket()).unwrap());
    let mut guest = Guest::connect(&daemon.socket(), 2);
    assert_eq!(guest.request(0, T_IN, 4, DATA, 512), (OK, 513));
    assert_eq!(guest.bytes(DATA, 512), [0xc4; 512]);
    until("the counters", || daemon.stats()["connections"] == 7);

    // The daemon terminates cleanly with a front-end connected.
    daemon.signal(libc::SIGTERM);
    assert!(daemon.wait().success());
    assert!(!daemon.socket().exists());
    assert_eq!(daemon.stats()["connections"], 8);
    assert_eq!(daemon.stats()["writes"], 5);
}

/// Counters that can no longer be written are reported, and the next front-end is served.
#[test]
fn unwritable_counters_are_reported() {
    let mut daemon = Daemon::start(100, &[]);
    let stats = daemon.dir.path().join("stats");
    fs::remove_file(&stats).unwrap();
    fs::create_dir(&stats).unwrap();
    drop(Guest::connect(&daemon.socket(), 1));
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.request(0, T_IN, 3, DATA, 512), (OK, 513));
    assert!(daemon.stderr().contains("--stats"), "{}", daemon.stderr());
    daemon.signal(libc::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(1));
    assert!(!daemon.socket().exists());
    assert_eq!(daemon.stderr().lines().count(), 2, "{}", daemon.stderr());
}

#[test]
fn ends_without_a_front_end() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let mut daemon = Daemon::start(100, &[]);
        daemon.signal(signal);
        assert_eq!(daemon.wait().code(), Some(0));
        assert!(!daemon.socket().exists());
        assert_eq!(daemon.stats()["connections"], 0);
    }
}

#[test]
fn killed_daemon_leaves_only_its_socket() {
    let mut daemon = Daemon::start(100, &[]);
    let guest = Guest::connect(&daemon.socket(), 1);
    daemon.signal(libc::SIGKILL);
    daemon.wait();
    assert!(daemon.socket().exists());
    until("the front-end's process to end", || guest.frontend.get_features().is_err());

    // A new daemon replaces the stale socket.
    daemon.process = spawn(daemon.dir.path(), &[]);
    until("the new socket", || std::os::unix::net::UnixStream::connect(daemon.socket()).is_ok());
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.request(0, T_IN, 1, DATA, 512), (OK, 513));
}

#[test]
fn a_protocol_error_fails_once() {
    let mut daemon = Daemon::start(100, &["--once"]);
    let guest = Guest::connect(&daemon.socket(), 0);
    // A queue larger than the daemon permits.
    assert!(guest.frontend.set_vring_num(0, 2048).is_err());
    assert_eq!(daemon.wait().code(), Some(1));
    let stderr = daemon.stderr();
    assert!(
        stderr.lines().last().unwrap().starts_with("vhost-device-blk: cannot serve"),
        "{stderr}"
    );
}

#[test]
fn wrong_command_lines_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (socket, disk, live) = (path("socket"), path("disk"), path("live"));
    fs::write(&disk, [0; 512]).unwrap();
    let _live = UnixListener::bind(&live).unwrap();
    let good = ["--socket-path", &socket, "--blk-file", &disk];
    let with = |more: &[&str]| [&good[..], more].concat().into_iter().map(String::from).collect();
    let cases: &[(Vec<String>, i32, &str)] = &[
        (vec![], 2, "required"),
        (vec!["--bogus".into()], 2, "--bogus"),
        (with(&["--num-queues", "0"]), 2, "--num-queues 0"),
        (with(&["--num-queues", "many"]), 2, "many"),
        (with(&["--queue-size", "48"]), 2, "--queue-size 48"),
        (with(&["--serial", "longer than twenty bytes"]), 2, "--serial"),
        (with(&["--threads", "0"]), 2, "--threads 0"),
        (with(&["--block-size", "100"]), 2, "--block-size 100"),
        (with(&["--block-size", "4096"]), 1, "less than a block"),
        (with(&["--cache", "none"]), 2, "none"),
        (with(&["--postcopy", "maybe"]), 2, "maybe"),
        (vec!["--socket".into(), socket.clone(), "--disk".into(), path("absent")], 1, "absent"),
        (
            vec!["--socket".into(), live.clone(), "--disk".into(), disk.clone()],
            1,
            "another process",
        ),
        (vec!["--socket".into(), disk.clone(), "--disk".into(), disk.clone()], 1, "not a socket"),
        (with(&["--stats", "/nonexistent/stats"]), 1, "/nonexistent/stats"),
    ];
    for (args, code, text) in cases {
        let output =
            Command::new(env!("CARGO_BIN_EXE_vhost-device-blk")).args(args).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(*code), "{args:?}: {stderr}");
        assert!(stderr.contains(text), "{args:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
    }
}

/// An image that is read-only by its permissions or its file system: the message names the option.
#[test]
fn read_only_image_is_refused_by_option() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    fs::write(&image, [0; 512]).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_vhost-device-blk"));
    let program = copy_for_everybody(program, folder.path()).unwrap();
    fs::set_permissions(&image, fs::Permissions::from_mode(0o444)).unwrap();
    let refused = |command: &mut Command, cause: &str| {
        command
            .arg("--socket-path")
            .arg(folder.path().join("socket"))
            .arg("--blk-file")
            .arg(&image);
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("for writing") && said.contains(cause), "{said}");
        assert!(said.contains("use --read-only"), "{said}");
    };
    let mut command = Command::new(&program);
    // SAFETY: geteuid has no arguments and cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        // Root may write the file despite its mode.
        command.uid(65534);
    }
    refused(&mut command, "Permission denied");

    let place = CString::new(folder.path().as_os_str().as_bytes()).unwrap();
    let read_only_file_system = move || {
        let mount = |target: &CStr, flags| {
            let (none, at) = (std::ptr::null(), target.as_ptr());
            // SAFETY: all strings are C strings that outlive the call, and the data pointer is
            // null.
            match unsafe { libc::mount(at, at, none, flags, none.cast()) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        // SAFETY: the child has one thread, and the new namespace separates its mounts from the
        // host's.
        if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
            return Err(io::Error::last_os_error());
        }
        mount(c"/", libc::MS_REC | libc::MS_PRIVATE)?;
        mount(&place, libc::MS_BIND)?;
        mount(&place, libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY)
    };
    let command = || {
        let mut command = Command::new(&program);
        // SAFETY: the closure only makes system calls.
        unsafe { command.pre_exec(read_only_file_system.clone()) };
        command
    };
    match command().arg("--help").stdout(Stdio::null()).status() {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            return eprintln!("SKIPPED: no mounts: {error}");
        }
        status => assert!(status.unwrap().success()),
    }
    refused(&mut command(), "Read-only file system");
}
