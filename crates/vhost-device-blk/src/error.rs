// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The daemon's errors, each one line: the operation, the cause and a hint.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::advice;

/// Errors of the daemon.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The disk image cannot be opened or is not usable.
    #[error(
        "cannot open --blk-file {}: {source}; {}",
        path.display(),
        advice::for_error(source)
            .unwrap_or("use a raw image or a block device that this user may open")
    )]
    Disk {
        /// The image.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The disk must be writable, but can only be read.
    #[error(
        "cannot open --blk-file {} for writing: {source}; use --read-only, or make it \
         writable",
        path.display()
    )]
    ReadOnly {
        /// The image or block device.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// Another process uses the disk, and one of the two writes to it.
    #[error(
        "cannot lock --blk-file {}: another process is using it; use another image, or use \
         --read-only in both",
        path.display()
    )]
    Locked {
        /// The image or block device.
        path: PathBuf,
    },
    /// The disk is larger than the files that this process may write.
    #[error(
        "cannot use --blk-file {}: it has {bytes} bytes, and files of this process may have \
         {most}; raise the limit (ulimit -f)",
        path.display()
    )]
    DiskTooLarge {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        most: u64,
    },
    /// The socket cannot be created.
    #[error(
        "cannot listen on --socket-path {}: {source}; {}",
        path.display(),
        advice::for_error(source).unwrap_or(advice)
    )]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// The reason.
        source: io::Error,
        /// A hint for the user.
        advice: &'static str,
    },
    /// The inherited socket cannot be used.
    #[error(
        "cannot use --fd {number}: {source}; start this program with a Unix stream socket there \
         that listens or is connected"
    )]
    Inherited {
        /// The descriptor.
        number: RawFd,
        /// The reason.
        source: io::Error,
    },
    /// `--postcopy require` was given and the host does not permit post-copy.
    #[error(
        "cannot offer post-copy (--postcopy require): {0}; {advice}, or use --postcopy off",
        advice = .0.advice()
    )]
    PostcopyUnavailable(#[source] crate::postcopy::Unavailable),
    /// The statistics cannot be written.
    #[error(
        "cannot write --stats {}: {source}; {}",
        path.display(),
        advice::for_error(source).unwrap_or("use a path that this user may write")
    )]
    Stats {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// A front-end's connection ended in an error (with `--once` only; otherwise it is logged).
    #[error("cannot serve the front-end: {0}")]
    Connection(String),
    /// The process has other threads.
    #[error(
        "cannot serve front-ends: this process has {0} threads, and a fork of it has one; serve \
         before starting other threads"
    )]
    Threads(usize),
    /// A system call failed unexpectedly.
    #[error(
        "cannot {what}: {source}; {}",
        advice::for_start(source)
            .unwrap_or("free resources of the host, or report a bug if it has enough")
    )]
    System {
        /// The attempted operation.
        what: &'static str,
        /// The host's error.
        source: io::Error,
    },
}

/// The result of the daemon's operations.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Returns whether the host's limits or permissions for this process are the cause, so that
    /// another host or another user could do what was asked.
    pub fn is_of_host(&self) -> bool {
        let source = match self {
            Error::PostcopyUnavailable(_) | Error::DiskTooLarge { .. } => return true,
            Error::Connection(text) => return advice::for_text(text).is_some_and(advice::is_limit),
            Error::Disk { source, .. }
            | Error::Socket { source, .. }
            | Error::Stats { source, .. } => source,
            Error::System { source, .. } => {
                return advice::for_start(source).is_some_and(advice::is_limit);
            }
            _ => return false,
        };
        advice::for_error(source).is_some_and(advice::is_limit)
    }

    /// Returns a function that converts an I/O error into an [`Error::System`].
    pub(crate) fn system(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Error::System { what, source }
    }

    /// Creates an [`Error::System`] from `errno`.
    pub(crate) fn last_os(what: &'static str) -> Self {
        Error::System { what, source: io::Error::last_os_error() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_one_line() {
        let errors = [
            Error::Disk { path: "x.img".into(), source: io::ErrorKind::NotFound.into() },
            Error::Connection("broken".into()),
        ];
        for error in errors {
            assert!(!error.to_string().contains('\n'), "{error}");
        }
    }
}
