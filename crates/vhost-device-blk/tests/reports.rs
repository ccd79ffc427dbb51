// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The daemon's log, its reports of the counters, and the signals that it hears.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use common::*;

/// Returns the reports of the counters in a log.
fn reports(log: &str) -> Vec<serde_json::Value> {
    // The last line may not be whole yet.
    let lines = log.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let lines = lines.filter_map(|line| line.split_once("vhost_device_blk::stats] "));
    lines.map(|(_, json)| serde_json::from_str(json).unwrap()).collect()
}

#[test]
fn log_file_tells_the_life_of_a_connection() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    fs::write(dir.path().join("disk"), vec![0; 1 << 20]).unwrap();
    fs::write(&log, "an older line\n").unwrap();
    let args = ["-v", "--log-file", log.to_str().unwrap(), "--num-queues", "2"];
    let mut daemon = Daemon { process: spawn(dir.path(), &args), dir };
    daemon.await_socket();
    let mut guest = Guest::connect(&daemon.socket(), 2);
    assert_eq!(guest.request(1, T_IN, 1, DATA, 512), (OK, 513));
    assert_eq!(guest.request(0, T_OUT, 1 << 20, DATA, 512).0, IOERR);
    let own = std::process::id();
    guest.rings[0].start(&mut guest.frontend, &guest.mem, 1);
    use vhost::VhostBackend;
    guest.frontend.get_vring_base(0).unwrap();
    // As a front-end does before the driver has negotiated: no news.
    guest.frontend.set_features(1 << 32 | 1 << 30).unwrap();
    drop(guest);
    until("the disconnect", || fs::read_to_string(&log).unwrap().contains("disconnected"));
    daemon.signal(libc::SIGTERM);
    assert!(daemon.wait().success());
    let log = fs::read_to_string(&log).unwrap();
    // Two processes write lines, so their order is not fixed, but that of the first and the last.
    for words in [
        "listening on ",
        "1048576 bytes, queues: 2 of up to 1024",
        &format!("front-end (process {own}) connected"),
        "features negotiated: 0x",
        "VERSION_1",
        "guest memory: 16777216 bytes in 2 regions",
        "queue 1 runs, with 64 entries",
        "queue 0 stopped",
        &format!("front-end (process {own}) disconnected after "),
        "2 requests, 512 bytes read, 0 bytes written, 1 errors",
    ] {
        assert!(log.contains(words), "no {words:?} in {log}");
    }
    assert_eq!(log.matches("features negotiated").count(), 1, "{log}");
    assert!(log.starts_with("an older line\n"), "{log}");
    assert!(log.lines().nth(1).unwrap().contains("listening on "), "{log}");
    assert!(log.ends_with("ending on SIGTERM\n"), "{log}");
    // Each line has a time with microseconds.
    let times = log.lines().skip(1).map(|line| line.get(20..29).unwrap_or(line));
    for time in times {
        assert!(time.starts_with('.') && time.ends_with("Z "), "{time} in {log}");
    }
    assert_eq!(daemon.stderr(), "");
}

#[test]
fn level_of_the_log_follows_the_command_line() {
    for (args, variable, infos, debugs) in [
        (&[][..], None, false, false),
        (&["--log-level", "info"], None, true, false),
        (&["-vv"], None, true, true),
        (&[], Some("info"), true, false),
        (&["--log-level", "error"], Some("trace"), false, false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("disk"), vec![0; 4096]).unwrap();
        let mut command = daemon_command(dir.path(), args);
        command.env_remove("RUST_LOG").envs(variable.map(|level| ("RUST_LOG", level)));
        let mut daemon = Daemon { process: command.spawn().unwrap(), dir };
        daemon.await_socket();
        drop(Guest::connect(&daemon.socket(), 1));
        daemon.signal(libc::SIGTERM);
        assert!(daemon.wait().success());
        let said = daemon.stderr();
        assert_eq!(said.contains(" INFO "), infos, "{args:?} {variable:?}: {said}");
        assert_eq!(said.contains(" DEBUG "), debugs, "{args:?} {variable:?}: {said}");
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("disk"), vec![0; 4096]).unwrap();
    let mut process = spawn(dir.path(), &["--log-file", "/nonexistent/log"]);
    assert_eq!(process.wait().unwrap().code(), Some(1));
    let said = fs::read_to_string(dir.path().join("stderr")).unwrap();
    assert!(said.contains("cannot open --log-file /nonexistent/log: No such file"), "{said}");
}

#[test]
fn signal_reports_the_counters() {
    let mut daemon = Daemon::start(100, &["--num-queues", "2"]);
    daemon.signal(libc::SIGUSR1);
    until("the first report", || reports(&daemon.stderr()).len() == 1);
    let mut guest = Guest::connect(&daemon.socket(), 2);
    assert_eq!(guest.request(1, T_IN, 1, DATA, 1024), (OK, 1025));
    assert_eq!(guest.request(1, T_IN, 1000, DATA, 1024), (IOERR, 0));
    // While the front-end is served, and to all processes, as `pkill` does.
    daemon.signal(libc::SIGUSR1);
    for child in children(daemon.process.id()) {
        // SAFETY: the child of our child ends only when its connection does.
        assert_eq!(unsafe { libc::kill(child, libc::SIGUSR1) }, 0);
    }
    until("the second report", || reports(&daemon.stderr()).len() == 2);
    let report = &reports(&daemon.stderr())[1];
    let expected = serde_json::json!({
        "requests": 2, "bytes_read": 1024, "bytes_written": 0, "io_errors": 1, "faults_waited": 0
    });
    assert_eq!(report["queues"][1], expected, "{report}");
    assert_eq!((&report["requests"], &report["io_errors"]), (&2.into(), &1.into()));
    assert_eq!(&daemon.stats(), report, "the file is written as well");
    assert_eq!(guest.request(0, T_IN, 1, DATA, 512), (OK, 513), "the front-end is served on");
    daemon.signal(libc::SIGTERM);
    assert!(daemon.wait().success());
}

