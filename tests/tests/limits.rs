// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Process limits that are too low: each is named, and no signal ends a process.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use demand_tests::host::{has_kvm, skip};
use demand_tests::process::{program, run};
use demand_tests::refusal::{HOST, Refusals};
use demand_tests::sandbox::{Device, for_everybody, is_root, with_devices, with_limit};
use demand_tests::tiny_kernel::pvh_kernel;

/// A freshly copied program cannot be executed while a process that is being started inherits this
/// process's open descriptor of the copy. So only one test runs at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The value that turns the machine off: the sleep type S5, and the bit that starts the transition.
const OFF: u8 = 5 << 2 | 1 << 5;

/// Creates a kernel that turns the machine off through ACPI's register.
fn off(folder: &Path) -> PathBuf {
    let port = demand_vmm::arch::layout::POWER;
    // mov dx, port; mov al, value; out dx, al; jmp here
    let code = [0x66, 0xba, port as u8, (port >> 8) as u8, 0xb0, OFF, 0xee, 0xeb, 0xfe];
    let kernel = folder.join("kernel");
    fs::write(&kernel, pvh_kernel(&code)).unwrap();
    kernel
}

fn vmm(program: &Path, kernel: &Path) -> Command {
    vmm_of("size=64M", program, kernel)
}

fn vmm_of(memory: &str, program: &Path, kernel: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["run", "--memory", memory, "--serial", "off", "--kernel"]).arg(kernel);
    command
}

#[test]
fn insufficient_limit_is_named() {
    let _alone = alone();
    if !has_kvm() {
        return skip("there is no usable /dev/kvm");
    }
    let folder = tempfile::tempdir().unwrap();
    let kernel = off(folder.path());
    let program = program("demand-vmm").unwrap();
    // It runs without a limit.
    let output = run(&mut vmm(&program, &kernel), Duration::from_secs(60)).unwrap();
    assert!(output.status.success(), "{output:?}");
    let mut refusals = Refusals::new();
    let mut refused = |case: &str, resource, most, words: &[&str]| {
        let mut command = vmm(&program, &kernel);
        with_limit(&mut command, resource, most);
        refusals.check(case, &mut command, HOST, words);
    };
    for most in [4, 5, 6, 7, 8, 10, 12, 14, 16] {
        let words = ["Too many open files", &format!("may have {most} files"), "(ulimit -n)"];
        refused(&format!("{most} open files"), libc::RLIMIT_NOFILE, most, &words);
    }
    let words = ["File too large", "may have 1000000 bytes", "(ulimit -f)"];
    refused("files that are small", libc::RLIMIT_FSIZE, 1_000_000, &words);
    let words = ["Cannot allocate memory", "address space, 200000000 bytes (ulimit -v)"];
    // 64 MiB may just fit.
    let mut command = vmm_of("size=256M", &program, &kernel);
    with_limit(&mut command, libc::RLIMIT_AS, 200_000_000);
    refusals.check("a small address space", &mut command, HOST, &words);
    refusals.end();
}

#[test]
fn thread_limit_of_the_user_is_named() {
    let _alone = alone();
    let kvm = Device::of_machine(c"/dev/kvm", 0o666);
    let (Some(kvm), true) = (kvm.filter(|_| has_kvm()), is_root()) else {
        return skip("it takes root and a usable /dev/kvm");
    };
    let folder = tempfile::tempdir().unwrap();
    let kernel = off(folder.path());
    let program = for_everybody("demand-vmm", folder.path()).unwrap();
    let mut refusals = Refusals::new();
    // A user without other processes: the limit counts all threads of a user.
    for most in [1, 3] {
        let mut command = vmm(&program, &kernel);
        with_limit(&mut command, libc::RLIMIT_NPROC, most);
        with_devices(&mut command, vec![kvm], Some(54_321));
        let words = ["start a ", &format!("may have {most} threads (ulimit -u)")];
        refusals.check(&format!("{most} threads"), &mut command, HOST, &words);
    }
    refusals.end();
}

#[test]
fn disk_beyond_the_limits_is_refused() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    File::create(at("disk")).unwrap().set_len(2 << 20).unwrap();
    let mut refusals = Refusals::new();
    for (case, resource, most, words) in [
        ("small files", libc::RLIMIT_FSIZE, 1 << 20, ["--blk-file", "have 1048576", "(ulimit -f)"]),
        ("4 open files", libc::RLIMIT_NOFILE, 4, ["--blk-file", "Too many open", "(ulimit -n)"]),
        ("5 open files", libc::RLIMIT_NOFILE, 5, ["--socket-path", "Too many open", "(ulimit -n)"]),
    ] {
        let mut command = Command::new(program("vhost-device-blk").unwrap());
        command.arg("--socket-path").arg(at("blk.sock")).arg("--blk-file").arg(at("disk"));
        // (It would warn of the few files, too.)
        command.args(["--postcopy", "off", "--log-level", "error"]);
        with_limit(&mut command, resource, most);
        refusals.check(case, &mut command, HOST, &words);
    }
    refusals.end();
}
