// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A snapshot whose files are open.
//!
//! The directory's writer may have fewer rights than its reader. Therefore the directory is opened
//! once, and each file is opened by its own name in it; symbolic links are not followed, and only
//! regular files are read. The files stay open while the guest runs, even if the directory is
//! changed or removed.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

#[cfg(feature = "remote")]
use demand_remote::image::RemoteImage;
use demand_source::HashedImage;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, openat, statat};
use rustix::io::Errno;
use serde::de::DeserializeOwned;

use crate::arch::boot_files::BootContent;
use crate::config::source::SnapshotPlace;
use crate::error::Error;
use crate::snapshot::dir::{HASHES, MEMORY};
#[cfg(feature = "remote")]
use crate::snapshot::dir::{INITRAMFS, KERNEL};
use crate::snapshot::error::{OpenError, ReadError};
use crate::snapshot::image::MemoryImage;
use crate::snapshot::remote::{Reading, RemoteSnapshot};
use crate::snapshot::state_file::{MAX_STATE, STATE, decode};

/// A snapshot whose files are open.
#[derive(Debug)]
pub struct OpenSnapshot {
    path: PathBuf,
    files: Files,
}

#[derive(Debug)]
enum Files {
    Directory(Directory),
    Remote(RemoteSnapshot),
}

/// A directory, with the files that each snapshot has.
#[derive(Debug)]
struct Directory {
    dir: OwnedFd,
    state: File,
    memory: File,
    hashes: File,
}

