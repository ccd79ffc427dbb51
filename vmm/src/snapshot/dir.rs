// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A snapshot as a directory that is either complete or absent.
//!
//! | file | content |
//! |---|---|
//! | `state` | a header line, and the state of the VM as JSON |
//! | `memory` | the image of its memory: raw, with holes for zeros |
//! | `hashes` | the image's table of hashes |
//! | `kernel` | the kernel that the guest boots when it resets itself |
//! | `initramfs` | the guest's initramfs, if it has one |
//!
//! The state holds the length and the SHA-256 of `kernel` and `initramfs`. A snapshot names no file
//! outside its directory. (In version 1 the state named the kernel's path on the host. That path is
//! ignored now, and a snapshot of that version has no `kernel`.)
//!
//! A snapshot is written beside its destination, in a directory `DIR.partial-RANDOM` that only its
//! owner can read, and renamed once all of it is on the disk. A crash leaves that directory behind.
//! Its name holds only the beginning of a long DIR.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use serde::Serialize;
use tempfile::TempDir;

use crate::arch::boot_part::BootPart;
use crate::snapshot::error::{DestinationError, SnapshotError, WriteError};
use crate::snapshot::state_file::{STATE, encode};

pub(crate) const MEMORY: &str = "memory";
pub(crate) const HASHES: &str = "hashes";
pub(crate) const KERNEL: &str = BootPart::Kernel.name();
pub(crate) const INITRAMFS: &str = BootPart::Initramfs.name();

/// The part of a partial directory's name after the snapshot's name, and the number of random
/// letters after that.
const PARTIAL: &str = ".partial-";
const RANDOM: usize = 8;

/// Largest length of a file's name, in bytes: Linux's `NAME_MAX`.
const NAME_MAX: usize = 255;

/// Returns the path of the memory's image in the snapshot `dir`.
pub fn memory(dir: &Path) -> PathBuf {
    dir.join(MEMORY)
}

/// Returns the path of the table of hashes in the snapshot `dir`.
pub fn hashes(dir: &Path) -> PathBuf {
    dir.join(HASHES)
}

/// Returns the paths of all files that the snapshot `dir` may have.
pub fn files(dir: &Path) -> [PathBuf; 5] {
    [STATE, MEMORY, HASHES, KERNEL, INITRAMFS].map(|name| dir.join(name))
}

/// A snapshot that is being written. Dropping it removes it, unless it was published.
///
/// # Examples
///
/// ```
/// use demand_vmm::snapshot::dir::PartialSnapshot;
/// use demand_vmm::snapshot::open::read_state;
///
/// let folder = tempfile::tempdir().unwrap();
/// let dir = folder.path().join("snapshot");
/// let partial = PartialSnapshot::create(&dir).unwrap();
/// std::fs::write(partial.memory(), [1; 4096]).unwrap();
/// std::fs::write(partial.hashes(), [2; 8]).unwrap();
/// assert!(!dir.exists());
/// partial.publish(&("vcpus", 2)).unwrap();
/// assert_eq!(read_state::<(String, u32)>(&dir).unwrap(), ("vcpus".to_string(), 2));
/// ```
#[derive(Debug)]
pub struct PartialSnapshot {
    /// The destination.
    dir: PathBuf,
    parent: PathBuf,
    /// The directory that it is written in.
    partial: TempDir,
}

impl PartialSnapshot {
    /// Creates a directory beside `dir`. `dir` must not exist, or must be an empty directory, which
    /// is replaced later; a mount point cannot be replaced.
    ///
    /// # Errors
    ///
    /// If `dir` is taken, or if its parent is not a directory or cannot be written to.
    pub fn create(dir: &Path) -> Result<Self, SnapshotError> {
        let failed = |source| SnapshotError::Destination { dir: dir.into(), source };
        let Some(name) = dir.file_name() else {
            return Err(failed(DestinationError::NoName));
        };
        let parent = match dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        check_free(dir, parent).map_err(failed)?;
        let prefix = partial_prefix(name);
        warn_of_leftovers(parent, &prefix);
        let partial = tempfile::Builder::new()
            .prefix(&prefix)
            .rand_bytes(RANDOM)
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir_in(parent)
            .map_err(|source| {
                let parent = parent.to_owned();
                // Some existing folders, such as /proc, say that they are not found, too.
                failed(if parent.is_dir() {
                    DestinationError::Parent { parent, source }
                } else {
                    DestinationError::NoParent { parent, source }
                })
            })?;
        Ok(PartialSnapshot { dir: dir.into(), parent: parent.into(), partial })
    }

