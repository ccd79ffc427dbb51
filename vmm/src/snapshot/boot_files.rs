// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The boot files of a guest, stored in its snapshots and read from them.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, ioctl_ficlone, linkat};
use serde::{Deserialize, Serialize};

use crate::arch::boot_files::{BootFile, BootSource, MAX_BYTES, STEP, Seal, check_not_ended};
use crate::arch::boot_part::BootPart;
use crate::arch::error::{BootFileError, BootFileFault};
use crate::snapshot::dir::PartialSnapshot;
use crate::snapshot::error::{OpenError, SnapshotError, WriteError};
use crate::snapshot::open::OpenSnapshot;

/// The boot files as recorded in a snapshot's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedBoot {
    /// The seal of the snapshot's file `kernel`.
    pub kernel: Seal,
    /// The seal of the snapshot's file `initramfs`, if it has one.
    pub initramfs: Option<Seal>,
    /// The kernel's command line.
    pub cmdline: String,
}

impl BootSource {
    /// Opens the files of a snapshot. Their content is checked when it is used.
    ///
    /// # Errors
    ///
    /// Returns a one-line error if a file is missing, is not a regular file, or has another length.
    pub(crate) fn in_snapshot(
        snapshot: &OpenSnapshot,
        saved: &SavedBoot,
    ) -> Result<Self, OpenError> {
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
    ) -> Result<(Option<SavedBoot>, Option<BootFileError>), SnapshotError> {
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
                        Err(partial.failed(file.part.name(), WriteError::File(error)))
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
    Source(BootFileError),
    Destination(io::Error),
}

impl BootFile {
    fn in_snapshot(
        snapshot: &OpenSnapshot,
        part: BootPart,
        seal: &Seal,
    ) -> Result<Self, OpenError> {
        let name = part.name();
        Ok(BootFile {
            part,
            path: snapshot.path(name),
            content: snapshot.boot_file(name, seal.bytes, MAX_BYTES)?,
            seal: seal.clone(),
            is_snapshots: true,
        })
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
            let from = self.file().map_err(|error| self.cannot_read(error))?;
            if ioctl_ficlone(&copy, from).is_err() {
                self.copy_into(from, &copy, ended)?;
            }
            copy
        };
        // The seal of the copy itself counts, because the original may have changed meanwhile.
        let seal = Seal::of(&copy, ended).map_err(cannot_write)?;
        self.compare(&seal).map_err(CopyFailure::Source)
    }

    /// Adds a name to the file. This fails if the file has no name left.
    fn link_to(&self, to: &Path) -> io::Result<()> {
        let this = format!("/proc/self/fd/{}", self.file()?.as_raw_fd());
        Ok(linkat(CWD, this, CWD, to, AtFlags::SYMLINK_FOLLOW)?)
    }

    fn cannot_read(&self, error: io::Error) -> CopyFailure {
        CopyFailure::Source(self.cannot_load(BootFileFault::Read(error)))
    }

    fn copy_into(
        &self,
        mut from: &File,
        mut to: &File,
        ended: &dyn Fn() -> bool,
    ) -> Result<(), CopyFailure> {
        let cannot_read = |error| self.cannot_read(error);
        from.seek(SeekFrom::Start(0)).map_err(cannot_read)?;
        let mut from = from.take(self.seal.bytes);
        let mut buffer = vec![0; STEP];
        loop {
            check_not_ended(ended).map_err(CopyFailure::Destination)?;
            match from.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(len) => to.write_all(&buffer[..len]).map_err(CopyFailure::Destination)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(cannot_read(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::process::Command;

    use tempfile::TempDir;

    use crate::arch::boot_files::BootConfig;

    /// Returns a directory with a kernel and an initramfs, and the source opened from them.
    fn booted() -> (TempDir, BootSource) {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("vmlinuz"), vec![1; 3 << 20]).unwrap();
        fs::write(at("archive"), [2; 5000]).unwrap();
        let option = BootConfig {
            kernel: at("vmlinuz"),
            initramfs: Some(at("archive")),
            cmdline: "quiet".into(),
        };
        let source = BootSource::open(&option, &|| false).unwrap();
        (folder, source)
    }

    /// Takes a snapshot without a VM and returns the boot files in its state.
    fn snapshot(source: &BootSource, dir: &Path) -> Result<Option<SavedBoot>, SnapshotError> {
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
        restored.check(&|| false).unwrap();
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
        let error = source.check(&|| false).unwrap_err().to_string();
        assert!(error.contains("initramfs") && error.contains("was altered after"), "{error}");
        assert_eq!(snapshot(&source, &at("second")).unwrap(), None);
        assert_eq!(fs::read_dir(at("second")).unwrap().count(), 3);
        // A snapshot's file, altered without a change of length.
        fs::write(at("first/kernel"), vec![4; 3 << 20]).unwrap();
        let opened = OpenSnapshot::open(&at("first")).unwrap();
        let restored = BootSource::in_snapshot(&opened, &first).unwrap();
        let error = restored.check(&|| false).unwrap_err().to_string();
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
}
