// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Wrong command lines, and options of `restore` that contradict the snapshot.

use std::fs;
use std::process::Command;

use demand_tests::process::program;
use demand_tests::refusal::{FAILED, Refusals, USAGE};
use demand_vmm::snapshot::dir as snapshot_dir;

use crate::snapshot::{Snapshot, restore_with};

/// Needs no guest.
#[test]
fn invalid_options_are_refused() {
    let mut refusals = Refusals::new();
    for (arguments, words) in [
        (&[][..], &["no command given", "demand-vmm run"][..]),
        (&["run"], &["--memory", "--kernel"]),
        (&["run", "--memory", "size=1G"], &["--kernel"]),
        (&["run", "--memory", "size=1G", "--kernel", "x", "--source", "y"], &["--source"]),
        (&["run", "--memory", "size=1G", "--kernel", "x", "--cpus", "0"], &["--cpus"]),
        (&["run", "--memory", "size=4097", "--kernel", "x"], &["4097"]),
        (&["run", "--memory", "size=1G,backing=paper", "--kernel", "x"], &["--memory", "paper"]),
        (&["run", "--memory", "size=1G", "--kernel", "x", "--engine", "magic"], &["--engine"]),
        (&["run", "--memory", "size=1G", "--kernel", "x", "--fill", "rate=0"], &["--fill", "off"]),
        (&["restore"], &["--source"]),
        (&["restore", "--source", "x", "--cpus", "two"], &["--cpus"]),
        (&["restore", "--source", "x", "--memory", "size=1Q"], &["--memory", "size=1Q"]),
        (&["restore", "--source", "x", "--memory", "backing=paper"], &["--memory", "paper"]),
        (&["restore", "--source", "x", "--engine", "magic"], &["--engine", "magic"]),
        (&["restore", "--source", "x", "--lazy", "no"], &["--lazy", "auto, require, off"]),
        (&["restore", "--source", "x", "--fill", "rate=0"], &["--fill", "off"]),
        (&["restore", "--source", "x", "--cache", "/c"], &["--cache", "size"]),
        (&["restore", "--source", "x", "--cache", "/c,size=1G"], &["--cache", "was not pushed"]),
        (&["restore", "--source", "x", "--serial", "com1"], &["--serial", "tty"]),
        (&["restore", "--source", "x", "--source-limit", "-1"], &["-1"]),
        (&["restore", "--source", "x", "--vhost-user", "blk"], &["socket=PATH"]),
        (&["restore", "--source", "x", "--vhost-user", "fs,socket=y"], &["--vhost-user"]),
        (&["restore", "--source", "x", "--kernel", "y"], &["--kernel"]),
        (&["snapshot", "--api-socket", "x"], &["DIR"]),
        (&["snapshot", "--api-socket", "x", "--then", "fly", "y"], &["--then", "fly"]),
        (&["pause"], &["--api-socket"]),
    ] {
        let mut command = Command::new(program("demand-vmm").unwrap());
        refusals.check(&arguments.join(" "), command.args(arguments), USAGE, words);
    }
    let mut command = Command::new(program("demand-vmm").unwrap());
    command.args(["restore", "--source", "file:///nowhere/vm7", "--cache", "/dev/null,size=1G"]);
    let words = ["cannot use /dev/null as a host cache: it is not a directory"];
    refusals.check("a cache in a device", &mut command, FAILED, &words);
    for (asked, action) in [
        ("status", "read the status"),
        ("pause", "pause"),
        ("resume", "resume"),
        ("shutdown", "shut down"),
        ("events", "read the events"),
        ("boot", "boot a VM"),
    ] {
        let mut command = Command::new(program("demand-vmm").unwrap());
        command.args([asked, "--api-socket", "/nowhere/api.sock"]);
        let words = [&format!("cannot {action}: no VMM listens at /nowhere/api.sock;")[..]];
        refusals.check(asked, &mut command, FAILED, &words);
    }
    refusals.end();
}

/// The line names the file, the place in it, and the fault.
#[test]
fn bad_configuration_is_refused_with_place() {
    let folder = tempfile::tempdir().unwrap();
    let mut refusals = Refusals::new();
    for (command, name, text, words) in [
        ("run", "a.json", "{\n\"memory\": {\"siz\": 1}}", &["line 2", "memory.siz: unknown"][..]),
        ("run", "a.json", "{\"memory\": {\"size\": \"64M\"}}", &["--kernel", "--config"]),
        ("run", "a.json", "{\"kernel\": \"k\"}", &["--memory", "--config"]),
        ("run", "a.json", "{\"kernel\": \"k\", \"memory\": {}}", &["size is missing"]),
        ("restore", "a.json", "{}", &["--source", "--config"]),
        ("restore", "a.toml", "cpus = 1\nkernel = \"k\"\n", &["line 2, column 1: kernel: unknown"]),
        ("restore", "a.toml", "cpus: 1\n", &["line 1, column 7"]),
        ("run", "a.toml", "memory.size = 0\nkernel = \"k\"\n", &["memory: size=0 leaves"]),
        ("run", "a.toml", "cpus = 0\nkernel = \"k\"\nmemory.size = 4096\n", &["1 to 16"]),
    ] {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        let mut demand_vmm = Command::new(program("demand-vmm").unwrap());
        demand_vmm.arg(command).arg("--config").arg(&path);
        refusals.check(text, &mut demand_vmm, USAGE, words);
    }
    let mut demand_vmm = Command::new(program("demand-vmm").unwrap());
    demand_vmm.args(["run", "--config", "/nowhere/vm.json"]);
    refusals.check("no file", &mut demand_vmm, FAILED, &["cannot read", "/nowhere/vm.json"]);
    let mut command = Command::new(program("demand-vmm").unwrap());
    command.args(["status", "--api-socket", &format!("/tmp/{}", "x".repeat(107))]);
    let words = ["longer than a socket's limit of 107 bytes", "give a shorter one"];
    refusals.check("a long path", &mut command, FAILED, &words);
    refusals.end();
}

