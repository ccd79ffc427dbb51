// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The daemon's errors, each one line: the operation, the cause and a hint.

use std::io;
use std::path::{Path, PathBuf};

/// Errors of the daemon.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option's value is invalid.
    #[error("cannot use {option} {value}: {problem}; see --help")]
    Option {
        /// The option as written on the command line.
        option: &'static str,
        /// The given value.
        value: String,
        /// The reason why the value is invalid.
        problem: String,
    },
    /// The disk image cannot be opened or is not usable.
    #[error(
        "cannot open --disk {}: {problem}; use a raw image or a block device that this user may \
         open",
        path.display()
    )]
    Disk {
        /// The image.
        path: PathBuf,
        /// The host's error.
        problem: String,
    },
    /// The disk must be writable, but can only be read.
    #[error(
        "cannot open --disk {} for writing: {problem}; use --read-only, or make it \
         writable",
        path.display()
    )]
    ReadOnly {
        /// The image or block device.
        path: PathBuf,
        /// The host's error.
        problem: String,
    },
    /// The socket cannot be created.
    #[error("cannot listen on --socket {}: {problem}; {advice}", path.display())]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// The host's error.
        problem: String,
        /// A hint for the user.
        advice: &'static str,
    },
    /// A limit of this process prevents the operation.
    #[error("cannot use {option} {}: {problem}; raise the limit ({limit})", path.display())]
    Limit {
        /// The option that names the file.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's error.
        problem: String,
        /// The command that raises the limit.
        limit: &'static str,
    },
    /// `--postcopy require` was given and the host does not permit post-copy.
    #[error(
        "cannot offer post-copy (--postcopy require): {0}; {advice}, or use --postcopy off",
        advice = .0.advice()
    )]
    PostcopyUnavailable(crate::postcopy::Unavailable),
    /// The statistics cannot be written.
    #[error(
        "cannot write --stats {}: {source}; use a path that this user may write",
        path.display()
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
        "cannot {what}: {source}; free resources of the host, or report a bug if it has enough"
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
    /// Returns the daemon's exit status: 1 for a failure, 2 for a wrong command line, 3 if this
    /// host cannot do what was asked.
    pub fn exit_status(&self) -> u8 {
        match self {
            Error::Option { .. } => 2,
            Error::PostcopyUnavailable(_) => 3,
            _ => 1,
        }
    }

    /// Returns an [`Error::Limit`] if `error` means that too many files are open.
    pub(crate) fn too_many_files(
        option: &'static str,
        path: &Path,
        error: &io::Error,
    ) -> Option<Self> {
        (error.raw_os_error() == Some(libc::EMFILE)).then(|| Error::Limit {
            option,
            path: path.to_path_buf(),
            problem: error.to_string(),
            limit: "ulimit -n",
        })
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
    fn errors_are_one_line_with_their_status() {
        let errors = [
            (
                Error::Option {
                    option: "--queue-size",
                    value: "3".into(),
                    problem: "not a power of two".into(),
                },
                2,
            ),
            (Error::Disk { path: "x.img".into(), problem: "No such file".into() }, 1),
            (Error::Connection("broken".into()), 1),
        ];
        for (e, status) in errors {
            assert_eq!(e.exit_status(), status);
            assert!(!e.to_string().contains('\n'), "{e}");
        }
    }
}
