// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A snapshot whose files are open.
//!
//! The writer of the directory may have fewer rights than its reader. So each file
//! is opened by its own name in the directory, which is opened once; a symbolic link is not followed,
//! and nothing but a regular file is read. What is open stays so while the guest runs, whatever
//! becomes of the directory.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, openat, statat};
use serde::de::DeserializeOwned;

use crate::error::Error;
use crate::snapshot_dir::{HASHES, MAX_STATE, MEMORY, STATE, decode};

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
    /// Opens the snapshot `dir`. The directory itself may be named by a symbolic link.
    ///
    /// # Errors
    ///
    /// If it is no directory, or one of the files that each snapshot has is missing or is not a
    /// regular one: one line that names it.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let path = dir.to_owned();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = openat(CWD, dir, flags, Mode::empty()).map_err(|error| {
            let why = match error {
                rustix::io::Errno::NOTDIR => {
                    "it is no snapshot, which would be a directory".to_string()
                }
                error => format!("{}; name the directory of a snapshot", io::Error::from(error)),
            };
            cannot_read(&path, &why)
        })?;
        let file = |name| open_file(&dir, name, &path);
        let (state, memory, hashes) = (file(STATE)?, file(MEMORY)?, file(HASHES)?);
        Ok(OpenSnapshot { state, memory, hashes, dir, path })
    }

    /// Reads the state, and sees that it is whole.
    ///
    /// # Errors
    ///
    /// If the state is shorter than it says or was altered, if it is of another version, or if it
    /// is not what this program writes: then the line names the field.
    pub fn read_state<T: DeserializeOwned>(&self) -> Result<T, Error> {
        let mut bytes = Vec::new();
        let read = (&self.state).take(MAX_STATE + 1).read_to_end(&mut bytes);
        read.map_err(|error| self.failed(STATE, &error))?;
        decode(&bytes).map_err(|why| cannot_read(&self.path, &why))
    }

    /// The image of the memory and what to call it.
    ///
    /// # Errors
    ///
    /// The host has no descriptor left.
    pub fn memory(&self) -> Result<(File, PathBuf), Error> {
        self.another(MEMORY, &self.memory)
    }

    /// The table of hashes and what to call it.
    ///
    /// # Errors
    ///
    /// The host has no descriptor left.
    pub fn hashes(&self) -> Result<(File, PathBuf), Error> {
        self.another(HASHES, &self.hashes)
    }

    fn another(&self, name: &str, file: &File) -> Result<(File, PathBuf), Error> {
        let file = file.try_clone().map_err(|error| self.failed(name, &error))?;
        Ok((file, self.path(name)))
    }

    /// Opens another file of it.
    pub(crate) fn file(&self, name: &str) -> Result<File, Error> {
        open_file(&self.dir, name, &self.path)
    }

    /// The path by which messages name one of its files. It is never opened by this.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The error that one of its files cannot be read.
    pub(crate) fn failed(&self, file: &str, why: &dyn fmt::Display) -> Error {
        cannot_read(&self.path, &format_args!("{file}: {why}"))
    }
}

fn cannot_read(path: &Path, why: &dyn fmt::Display) -> Error {
    Error::failed(format!("cannot read the snapshot {}: {why}", path.display()))
}

/// Opens a file of a snapshot to be read; it never waits, whatever it is.
fn open_file(dir: &OwnedFd, name: &str, path: &Path) -> Result<File, Error> {
    let not_regular =
        || cannot_read(path, &format_args!("it is no snapshot: its '{name}' is no regular file"));
    let failed = |error| match error {
        rustix::io::Errno::LOOP => not_regular(),
        rustix::io::Errno::NOENT => {
            cannot_read(path, &format_args!("it is no snapshot: it has no file '{name}'"))
        }
        error => cannot_read(path, &format_args!("{name}: {}", io::Error::from(error))),
    };
    // To open some devices does something to them.
    let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(not_regular());
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(openat(dir, name, flags, Mode::empty()).map_err(failed)?);
    // It may be another by now.
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(file),
        Ok(_) => Err(not_regular()),
        Err(error) => Err(cannot_read(path, &format_args!("{name}: {error}"))),
    }
}