impl OpenSnapshot {
    /// Opens the snapshot `dir`. The path of the directory itself may be a symbolic link.
    ///
    /// # Errors
    ///
    /// One line that names the cause, if `dir` is not a directory, or if one of the files that each
    /// snapshot has is missing or is not a regular file.
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        let path = dir.to_owned();
        let dir = open_directory(dir).map_err(|error| OpenError::new(&path, error))?;
        let file = |name| open_file(&dir, name).map_err(|error| OpenError::new(&path, error));
        let (state, memory, hashes) = (file(STATE)?, file(MEMORY)?, file(HASHES)?);
        let files = Files::Directory(Directory { dir, state, memory, hashes });
        Ok(OpenSnapshot { files, path })
    }

    /// Opens the snapshot in a directory or behind a URL. The chunks of one that was pushed to a
    /// store are read as `reading` says.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open); one line that names the cause, if a URL cannot be used.
    pub(crate) fn open_with(place: &SnapshotPlace, reading: &Reading) -> Result<Self, OpenError> {
        match place {
            SnapshotPlace::Directory(dir) => OpenSnapshot::open(dir),
            SnapshotPlace::Url(url) => {
                let path = place.shown();
                let files = RemoteSnapshot::open(url, reading);
                let files = files.map_err(|error| OpenError::new(&path, error))?;
                Ok(OpenSnapshot { files: Files::Remote(files), path })
            }
        }
    }

    /// Returns the image of a snapshot that was pushed to a store.
    #[cfg(feature = "remote")]
    pub(crate) fn pushed(&self) -> Option<&RemoteImage> {
        match &self.files {
            Files::Directory(_) => None,
            Files::Remote(remote) => remote.pushed(),
        }
    }

    /// Returns whether the snapshot was pushed to a store.
    pub(crate) fn is_pushed(&self) -> bool {
        match &self.files {
            Files::Directory(_) => false,
            Files::Remote(remote) => remote.is_pushed(),
        }
    }

    /// Returns the digest of the index of a snapshot that was pushed to a store.
    #[cfg(feature = "remote")]
    pub(crate) fn index(&self) -> Option<demand_remote::image::ObjectId> {
        match &self.files {
            Files::Directory(_) => None,
            Files::Remote(remote) => remote.index(),
        }
    }

    /// Reads the state, and checks that it is complete.
    ///
    /// # Errors
    ///
    /// If the state is shorter than its header says, was altered, has an unsupported version, or is
    /// not in the format that this program writes. In the last case the line names the field.
    pub fn read_state<T: DeserializeOwned>(&self) -> Result<T, OpenError> {
        let bytes = match &self.files {
            Files::Directory(Directory { state, .. }) => {
                let mut bytes = Vec::new();
                let read = state.take(MAX_STATE + 1).read_to_end(&mut bytes);
                read.map_err(|source| self.failed(ReadError::File { file: STATE, source }))?;
                bytes
            }
            Files::Remote(remote) => remote.state().map_err(|error| self.failed(error))?,
        };
        decode(&bytes).map_err(|error| self.failed(error.into()))
    }

    /// Opens the image of the memory, each page of which is checked. Its size, in bytes, is that of
    /// the state, for sources that do not know it.
    ///
    /// # Errors
    ///
    /// If the image's table of hashes is damaged, or belongs to another image.
    pub(crate) fn memory(&self, size: u64) -> Result<MemoryImage, Error> {
        match &self.files {
            Files::Directory(directory) => Ok(MemoryImage::Local(self.image_of(directory)?)),
            Files::Remote(remote) => {
                remote.memory(&self.path, size).map_err(|error| self.failed(error).into())
            }
        }
    }

    fn image_of(&self, directory: &Directory) -> Result<HashedImage, Error> {
        let file = |name, file: &File| {
            let copy = file.try_clone();
            let copy = copy.map_err(|source| ReadError::File { file: name, source });
            copy.map(|copy| (copy, self.path(name))).map_err(|error| self.failed(error))
        };
        let Directory { memory, hashes, .. } = directory;
        Ok(HashedImage::of_files(file(MEMORY, memory)?, file(HASHES, hashes)?)?)
    }

    /// Opens the image of the memory of a snapshot in a directory.
    #[cfg(feature = "remote")]
    pub(crate) fn local_memory(&self) -> Result<HashedImage, Error> {
        match &self.files {
            Files::Directory(directory) => self.image_of(directory),
            Files::Remote(_) => Err(self.failed(ReadError::NotADirectory).into()),
        }
    }

    /// Opens the files that a snapshot in a directory has beside the memory's image and its hashes.
    #[cfg(feature = "remote")]
    pub(crate) fn local_files(&self) -> Result<Vec<(&'static str, File)>, OpenError> {
        let Files::Directory(Directory { dir, .. }) = &self.files else {
            return Err(self.failed(ReadError::NotADirectory));
        };
        let mut files = Vec::new();
        for name in [STATE, KERNEL, INITRAMFS] {
            match open_file(dir, name) {
                Ok(file) => files.push((name, file)),
                Err(ReadError::Missing { .. }) => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(files)
    }

    /// Opens a boot file of the snapshot, which must have `recorded` bytes, and at most `most`.
    pub(crate) fn boot_file(
        &self,
        name: &'static str,
        recorded: u64,
        most: u64,
    ) -> Result<BootContent, OpenError> {
        let check = |len| match len == recorded && len <= most {
            true => Ok(()),
            false => Err(ReadError::Length { file: name, len, recorded }),
        };
        let failed = |source| ReadError::File { file: name, source };
        let opened = match &self.files {
            Files::Directory(Directory { dir, .. }) => open_file(dir, name).and_then(|file| {
                check(file.metadata().map_err(failed)?.len())?;
                Ok(BootContent::File(file))
            }),
            Files::Remote(remote) => remote.boot_file(name, check).map(BootContent::Late),
        };
        opened.map_err(|error| self.failed(error))
    }

    /// Returns the path of a file, for messages. Files are never opened by this path.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Returns the error with this snapshot's path.
    pub(crate) fn failed(&self, cause: ReadError) -> OpenError {
        OpenError::new(&self.path, cause)
    }
}

/// Reads the state of the snapshot `dir`, and checks that it is complete.
///
/// # Errors
///
/// If `dir` is not a snapshot, or if the state is shorter than its header says, was altered, has an
/// unsupported version, or is not in the format that this program writes. In the last case the line
/// names the field.
pub fn read_state<T: DeserializeOwned>(dir: &Path) -> Result<T, OpenError> {
    OpenSnapshot::open(dir)?.read_state()
}

/// Opens the directory of a snapshot's files.
pub(super) fn open_directory(dir: &Path) -> Result<OwnedFd, ReadError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, dir, flags, Mode::empty()).map_err(|error| match error {
        Errno::NOTDIR => ReadError::NotADirectory,
        error => ReadError::Directory(error.into()),
    })
}

/// Opens a file of a snapshot for reading. Never blocks, even if the file is a FIFO or a device.
pub(super) fn open_file(dir: &OwnedFd, file: &'static str) -> Result<File, ReadError> {
    let not_regular = ReadError::NotRegular { file };
    let failed = |error| match error {
        Errno::LOOP => ReadError::NotRegular { file },
        Errno::NOENT => ReadError::Missing { file },
        error => ReadError::File { file, source: error.into() },
    };
    // Opening some devices has side effects.
    let stat = statat(dir, file, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(not_regular);
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = File::from(openat(dir, file, flags, Mode::empty()).map_err(failed)?);
    // The file may have been replaced since the check.
    match opened.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(opened),
        Ok(_) => Err(not_regular),
        Err(source) => Err(ReadError::File { file, source }),
    }
}
