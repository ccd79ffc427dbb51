// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The snapshot for all cases, taken once, and altered copies of it.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use demand_tests::backend::{BackEnd, BlkOptions};
use demand_tests::linux_vm::{Guest, GuestConfig, Kernel};
use demand_tests::process::program;
use demand_vmm::api::Go;
use demand_vmm::snapshot::state_file::{VERSION, decode};
use guest_work::{Prove, Work};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Size of the guest's memory, in bytes.
pub(crate) const MEMORY: u64 = 128 << 20;
/// Size of its disk, in bytes.
const DISK: u64 = 8 << 20;
/// Number of queues of its disk.
const QUEUES: u16 = 2;
/// The files of each snapshot.
pub(crate) const FILES: [&str; 3] = ["state", "memory", "hashes"];
/// The boot files beside them.
pub(crate) const BOOT_FILES: [&str; 2] = ["kernel", "initramfs"];

/// The snapshot of a guest that has ended.
pub(crate) struct Snapshot {
    folder: tempfile::TempDir,
    before: Vec<(String, u64)>,
}

impl Snapshot {
    /// Returns the snapshot; `None` where Linux guests cannot be run.
    pub(crate) fn get() -> Option<&'static Self> {
        static SNAPSHOT: OnceLock<Option<Snapshot>> = OnceLock::new();
        SNAPSHOT.get_or_init(Self::take).as_ref()
    }

    fn take() -> Option<Self> {
        Self::take_with(|folder, disk| {
            BackEnd::vhost_device_blk_at(folder.join("boot.sock"), disk, &blk()).unwrap()
        })
    }

    /// Takes a snapshot of a guest whose disk, in a folder, is served by this back-end. Returns
    /// `None` where Linux guests cannot be run.
    pub(crate) fn take_with(back_end: impl FnOnce(&Path, &Path) -> BackEnd) -> Option<Self> {
        let kernel = Kernel::lab()?;
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk");
        File::create(&disk).unwrap().set_len(DISK).unwrap();
        let back_end = back_end(folder.path(), &disk);
        let mut config = config(format!("size={MEMORY}"));
        let device = format!("blk,socket={},queues={QUEUES}", back_end.socket().display());
        config.more = vec!["--vhost-user".into(), device];
        let mut guest = Guest::boot(folder.path(), &kernel, &work(), &config).unwrap();
        guest.wait_ready().unwrap();
        guest.wait_beats(2).unwrap();
        guest.snapshot(&folder.path().join("snapshot"), Some(Go::Pause)).unwrap();
        guest.kill();
        let mut taken = Snapshot { folder, before: Vec::new() };
        taken.before = taken.digests();
        Some(taken)
    }

    /// Returns its directory, in which nothing may be changed.
    pub(crate) fn dir(&self) -> PathBuf {
        self.folder.path().join("snapshot")
    }

    /// Reads one of its files.
    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.dir().join(name)).unwrap()
    }

    fn digests(&self) -> Vec<(String, u64)> {
        let digest = |name: String| {
            let mut file = File::open(self.dir().join(&name)).unwrap();
            let (mut hasher, mut bytes) = (DefaultHasher::new(), vec![0; 1 << 20]);
            loop {
                match file.read(&mut bytes).unwrap() {
                    0 => return (name, hasher.finish()),
                    len => hasher.write(&bytes[..len]),
                }
            }
        };
        let mut digests: Vec<_> = names(&self.dir()).into_iter().map(digest).collect();
        digests.sort();
        digests
    }

    /// Checks that its files are unchanged and that none was added.
    #[track_caller]
    pub(crate) fn assert_unchanged(&self) {
        assert_eq!(self.digests(), self.before, "the snapshot's files are not what they were");
    }

    /// Creates a copy that can be altered.
    pub(crate) fn copy(&self) -> Spoilt {
        let copy = Spoilt { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(copy.dir()).unwrap();
        for name in names(&self.dir()) {
            fs::hard_link(self.dir().join(&name), copy.path(&name)).unwrap();
        }
        copy
    }

    /// Creates a copy with an edited state that is sealed correctly.
    pub(crate) fn edited(&self, edit: impl FnOnce(&mut Value)) -> Spoilt {
        self.edited_as(VERSION, edit)
    }

    /// Like [`edited`](Self::edited), as a state of another version.
    pub(crate) fn edited_as(&self, version: u32, edit: impl FnOnce(&mut Value)) -> Spoilt {
        let mut state: Value = decode(&self.read("state")).unwrap();
        edit(&mut state);
        let copy = self.copy();
        copy.write("state", &seal(version, &serde_json::to_vec(&state).unwrap()));
        copy
    }

    /// Copies the disk at the time of the snapshot, for a restored guest.
    pub(crate) fn disk(&self, folder: &Path) -> PathBuf {
        let disk = folder.join("disk");
        fs::copy(self.folder.path().join("disk"), &disk).unwrap();
        disk
    }

    /// Starts a back-end like the original one.
    pub(crate) fn back_end(&self, folder: &Path, options: &BlkOptions) -> BackEnd {
        let disk = self.disk(folder);
        BackEnd::vhost_device_blk_at(folder.join("restore.sock"), &disk, options).unwrap()
    }

    /// Restores the guest from `dir`, on a copy of its disk, with additional arguments.
    pub(crate) fn restore(&self, folder: &Path, dir: &Path, more: &[&str]) -> (Guest, BackEnd) {
        let back_end = self.back_end(folder, &blk());
        let guest = self.restore_with(folder, dir, back_end.socket(), "", more);
        (guest, back_end)
    }

    /// Like [`restore`](Self::restore), with an existing back-end; `option` is appended to
    /// `--vhost-user`.
    pub(crate) fn restore_with(
        &self,
        folder: &Path,
        dir: &Path,
        socket: &Path,
        option: &str,
        more: &[&str],
    ) -> Guest {
        let device = format!("blk,socket={}{option}", socket.display());
        let mut config = config(String::new());
        config.more = vec!["--vhost-user".into(), device];
        config.more.extend(more.iter().map(ToString::to_string));
        Guest::restore(folder, dir, &config).unwrap()
    }
}