fn children(process: u32) -> Vec<i32> {
    let list = fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
    list.unwrap_or_default().split_whitespace().map(|id| id.parse().unwrap()).collect()
}

#[test]
fn counters_are_reported_regularly() {
    let daemon = Daemon::start(100, &["--stats-interval", "1"]);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.request(0, T_IN, 1, DATA, 512), (OK, 513));
    until("two reports", || reports(&daemon.stderr()).len() >= 2);
    // The first ones may have come before the request.
    until("a report of it", || reports(&daemon.stderr()).last().unwrap()["reads"] == 1);
    assert_eq!(daemon.stats()["reads"], 1);
    drop(guest);
    let so_far = reports(&daemon.stderr()).len();
    until("a report without a front-end", || reports(&daemon.stderr()).len() > so_far);
}

/// As under `nohup`, or as a background job of a script, which ignores SIGINT.
#[test]
fn ignored_signals_stay_ignored() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("disk"), vec![0; 4096]).unwrap();
    let mut command = daemon_command(dir.path(), &[]);
    let ignored = [libc::SIGHUP, libc::SIGINT, libc::SIGUSR1];
    // SAFETY: the closure only makes system calls.
    unsafe {
        command.pre_exec(move || {
            for signal in ignored {
                libc::signal(signal, libc::SIG_IGN);
            }
            Ok(())
        });
    }
    let mut daemon = Daemon { process: command.spawn().unwrap(), dir };
    daemon.await_socket();
    for signal in ignored {
        daemon.signal(signal);
    }
    let mut guest = Guest::connect(&daemon.socket(), 1);
    for signal in ignored {
        daemon.signal(signal);
    }
    assert_eq!(guest.request(0, T_IN, 1, DATA, 512), (OK, 513));
    daemon.signal(libc::SIGTERM);
    assert!(daemon.wait().success());
    assert_eq!(daemon.stderr(), "");
}

/// A closed terminal ends it in good order.
#[test]
fn hangup_ends_it_in_order() {
    let mut daemon = Daemon::start(100, &[]);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.request(0, T_IN, 1, DATA, 512), (OK, 513));
    daemon.signal(libc::SIGHUP);
    assert!(daemon.wait().success());
    assert!(!daemon.socket().exists());
    assert_eq!(daemon.stats()["reads"], 1);
}

/// With too few descriptors for a front-end, the next one may fare better; the daemon does not
/// start one process after another meanwhile.
#[test]
fn short_limits_are_named_and_survived() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("disk"), vec![0; 4096]).unwrap();
    let mut command = daemon_command(dir.path(), &["--postcopy", "off", "--num-queues", "8"]);
    limit_to(&mut command, libc::RLIMIT_NOFILE, 14);
    let mut daemon = Daemon { process: command.spawn().unwrap(), dir };
    daemon.await_socket();
    let begun = Instant::now();
    let _pending = std::os::unix::net::UnixStream::connect(daemon.socket()).unwrap();
    let advice = "raise the limit of open files (ulimit -n)";
    until("the error", || daemon.stderr().contains(advice));
    std::thread::sleep(std::time::Duration::from_millis(500));
    let said = daemon.stderr();
    // It tries once a second.
    let errors = said.lines().filter(|line| line.contains(advice)).count();
    assert!(errors as u64 <= 1 + begun.elapsed().as_secs(), "{said}");
    // A warning at the start; and the device may name what it could not create.
    assert!(said.lines().count() <= 1 + 2 * errors, "{said}");
    daemon.signal(libc::SIGTERM);
    assert!(daemon.wait().success());
}

/// A full disk, and a limit on files: each is an error that says what helps, and no signal.
#[test]
fn advice_on_unwritable_counters_fits_the_cause() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("disk"), vec![0; 4096]).unwrap();
    let base = ["--read-only", "--stats"];
    let stats = dir.path().join("stats-2");
    for (file, limit, status, words) in [
        (Path::new("/dev/full"), None, 1, "No space left on device (os error 28); free space"),
        (&stats, Some(0), 3, "File too large (os error 27); raise the limit of the size of files"),
        (Path::new("/nonexistent/x"), None, 1, "use a path that this user may write"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-device-blk"));
        command.arg("--blk-file").arg(dir.path().join("disk")).args(base).arg(file);
        command.arg("--socket-path").arg(dir.path().join("socket"));
        if let Some(most) = limit {
            limit_to(&mut command, libc::RLIMIT_FSIZE, most);
            // Otherwise a build that measures coverage writes, and complains.
            command.env("LLVM_PROFILE_FILE", "/dev/null");
        }
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{said}");
        assert!(said.contains("cannot write --stats ") && said.contains(words), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no file is left");
}

fn limit_to(command: &mut Command, resource: libc::__rlimit_resource_t, most: u64) {
    // SAFETY: the closure only makes a system call.
    unsafe {
        command.pre_exec(move || {
            let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
            match libc::setrlimit(resource, &limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
}
