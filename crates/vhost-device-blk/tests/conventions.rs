// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The conventions of the vhost-user specification for back-end programs, and those of service
//! managers.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::*;
use serde::Deserialize;
use vhost::vhost_user::Frontend;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-device-blk");

/// `VhostUserBackend` of the specification's schema.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    description: String,
    r#type: String,
    binary: String,
    #[serde(default)]
    tags: Vec<String>,
}

/// `VHostUserBackendCapabilities` of the schema, for the type "block".
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Capabilities {
    r#type: String,
    features: Vec<String>,
}

fn output(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

fn disk(folder: &Path) -> std::path::PathBuf {
    let disk = folder.join("disk");
    fs::write(&disk, vec![0x5a; 1 << 20]).unwrap();
    disk
}

#[test]
fn capabilities_match_schema_and_description() {
    for args in [&["--print-capabilities"][..], &["--bogus", "--fd=x", "--print-capabilities"]] {
        let (code, stdout, stderr) = output(Command::new(PROGRAM).args(args));
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{args:?}");
        let capabilities: Capabilities = serde_json::from_str(&stdout).unwrap();
        assert_eq!(capabilities.r#type, "block");
        assert_eq!(capabilities.features, ["read-only", "blk-file"]);
        // Each feature says that the option of its name exists.
        let (_, help, _) = output(Command::new(PROGRAM).arg("--help"));
        for option in capabilities.features {
            assert!(help.contains(&format!("--{option}")), "{option}");
        }

        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("50-vhost-device-blk.json");
        let text = fs::read_to_string(file).unwrap();
        let description: Description = serde_json::from_str(&text).unwrap();
        assert_eq!(description.r#type, capabilities.r#type);
        let binary = Path::new(&description.binary);
        assert!(binary.is_absolute() && binary.file_name() == Path::new(PROGRAM).file_name());
        assert!(!description.description.is_empty() && description.tags.is_empty());
    }
}

#[test]
fn wrong_option_is_one_clear_line() {
    for (option, value, words) in [
        ("--log-level", "loud", &["--log-level", "off, error, warn, info, debug, trace"][..]),
        ("--socket-count", "2", &["'--socket-count' found; a similar argument exists: '--socket"]),
        ("--num-queues", "-1", &["'-1'", "--num-queues"]),
        ("--stats-interval", "-1", &["-1", "--stats-interval"]),
    ] {
        let (code, _, stderr) =
            output(Command::new(PROGRAM).args(["--blk-file", "d", option, value]));
        assert_eq!((code, stderr.lines().count()), (Some(2), 1), "{stderr}");
        assert!(words.iter().all(|word| stderr.contains(word)), "{stderr}");
        assert!(!stderr.contains("tip:"), "{stderr}");
    }
}

#[test]
fn few_files_are_warned_of() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(dir.path());
    let stderr = |limit: &str| {
        let script = format!("ulimit -n {limit}; exec \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &script, PROGRAM, "--blk-file"]).arg(&disk);
        // A path that is refused ends the daemon after its checks.
        command.arg("--socket-path").arg(dir.path().join("absent/s"));
        output(&mut command).2
    };
    let warned = stderr("20");
    assert!(warned.contains("may have 20 files open") && warned.contains("ulimit -n"), "{warned}");
    assert!(!stderr("200").contains("files open"));
}

#[test]
fn inherited_listener_serves_several_front_ends() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    disk(dir.path());
    let process = spawn_with(listener.into(), dir.path(), &[]);
    let mut daemon = Daemon { process, dir };
    for _ in 0..2 {
        let mut guest = Guest::connect(&socket, 1);
        assert_eq!(guest.request(0, T_IN, 1, DATA, 512), (OK, 513));
    }
    daemon.signal(libc::SIGTERM);
    assert!(daemon.wait().success());
    assert!(socket.exists(), "the socket belongs to the process that created it");
}

#[test]
fn inherited_connection_is_the_only_front_end() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    disk(dir.path());
    let process = spawn_with(theirs.into(), dir.path(), &["--num-queues", "2"]);
    let mut daemon = Daemon { process, dir };
    let mut guest = Guest::of(Frontend::from_stream(ours, 64), 2, 0);
    guest.fill(DATA, 4096, 0x77);
    assert_eq!(guest.request(1, T_OUT, 8, DATA, 4096), (OK, 1));
    assert_eq!(guest.request(0, T_IN, 8, DATA + PAGE, 4096), (OK, 4097));
    assert_eq!(guest.bytes(DATA + PAGE, 4096), [0x77; 4096]);
    drop(guest);
    assert!(daemon.wait().success());
    assert!(daemon.disk()[4096..8192] == [0x77; 4096]);
    assert_eq!(daemon.stderr(), "");
}

#[test]
fn signal_ends_an_inherited_connection() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    disk(dir.path());
    let process = spawn_with(theirs.into(), dir.path(), &[]);
    let mut daemon = Daemon { process, dir };
    let guest = Guest::of(Frontend::from_stream(ours, 64), 1, 0);
    daemon.signal(libc::SIGTERM);
    assert!(daemon.wait().success());
    use vhost::VhostBackend;
    assert!(guest.frontend.get_features().is_err(), "the front-end learns of it");
}

