// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel and initramfs of a guest, held open while it runs and stored in its snapshots.
//!
//! A reset or a snapshot may come long after the boot. Neither opens a path again, and both compare
//! the content with a digest taken at the boot.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, ioctl_ficlone, linkat};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::Error;
use crate::snapshot::dir::{self, PartialSnapshot};
use crate::snapshot::open::OpenSnapshot;

/// Maximum size of a boot file, in bytes: about three times a vmlinux with full debug information.
const MAX_BYTES: u64 = 2 << 30;

/// Number of bytes per read.
const STEP: usize = 1 << 20;

/// The role of a boot file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootPart {
    /// The kernel: a bzImage, or an ELF image with a PVH entry.
    Kernel,
    /// The initramfs, a cpio archive.
    Initramfs,
}

impl BootPart {
    /// Returns the part's name, which is also its file name in a snapshot.
    pub fn name(self) -> &'static str {
        match self {
            BootPart::Kernel => dir::KERNEL,
            BootPart::Initramfs => dir::INITRAMFS,
        }
    }
}

/// A file's length and digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seal {
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 of the content, as 64 hexadecimal digits.
    pub sha256: String,
}

impl Seal {
    /// Computes the seal of a whole file, whatever its position. Fails once `ended` returns true.
    fn of(file: &File, ended: &dyn Fn() -> bool) -> io::Result<Self> {
        let (mut hasher, mut bytes) = (Sha256::new(), 0);
        let mut buffer = vec![0; STEP];
        loop {
            go_on(ended)?;
            match file.read_at(&mut buffer, bytes) {
                Ok(0) => break,
                Ok(len) => {
                    hasher.update(&buffer[..len]);
                    bytes += len as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            // The file grows while it is read, or a device has replaced it before it was opened.
            if bytes > MAX_BYTES {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
        }
        let sha256 = hasher.finalize().iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        Ok(Seal { bytes, sha256 })
    }
}

/// The boot files as recorded in a snapshot's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedBoot {
    /// The seal of the snapshot's file `kernel`.
    pub kernel: Seal,
    /// The seal of the snapshot's file `initramfs`, if it has one.
    pub initramfs: Option<Seal>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// The boot files that the command line names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootOption {
    /// The kernel: a bzImage, or an ELF image with a PVH entry.
    pub kernel: PathBuf,
    /// The initramfs, a cpio archive.
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// The files from which a Linux guest boots, and boots again after a reset.
#[derive(Debug)]
pub struct BootSource {
    /// The kernel.
    pub kernel: BootFile,
    /// The initramfs.
    pub initramfs: Option<BootFile>,
    /// The kernel's command line.
    pub cmdline: String,
}

impl BootSource {
    /// Opens and reads the files that the user named.
    ///
    /// # Errors
    ///
    /// Returns a one-line error that names the file.
    pub fn open(option: &BootOption) -> Result<Self, Error> {
        let initramfs = option.initramfs.as_deref();
        Ok(BootSource {
            kernel: BootFile::open(BootPart::Kernel, &option.kernel)?,
            initramfs: initramfs
                .map(|path| BootFile::open(BootPart::Initramfs, path))
                .transpose()?,
            cmdline: option.cmdline.clone(),
        })
    }

    /// Opens the files of a snapshot. Their content is checked when it is used.
    ///
    /// # Errors
    ///
    /// Returns a one-line error if a file is missing, is not a regular file, or has another length.
    pub fn in_snapshot(snapshot: &OpenSnapshot, saved: &SavedBoot) -> Result<Self, Error> {
        let open = |part, seal| BootFile::in_snapshot(snapshot, part, seal);
        Ok(BootSource {
            kernel: open(BootPart::Kernel, &saved.kernel)?,
            initramfs: saved
                .initramfs
                .as_ref()
                .map(|seal| open(BootPart::Initramfs, seal))
                .transpose()?,
            cmdline: saved.cmdline.clone(),
        })
    }

    fn files(&self) -> impl Iterator<Item = &BootFile> {
        std::iter::once(&self.kernel).chain(&self.initramfs)
    }

    /// Reads the files and compares them with their seals from the boot.
    ///
    /// # Errors
    ///
    /// Returns a one-line error that names the file that cannot be read, or differs.
    pub fn check(&self) -> Result<(), Error> {
        self.files().try_for_each(BootFile::check)
    }

    /// Stores the files in a snapshot and returns their description for its state. If a file
    /// differs from its seal, the snapshot gets none of them, and the second value says why.
    ///
    /// # Errors
    ///
    /// Returns a one-line error if the snapshot cannot be written, or once `ended` returns true
    /// because the VM is going away.
    pub(crate) fn keep_in(
        &self,
        partial: &PartialSnapshot,
        ended: &dyn Fn() -> bool,
    ) -> Result<(Option<SavedBoot>, Option<Error>), Error> {
        for file in self.files() {
            if let Err(failure) = file.copy_to(&partial.file(file.part.name()), ended) {
                return match failure {
                    CopyFailure::Source(error) => {
                        for file in self.files() {
                            let _ = std::fs::remove_file(partial.file(file.part.name()));
                        }
                        Ok((None, Some(error)))
                    }
                    CopyFailure::Destination(error) => {
                        Err(partial.failed(file.part.name(), &dir::room(&error)))
                    }
                };
            }
        }
        let saved = SavedBoot {
            kernel: self.kernel.seal.clone(),
            initramfs: self.initramfs.as_ref().map(|file| file.seal.clone()),
            cmdline: self.cmdline.clone(),
        };
        Ok((Some(saved), None))
    }
}

/// The end of a copy that failed.
enum CopyFailure {
    Source(Error),
    Destination(io::Error),
}

/// A file from which a guest boots. It stays open, so that its path can be replaced or removed
/// meanwhile.
#[derive(Debug)]
pub struct BootFile {
    part: BootPart,
    path: PathBuf,
    file: File,
    seal: Seal,
    /// Whether the file belongs to a snapshot. Such a file is never written again.
    is_snapshots: bool,
}

impl BootFile {
    /// Opens and reads a file that the user named.
    ///
    /// # Errors
    ///
    /// Returns a one-line error that names the file.
    pub fn open(part: BootPart, path: &Path) -> Result<Self, Error> {
        const REMEDY: &str = "name a readable file";
        let refused = |why: &dyn fmt::Display| cannot_load(part, path, why, REMEDY);
        // With O_NONBLOCK a pipe without a writer is refused at once; otherwise the open would
        // block.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = opened.map_err(|error| refused(&error))?;
        let metadata = file.metadata().map_err(|error| refused(&error))?;
        if !metadata.is_file() {
            return Err(refused(&"it is not a regular file"));
        }
        if metadata.len() > MAX_BYTES {
            return Err(refused(&format_args!("it has more than {MAX_BYTES} bytes")));
        }
        let seal = Seal::of(&file, &|| false).map_err(|error| refused(&error))?;
        Ok(BootFile { part, path: path.into(), file, seal, is_snapshots: false })
    }

    fn in_snapshot(snapshot: &OpenSnapshot, part: BootPart, seal: &Seal) -> Result<Self, Error> {
        let name = part.name();
        let file = snapshot.file(name)?;
        let len = file.metadata().map_err(|error| snapshot.failed(name, &error))?.len();
        if len != seal.bytes || len > MAX_BYTES {
            let why = format!(
                "it has {len} bytes, but the state records {}; use files of the same snapshot",
                seal.bytes
            );
            return Err(snapshot.failed(name, &why));
        }
        Ok(BootFile {
            part,
            path: snapshot.path(name),
            file,
            seal: seal.clone(),
            is_snapshots: true,
        })
    }

    /// Returns the file's length in bytes.
    pub fn size(&self) -> u64 {
        self.seal.bytes
    }

    /// Returns the path for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the file, positioned at its start. Only one caller at a time may use it.
    ///
    /// # Errors
    ///
    /// Returns a one-line error that names the file.
    pub fn rewound(&self) -> Result<&File, Error> {
        (&self.file)
            .seek(SeekFrom::Start(0))
            .map_err(|error| self.cannot_load(&error, "use another copy"))?;
        Ok(&self.file)
    }

    /// Returns an error for a file that cannot be loaded.
    pub(crate) fn cannot_load(&self, why: &dyn fmt::Display, remedy: &str) -> Error {
        cannot_load(self.part, &self.path, why, remedy)
    }

    /// Reads the file and compares it with its seal from the boot.
    ///
    /// # Errors
    ///
    /// Returns a one-line error if the file cannot be read, or differs.
    pub fn check(&self) -> Result<(), Error> {
        match Seal::of(&self.file, &|| false) {
            Ok(seal) => self.compare(&seal),
            Err(error) => Err(self.cannot_load(&error, "check its disk")),
        }
    }

    fn compare(&self, seal: &Seal) -> Result<(), Error> {
        if *seal == self.seal {
            return Ok(());
        }
        let remedy = if self.is_snapshots {
            "use another copy of the snapshot"
        } else {
            "do not write to a kernel or an initramfs in use; replace it with a new file"
        };
        let since = if self.is_snapshots { "the snapshot" } else { "the guest's boot" };
        Err(self.cannot_load(&format_args!("it was altered after {since}"), remedy))
    }

    /// Copies the file to `to`, sharing its disk space where the file system can.
    fn copy_to(&self, to: &Path, ended: &dyn Fn() -> bool) -> Result<(), CopyFailure> {
        let cannot_write = CopyFailure::Destination;
        let copy = if self.is_snapshots && self.link_to(to).is_ok() {
            File::open(to).map_err(cannot_write)?
        } else {
            let mut options = OpenOptions::new();
            let options = options.read(true).write(true).create_new(true).mode(0o600);
            let copy = options.open(to).map_err(cannot_write)?;
            if ioctl_ficlone(&copy, &self.file).is_err() {
                self.copy_into(&copy, ended)?;
            }
            copy
        };
        // The seal of the copy itself counts, because the original may have changed meanwhile.
        let seal = Seal::of(&copy, ended).map_err(cannot_write)?;
        self.compare(&seal).map_err(CopyFailure::Source)
    }

    /// Adds a name to the file. This fails if the file has no name left.
    fn link_to(&self, to: &Path) -> io::Result<()> {
        let this = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(linkat(CWD, this, CWD, to, AtFlags::SYMLINK_FOLLOW)?)
    }

    fn copy_into(&self, mut to: &File, ended: &dyn Fn() -> bool) -> Result<(), CopyFailure> {
        let cannot_read = |error| CopyFailure::Source(self.cannot_load(&error, "check its disk"));
        let mut from = &self.file;
        from.seek(SeekFrom::Start(0)).map_err(cannot_read)?;
        let mut from = from.take(self.seal.bytes);
        let mut buffer = vec![0; STEP];
        loop {
            go_on(ended).map_err(CopyFailure::Destination)?;
            match from.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(len) => to.write_all(&buffer[..len]).map_err(CopyFailure::Destination)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(cannot_read(error)),
            }
        }
    }
}

/// Fails if the VM is going away, because its end waits for the copy.
fn go_on(ended: &dyn Fn() -> bool) -> io::Result<()> {
    if ended() { Err(io::Error::other("the VM is ending")) } else { Ok(()) }
}

fn cannot_load(part: BootPart, path: &Path, why: &dyn fmt::Display, remedy: &str) -> Error {
    let name = part.name();
    Error::failed(format!("cannot load the {name} {}: {why}; {remedy}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::process::Command;

    use tempfile::TempDir;

    /// Returns a directory with a kernel and an initramfs, and the source opened from them.
    fn booted() -> (TempDir, BootSource) {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("vmlinuz"), vec![1; 3 << 20]).unwrap();
        fs::write(at("archive"), [2; 5000]).unwrap();
        let option = BootOption {
            kernel: at("vmlinuz"),
            initramfs: Some(at("archive")),
            cmdline: "quiet".into(),
        };
        let source = BootSource::open(&option).unwrap();
        (folder, source)
    }

    /// Takes a snapshot without a VM and returns the boot files in its state.
    fn snapshot(source: &BootSource, dir: &Path) -> Result<Option<SavedBoot>, Error> {
        let partial = PartialSnapshot::create(dir)?;
        fs::write(partial.memory(), [1; 4096]).unwrap();
        fs::write(partial.hashes(), [2; 8]).unwrap();
        let (saved, warning) = source.keep_in(&partial, &|| false)?;
        assert_eq!(saved.is_none(), warning.is_some(), "{warning:?}");
        partial.publish(&saved)?;
        Ok(saved)
    }

    fn read(file: &BootFile) -> Vec<u8> {
        let mut bytes = Vec::new();
        file.rewound().unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_chain_of_snapshots_keeps_the_kernel() {
        let (folder, source) = booted();
        let at = |name: &str| folder.path().join(name);
        // Replace the files as a package manager does.
        fs::write(at("new"), "newer").unwrap();
        fs::rename(at("new"), at("vmlinuz")).unwrap();
        fs::remove_file(at("archive")).unwrap();
        let first = snapshot(&source, &at("first")).unwrap().unwrap();
        let text = fs::read_to_string(at("first/state")).unwrap();
        assert!(!text.contains(folder.path().to_str().unwrap()), "{text}");
        let opened = OpenSnapshot::open(&at("first")).unwrap();
        let restored = BootSource::in_snapshot(&opened, &first).unwrap();
        let second = snapshot(&restored, &at("second")).unwrap();
        assert_eq!(second.as_ref(), Some(&first));
        let inode = |name: &str| fs::metadata(at(name)).unwrap().ino();
        assert_eq!(inode("first/kernel"), inode("second/kernel"), "no room was used");
        // The directories are removed while the guest runs.
        fs::remove_dir_all(at("first")).unwrap();
        fs::remove_dir_all(at("second")).unwrap();
        restored.check().unwrap();
        assert_eq!(read(&restored.kernel), vec![1; 3 << 20]);
        assert_eq!(snapshot(&restored, &at("third")).unwrap(), Some(first));
        assert_eq!(fs::read(at("third/initramfs")).unwrap(), [2; 5000]);
        assert_eq!(fs::metadata(at("third/kernel")).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn copy_ends_with_the_vm() {
        let (folder, source) = booted();
        let partial = PartialSnapshot::create(&folder.path().join("first")).unwrap();
        let steps = std::cell::Cell::new(0);
        let ended = || steps.replace(steps.get() + 1) >= 2;
        let error = source.keep_in(&partial, &ended).unwrap_err().to_string();
        assert!(error.contains("the VM is ending"), "{error}");
        assert_eq!(steps.get(), 3, "it ends at the next step");
    }

    #[test]
    fn an_altered_kernel_is_not_kept() {
        let (folder, source) = booted();
        let at = |name: &str| folder.path().join(name);
        let first = snapshot(&source, &at("first")).unwrap().unwrap();
        fs::write(at("archive"), [3; 5000]).unwrap();
        let error = source.check().unwrap_err().to_string();
        assert!(error.contains("initramfs") && error.contains("was altered after"), "{error}");
        assert_eq!(snapshot(&source, &at("second")).unwrap(), None);
        assert_eq!(fs::read_dir(at("second")).unwrap().count(), 3);
        // A snapshot's file, altered without a change of length.
        fs::write(at("first/kernel"), vec![4; 3 << 20]).unwrap();
        let opened = OpenSnapshot::open(&at("first")).unwrap();
        let restored = BootSource::in_snapshot(&opened, &first).unwrap();
        let error = restored.check().unwrap_err().to_string();
        assert!(error.contains("use another copy of the snapshot"), "{error}");
        assert_eq!(snapshot(&restored, &at("third")).unwrap(), None);
    }

    #[test]
    fn files_of_the_host_are_not_opened() {
        let (folder, source) = booted();
        let at = |name: &str| folder.path().join(name);
        let saved = snapshot(&source, &at("first")).unwrap().unwrap();
        let secret = at("secret");
        fs::write(&secret, vec![1; 3 << 20]).unwrap();
        let told = || {
            let opened = OpenSnapshot::open(&at("first"));
            opened
                .and_then(|opened| BootSource::in_snapshot(&opened, &saved).map(drop))
                .unwrap_err()
                .to_string()
        };
        for name in ["kernel", "initramfs", "memory", "hashes", "state"] {
            let path = at("first").join(name);
            let kept = fs::read(&path).unwrap();
            fs::remove_file(&path).unwrap();
            assert!(told().contains(&format!("'{name}' is missing")), "{}", told());
            for target in [&*secret, Path::new("../secret"), Path::new("/proc/self/fd/0")] {
                symlink(target, &path).unwrap();
                assert!(told().contains(&format!("'{name}' is not a regular file")), "{}", told());
                fs::remove_file(&path).unwrap();
            }
            assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
            assert!(told().contains(&format!("'{name}' is not a regular file")), "{}", told());
            fs::remove_file(&path).unwrap();
            fs::write(&path, kept).unwrap();
        }
        let open = OpenSnapshot::open(&at("first")).unwrap();
        BootSource::in_snapshot(&open, &saved).unwrap();
        fs::File::options().append(true).open(at("first/kernel")).unwrap().set_len(7).unwrap();
        assert!(told().contains("kernel: it has 7 bytes"), "{}", told());
    }

    #[test]
    fn a_file_without_end_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
        let error = BootFile::open(BootPart::Kernel, &path).unwrap_err().to_string();
        assert!(error.contains("more than"), "{error}");
    }
}
