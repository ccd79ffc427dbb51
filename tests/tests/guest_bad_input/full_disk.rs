// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Snapshots that cannot be written: the guest continues, and nothing that looks like a snapshot
//! remains.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use demand_memory::PAGE_SIZE;
use demand_tests::refusal::Refusals;
use demand_vmm::api::{Go, SnapshotRequest, State};

use crate::snapshot::{BOOT_FILES, FILES, Snapshot};

/// A mounted disk, unmounted when dropped.
struct Disk(PathBuf);

impl Disk {
    /// Mounts a disk with these options at `folder`, which is created.
    fn new(folder: PathBuf, options: &str) -> Self {
        fs::create_dir(&folder).unwrap();
        mount(&["-t", "tmpfs", "-o", options, "none"], &folder);
        Disk(folder)
    }

    fn names(&self) -> Vec<PathBuf> {
        fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path()).collect()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn mount(arguments: &[&str], folder: &Path) {
    assert!(Command::new("mount").args(arguments).arg(folder).status().unwrap().success());
}

#[test]
fn failed_snapshot_does_not_harm_the_guest() {
    let Some(snapshot) = Snapshot::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (mut guest, _back_end) = snapshot.restore(folder.path(), &snapshot.dir(), &[]);
    guest.wait_beats(1).unwrap();
    let small = [
        Disk::new(at("tiny"), "size=64k"),
        Disk::new(at("small"), "size=24m"),
        // Space for the content, but not for the files' names.
        Disk::new(at("names"), "size=256m,nr_inodes=6"),
    ];
    let sealed = Disk::new(at("sealed"), "size=1m");
    mount(&["-o", "remount,ro"], &sealed.0);
    fs::create_dir(at("taken")).unwrap();
    fs::write(at("taken/file"), "precious").unwrap();
    fs::write(at("file"), "precious").unwrap();

    let mut refusals = Refusals::new();
    let mut refused =
        |guest: &mut demand_tests::linux_vm::Guest, case: &str, to: PathBuf, words: &[&str]| {
            let line = guest.api().snapshot(
                &SnapshotRequest { destination: to.clone(), then: Some(Go::Shutdown) },
                |_| {},
            );
            let line = match line {
                Ok(done) => Err(format!("it was written: {done:?}")),
                Err(error) => Ok(error.to_string()),
            };
            let name = to.to_str().unwrap();
            refusals.check_line(case, line, &[words, &[name]].concat());
            assert_eq!(guest.api().status().unwrap().state, State::Running, "{case}");
            guest.wait_beats(1).unwrap();
        };
    for disk in &small {
        let case = format!("no room in {}", disk.0.display());
        refused(&mut guest, &case, disk.0.join("s"), &["No space left", "space", "another"]);
        assert!(disk.names().is_empty(), "{case}: {:?}", disk.names());
    }
    refused(&mut guest, "a disk to be read only", sealed.0.join("s"), &["read-only"]);
    refused(&mut guest, "it is taken", at("taken"), &["not empty", "another path"]);
    let mounted = small[0].0.clone();
    refused(&mut guest, "a mount point", mounted, &["mount point", "name a directory in it"]);
    refused(&mut guest, "a file", at("file"), &["not a directory", "another path"]);
    refused(
        &mut guest,
        "no such folder",
        at("none/s"),
        &["is not an existing folder", "create it"],
    );
    refused(&mut guest, "under a file", at("file/s"), &["is not an existing folder", "create it"]);
    refused(&mut guest, "the root", "/".into(), &["does not end in a name"]);
    refused(&mut guest, "a long name", at(&"s".repeat(300)), &["name"]);
    refused(&mut guest, "a relative path", "s".into(), &["it is not absolute"]);
    refusals.end();
    assert_eq!(fs::read_to_string(at("taken/file")).unwrap(), "precious");
    assert_eq!(fs::read_to_string(at("file")).unwrap(), "precious");
    let partial = |entry: fs::DirEntry| entry.file_name().to_string_lossy().contains(".partial-");
    assert!(!fs::read_dir(folder.path()).unwrap().flatten().any(partial));

    // A snapshot can still be written where there is space, of a paused guest and of a running one.
    guest.api().pause().unwrap();
    let tiny = SnapshotRequest { destination: small[0].0.join("s"), then: None };
    let error = guest.api().snapshot(&tiny, |_| {}).unwrap_err();
    assert!(error.to_string().contains("No space left"), "{error}");
    assert_eq!(guest.api().status().unwrap().state, State::Paused);
    guest.api().resume().unwrap();
    let done = guest.snapshot(&at("s"), None).unwrap();
    let len = |name: &str| fs::metadata(at("s").join(name)).unwrap().len();
    let beside = ["hashes", "state", "kernel", "initramfs"].map(len);
    assert_eq!(done.bytes, done.data_pages * PAGE_SIZE + beside.iter().sum::<u64>());
    assert_eq!(fs::read_dir(at("s")).unwrap().count(), FILES.len() + BOOT_FILES.len());
    guest.wait_beats(1).unwrap();
    guest.finish().unwrap();
    snapshot.assert_unchanged();
}