/// A daemon of either kind of socket has ended in order, even if it had to kill the process of its
/// front-end.
#[test]
fn signal_ends_a_daemon_whose_child_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    disk(dir.path());
    let process = spawn_with(theirs.into(), dir.path(), &[]);
    let connected = Daemon { process, dir };
    let guest = Guest::of(Frontend::from_stream(ours, 64), 1, 0);
    let listening = Daemon::start(100, &["--once"]);
    let other = Guest::connect(&listening.socket(), 1);
    for mut daemon in [connected, listening] {
        let child = child_of(daemon.process.id());
        // SAFETY: its parent waits for it only after its end, so its ID has not been reused.
        assert_eq!(unsafe { libc::kill(child, libc::SIGSTOP) }, 0);
        daemon.signal(libc::SIGTERM);
        let status = daemon.wait();
        let said = daemon.stderr();
        assert_eq!(status.code(), Some(0), "{said}");
        assert!(said.contains("it does not stop; killing it"), "{said}");
        assert!(!said.contains("killed by signal"), "{said}");
    }
    drop((guest, other));
}

/// Returns the process that a daemon has started.
fn child_of(daemon: u32) -> libc::pid_t {
    let parent = format!("PPid:\t{daemon}");
    let is_child = |id: &libc::pid_t| {
        let status = fs::read_to_string(format!("/proc/{id}/status"));
        status.is_ok_and(|status| status.lines().any(|line| line == parent))
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let mut ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.find(is_child).expect("a child")
}

#[test]
fn unusable_sockets_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let blk_file = disk(dir.path());
    let refused = |args: &[&str], fd: Option<OwnedFd>, status, words: &str| {
        let mut command = Command::new(PROGRAM);
        command.arg("--blk-file").arg(&blk_file).args(args);
        if let Some(fd) = fd {
            pass(&mut command, fd);
        }
        let (code, _, said) = output(&mut command);
        assert_eq!(code, Some(status), "{said}");
        assert!(said.contains(words) && said.lines().count() == 1, "{said}");
    };
    refused(&[], None, 2, "use --socket-path PATH or --fd FDNUM");
    refused(&["--fd", "1"], None, 2, "standard stream");
    refused(&["--fd", "77"], None, 2, "--fd 77: Bad file descriptor");
    refused(&["--fd", "100", "--socket-path", "x"], None, 2, "cannot be used with");
    let file = fs::File::open(&blk_file).unwrap();
    refused(&["--fd", "100"], Some(file.into()), 1, "non-socket");
    let datagram = UnixDatagram::unbound().unwrap();
    refused(&["--fd", "100"], Some(datagram.into()), 1, "not a Unix stream socket");
}

/// A service manager's end of the notification protocol.
struct Manager(UnixDatagram);

impl Manager {
    fn next(&self) -> String {
        let mut buffer = [0; 1000];
        let n = self.0.recv(&mut buffer).expect("a notification");
        String::from_utf8(buffer[..n].to_vec()).unwrap()
    }
}

#[test]
fn service_manager_is_notified() {
    let dir = tempfile::tempdir().unwrap();
    let manager = Manager(UnixDatagram::bind(dir.path().join("notify")).unwrap());
    manager.0.set_read_timeout(Some(PATIENCE)).unwrap();
    disk(dir.path());
    let mut command = daemon_command(dir.path(), &[]);
    let process = command.env("NOTIFY_SOCKET", dir.path().join("notify")).spawn().unwrap();
    let mut daemon = Daemon { process, dir };
    let ready = manager.next();
    assert!(ready.starts_with("READY=1\nSTATUS=listening on "), "{ready}");
    // It is ready when front-ends can connect.
    let guest = Guest::connect(&daemon.socket(), 1);
    let serving = manager.next();
    let expected = format!("STATUS=serving front-end (process {})\n", std::process::id());
    assert_eq!(serving, expected);
    drop(guest);
    assert!(manager.next().starts_with("STATUS=listening"));
    daemon.signal(libc::SIGTERM);
    assert_eq!(manager.next(), "STOPPING=1\nSTATUS=ending on SIGTERM\n");
    assert!(daemon.wait().success());
}

/// systemd's own program listens, and starts the back-end when a front-end connects.
#[test]
fn systemd_activates_the_socket() {
    let tool = "systemd-socket-activate";
    if Command::new(tool).arg("--version").stdout(Stdio::null()).status().is_err() {
        return eprintln!("SKIPPED: {tool} is not installed");
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let process = Command::new(tool)
        .args([OsStr::new("-l"), socket.as_os_str(), OsStr::new(PROGRAM)])
        .args([OsStr::new("--blk-file"), disk(dir.path()).as_os_str(), OsStr::new("--once")])
        .stderr(fs::File::create(dir.path().join("stderr")).unwrap())
        .spawn()
        .unwrap();
    let mut daemon = Daemon { process, dir };
    daemon.await_socket();
    let mut guest = Guest::connect(&socket, 1);
    assert_eq!(guest.request(0, T_IN, 1, DATA, 512), (OK, 513));
    drop(guest);
    assert!(daemon.wait().success());
}

/// The second front-end, whatever it is, is not left waiting.
#[test]
fn another_front_end_learns_that_it_is_busy() {
    let mut daemon = Daemon::start(100, &[]);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    let start = std::time::Instant::now();
    for _ in 0..2 {
        let mut other = UnixStream::connect(daemon.socket()).unwrap();
        other.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(other.read(&mut [0]).unwrap(), 0, "its connection is closed");
    }
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    let busy = format!("busy with front-end (process {})", std::process::id());
    // The connection may be closed before the line is written.
    until("the message", || daemon.stderr().contains(&busy));
    // The first one is served on, and the next one after it.
    assert_eq!(guest.request(0, T_IN, 1, DATA, 512), (OK, 513));
    drop(guest);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.request(0, T_IN, 2, DATA, 512), (OK, 513));
    daemon.signal(libc::SIGTERM);
    assert!(daemon.wait().success());
}
