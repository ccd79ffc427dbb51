// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A snapshot whose files are open.
//!
//! The directory's writer may have fewer rights than its reader. Therefore the directory is opened
//! once, and each file is opened by its own name in it; symbolic links are not followed, and only
//! regular files are read. The files stay open while the guest runs, even if the directory is
//! changed or removed.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, openat, statat};
use serde::de::DeserializeOwned;

use crate::error::Error;
use crate::snapshot::dir::{HASHES, MAX_STATE, MEMORY, STATE, decode};

/// A snapshot whose files are open.
#[derive(Debug)]
pub struct OpenSnapshot {
    path: PathBuf,
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
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let path = dir.to_owned();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = openat(CWD, dir, flags, Mode::empty()).map_err(|error| {
            let why = match error {
                rustix::io::Errno::NOTDIR => {
                    "it is not a directory; name the directory of a snapshot".to_string()
                }
                error => format!("{}; name the directory of a snapshot", io::Error::from(error)),
            };
            cannot_read(&path, &why)
        })?;
        let file = |name| open_file(&dir, name, &path);
        let (state, memory, hashes) = (file(STATE)?, file(MEMORY)?, file(HASHES)?);
        Ok(OpenSnapshot { state, memory, hashes, dir, path })
    }

    /// Reads the state, and checks that it is complete.
    ///
    /// # Errors
    ///
    /// If the state is shorter than its header says, was altered, has an unsupported version, or is
    /// not in the format that this program writes. In the last case the line names the field.
    pub fn read_state<T: DeserializeOwned>(&self) -> Result<T, Error> {
        let mut bytes = Vec::new();
        let read = (&self.state).take(MAX_STATE + 1).read_to_end(&mut bytes);
        read.map_err(|error| self.failed(STATE, &error))?;
        decode(&bytes).map_err(|why| cannot_read(&self.path, &why))
    }

    /// Returns the image of the memory, and its path for messages.
    ///
    /// # Errors
    ///
    /// If the process has no more file descriptors.
    pub fn memory(&self) -> Result<(File, PathBuf), Error> {
        self.another(MEMORY, &self.memory)
    }

    /// Returns the table of hashes, and its path for messages.
    ///
    /// # Errors
    ///
    /// If the process has no more file descriptors.
    pub fn hashes(&self) -> Result<(File, PathBuf), Error> {
        self.another(HASHES, &self.hashes)
    }

    fn another(&self, name: &str, file: &File) -> Result<(File, PathBuf), Error> {
        let file = file.try_clone().map_err(|error| self.failed(name, &error))?;
        Ok((file, self.path(name)))
    }

    /// Opens another file of the snapshot.
    pub(crate) fn file(&self, name: &str) -> Result<File, Error> {
        open_file(&self.dir, name, &self.path)
    }

    /// Returns the path of a file, for messages. Files are never opened by this path.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Returns the error for a file that cannot be read.
    pub(crate) fn failed(&self, file: &str, why: &dyn fmt::Display) -> Error {
        cannot_read(&self.path, &format_args!("{file}: {why}"))
    }
}

fn cannot_read(path: &Path, why: &dyn fmt::Display) -> Error {
    Error::failed(format!("cannot read snapshot {}: {why}", path.display()))
}

/// Opens a file of a snapshot for reading. Never blocks, even if the file is a FIFO or a device.
fn open_file(dir: &OwnedFd, name: &str, path: &Path) -> Result<File, Error> {
    let not_regular =
        || cannot_read(path, &format_args!("it is not a snapshot: '{name}' is not a regular file"));
    let failed = |error| match error {
        rustix::io::Errno::LOOP => not_regular(),
        rustix::io::Errno::NOENT => {
            cannot_read(path, &format_args!("it is not a snapshot: '{name}' is missing"))
        }
        error => cannot_read(path, &format_args!("{name}: {}", io::Error::from(error))),
    };
    // Opening some devices has side effects.
    let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(not_regular());
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(openat(dir, name, flags, Mode::empty()).map_err(failed)?);
    // The file may have been replaced since the check.
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(file),
        Ok(_) => Err(not_regular()),
        Err(error) => Err(cannot_read(path, &format_args!("{name}: {error}"))),
    }
}
