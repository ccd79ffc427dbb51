// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Altered or missing files of a snapshot.

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::Command;

use demand_source::ImageWriter;
use demand_tests::refusal::{FAILED, Refusals};
use demand_vmm::snapshot::state_file::{OLDEST, VERSION};

use serde_json::json;

use crate::snapshot::{BOOT_FILES, FILES, MEMORY, Snapshot, Spoilt, restore, restore_with, seal};

/// The cause and the hint for an altered state.
const ALTERED: &[&str] = &["altered after it was written", "use another copy"];

/// Returns state files that are truncated, altered, or of another version: description, content,
/// words of the error.
fn spoilt(good: &[u8]) -> Vec<(String, Vec<u8>, &'static [&'static str])> {
    let line = good.iter().position(|byte| *byte == b'\n').unwrap();
    let mut cases = Vec::new();
    let mut cut = |len: usize, words: &'static [&'static str]| {
        cases.push((format!("state cut to {len} bytes"), good[..len].to_vec(), words));
    };
    for len in [0, 1, 18] {
        cut(len, &["not a snapshot", "does not begin with"]);
    }
    for len in [19, 22, line / 2, line] {
        cut(len, &["ends in its first line", "use another copy"]);
    }
    for len in [line + 1, line + 2, (line + good.len()) / 2, good.len() - 1] {
        cut(len, &["is truncated", "use another copy"]);
    }
    cases.push(("state with a byte more".into(), [good, b"x"].concat(), ALTERED));
    // Each word of the header (its version, length, and both sums), and places all over the rest.
    let words = (0..line).filter(|at| good[*at] == b' ').map(|at| at + 1);
    let step = (good.len() - line).div_ceil(12);
    for at in words.chain((line..good.len()).step_by(step)).chain([good.len() - 1]) {
        let mut bytes = good.to_vec();
        bytes[at] ^= 1;
        cases.push((format!("state altered at byte {at}"), bytes, ALTERED));
    }
    let mut bytes = good.to_vec();
    bytes[3] ^= 1;
    cases.push(("state of something else".into(), bytes, &["does not begin with"]));
    let json = &good[line + 1..];
    let newer = &["it has version 3", "use a newer demand-vmm"];
    cases.push(("a newer state".into(), seal(VERSION + 1, json), newer));
    cases.push(("a state of the future".into(), seal(u32::MAX, b"?"), &["use a newer demand-vmm"]));
    let older = &["version 0", "use the demand-vmm that wrote it"];
    cases.push(("an older state".into(), seal(0, json), older));
    for (what, json) in [
        ("nothing", &b""[..]),
        ("null", b"null"),
        ("no JSON", b"\xff\xfe"),
        ("half of a string", b"{\"memory\": \""),
        ("an unknown field", b"{\"mammoth\": 1}"),
    ] {
        cases.push((
            format!("a state that holds {what}"),
            seal(VERSION, json),
            &["is complete, but not"],
        ));
    }
    let deep = "[".repeat(100_000);
    for version in OLDEST..=VERSION {
        let state = seal(version, deep.as_bytes());
        cases.push((
            format!("a deep state of version {version}"),
            state,
            &["is complete, but not"],
        ));
    }
    cases
}

/// Needs no guest: any sealed content serves as a state.
#[test]
fn truncated_or_altered_state_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut refusals = Refusals::new();
    for (case, bytes, words) in spoilt(&seal(VERSION, &br#"{"memory":{"size":1}}"#.repeat(100))) {
        for name in FILES {
            fs::write(folder.path().join(name), &bytes).unwrap();
        }
        let dir = folder.path().to_str().unwrap();
        let words = [words, &[dir]].concat();
        refusals.check(&case, &mut restore(folder.path()), FAILED, &words);
    }
    refusals.end();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), FILES.len());
}

#[test]
fn truncated_or_altered_real_state_is_refused() {
    let Some(snapshot) = Snapshot::get() else { return };
    let mut refusals = Refusals::new();
    let copy = snapshot.copy();
    for (case, bytes, words) in spoilt(&snapshot.read("state")) {
        copy.write("state", &bytes);
        refusals.check(&case, &mut restore(&copy.dir()), FAILED, words);
    }
    refusals.end();
    snapshot.assert_unchanged();
}

#[test]
fn missing_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut refusals = Refusals::new();
    let mut refused = |case: &str, dir: &str, words: &[&str]| {
        refusals.check(case, &mut restore(&at(dir)), FAILED, &[words, &[dir]].concat());
    };
    refused("nothing there", "none", &["No such file", "name the directory of a snapshot"]);
    fs::write(at("file"), "x").unwrap();
    refused("a file", "file", &["it is not a directory"]);
    symlink(at("none"), at("dangling")).unwrap();
    refused("a symbolic link to nothing", "dangling", &["No such file"]);
    for missing in FILES {
        fs::create_dir(at(missing)).unwrap();
        for name in FILES.iter().filter(|name| **name != missing) {
            fs::write(at(missing).join(name), "x").unwrap();
        }
        let words = format!("'{missing}' is missing");
        refused(&format!("no {missing}"), missing, &[&words]);
        let words = format!("'{missing}' is not a regular file");
        fs::create_dir(at(missing).join(missing)).unwrap();
        refused(&format!("a folder for {missing}"), missing, &[&words]);
        fs::remove_dir(at(missing).join(missing)).unwrap();
        // The VMM does not wait for a writer.
        let fifo = Command::new("mkfifo").arg(at(missing).join(missing)).status().unwrap();
        assert!(fifo.success());
        refused(&format!("a pipe for {missing}"), missing, &[&words]);
    }
    refusals.end();
}