    /// Returns the path for the memory's image.
    pub fn memory(&self) -> PathBuf {
        memory(self.partial.path())
    }

    /// Returns the path for the table of hashes.
    pub fn hashes(&self) -> PathBuf {
        hashes(self.partial.path())
    }

    /// Returns the path for another file of the snapshot. Publishing syncs the kernel and the
    /// initramfs if they exist.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.partial.path().join(name)
    }

    /// Returns the error for a part that cannot be written.
    pub(crate) fn failed(&self, part: &'static str, source: WriteError) -> SnapshotError {
        SnapshotError::Write { dir: self.dir.clone(), part, source }
    }

    /// Writes the state, syncs everything to the disk, and gives the snapshot its name. Memory and
    /// hashes must have been written before. The snapshot appears complete or not at all, even
    /// after a power cut. Returns the size of all files but the memory, in bytes.
    ///
    /// # Errors
    ///
    /// If a step fails; nothing is left then. The exception is the last step, which syncs the name
    /// itself: if that fails, the snapshot exists and is complete.
    pub fn publish<T: Serialize>(self, state: &T) -> Result<u64, SnapshotError> {
        let dir = self.dir.clone();
        let failed = |part, source| SnapshotError::Write { dir: dir.clone(), part, source };
        let bytes = encode(state).map_err(|error| failed(STATE, error.into()))?;
        step("encoded");
        let path = self.partial.path().join(STATE);
        write_synced(&path, &bytes).map_err(|error| failed(STATE, WriteError::File(error)))?;
        let sync = |file: &'static str| {
            step(file);
            let path = self.partial.path().join(file);
            sync_file(&path).map_err(|error| failed(file, WriteError::File(error)))
        };
        sync(MEMORY)?;
        let mut beside = sync(HASHES)? + bytes.len() as u64;
        for name in [KERNEL, INITRAMFS] {
            if self.file(name).exists() {
                beside += sync(name)?;
            }
        }
        step("directory");
        sync_dir(self.partial.path())
            .map_err(|error| failed("its folder", WriteError::Directory(error)))?;
        step("rename");
        // rename(2): a directory replaces nothing but an empty directory.
        fs::rename(self.partial.path(), &self.dir).map_err(|error| {
            let cause = match error.kind() {
                io::ErrorKind::DirectoryNotEmpty
                | io::ErrorKind::AlreadyExists
                | io::ErrorKind::NotADirectory => WriteError::Taken(error),
                // A bind mount from the same disk, or a mount made since `create`.
                io::ErrorKind::ResourceBusy => WriteError::MountPoint(error),
                _ => WriteError::Directory(error),
            };
            failed("rename", cause)
        })?;
        // The directory has its final name, so nothing must be removed.
        let _ = self.partial.keep();
        step("parent");
        sync_dir(&self.parent)
            .map_err(|error| failed("its parent folder", WriteError::Unsynced(error)))?;
        step("published");
        Ok(beside)
    }
}

/// Returns the beginning of the partial directory's name for a snapshot called `name`. The whole
/// name fits wherever `name` fits.
fn partial_prefix(name: &OsStr) -> OsString {
    let most = name.len().min(NAME_MAX - PARTIAL.len() - RANDOM);
    // Some file systems accept only whole characters.
    let is_end = |at: &usize| name.to_str().is_none_or(|text| text.is_char_boundary(*at));
    let len = (0..=most).rev().find(is_end).unwrap_or(0);
    let mut prefix = OsStr::from_bytes(&name.as_bytes()[..len]).to_os_string();
    prefix.push(PARTIAL);
    prefix
}

/// Refuses a destination that is taken, or that a rename within `parent` cannot replace.
fn check_free(dir: &Path, parent: &Path) -> Result<(), DestinationError> {
    let there = match dir.symlink_metadata() {
        Ok(there) => there,
        // The parent is checked later.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound) => return Ok(()),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotADirectory) => return Ok(()),
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidFilename) => {
            return Err(DestinationError::LongName(error));
        }
        Err(error) => return Err(DestinationError::Path(error)),
    };
    if !there.is_dir() {
        return Err(DestinationError::NotADirectory);
    }
    match fs::read_dir(dir).map(|mut entries| entries.next()) {
        Ok(None) if is_mount_point(dir, &there, parent) => Err(DestinationError::MountPoint),
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(DestinationError::NotEmpty),
        Err(error) => Err(DestinationError::Unreadable(error)),
    }
}

