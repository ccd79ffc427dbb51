// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ends before a restored guest runs, or while a back-end is silent: a signal ends each wait in
//! order, and the user's limit each wait for the source.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use demand_tests::backend::{BackEnd, BlkOptions};
use demand_tests::cannot_run;
use demand_tests::host::{has_kvm, skip};
use demand_tests::process::{Guarded, Stopped, program};
use demand_tests::refusal::{FAILED, refused};
use demand_tests::tiny_kernel::{LOOP, START, pvh_kernel};
use demand_tests::tiny_snapshot::TinySnapshot;
use demand_vmm::api::events::{EventKind, PauseReason};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
use test_support::fuse::SlowFile;
use test_support::wait::until;

/// Time limit for an end in order, on a busy machine: less than a back-end has for an answer.
const SOON: Duration = Duration::from_secs(20);

#[test]
fn storage_server() {
    test_support::fuse::serve();
}

/// A guest that starts, and its lines of standard error.
struct Start {
    vmm: Guarded,
    lines: Receiver<String>,
    said: Vec<String>,
}

impl Start {
    fn of(command: &mut Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut vmm = Guarded::spawn(command).unwrap();
        let (sender, lines) = channel();
        let pipe = BufReader::new(vmm.child().stderr.take().unwrap());
        thread::spawn(move || {
            pipe.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Start { vmm, lines, said: Vec::new() }
    }

    /// Waits for a line with all of these words.
    #[track_caller]
    fn wait_said(&mut self, words: &[&str]) {
        loop {
            let line = self.lines.recv_timeout(Duration::from_secs(60));
            let line = line.unwrap_or_else(|_| panic!("no line has {words:?}: {:?}", self.said));
            self.said.push(line);
            let line = self.said.last().unwrap();
            if words.iter().all(|words| line.contains(words)) {
                return;
            }
        }
    }

    fn signal(&self, signal: libc::c_int) {
        let id = libc::pid_t::try_from(self.vmm.id()).unwrap();
        // SAFETY: the child has not been reaped, so its ID has not been reused.
        assert_eq!(unsafe { libc::kill(id, signal) }, 0);
    }

    /// Waits for the end; returns the lines, too.
    fn end(mut self) -> (ExitStatus, Vec<String>, Duration) {
        let begun = Instant::now();
        let status = self.vmm.wait(Duration::from_secs(60)).unwrap();
        self.said.extend(self.lines.iter());
        (status, self.said, begun.elapsed())
    }

    /// Ends it by a signal, which must be an end in order; returns its lines.
    #[track_caller]
    fn ended_by(self, signal: libc::c_int) -> Vec<String> {
        self.signal(signal);
        let (status, said, took) = self.end();
        assert!(status.success() && took < SOON, "{status} after {took:?}: {said:?}");
        assert!(!said.iter().any(|line| line.starts_with("demand-vmm: ")), "{said:?}");
        said
    }
}

fn restore(snapshot: &TinySnapshot, disks: &[&Path], more: &[&str]) -> Start {
    let mut command = snapshot.restore(disks).unwrap();
    Start::of(command.args(["--serial", "off"]).args(more))
}

fn back_end(snapshot: &Path, name: &str) -> BackEnd {
    let disk = snapshot.join(format!("{name}.img"));
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let options = BlkOptions { queues: 1, queue_size: 256, postcopy: true };
    BackEnd::vhost_device_blk_at(snapshot.join(name), &disk, &options).unwrap()
}

#[test]
fn signal_ends_a_wait_for_a_connection() {
    if !has_kvm() {
        return skip("there is no usable /dev/kvm");
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("kernel"), pvh_kernel(LOOP)).unwrap();
    // A queue that one connection has filled, and one in which no process looks.
    let full = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&full, &SocketAddrUnix::new(at("full")).unwrap()).unwrap();
    listen(&full, 0).unwrap();
    let _filled = UnixStream::connect(at("full")).unwrap();
    let _silent = UnixListener::bind(at("silent")).unwrap();
    for (socket, signal) in [("full", libc::SIGTERM), ("silent", libc::SIGINT)] {
        let mut command = Command::new(program("demand-vmm").unwrap());
        command.args(["run", "--memory", "64M", "--serial", "off", "--kernel"]);
        command.arg(at("kernel")).arg("--vhost-user");
        command.arg(format!("blk,socket={}", at(socket).display()));
        let mut vmm = Start::of(&mut command);
        vmm.wait_said(&["device blk0: waiting for the back-end at ", "to negotiate features"]);
        vmm.ended_by(signal);
    }
}

/// The first back-end is stopped while the second is connected, and is then silent when it gets the
/// memory; or it is stopped while the guest runs, and is silent when the last page is present.
#[test]
fn signal_ends_waits_for_a_stopped_back_end() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let folder = tempfile::tempdir().unwrap();
    let mut disks = ["one", "two"].map(|name| back_end(folder.path(), name));
    let sockets = disks.each_ref().map(|disk| disk.socket().to_owned());
    let paths = sockets.each_ref().map(|socket| socket.as_path());
    let Some(snapshot) = TinySnapshot::take(&paths).unwrap() else { return };

