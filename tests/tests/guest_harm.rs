// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests that try to harm the VMM by writing to a device's registers as fast as they can.

use std::fs;
use std::io::{PipeReader, Read, pipe};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use demand_tests::backend::{BackEnd, BlkOptions};
use demand_tests::host::{has_kvm, skip};
use demand_tests::process::{Guarded, Stopped, program};
use demand_tests::tiny_kernel::{pvh_kernel, register_writer};
use demand_vmm::api::client::Client;
use tempfile::TempDir;
use test_support::wait::until;

/// Offsets of registers (virtio 1.2, section 4.2.2).
const STATUS: u8 = 0x70;
const FEATURES: u8 = 0x20;
const FEATURES_SELECT: u8 = 0x24;

/// Resets the device and marks it as failed; and a write of one byte, which no register accepts.
const GIVE_UP: &[(u8, u32, bool)] = &[(STATUS, 0, true), (STATUS, 0x80, true), (STATUS, 0, false)];

/// Starts the device without queues, and resets it.
const START: &[(u8, u32, bool)] = &[
    (STATUS, 0, true),
    (STATUS, 3, true),
    (FEATURES_SELECT, 1, true),
    (FEATURES, 1, true),
    (STATUS, 11, true),
    (STATUS, 15, true),
];

/// More messages than a pipe and the log's queue can hold.
const FLOOD: u64 = 8_000;

/// A VM whose guest writes to registers, with a standard error that is not read.
struct Writer {
    vmm: Guarded,
    back_end: BackEnd,
    stderr: PipeReader,
    folder: TempDir,
}

impl Writer {
    fn start(writes: &[(u8, u32, bool)], log: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("kernel"), pvh_kernel(&register_writer(writes))).unwrap();
        fs::File::create(at("disk")).unwrap().set_len(1 << 20).unwrap();
        let options = BlkOptions { queues: 1, queue_size: 256, postcopy: true };
        let back_end = BackEnd::vhost_device_blk_at(at("blk.sock"), &at("disk"), &options).unwrap();
        let (stderr, theirs) = pipe().unwrap();
        let mut command = Command::new(program("demand-vmm").unwrap());
        command.args(["run", "--memory", "size=64M", "--kernel"]).arg(at("kernel"));
        command.arg("--vhost-user").arg(format!("blk,socket={}", at("blk.sock").display()));
        command.arg("--serial").arg(format!("file={}", at("console").display()));
        command.arg("--api-socket").arg(at("api.sock")).env("RUST_LOG", log);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(theirs);
        let vmm = Guarded::spawn(&mut command).unwrap();
        Writer { vmm, back_end, stderr, folder }
    }

    fn api(&self) -> Client {
        Client::new(self.folder.path().join("api.sock"))
    }

    /// Returns a lower bound of the number of rounds that the guest has made.
    fn rounds(&self) -> u64 {
        fs::metadata(self.folder.path().join("console")).map_or(0, |file| file.len() * 256)
    }

    /// Shuts the VM down; returns everything that it has written to standard error.
    fn end(mut self) -> String {
        self.api().shutdown().unwrap();
        let status = self.vmm.wait(Duration::from_secs(20)).unwrap();
        assert!(status.success(), "{status}");
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).unwrap();
        drop(self.back_end);
        said
    }
}

#[test]
fn a_flood_of_warnings_is_bounded() {
    if !has_kvm() {
        return skip("there is no usable /dev/kvm");
    }
    let vm = Writer::start(GIVE_UP, "warn");
    until("the guest makes its rounds", || vm.rounds() >= FLOOD);
    let said = vm.end();
    let lines = said.lines().filter(|line| line.contains("has set the status bit FAILED")).count();
    assert!((20..200).contains(&lines), "{lines} lines: {said:.3000}");
    let last = said.lines().last().unwrap();
    assert!(last.contains("left out") && last.contains("blk0"), "{last}");
}

#[test]
fn an_unread_log_holds_up_no_vcpu() {
    if !has_kvm() {
        return skip("there is no usable /dev/kvm");
    }
    // Each round logs two lines.
    let vm = Writer::start(GIVE_UP, "debug");
    until("the guest makes its rounds", || vm.rounds() >= FLOOD);
    // A pause, a resume and the shutdown are not delayed either.
    vm.api().pause().unwrap();
    vm.api().resume().unwrap();
    let rounds = vm.rounds();
    until("the guest goes on", || vm.rounds() > rounds);
    // The capacity of a pipe.
    let said = vm.end();
    assert!(said.len() <= 64 << 10, "{} bytes", said.len());
}

#[test]
fn pause_error_names_the_unresponsive_back_end() {
    if !has_kvm() {
        return skip("there is no usable /dev/kvm");
    }
    let mut vm = Writer::start(START, "warn");
    until("the guest makes its rounds", || vm.rounds() > 0);
    let stopped = Stopped::all_of(vm.back_end.process().id()).unwrap();
    until("the guest waits", || {
        let rounds = vm.rounds();
        thread::sleep(Duration::from_millis(300));
        vm.rounds() == rounds
    });
    let error = vm.api().pause().unwrap_err().to_string();
    for words in ["vCPU 0 did not stop", "device blk0 waits for its back-end at", "blk.sock"] {
        assert!(error.contains(words), "{error}");
    }
    drop(stopped);
    // It continues, as it would have without the pause.
    let rounds = vm.rounds();
    until("the guest goes on", || vm.rounds() > rounds);
    vm.api().pause().unwrap();
    vm.end();
}
