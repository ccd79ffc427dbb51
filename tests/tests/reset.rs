// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that requests a reset boots again, in the same VM.

use std::fs::{self, File};
use std::io::Write;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use demand_tests::host::{has_kvm, skip};
use demand_tests::linux_vm::{DiskOption, Guest, GuestConfig, Kernel};
use demand_tests::process::{Guarded, program};
use demand_tests::tiny_kernel::pvh_kernel;
use demand_vmm::api::client::Client;
use demand_vmm::api::{Go, SnapshotRequest, State};
use demand_vmm::arch::layout::{RESET, RESET_VALUE};
use guest_work::Work;
use test_support::fuse::SlowFile;
use test_support::wait::until;

/// With the same devices; also in a restored guest whose memory is partly missing.
#[test]
fn a_reset_begins_anew() {
    let Some(kernel) = Kernel::lab() else { return };
    begins_anew(&kernel).unwrap_or_else(|error| panic!("{error:#}"));
}

fn begins_anew(kernel: &Kernel) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    std::fs::File::create(at("disk"))?.set_len(64 << 20)?;
    let mut config = GuestConfig {
        cpus: 2,
        memory: "size=192M".into(),
        disks: vec![DiskOption::new(at("disk"))],
        ..GuestConfig::default()
    };
    let mut guest = Guest::boot(&at("first"), kernel, &Work::Idle, &config)?;
    guest.wait_ready()?;
    guest.type_line("reset")?;
    assert_eq!(guest.wait_ready()?, 2);
    guest.snapshot(&at("snapshot"), Some(Go::Pause))?;
    guest.kill();
    config.memory = String::new();
    config.more = vec!["--fill".into(), "off".into()];
    let mut guest = Guest::restore(&at("second"), &at("snapshot"), &config)?;
    // The kernel comes from the snapshot, even if that is removed.
    let due = Instant::now() + Duration::from_secs(60);
    while guest.api().status().map_or(true, |status| status.state == State::Starting) {
        ensure!(Instant::now() < due, "it does not begin; {}", guest.story());
        std::thread::sleep(Duration::from_millis(20));
    }
    std::fs::remove_dir_all(at("snapshot"))?;
    guest.type_line("reset")?;
    assert_eq!(guest.wait_ready()?, 2);
    guest.api().shutdown()?;
    guest.ended()?;
    Ok(())
}

#[test]
fn storage_server() {
    test_support::fuse::serve();
}

/// Code that says "b" on the serial port, waits for a byte there, and resets the machine.
fn reset_on_input() -> Vec<u8> {
    let [reset_low, reset_high] = RESET.to_le_bytes();
    [
        // mov dx, 0x3f8; mov al, 'b'; out dx, al
        &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'b', 0xee][..],
        // mov dx, 0x3fd; in al, dx; test al, 1; jz (to the in)
        &[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 1, 0x74, 0xfb],
        // mov dx, 0x3f8; in al, dx
        &[0x66, 0xba, 0xf8, 0x03, 0xec],
        // mov dx, RESET; mov al, RESET_VALUE; out dx, al; jmp here
        &[0x66, 0xba, reset_low, reset_high, 0xb0, RESET_VALUE, 0xee, 0xeb, 0xfe],
    ]
    .concat()
}

/// The saved state holds no request for a reset: a guest restored from it would wait forever for
/// the reset that it has asked for.
#[test]
fn snapshot_loses_no_pending_reset() {
    if !has_kvm() {
        return skip("there is no usable /dev/kvm");
    }
    let kernel = pvh_kernel(&reset_on_input());
    let Some(file) = SlowFile::new(&kernel) else { return };
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut command = Command::new(program("demand-vmm").unwrap());
    command.args(["run", "--memory", "size=64M", "--kernel"]).arg(file.path());
    command.arg("--api-socket").arg(at("api.sock")).stdin(Stdio::piped());
    command.stdout(File::create(at("console")).unwrap());
    let mut vmm = Guarded::spawn(&mut command).unwrap();
    let _guard = file.answer_at_the_end();
    let beginnings =
        || fs::read(at("console")).unwrap().iter().filter(|byte| **byte == b'b').count();
    until("the guest begins", || beginnings() == 1);
    // Both the reset and the snapshot read the kernel before they stop the guest.
    file.hold(0..kernel.len() as u64);
    vmm.child().stdin.as_mut().unwrap().write_all(b"r").unwrap();
    until("the reset is pending", || file.waiting() == 1);
    let take = |name: &str| {
        let request = SnapshotRequest { destination: at(name), then: None };
        Client::new(at("api.sock")).snapshot(&request, |_| {})
    };
    let taken = thread::scope(|scope| {
        let snapshot = scope.spawn(|| take("early"));
        until("the snapshot is under way", || file.waiting() == 2);
        file.answer();
        snapshot.join().unwrap()
    });
    let error = taken.expect_err("a snapshot was taken without the reset").to_string();
    assert!(error.contains("the guest is resetting itself; retry"), "{error}");
    assert!(!at("early").exists());
    until("the guest begins anew", || beginnings() == 2);
    // The guest may begin a moment before the reset is done.
    until("the reset is done", || match take("later") {
        Err(error) if error.to_string().contains("is in progress; retry") => false,
        taken => taken.map(|_| true).unwrap(),
    });
    Client::new(at("api.sock")).shutdown().unwrap();
    assert!(vmm.wait(Duration::from_secs(20)).unwrap().success());
}
