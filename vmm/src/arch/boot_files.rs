// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel and initramfs of a guest, held open while it runs.
//!
//! A reset or a snapshot may come long after the boot. Neither opens a path again, and both compare
//! the content with a digest taken at the boot.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::arch::boot_part::BootPart;
use crate::arch::error::{BootFileError, BootFileFault};
use crate::late_file::LateFile;

/// Maximum size of a boot file, in bytes: about three times a vmlinux with full debug information.
pub(crate) const MAX_BYTES: u64 = 2 << 30;

/// Number of bytes per read.
pub(crate) const STEP: usize = 1 << 20;

/// A file's length and digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Seal {
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256 of the content, as 64 hexadecimal digits.
    pub sha256: String,
}

impl Seal {
    /// Computes the seal of a whole file, whatever its position. Fails once `ended` returns true.
    pub(crate) fn of(file: &File, ended: &dyn Fn() -> bool) -> io::Result<Self> {
        let (mut hasher, mut bytes) = (Sha256::new(), 0);
        let mut buffer = vec![0; STEP];
        loop {
            check_not_ended(ended)?;
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

/// The boot files that the command line names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BootConfig {
    /// The kernel: a bzImage, or an ELF image with a PVH entry.
    pub kernel: PathBuf,
    /// The initramfs, a cpio archive.
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// The files from which a Linux guest boots, and boots again after a reset.
#[derive(Debug)]
pub(crate) struct BootSource {
    /// The kernel.
    pub kernel: BootFile,
    /// The initramfs.
    pub initramfs: Option<BootFile>,
    /// The kernel's command line.
    pub cmdline: String,
}

impl BootSource {
    /// Opens and reads the files that the user named, unless `ended` returns true meanwhile.
    ///
    /// # Errors
    ///
    /// Returns a one-line error that names the file.
    pub(crate) fn open(
        option: &BootConfig,
        ended: &dyn Fn() -> bool,
    ) -> Result<Self, BootFileError> {
        let initramfs = option.initramfs.as_deref();
        Ok(BootSource {
            kernel: BootFile::open(BootPart::Kernel, &option.kernel, ended)?,
            initramfs: initramfs
                .map(|path| BootFile::open(BootPart::Initramfs, path, ended))
                .transpose()?,
            cmdline: option.cmdline.clone(),
        })
    }

    pub(crate) fn files(&self) -> impl Iterator<Item = &BootFile> {
        std::iter::once(&self.kernel).chain(&self.initramfs)
    }

    /// Reads the files and compares them with their seals from the boot, unless `ended` returns
    /// true meanwhile.
    ///
    /// # Errors
    ///
    /// Returns a one-line error that names the file that cannot be read, or differs.
    pub(crate) fn check(&self, ended: &dyn Fn() -> bool) -> Result<(), BootFileError> {
        self.files().try_for_each(|file| file.check(ended))
    }
}

/// The content of a boot file.
#[derive(Debug)]
pub(crate) enum BootContent {
    /// A file of this system.
    File(File),
    /// A copy that arrives in the background.
    Late(Arc<LateFile>),
}

/// A file from which a guest boots. It stays open, so that its path can be replaced or removed
/// meanwhile.
#[derive(Debug)]
pub(crate) struct BootFile {
    pub(crate) part: BootPart,
    pub(crate) path: PathBuf,
    pub(crate) content: BootContent,
    pub(crate) seal: Seal,
    /// Whether the file belongs to a snapshot. Such a file is never written again.
    pub(crate) is_snapshots: bool,
}

impl BootFile {
    /// Opens and reads a file that the user named, unless `ended` returns true meanwhile.
    ///
    /// # Errors
    ///
    /// Returns a one-line error that names the file.
    pub(crate) fn open(
        part: BootPart,
        path: &Path,
        ended: &dyn Fn() -> bool,
    ) -> Result<Self, BootFileError> {
        let refused = |fault| BootFileError { part, path: path.into(), fault };
        let unreadable = |error| refused(BootFileFault::Open(error));
        // With O_NONBLOCK a pipe without a writer is refused at once; otherwise the open would
        // block.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = opened.map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        if !metadata.is_file() {
            return Err(refused(BootFileFault::NotRegular));
        }
        if metadata.len() > MAX_BYTES {
            return Err(refused(BootFileFault::TooLong { most: MAX_BYTES }));
        }
        let seal = Seal::of(&file, ended).map_err(unreadable)?;
        let content = BootContent::File(file);
        Ok(BootFile { part, path: path.into(), content, seal, is_snapshots: false })
    }

    /// Returns the file. One of a snapshot at a distance is waited for.
    ///
    /// # Errors
    ///
    /// The source's, if the file has not arrived within a minute.
    pub(crate) fn file(&self) -> io::Result<&File> {
        match &self.content {
            BootContent::File(file) => Ok(file),
            BootContent::Late(late) => late.wait(),
        }
    }

    /// Returns the file's length in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.seal.bytes
    }

    /// Returns the file, positioned at its start. Only one caller at a time may use it.
    ///
    /// # Errors
    ///
    /// Returns a one-line error that names the file.
    pub(crate) fn rewound(&self) -> Result<&File, BootFileError> {
        let mut file = self.file().map_err(|error| self.cannot_load(BootFileFault::Read(error)))?;
        file.seek(SeekFrom::Start(0))
            .map_err(|error| self.cannot_load(BootFileFault::Rewind(error)))?;
        Ok(file)
    }

    /// Returns an error for a file that cannot be loaded.
    pub(crate) fn cannot_load(&self, fault: BootFileFault) -> BootFileError {
        BootFileError { part: self.part, path: self.path.clone(), fault }
    }

    /// Reads the file and compares it with its seal from the boot, unless `ended` returns true
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// Returns a one-line error if the file cannot be read, or differs.
    pub(crate) fn check(&self, ended: &dyn Fn() -> bool) -> Result<(), BootFileError> {
        match self.file().and_then(|file| Seal::of(file, ended)) {
            Ok(seal) => self.compare(&seal),
            Err(error) => Err(self.cannot_load(BootFileFault::Read(error))),
        }
    }

    pub(crate) fn compare(&self, seal: &Seal) -> Result<(), BootFileError> {
        if *seal == self.seal {
            return Ok(());
        }
        Err(self.cannot_load(match self.is_snapshots {
            true => BootFileFault::AlteredInSnapshot,
            false => BootFileFault::AlteredInUse,
        }))
    }
}

/// Fails if the VM is going away, because its end waits for the copy.
pub(crate) fn check_not_ended(ended: &dyn Fn() -> bool) -> io::Result<()> {
    if ended() { Err(io::Error::other("the VM is ending")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs;

    #[test]
    fn a_file_without_end_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
        let error = BootFile::open(BootPart::Kernel, &path, &|| false).unwrap_err().to_string();
        assert!(error.contains("more than"), "{error}");
    }
}
