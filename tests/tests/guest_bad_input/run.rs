// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `run` with a file that is not a kernel, or with a kernel that does not fit the other options.

use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use demand_tests::host::{has_kvm, skip};
use demand_tests::linux_vm::Kernel;
use demand_tests::process::{self, program};
use demand_tests::refusal::{FAILED, HOST, Refusals, USAGE};
use demand_tests::tiny_kernel::{plain_elf, pvh_kernel};

/// Time limit for a guest to end.
const PATIENCE: Duration = Duration::from_secs(120);

/// Returns `demand-vmm run` of a kernel.
fn run(memory: &str, kernel: &Path) -> Command {
    let mut command = Command::new(program("demand-vmm").unwrap());
    command.args(["run", "--memory", &format!("size={memory}")]).arg("--kernel").arg(kernel);
    command
}

/// An invalid instruction. Without an interrupt table it causes a triple fault.
const CRASH: &[u8] = &[0x0f, 0x0b];

/// A guest that crashes again and again ends with an error.
#[test]
fn repeated_crashes_end_the_run() {
    if !has_kvm() {
        return skip("there is no usable /dev/kvm");
    }
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    fs::write(&kernel, pvh_kernel(CRASH)).unwrap();
    let output = process::run(&mut run("64M", &kernel), PATIENCE).unwrap();
    assert_eq!(output.status.code(), Some(FAILED), "{output:?}");
    assert!(output.stderr.contains("restarting it"), "{output:?}");
    let last = output.stderr.trim_end().lines().last().unwrap();
    assert!(last.contains("reset itself 10 times") && last.contains("check that"), "{last}");
}

