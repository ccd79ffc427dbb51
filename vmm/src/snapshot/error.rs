// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The errors of snapshots.

use std::io;
use std::path::PathBuf;

use crate::error::{Error, Kind};
use crate::snapshot::state_file::{EncodeError, StateError};

/// The cause if a snapshot cannot take the place of an empty directory.
const MOUNT_POINT: &str = "it is a mount point, which cannot be replaced; name a directory in it";

/// An error from writing a snapshot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The destination cannot hold a snapshot.
    #[error("cannot create snapshot {}: {source}", dir.display())]
    Destination {
        /// The destination.
        dir: PathBuf,
        /// The cause.
        source: DestinationError,
    },
    /// A part of the snapshot cannot be written.
    #[error("cannot write snapshot {}: {part}: {source}", dir.display())]
    Write {
        /// The destination.
        dir: PathBuf,
        /// The file or the step.
        part: &'static str,
        /// The cause.
        source: WriteError,
    },
}

impl From<SnapshotError> for Error {
    fn from(error: SnapshotError) -> Self {
        Error::of(Kind::Failed, error)
    }
}

/// The reason for which a path cannot be the destination of a snapshot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DestinationError {
    /// The path ends in `..`, for example.
    #[error("the path does not end in a name; give one that does")]
    NoName,
    /// The name is longer than the file system allows.
    #[error("{0}; give a shorter one")]
    LongName(#[source] io::Error),
    /// The path cannot be looked up.
    #[error("{0}; give another path")]
    Path(#[source] io::Error),
    /// A file has the path.
    #[error("it exists and is not a directory; give another path")]
    NotADirectory,
    /// The directory has entries.
    #[error("it exists and is not empty; give another path")]
    NotEmpty,
    /// Something is mounted at the path.
    #[error("{MOUNT_POINT}")]
    MountPoint,
    /// The directory cannot be read.
    #[error("it exists, but cannot be read: {0}; give another path")]
    Unreadable(#[source] io::Error),
    /// The parent is missing, or is not a directory.
    #[error("{} is not an existing folder; create it, or give another path", parent.display())]
    NoParent {
        /// The parent.
        parent: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The parent cannot be written to.
    // (tempfile's own message names a temporary file that the user does not know.)
    #[error("nothing can be created in {}: {}; {}", parent.display(), source.kind(), room_in(source))]
    Parent {
        /// The parent.
        parent: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// The reason for which a part of a snapshot cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The part cannot be written or synced.
    #[error("{}", room(.0))]
    File(#[source] io::Error),
    /// The state cannot be encoded.
    #[error(transparent)]
    State(#[from] EncodeError),
    /// The destination has been created since the start.
    #[error("the destination was created meanwhile; give another path")]
    Taken(#[source] io::Error),
    /// The destination has become a mount point since the start.
    #[error("{MOUNT_POINT}")]
    MountPoint(#[source] io::Error),
    /// A step on a directory failed.
    #[error("{0}")]
    Directory(#[source] io::Error),
    /// The name cannot be synced. The snapshot exists.
    #[error("{0}; the snapshot is complete, but a crash may lose it")]
    Unsynced(#[source] io::Error),
}

/// Returns the remedy for a folder in which nothing can be created.
fn room_in(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "check its permissions, or give another path",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some space, or give a path on another disk"
        }
        _ => "give a path in another folder",
    }
}

/// Formats a write error, with a remedy if the disk is full.
fn room(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            format!("{error}; free some space, or give a path on another disk")
        }
        _ => error.to_string(),
    }
}

/// An error from opening or reading a snapshot.
#[derive(Debug, thiserror::Error)]
#[error("cannot read snapshot {}: {source}", dir.display())]
pub struct OpenError {
    dir: PathBuf,
    source: ReadError,
}

impl OpenError {
    pub(crate) fn new(dir: impl Into<PathBuf>, source: ReadError) -> Self {
        OpenError { dir: dir.into(), source }
    }

    /// Returns the cause.
    pub fn kind(&self) -> &ReadError {
        &self.source
    }
}

impl From<OpenError> for Error {
    fn from(error: OpenError) -> Self {
        Error::of(Kind::Failed, error)
    }
}

/// Returns the hint for a directory or file that this user may not read.
fn hint_for(error: &io::Error) -> Option<&'static str> {
    let denied = error.kind() == io::ErrorKind::PermissionDenied;
    denied.then_some("let this user read the directory and all files in it")
}

/// The reason for which a snapshot cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The path is not a directory's.
    #[error("it is not a directory; name the directory of a snapshot")]
    NotADirectory,
    /// The directory cannot be opened.
    #[error("{0}; {hint}", hint = hint_for(.0).unwrap_or("name the directory of a snapshot"))]
    Directory(#[source] io::Error),
    /// A file that each snapshot has is missing.
    #[error("it is not a snapshot: '{file}' is missing; name the directory of a snapshot")]
    Missing {
        /// The file's name.
        file: &'static str,
    },
    /// A file is a symbolic link or a device, for example.
    #[error("it is not a snapshot: '{file}' is not a regular file")]
    NotRegular {
        /// The file's name.
        file: &'static str,
    },
    /// A file cannot be opened or read.
    #[error("{file}: {source}{}", hint_for(source).map_or(String::new(), |hint| format!("; {hint}")))]
    File {
        /// The file's name.
        file: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// A boot file is not the one that the state describes.
    #[error(
        "{file}: it has {len} bytes, but the state records {recorded}; use files of the same \
         snapshot"
    )]
    Length {
        /// The file's name.
        file: &'static str,
        /// Its length, in bytes.
        len: u64,
        /// The length in the state, in bytes.
        recorded: u64,
    },
    /// The URL of a snapshot cannot be used.
    #[error("{0}")]
    Url(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// This program was built without remote sources.
    #[error("this program was built without remote sources; build it with the feature 'remote'")]
    NoRemote,
    /// A file of a snapshot behind a URL cannot be read.
    #[error("{file}: {source}")]
    Remote {
        /// The file's name.
        file: &'static str,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The state file is damaged, or another version's.
    #[error(transparent)]
    State(#[from] StateError),
}
