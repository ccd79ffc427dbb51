// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VMM's log: its level, its file, and what it says of a back-end that does not answer.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use demand_tests::backend::{BackEnd, BlkOptions};
use demand_tests::host::{has_kvm, skip};
use demand_tests::process::{Guarded, program, run};
use demand_tests::refusal::{FAILED, refused};
use demand_tests::tiny_kernel::{LOOP, pvh_kernel};
use demand_vmm::api::client::Client;
use test_support::wait::until;

/// Resets the machine with register 0xcf9: the run ends after a series of quick resets.
const RESET: &[u8] = &[0xb0, 0x06, 0x66, 0xba, 0xf9, 0x0c, 0xee, 0xeb, 0xfe];

/// Returns a command that runs a guest which resets itself until the VMM ends it, with a disk.
fn with_disk(folder: &Path) -> Command {
    running(RESET, folder)
}

/// Returns a command that runs a guest of these instructions, with a disk.
fn running(code: &[u8], folder: &Path) -> Command {
    let at = |name: &str| folder.join(name);
    fs::write(at("kernel"), pvh_kernel(code)).unwrap();
    let mut command = Command::new(program("demand-vmm").unwrap());
    command.args(["run", "--memory", "64M", "--serial", "off", "--kernel"]).arg(at("kernel"));
    command.arg("--api-socket").arg(at("api.sock"));
    command.arg("--vhost-user").arg(format!("blk,socket={}", at("blk.sock").display()));
    command
}

fn back_end(folder: &Path) -> BackEnd {
    fs::File::create(folder.join("disk")).unwrap().set_len(1 << 20).unwrap();
    let options = BlkOptions { queues: 1, queue_size: 256, postcopy: true };
    BackEnd::vhost_device_blk_at(folder.join("blk.sock"), &folder.join("disk"), &options).unwrap()
}

/// The file is appended to, and standard error has only the error that ends the VM.
#[test]
fn log_file_has_times_and_levels() {
    if !has_kvm() {
        return skip("there is no usable /dev/kvm");
    }
    let folder = tempfile::tempdir().unwrap();
    let _back_end = back_end(folder.path());
    let log = folder.path().join("vmm.log");
    fs::write(&log, "of another run\n").unwrap();
    let mut command = with_disk(folder.path());
    let output = run(command.arg("--log-file").arg(&log), Duration::from_secs(60)).unwrap();
    let said = output.stderr;
    assert!(said.starts_with("demand-vmm: ") && said.lines().count() == 1, "{said}");
    let text = fs::read_to_string(&log).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], "of another run");
    for line in &lines[1..] {
        let bytes = line.as_bytes();
        assert!(line.starts_with("[20") && bytes[11] == b'T' && bytes[27] == b'Z', "{line}");
    }
    for (level, words) in [
        (" INFO ", "device blk0: connected to "),
        (" INFO ", "queues: 1 of 256; features: "),
        (" INFO ", "the back-end shares the guest's memory"),
        (" INFO ", "booting /"),
        (" INFO ", "VM: 64M of shmem, engine none, 1 vCPUs"),
        (" INFO ", "api: listening on /"),
        (" INFO ", "the guest runs"),
        (" INFO ", "the VM has ended, with status 1"),
        (" WARN ", "the guest reset itself"),
        (" ERROR ", "the guest reset itself 10 times"),
    ] {
        let found = lines.iter().any(|line| line.contains(level) && line.contains(words));
        assert!(found, "no line {level}{words}: {text}");
    }
}

#[test]
fn verbose_logs_on_standard_error() {
    if !has_kvm() {
        return skip("there is no usable /dev/kvm");
    }
    let folder = tempfile::tempdir().unwrap();
    let _back_end = back_end(folder.path());
    for (options, lowest) in [
        (&[][..], "WARN"),
        (&["-v"], "INFO"),
        (&["--log-level", "info"], "INFO"),
        (&["--log-level", "error"], "demand-vmm"),
    ] {
        let mut command = with_disk(folder.path());
        command.args(options).env_remove("RUST_LOG");
        let said = run(&mut command, Duration::from_secs(60)).unwrap().stderr;
        let last = said.lines().last().unwrap();
        assert!(last.starts_with("demand-vmm: "), "{options:?}: {said}");
        let has = |level: &str| said.lines().any(|line| line.contains(level));
        assert_eq!(has(" INFO "), lowest == "INFO", "{options:?}: {said}");
        assert_eq!(has(" WARN "), lowest != "demand-vmm", "{options:?}: {said}");
    }
}

#[test]
fn life_of_a_vm_is_logged() {
    if !has_kvm() {
        return skip("there is no usable /dev/kvm");
    }
    let folder = tempfile::tempdir().unwrap();
    let _back_end = back_end(folder.path());
    let mut command = running(LOOP, folder.path());
    command.arg("-v").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut vmm = Guarded::spawn(&mut command).unwrap();
    let mut lines = BufReader::new(vmm.child().stderr.take().unwrap()).lines();
    let mut wait_for = |words: &str| {
        let found = lines.find(|line| line.as_ref().unwrap().contains(words));
        assert!(found.is_some(), "no line in its place: {words}");
    };
    wait_for("the guest runs");
    let api = Client::new(folder.path().join("api.sock"));
    // The start may not be over yet.
    until("it can be paused", || api.pause().is_ok());
    wait_for("the VM is paused");
    until("it can be resumed", || api.resume().is_ok());
    wait_for("the VM is resumed");
    api.shutdown().unwrap();
    wait_for("the VM has ended, with status 0");
    wait_for("device blk0: disconnected from ");
    assert!(vmm.wait(Duration::from_secs(20)).unwrap().success());
}

#[test]
fn unusable_log_file_is_refused() {
    let mut command = Command::new(program("demand-vmm").unwrap());
    command.args(["probe", "--log-file", "/nowhere/vmm.log"]);
    refused(&mut command, FAILED, &["cannot write the log to /nowhere/vmm.log", "writable file"]);
}

#[test]
fn log_does_not_alter_an_input() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = with_disk(folder.path());
    let kernel = folder.path().join("kernel");
    let before = fs::read(&kernel).unwrap();
    let words = ["--log-file", "kernel", "is the input"];
    refused(command.arg("--log-file").arg(&kernel), FAILED, &words);
    assert!(fs::read(&kernel).unwrap() == before, "the kernel has a line of the log");
}

/// A back-end that serves another front-end accepts no connection, but the kernel does.
#[test]
fn silent_back_end_is_named_soon() {
    if !has_kvm() {
        return skip("there is no usable /dev/kvm");
    }
    let folder = tempfile::tempdir().unwrap();
    let _listener = UnixListener::bind(folder.path().join("blk.sock")).unwrap();
    let mut command = with_disk(folder.path());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut vmm = Guarded::spawn(&mut command).unwrap();
    let mut line = String::new();
    BufReader::new(vmm.child().stderr.take().unwrap()).read_line(&mut line).unwrap();
    for words in ["device blk0: waiting for the back-end at ", "blk.sock", "another front-end"] {
        assert!(line.contains(words), "{line}");
    }
    assert!(vmm.try_wait().unwrap().is_none(), "it waits: {line}");
}
