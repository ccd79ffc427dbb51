// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The directory of a host cache, and the checks that it must pass.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    Access, AtFlags, CWD, Mode, OFlags, RawMode, accessat, fchmod, fstat, fstatfs, mkdirat, openat,
};
use rustix::io::Errno;

use super::error::{CacheError, CacheErrorKind};
use super::file_system;

/// The folder of the packs' files. Another layout of these files gets another name.
const PACKS: &str = "packs-v1";

/// An open cache directory.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    packs: OwnedFd,
    file_mode: Mode,
}

impl Directory {
    /// Opens a directory, which is created if it does not exist.
    pub(crate) fn open(path: &Path) -> Result<Self, CacheError> {
        let failed = |kind| CacheError::new(path, kind);
        let dir = match open(CWD, path, OFlags::empty()) {
            Err(Errno::NOENT) => {
                let made = mkdirat(CWD, path, Mode::RWXU);
                made.and_then(|()| open(CWD, path, OFlags::empty()))
            }
            opened => opened,
        };
        let dir = dir.map_err(|error| failed(kind_of(error)))?;
        let mode = checked(&dir).map_err(failed)?;
        // Users who share the directory through its group share the files as well.
        let shared = mode.contains(Mode::WGRP);
        let failed = |kind| CacheError::new(path.join(PACKS), kind);
        let packs = folder_in(&dir, mode, shared).map_err(|error| failed(kind_of(error)))?;
        checked(&packs).map_err(failed)?;
        accessat(&packs, ".", Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS)
            .map_err(|error| failed(kind_of(error)))?;
        let group = if shared { Mode::RGRP | Mode::WGRP } else { Mode::empty() };
        let file_mode = Mode::RUSR | Mode::WUSR | group;
        Ok(Directory { path: path.to_owned(), packs, file_mode })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the folder of the packs' files.
    pub(crate) fn packs(&self) -> BorrowedFd<'_> {
        self.packs.as_fd()
    }

    /// Returns the mode of new files.
    pub(crate) fn file_mode(&self) -> Mode {
        self.file_mode
    }
}

fn open(at: impl AsFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    openat(at, path, flags | OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Opens the folder of the packs, which is created with the rights of the directory.
fn folder_in(dir: &OwnedFd, mode: Mode, shared: bool) -> Result<OwnedFd, Errno> {
    let created = match mkdirat(dir, PACKS, Mode::RWXU) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(error) => return Err(error),
    };
    let packs = open(dir, Path::new(PACKS), OFlags::NOFOLLOW)?;
    if created && shared {
        // Not by mkdirat, whose mode the process's mask narrows.
        fchmod(&packs, Mode::RWXU | Mode::RWXG | mode & Mode::SGID)?;
    }
    Ok(packs)
}

/// Checks the rights and the file system of a directory, and returns its mode.
fn checked(dir: &OwnedFd) -> Result<Mode, CacheErrorKind> {
    let access = |error: Errno| CacheErrorKind::Access(error.into());
    let magic = fstatfs(dir).map_err(access)?.f_type;
    // Sign extension keeps the number's lower half.
    #[allow(clippy::unnecessary_cast, reason = "the type differs between architectures")]
    if let Some(file_system) = file_system::refused(magic as u64) {
        return Err(CacheErrorKind::FileSystem { file_system });
    }
    let mode = Mode::from_raw_mode(fstat(dir).map_err(access)?.st_mode as RawMode);
    // Not even if the sticky bit protects the files of others: a forged file may come first.
    if mode.contains(Mode::WOTH) {
        return Err(CacheErrorKind::Writable);
    }
    Ok(mode)
}

fn kind_of(error: Errno) -> CacheErrorKind {
    match error {
        Errno::NOTDIR | Errno::LOOP => CacheErrorKind::NotADirectory,
        error => CacheErrorKind::Access(error.into()),
    }
}
