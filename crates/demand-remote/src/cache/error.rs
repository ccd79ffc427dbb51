// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors from opening a host cache.

use std::io;
use std::path::PathBuf;

/// An error from opening a host cache. Later failures are not errors: the chunks then come from the
/// store.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {} as a host cache: {source}", path.display())]
pub struct CacheError {
    path: PathBuf,
    source: CacheErrorKind,
}

impl CacheError {
    pub(crate) fn new(path: impl Into<PathBuf>, source: CacheErrorKind) -> Self {
        CacheError { path: path.into(), source }
    }

    /// Returns the cause.
    pub fn kind(&self) -> &CacheErrorKind {
        &self.source
    }
}

/// The reason for which a directory cannot be a host cache.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheErrorKind {
    /// The size is too small.
    #[error("a size of {size} bytes is too small; give at least {least} bytes")]
    Size {
        /// The size that was given, in bytes.
        size: u64,
        /// The smallest size, in bytes.
        least: u64,
    },
    /// The path is not a directory's.
    #[error("it is not a directory; name a directory")]
    NotADirectory,
    /// The directory is on a file system that other hosts may use.
    #[error("it is on {file_system}, which other hosts may use as well; use a local file system")]
    FileSystem {
        /// The file system.
        file_system: &'static str,
    },
    /// Any user can write to the directory.
    #[error(
        "any user can write to it, and could change what guests read; remove that permission \
         (chmod o-w), or name another directory"
    )]
    Writable,
    /// The directory, or the folder of the packs in it, cannot be opened, created or written.
    #[error("{0}; check its permissions, or name another directory")]
    Access(#[source] io::Error),
}