#[test]
fn foreign_memory_is_refused() {
    let Some(snapshot) = Snapshot::get() else { return };
    let mut refusals = Refusals::new();
    let copy = snapshot.copy();
    let mut refused = |case: &str, copy: &Spoilt, words: &[&str]| {
        let mut command = restore_with(&copy.dir(), Path::new("/nowhere/blk.sock"));
        refusals.check(case, &mut command, FAILED, words);
    };
    let memory = copy.own("memory");
    for len in [0, 4096, MEMORY - 4096, MEMORY - 1, MEMORY + 1, MEMORY + 4096] {
        memory.set_len(len).unwrap();
        let words = ["the table is for 134217728 bytes", &format!("has {len}"), "one snapshot"];
        refused(&format!("a memory of {len} bytes"), &copy, &words);
    }
    drop(memory);

    // Another snapshot's, which is valid by itself.
    for (case, size, generation) in
        [("another snapshot's memory", MEMORY, [7; 16]), ("a smaller guest's", MEMORY / 2, [8; 16])]
    {
        let copy = snapshot.copy();
        copy.remove("memory");
        copy.remove("hashes");
        let (memory, hashes) = (copy.path("memory"), copy.path("hashes"));
        let writer = ImageWriter::create(&memory, &hashes, size, generation).unwrap();
        writer.finish().unwrap();
        refused(case, &copy, &["from different snapshots", "use files of the same snapshot"]);
    }

    let copy = snapshot.copy();
    let good = snapshot.read("hashes");
    for (case, bytes, word) in [
        ("no hashes", &good[..0], "less than its header"),
        ("half a header of hashes", &good[..100], "less than its header"),
        ("fewer hashes", &good[..good.len() - 8], "instead of"),
        ("half a hash", &good[..good.len() - 1], "instead of"),
        ("more hashes", &[&good[..], &[0; 8]].concat(), "instead of"),
        ("hashes that were not finished", &vec![0; good.len()], "unfinished"),
    ] {
        copy.write("hashes", bytes);
        refused(case, &copy, &[word, "one snapshot"]);
    }
    for (at, word) in [(3, "not a table"), (8, "version"), (17, "damaged"), (30, "damaged")] {
        let mut bytes = good.clone();
        bytes[at] ^= 2;
        copy.write("hashes", &bytes);
        refused(&format!("hashes altered at byte {at}"), &copy, &[word, "one snapshot"]);
    }
    refusals.end();
    snapshot.assert_unchanged();
}

#[test]
fn foreign_boot_files_are_refused() {
    let Some(snapshot) = Snapshot::get() else { return };
    let secret = tempfile::NamedTempFile::new().unwrap();
    let mut refusals = Refusals::new();
    for name in BOOT_FILES {
        let mut refused = |case: &str, copy: &Spoilt, words: &[&str]| {
            let mut command = restore_with(&copy.dir(), Path::new("/nowhere/blk.sock"));
            refusals.check(&format!("{case} for {name}"), &mut command, FAILED, words);
        };
        let copy = snapshot.copy();
        copy.remove(name);
        refused("nothing", &copy, &[&format!("'{name}' is missing")]);
        let not_regular = [&*format!("'{name}' is not a regular file")];
        for target in [secret.path(), Path::new("../secret"), Path::new("/proc/self/fd/0")] {
            symlink(target, copy.path(name)).unwrap();
            refused(&format!("a link to {}", target.display()), &copy, &not_regular);
            copy.remove(name);
        }
        assert!(Command::new("mkfifo").arg(copy.path(name)).status().unwrap().success());
        refused("a pipe", &copy, &not_regular);
        copy.write(name, b"short");
        refused("another file", &copy, &[name, "it has 5 bytes", "use files of the same snapshot"]);
        let altered = snapshot.copy();
        let file = altered.own(name);
        file.write_all_at(b"?", file.metadata().unwrap().len() / 2).unwrap();
        let mut command = restore_with(&altered.dir(), Path::new("/nowhere/blk.sock"));
        command.arg("--verify");
        let path = altered.path(name);
        let words = ["altered after the snapshot", path.to_str().unwrap()];
        refusals.check(&format!("an altered {name}"), &mut command, FAILED, &words);
    }
    refusals.end();
    snapshot.assert_unchanged();
}

/// A state of version 1 names the kernel and the initramfs of a reset by paths.
#[test]
fn reset_opens_no_path_of_old_state() {
    let Some(snapshot) = Snapshot::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    fs::write(&secret, "the host's own").unwrap();
    let kernel = demand_tests::linux_vm::Kernel::lab().unwrap().image;
    let copy = snapshot.edited_as(1, |state| {
        state["boot"] = json!({"kernel": kernel, "initramfs": secret, "cmdline": "console=ttyS0"});
    });
    BOOT_FILES.iter().filter(|name| copy.path(name).exists()).for_each(|name| copy.remove(name));
    let (mut guest, _back_end) = snapshot.restore(folder.path(), &copy.dir(), &[]);
    // Otherwise the guest is unaffected.
    guest.wait_beats(1).unwrap();
    guest.type_line("reset").unwrap();
    let status = guest.wait_end().unwrap();
    assert_eq!(status.code(), Some(FAILED), "{}", guest.story());
    let said = guest.said();
    assert!(said.contains("cannot reset the guest: its snapshot has no kernel"), "{said}");
    // A warning at the restore announced this.
    assert!(said.contains(&format!("{} has no kernel", copy.dir().display())), "{said}");
}