/// Whether `dir` is a mount point, as far as the kernel tells: Linux before 5.8 does not tell of a
/// bind mount from the disk that `parent` is on.
fn is_mount_point(dir: &Path, there: &Metadata, parent: &Path) -> bool {
    let on_another_disk = parent.metadata().is_ok_and(|parent| parent.dev() != there.dev());
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    let told = statx(CWD, dir, flags, StatxFlags::empty());
    on_another_disk
        || told.is_ok_and(|told| told.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Warns of directories that unfinished attempts have left, because nothing else removes them.
fn warn_of_leftovers(parent: &Path, prefix: &OsString) {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    for name in entries.map(|entry| entry.file_name()) {
        if name.as_encoded_bytes().starts_with(prefix.as_encoded_bytes()) {
            let path = parent.join(name);
            log::warn!(
                "found {}: an unfinished snapshot, or one that is being written; delete it only \
                 if none is being written",
                path.display()
            );
        }
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // Mode 0600, as for the image and its table: it protects the file outside its directory, too.
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    step("created");
    let (first, rest) = bytes.split_at(bytes.len() / 2);
    file.write_all(first)?;
    step("halfway");
    file.write_all(rest)?;
    step("written");
    file.sync_all()
}

/// Syncs a file to the disk, and returns its length in bytes.
fn sync_file(path: &Path) -> io::Result<u64> {
    let file = open(path)?;
    let there = file.metadata()?;
    if !there.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    file.sync_all()?;
    Ok(there.len())
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Opens a file for reading. Never blocks, even if the file is a FIFO or a device.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// A step at which the crash test kills the process.
#[cfg(not(test))]
fn step(_name: &str) {}

#[cfg(test)]
use tests::step;

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use crate::snapshot::open::read_state;
    use crate::snapshot::sample::{Machine, machine};

    /// Creates a snapshot that is ready to be published.
    fn partial(dir: &Path) -> PartialSnapshot {
        let partial = PartialSnapshot::create(dir).unwrap();
        fs::write(partial.memory(), [7; 8192]).unwrap();
        fs::write(partial.hashes(), [8; 16]).unwrap();
        partial
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// The step at which a test's child process dies, and the destination of its snapshot.
    const CRASH_AT: &str = "SNAPSHOT_TEST_CRASH_AT";
    const CRASH_DIR: &str = "SNAPSHOT_TEST_DIR";

    pub(super) fn step(name: &str) {
        if std::env::var(CRASH_AT).is_ok_and(|at| at == name) {
            let this = rustix::process::getpid();
            let _ = rustix::process::kill_process(this, rustix::process::Signal::KILL);
            // Waits for the signal.
            std::thread::park();
        }
    }

    #[test]
    fn kill_at_any_step_leaves_all_or_nothing() {
        if let Some(dir) = std::env::var_os(CRASH_DIR) {
            // This process is the child.
            partial(Path::new(&dir)).publish(&machine()).unwrap();
            return;
        }
        const TEST: &str = "snapshot::dir::tests::kill_at_any_step_leaves_all_or_nothing";
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("snapshot");
        let mut there = Vec::new();
        for at in [
            "encoded",
            "created",
            "halfway",
            "written",
            MEMORY,
            HASHES,
            "directory",
            "rename",
            "parent",
            "published",
        ] {
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", TEST, "--test-threads", "1"])
                .env(CRASH_AT, at)
                .env(CRASH_DIR, &dir)
                .output()
                .unwrap();
            assert_eq!(output.status.signal(), Some(9), "{at}: {output:?}");
            if dir.exists() {
                assert_eq!(read_state::<Machine>(&dir).unwrap(), machine(), "{at}");
                assert_eq!(fs::read(memory(&dir)).unwrap(), [7; 8192], "{at}");
                fs::remove_dir_all(&dir).unwrap();
                there.push(at);
            }
        }
        assert_eq!(there, ["parent", "published"]);
        // The directories that the other children left do no harm.
        assert_eq!(names(folder.path()).len(), 8);
        partial(&dir).publish(&machine()).unwrap();
        assert_eq!(read_state::<Machine>(&dir).unwrap(), machine());
    }

    #[test]
    fn unpublished_snapshot_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("snapshot");
        let half = partial(&dir);
        let there = names(folder.path());
        assert!(there.len() == 1 && there[0].starts_with("snapshot.partial-"), "{there:?}");
        let mode = fs::metadata(folder.path().join(&there[0])).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        drop(half);
        assert!(names(folder.path()).is_empty());
        // A snapshot without its memory is refused.
        let half = partial(&dir);
        fs::remove_file(half.memory()).unwrap();
        let error = half.publish(&machine()).unwrap_err().to_string();
        assert!(error.contains("memory: No such file"), "{error}");
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn snapshot_can_have_any_file_name() {
        let folder = tempfile::tempdir().unwrap();
        let names = [237, 238, 239, 254, 255].map(|len| "s".repeat(len));
        // Characters of two and four bytes, and bytes that are no characters.
        let names = names.into_iter().chain(["ä".repeat(127), "a".to_string() + &"🦀".repeat(63)]);
        let names = names.map(OsString::from);
        for name in names.chain([OsString::from_vec(vec![0xbf; 255])]) {
            let dir = folder.path().join(&name);
            let half = partial(&dir);
            let beside = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().file_name();
            assert_eq!(beside.to_str().is_some(), name.to_str().is_some(), "{beside:?}");
            half.publish(&machine()).unwrap();
            assert_eq!(read_state::<Machine>(&dir).unwrap(), machine());
            fs::remove_dir_all(&dir).unwrap();
        }
        let error = PartialSnapshot::create(&folder.path().join("s".repeat(256))).unwrap_err();
        assert!(error.to_string().contains("name too long"), "{error}");
        assert!(error.to_string().contains("give a shorter one"), "{error}");
        assert!(self::names(folder.path()).is_empty());
    }

    #[test]
    fn a_state_is_its_owners_only_and_counted() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("snapshot");
        let beside = partial(&dir).publish(&machine()).unwrap();
        let state = fs::metadata(dir.join(STATE)).unwrap();
        assert_eq!(state.permissions().mode() & 0o777, 0o600);
        assert_eq!(beside, 16 + state.len());
    }

    #[test]
    fn nothing_but_an_empty_directory_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("snapshot");
        let refused = |dir: &Path| PartialSnapshot::create(dir).unwrap_err().to_string();
        fs::create_dir(&dir).unwrap();
        partial(&dir).publish(&machine()).unwrap();
        let error = refused(&dir);
        assert!(error.contains("not empty; give another path"), "{error}");
        let file = folder.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert!(refused(&file).contains("not a directory"));
        assert!(refused(&file.join("x")).contains("is not an existing folder"));
        assert!(refused(&folder.path().join("no/x")).contains("create it"));
        assert!(refused(&folder.path().join("..")).contains("does not end in a name"));
        let error = refused(Path::new("/proc/x"));
        assert!(
            error.contains("nothing can be created in /proc: ") && !error.contains("create it")
        );
        assert!(refused(Path::new("")).contains("does not end in a name"));
        // The destination is taken after the check.
        for make in [
            |dir: &Path| fs::write(dir, "precious"),
            |dir: &Path| fs::create_dir_all(dir.join("x")),
        ] {
            let dir = folder.path().join("late");
            let late = partial(&dir);
            make(&dir).unwrap();
            let error = late.publish(&machine()).unwrap_err().to_string();
            assert!(error.contains("created meanwhile"), "{error}");
            assert!(fs::remove_file(&dir).or_else(|_| fs::remove_dir_all(&dir)).is_ok());
        }
        assert_eq!(names(folder.path()).len(), 2, "{:?}", names(folder.path()));
    }

    #[test]
    fn anything_but_a_snapshot_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("snapshot");
        let told = |dir: &Path| read_state::<Machine>(dir).unwrap_err().to_string();
        assert!(told(&dir).contains("No such file"));
        partial(&dir).publish(&machine()).unwrap();
        assert!(told(&dir.join(STATE)).contains("it is not a directory"));
        for file in [HASHES, STATE] {
            fs::remove_file(dir.join(file)).unwrap();
            let error = told(&dir);
            assert!(error.contains(&format!("'{file}' is missing")), "{error}");
            // A FIFO in place of a file does not block the reader.
            rustix::fs::mknodat(
                rustix::fs::CWD,
                dir.join(file),
                rustix::fs::FileType::Fifo,
                rustix::fs::Mode::RUSR,
                0,
            )
            .unwrap();
            let error = told(&dir);
            assert!(error.contains(&format!("'{file}' is not a regular file")), "{error}");
            fs::remove_file(dir.join(file)).unwrap();
            fs::write(dir.join(file), "").unwrap();
        }
        assert!(told(&dir).contains("does not begin with"));
    }
}