    let second = Stopped::all_of(disks[1].process().id()).unwrap();
    let mut vmm = restore(&snapshot, &paths, &[]);
    vmm.wait_said(&["device blk1: waiting for", "to negotiate features"]);
    let first = Stopped::all_of(disks[0].process().id()).unwrap();
    drop(second);
    vmm.wait_said(&["device blk0: waiting for", "to take the memory"]);
    vmm.ended_by(libc::SIGTERM);
    drop(first);

    // 64 MiB in some seconds.
    let mut vmm = restore(&snapshot, &paths, &["--fill", "rate=16M"]);
    snapshot.wait_running();
    let _first = Stopped::all_of(disks[0].process().id()).unwrap();
    vmm.wait_said(&["device blk0: waiting for", "to end post-copy", "check its log"]);
    vmm.ended_by(libc::SIGTERM);
}

/// The rest of the image is not read.
#[test]
fn signal_ends_the_check_of_an_image() {
    let Some(snapshot) = TinySnapshot::take(&[]).unwrap() else { return };
    let image = snapshot.dir().join("memory");
    let Some((file, _guard)) = SlowFile::over(image) else { return };
    file.hold(0..64 << 20);
    let vmm = restore(&snapshot, &[], &["--verify", "--progress"]);
    until("the check reads", || file.waiting() > 0);
    vmm.signal(libc::SIGTERM);
    // Until the signal is taken; the read is not interrupted.
    thread::sleep(Duration::from_millis(300));
    file.answer();
    let (status, said, took) = vmm.end();
    assert!(status.success() && took < SOON, "{status} after {took:?}: {said:?}");
    let read = said.iter().filter(|line| line.starts_with("progress: verify: ")).count();
    assert!(read > 0 && !said.iter().any(|line| line.contains("(100.0 %)")), "{said:?}");
}

#[test]
fn source_limit_ends_reading_before_the_guest() {
    let Some(snapshot) = TinySnapshot::take(&[]).unwrap() else { return };
    let page = snapshot.flip().unwrap();
    let words = [&*format!("offset {page} of"), "the source had 1 s for it", "--source-limit"];
    let mut command = snapshot.restore(&[]).unwrap();
    command.args(["--lazy", "off", "--source-limit", "1", "--serial", "off"]);
    // One warning for each of the first attempts, and then the error.
    command.args(["--log-level", "off"]);
    let begun = Instant::now();
    refused(&mut command, FAILED, &words);
    assert!((Duration::from_secs(1)..SOON).contains(&begun.elapsed()), "{:?}", begun.elapsed());

    // Without a limit it waits, and a signal ends the wait at once.
    let mut vmm = restore(&snapshot, &[], &["--lazy", "off"]);
    vmm.wait_said(&[words[0]]);
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(vmm.vmm.try_wait().unwrap(), None);
    let begun = Instant::now();
    vmm.ended_by(libc::SIGTERM);
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[test]
fn source_limit_ends_a_read_without_answer() {
    let Some(snapshot) = TinySnapshot::take(&[]).unwrap() else { return };
    let image = snapshot.dir().join("memory");
    let Some((file, _guard)) = SlowFile::over(image) else { return };
    file.hold(START..START + 4096);
    let mut vmm = restore(&snapshot, &[], &["--lazy", "off", "--source-limit", "2"]);
    vmm.wait_said(&["demand-vmm: ", "no answer for ", "the source had 2 s for it"]);
    // The kernel does not interrupt the read.
    drop(file);
    assert_eq!(vmm.end().0.code(), Some(FAILED));
}

/// From the source's first failure to the guest's end, as a client sees them.
#[test]
fn events_of_a_failing_source() {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let Some(snapshot) = TinySnapshot::take(&[]).unwrap() else { return };
    let image = snapshot.dir().join("memory");
    let Some((file, _guard)) = SlowFile::over(image.clone()) else { return };
    file.fail(START..START + 4096);
    let vmm = restore(&snapshot, &[], &["--fill", "off", "--source-limit", "1"]);
    let api = snapshot.api();
    until("the API is served", || api.status().is_ok());
    let mut events = api.events().unwrap();
    let mut next = |wanted: &str| {
        let event = events.next_event().unwrap().unwrap_or_else(|| panic!("no event {wanted}"));
        let json = serde_json::to_value(&event.kind).unwrap();
        assert_eq!(json["event"], wanted, "{event:?}");
        event.kind
    };
    let words = format!("cannot read 4096 bytes at offset {START} of {}", image.display());
    next("restoring");
    next("running");
    let EventKind::SourceFailing { error } = next("source_failing") else { unreachable!() };
    assert!(error.starts_with(&words), "{error}, and not: {words}");
    let EventKind::Paused { reason, error } = next("paused") else { unreachable!() };
    let error = error.unwrap();
    assert!(reason == PauseReason::Source && error.starts_with(&words), "{reason:?}: {error}");
    file.recover();
    next("source_back");
    api.resume().unwrap();
    next("resumed");
    api.shutdown().unwrap();
    assert_eq!(next("ended"), EventKind::Ended { status: 0, error: None });
    assert!(events.next_event().unwrap().is_none());
    assert!(vmm.end().0.success());
}