/// A run's outputs must not be its inputs, and a refused run leaves no output.
#[test]
fn conflicting_outputs_are_refused() {
    let Some(snapshot) = Snapshot::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let old = folder.path().join("old");
    fs::write(&old, "of another run").unwrap();
    let new = folder.path().join("new");
    let (old_name, new_name) = (old.to_str().unwrap(), new.to_str().unwrap());
    let files = snapshot_dir::files(&snapshot.dir());
    let [state, memory, hashes, kernel, _] = files.each_ref().map(|path| path.to_str().unwrap());
    let serial = format!("file={memory}");
    let mut refusals = Refusals::new();
    for (case, arguments, words) in [
        ("the memory", &["--report", memory][..], &["--report", "memory", "is the input"][..]),
        ("the hashes", &["--timeline", hashes], &["--timeline", "hashes", "is the input"]),
        ("the state", &["--timeline", state], &["--timeline", "state", "is the input"]),
        ("the kernel", &["--timeline", kernel], &["--timeline", "kernel", "is the input"]),
        ("the console", &["--serial", &serial], &["--serial", "memory", "is the input"]),
        ("the log", &["--log-file", state], &["--log-file", "state", "is the input"]),
        ("twice", &["--report", new_name, "--timeline", new_name], &["--report writes it"]),
        // The snapshot has a disk, and none is given.
        ("a refusal", &["--report", old_name, "--timeline", new_name], &["has 1 (blk)"]),
    ] {
        let status = if case == "a refusal" { USAGE } else { FAILED };
        let mut command = Command::new(program("demand-vmm").unwrap());
        command.arg("restore").arg("--source").arg(snapshot.dir()).args(arguments);
        refusals.check(case, &mut command, status, words);
    }
    refusals.end();
    assert_eq!(fs::read_to_string(old).unwrap(), "of another run");
    assert!(!new.exists());
    snapshot.assert_unchanged();
}

#[test]
fn options_contradicting_the_snapshot_are_refused() {
    let Some(snapshot) = Snapshot::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let back_end = snapshot.back_end(folder.path(), &crate::snapshot::blk());
    let socket = back_end.socket();
    let device = |kind: &str| format!("{kind},socket={}", socket.display());
    let (blk, net) = (device("blk"), device("net"));
    let seventeen: Vec<_> = (0..17).flat_map(|_| ["--vhost-user", &blk]).collect();
    let one = ["--vhost-user", &blk];
    let mut refusals = Refusals::new();
    for (case, arguments, status, words) in [
        ("other CPUs", &["--cpus", "2"][..], USAGE, &["--cpus: 2", "has 1", "leave"][..]),
        ("no CPUs", &["--cpus", "0"], USAGE, &["--cpus: 0", "has 1"]),
        ("more memory", &["--memory", "size=256M"], USAGE, &["size=268435456", "134217728"]),
        ("less memory", &["--memory", "size=64M"], USAGE, &["size=67108864", "134217728"]),
        ("no memory", &["--memory", "size=0"], USAGE, &["--memory", "134217728"]),
        (
            "a backing that does not divide it",
            &["--memory", "backing=hugetlb-1g"],
            USAGE,
            &["size=134217728", "multiple of the 1073741824 bytes"],
        ),
        (
            "huge pages of huge pages",
            &["--memory", "backing=hugetlb-2m,thp=on"],
            USAGE,
            &["thp=", "leave it out"],
        ),
        ("two devices more", &[one, one].concat(), USAGE, &["3 devices", "has 1 (blk)"]),
        ("more than there can be", &seventeen, USAGE, &["18 devices", "room for 16"]),
        (
            "a report into nowhere",
            &["--report", "/nowhere/report"],
            FAILED,
            &["/nowhere/report", "name a writable file"],
        ),
        (
            "a console into nowhere",
            &["--serial", "file=/nowhere/console"],
            FAILED,
            &["/nowhere/console", "name a writable file"],
        ),
        (
            "an API in nowhere",
            &["--api-socket", "/nowhere/api.sock"],
            FAILED,
            &["/nowhere/api.sock", "name an existing folder"],
        ),
    ] {
        let mut command = restore_with(&snapshot.dir(), socket);
        refusals.check(case, command.args(arguments), status, words);
    }
    let mut without = crate::snapshot::restore(&snapshot.dir());
    refusals.check("no device", &mut without, USAGE, &["0 devices", "has 1 (blk)"]);
    let mut other = crate::snapshot::restore(&snapshot.dir());
    other.args(["--vhost-user", &net]);
    let words = ["of kind blk", "names net", "original order"];
    refusals.check("another kind of device", &mut other, FAILED, &words);
    let mut no_pool = restore_with(&snapshot.dir(), socket);
    no_pool.args(["--engine", "kvm-attributes", "--memory", "backing=hugetlb-1g,size=128M"]);
    refusals.check("all of it at once", &mut no_pool, USAGE, &["multiple"]);
    refusals.end();
    snapshot.assert_unchanged();
    assert!(back_end.accepts());
}