/// Needs no kernel, and often no KVM.
#[test]
fn files_other_than_kernels_are_refused() {
    if !has_kvm() {
        return skip("there is no usable /dev/kvm");
    }
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let random: Vec<u8> =
        (0..100_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let noisy = |at: usize, header: &[u8]| {
        let mut bytes = random.clone();
        bytes[at..at + header.len()].copy_from_slice(header);
        bytes
    };
    const KINDS: &str = "name a bzImage, or an ELF vmlinux with a PVH entry";
    let mut refusals = Refusals::new();
    for (case, kernel, words) in [
        ("no kernel", PathBuf::from("/nowhere/vmlinux"), &["No such file", "readable file"][..]),
        ("a folder", folder.path().into(), &["is not a regular file"]),
        ("a pipe", pipe, &["is not a regular file"]),
        ("a device", "/dev/zero".into(), &["is not a regular file"]),
        ("an empty file", file("empty", b""), &[KINDS]),
        ("three bytes", file("three", b"\x7fEL"), &[KINDS]),
        ("noise", file("noise", &random), &["neither a bzImage nor an ELF file", KINDS]),
        // More than the guest has memory, which would not help.
        (
            "much noise",
            file("much", &random.repeat(700)),
            &["neither a bzImage nor an ELF file", KINDS],
        ),
        ("an ELF header in noise", file("elf", &noisy(0, b"\x7fELF\x02\x01\x01")), &[KINDS]),
        (
            "a bzImage's header in noise",
            file("bzimage", &noisy(0x1fe, b"\x55\xaa..HdrS")),
            &["it is damaged", KINDS],
        ),
        ("a text", file("text", &b"#!/bin/sh\n".repeat(1000)), &[KINDS]),
        ("an ELF header", file("header", b"\x7fELF\x02\x01\x01"), &[KINDS]),
        ("a program", program("demand-vmm").unwrap(), &[KINDS]),
        (
            "ELF without PVH",
            file("plain", &plain_elf()),
            &["an ELF file without a PVH entry", KINDS],
        ),
    ] {
        let path = kernel.to_str().unwrap();
        let words = [words, &["load the kernel", path]].concat();
        refusals.check(case, &mut run("64M", &kernel), FAILED, &words);
    }
    refusals.end();
}

#[test]
fn impossible_options_are_refused() {
    let kernel = Path::new("/nowhere/vmlinux");
    let folder = tempfile::tempdir().unwrap();
    let taken = folder.path().join("taken.sock");
    let _listener = UnixListener::bind(&taken).unwrap();
    let disk = ["--vhost-user", "blk,socket=/nowhere/blk.sock"];
    let mut refusals = Refusals::new();
    for (case, memory, arguments, words) in [
        ("no CPUs", "64M", &["--cpus", "0"][..], &["--cpus: 0 vCPUs", "1 to 16"][..]),
        ("17 CPUs", "64M", &["--cpus", "17"], &["--cpus: 17", "1 to 16"]),
        ("CPUs below nothing", "64M", &["--cpus=-1"], &["--cpus", "-1"]),
        ("half a page of memory", "2048", &[], &["--memory", "multiple"]),
        ("half a huge page", "3M,backing=hugetlb-2m", &[], &["--memory", "multiple"]),
        ("more memory than numbers", "99999999999T", &[], &["--memory", "is not a size"]),
        ("17 devices", "64M", &disk.repeat(17), &["17 devices", "room for 16"]),
        ("an unknown device", "64M", &["--vhost-user", "gpu,socket=x"], &["gpu"]),
        (
            "an unknown serial port",
            "64M",
            &["--serial", "com1"],
            &["--serial", "tty, file=PATH or off"],
        ),
        ("a file without a name", "64M", &["--serial", "file="], &["--serial", "file=PATH"]),
        ("a kernel and a source", "64M", &["--source", "x"], &["--source"]),
        ("a limit of no source", "64M", &["--source-limit", "1"], &["--source"]),
    ] {
        refusals.check(case, run(memory, kernel).args(arguments), USAGE, words);
    }
    let mut without = Command::new(program("demand-vmm").unwrap());
    without.args(["run", "--memory", "size=64M", "--initramfs", "x"]);
    refusals.check("an initramfs alone", &mut without, USAGE, &["--kernel"]);
    refusals.end();

    if !has_kvm() {
        return skip("there is no usable /dev/kvm");
    }
    let mut refusals = Refusals::new();
    refusals.check("1M of memory", &mut run("1M", kernel), USAGE, &["--memory", "64M"]);
    refusals.check("a page of memory", &mut run("4K", kernel), USAGE, &["--memory", "64M"]);
    let words = ["--memory", "bits of physical address"];
    refusals.check("more than there are addresses", &mut run("8192T", kernel), HOST, &words);
    refusals.check(
        "a socket with a long path",
        run("64M", kernel).arg("--vhost-user").arg(format!("blk,socket=/tmp/{}", "x".repeat(107))),
        FAILED,
        &["longer than a socket's limit of 107 bytes", "use a shorter one"],
    );
    refusals.check(
        "nobody listens",
        run("64M", kernel).args(disk),
        FAILED,
        &["device blk0", "/nowhere/blk.sock", "start the back-end first"],
    );
    for option in ["--report", "--timeline"] {
        let mut command = run("64M", kernel);
        command.args([option, "/nowhere/file"]);
        refusals.check(option, &mut command, FAILED, &["/nowhere/file", "name a writable file"]);
    }
    refusals.end();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn unfit_boot_files_and_options_are_refused() {
    let Some(kernel) = Kernel::lab() else { return };
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut refusals = Refusals::new();
    let bytes = fs::read(&kernel.image).unwrap();
    fs::write(at("half"), &bytes[..bytes.len() / 2]).unwrap();
    refusals.check(
        "half a kernel",
        &mut run("128M", &at("half")),
        FAILED,
        &["is truncated", "half"],
    );
    for memory in ["2M", "16M"] {
        let mut command = run(memory, &kernel.image);
        let words = ["load the kernel", "--memory"];
        refusals.check(&format!("{memory} of memory"), &mut command, FAILED, &words);
    }

    let Some(elf) = Kernel::lab_elf() else { return };
    let mut small = run("16M", &elf.image);
    let words = ["load the kernel", "does not fit", "--memory"];
    refusals.check("16M of memory for ELF", &mut small, FAILED, &words);
    let bytes = fs::read(&elf.image).unwrap();
    // (The last part is for debuggers.)
    fs::write(at("half-elf"), &bytes[..4 << 20]).unwrap();
    let words = ["is missing from the file", "another copy"];
    refusals.check("half an ELF kernel", &mut run("256M", &at("half-elf")), FAILED, &words);

    fs::create_dir(at("directory")).unwrap();
    File::create(at("empty")).unwrap();
    File::create(at("huge")).unwrap().set_len(1 << 30).unwrap();
    File::create(at("endless")).unwrap().set_len(1 << 50).unwrap();
    assert!(Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
    for (name, words) in [
        ("none", &["No such file"][..]),
        ("empty", &["it is empty"]),
        ("huge", &["1073741824 bytes", "do not fit", "--memory"]),
        ("endless", &["more than 2147483648 bytes"]),
        ("pipe", &["is not a regular file"]),
        ("directory", &["is not a regular file"]),
    ] {
        let mut command = run("128M", &kernel.image);
        command.arg("--initramfs").arg(at(name));
        let path = at(name);
        let words = [words, &["load the initramfs", path.to_str().unwrap()]].concat();
        refusals.check(&format!("initramfs {name}"), &mut command, FAILED, &words);
    }

    for (case, line, words) in [
        ("a long command line", "x".repeat(3000), &["--cmdline", "3000 bytes", "at most"][..]),
        ("a longer one", "x".repeat(100_000), &["--cmdline", "at most"]),
        ("one of two lines", "a\nb".into(), &["--cmdline", "printable ASCII"]),
        ("one with an ä", "ä".into(), &["--cmdline", "printable ASCII"]),
    ] {
        let mut command = run("128M", &kernel.image);
        command.args(["--cmdline", &line]);
        refusals.check(case, &mut command, USAGE, words);
    }

    let listener = UnixListener::bind(at("taken")).unwrap();
    fs::write(at("precious"), "precious").unwrap();
    let long = "a".repeat(120);
    for (case, name, words) in [
        ("an API where somebody listens", "taken", &["another process listens on it"][..]),
        ("an API over a file", "precious", &["not a socket", "another path"]),
        ("an API in nowhere", "no/where", &["name an existing folder"]),
        ("an API with a long path", &long, &["107 bytes"]),
    ] {
        let mut command = run("128M", &kernel.image);
        command.arg("--api-socket").arg(at(name));
        refusals.check(case, &mut command, FAILED, &[words, &["API socket"]].concat());
    }
    drop(listener);
    assert_eq!(fs::read_to_string(at("precious")).unwrap(), "precious");
    refusals.end();
}
