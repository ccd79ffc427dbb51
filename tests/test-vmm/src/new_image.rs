// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Image files that appear when they are complete, and that replace others only by request.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use demand_vmm::error::Error;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};
use tempfile::NamedTempFile;

/// The content of an image that is not complete.
#[derive(Debug)]
enum Draft {
    /// A file without a name: nothing of it is left, even if the process is killed.
    Unnamed(File),
    /// The same with a name, on a file system that knows no others.
    Named(NamedTempFile),
}

/// An image that is being written. Dropping it removes what was written.
#[derive(Debug)]
pub(crate) struct NewImage {
    draft: Draft,
    path: PathBuf,
    force: bool,
}

impl NewImage {
    /// Begins an image at `path`. Only with `force` it may replace a regular file.
    ///
    /// # Errors
    ///
    /// One line, if something is there, or the folder cannot be written to.
    pub(crate) fn begin(path: &Path, force: bool) -> Result<Self, Error> {
        let shown = path.display();
        match fs::metadata(path) {
            Ok(_) if !force => {
                let hint = "name another file, or use --force";
                return Err(Error::failed(format!("cannot write {shown}: it exists; {hint}")));
            }
            Ok(there) if !there.is_file() => {
                let hint = "name another path";
                let line = format!("cannot write {shown}: it is not a regular file; {hint}");
                return Err(Error::failed(line));
            }
            _ => {}
        }
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let draft = match open(folder(path), flags, Mode::from_raw_mode(0o666)) {
            Ok(file) => Draft::Unnamed(file.into()),
            // If that is not the reason, this fails, too.
            Err(_) => Draft::Named(named(path)?),
        };
        Ok(NewImage { draft, path: path.into(), force })
    }

    /// Writes the image by `write`.
    pub(crate) fn write(&self, write: impl FnOnce(&File) -> io::Result<()>) -> Result<(), Error> {
        let file = match &self.draft {
            Draft::Unnamed(file) => file,
            Draft::Named(file) => file.as_file(),
        };
        let hint = "check that the disk has room";
        write(file).map_err(|error| cannot_write(&self.path, &error, hint))
    }

    /// Moves the image to its destination.
    pub(crate) fn finish(self) -> Result<(), Error> {
        let NewImage { draft, path, force } = self;
        let moved = match draft {
            Draft::Named(file) if force => file.persist(&path).map(drop).map_err(io::Error::from),
            Draft::Named(file) => file.persist_noclobber(&path).map(drop).map_err(io::Error::from),
            Draft::Unnamed(file) => match link(&file, &path) {
                Err(error) if force && error.kind() == io::ErrorKind::AlreadyExists => {
                    replace(&file, &path)
                }
                linked => linked,
            },
        };
        let hint = "name another file, or use --force";
        moved.map_err(|error| cannot_write(&path, &error, hint))
    }
}

/// Gives an unnamed file this name.
fn link(file: &File, path: &Path) -> io::Result<()> {
    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(linkat(CWD, unnamed, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
}

/// Replaces another file by an unnamed one. There is no call for that: the file has a temporary
/// name for a moment, in which a killed process leaves it, complete.
fn replace(file: &File, path: &Path) -> io::Result<()> {
    let make = |name: &Path| link(file, name);
    let linked = tempfile::Builder::new().prefix(PREFIX).make_in(folder(path), make)?;
    Ok(linked.persist(path).map(drop)?)
}

/// The beginning of temporary names.
const PREFIX: &str = ".make-image-";

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn named(path: &Path) -> Result<NamedTempFile, Error> {
    tempfile::Builder::new()
        .prefix(PREFIX)
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder(path))
        .map_err(|error| cannot_write(path, &error, "name a writable folder"))
}

fn cannot_write(path: &Path, error: &io::Error, hint: &str) -> Error {
    Error::failed(format!("cannot write {}: {error}; {hint}", path.display()))
}