/// Returns the options of the back-end of the guest's disk, except in cases about the back-end.
pub(crate) fn blk() -> BlkOptions {
    BlkOptions { queues: QUEUES, queue_size: 256, postcopy: true }
}

fn config(memory: String) -> GuestConfig {
    GuestConfig { cpus: 1, memory, ..GuestConfig::default() }
}

fn work() -> Work {
    let prove = Prove { memory: 8 << 20, slots: 256, beat_ms: 300, ..Prove::default() };
    Work::Prove(prove)
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Builds a state file of a version, as a writer does.
pub(crate) fn seal(version: u32, json: &[u8]) -> Vec<u8> {
    let mut header = format!("demand-vmm-snapshot {version} {} {}", json.len(), hex(json));
    let check = hex(header.as_bytes());
    writeln!(header, " {check}").unwrap();
    [header.as_bytes(), json].concat()
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// A copy of a snapshot. Files that are not written are shared with the original, which must not be
/// changed.
pub(crate) struct Spoilt {
    folder: tempfile::TempDir,
}

impl Spoilt {
    /// Returns its directory.
    pub(crate) fn dir(&self) -> PathBuf {
        self.folder.path().join("copy")
    }

    /// Returns the path of one of its files.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// Removes a file.
    pub(crate) fn remove(&self, name: &str) {
        fs::remove_file(self.path(name)).unwrap();
    }

    /// Replaces a file.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        self.remove(name);
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Replaces a shared file by a separate one with the same content; returns it, for changes.
    pub(crate) fn own(&self, name: &str) -> File {
        let original = self.dir().join("original");
        fs::rename(self.path(name), &original).unwrap();
        let mut command = Command::new("cp");
        command.arg("--sparse=always").arg(&original).arg(self.path(name));
        assert!(command.status().unwrap().success());
        fs::remove_file(original).unwrap();
        File::options().read(true).write(true).open(self.path(name)).unwrap()
    }
}

/// Returns `demand-vmm restore` of the snapshot in `dir`. Its console would be standard output.
pub(crate) fn restore(dir: &Path) -> Command {
    let mut command = Command::new(program("demand-vmm").unwrap());
    command.arg("restore").arg("--source").arg(dir);
    command
}

/// Like [`restore`], with a disk at `socket`.
pub(crate) fn restore_with(dir: &Path, socket: &Path) -> Command {
    let mut command = restore(dir);
    command.arg("--vhost-user").arg(format!("blk,socket={}", socket.display()));
    command
}
