// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors in a command line, and in the output of a command.

use std::io;
use std::path::PathBuf;

use crate::error::{Error, Kind};

/// Errors in a command line, and in the output of a command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CliError {
    /// No command is given.
    #[error(
        "no command given; name one, as in {example}, or give --api-socket PATH alone to begin \
         without a VM; --help lists them"
    )]
    NoCommand {
        /// A command.
        example: String,
    },
    /// The command line is wrong.
    #[error("{error}; --help lists the options")]
    Usage {
        /// The first paragraph of the parser's error.
        error: String,
    },
    /// A path in a VM's configuration cannot be made absolute.
    #[error("cannot use the configuration's paths: {source}; give absolute ones")]
    ConfigPath {
        /// The system's error.
        source: io::Error,
    },
    /// The file of the timeline has the ending of another format.
    #[error(
        "cannot draw the timeline to {}: it is drawn as SVG; name a file that ends with .svg",
        path.display()
    )]
    NotSvg {
        /// The path.
        path: PathBuf,
    },
    /// The path of a snapshot cannot be made absolute.
    #[error("cannot use the snapshot path {}: {source}; give an absolute path", path.display())]
    SnapshotPath {
        /// The path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The man pages cannot be written.
    #[error("cannot write man pages to {}: {source}; name a writable folder", folder.display())]
    ManPages {
        /// The folder.
        folder: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The host lacks a required capability.
    #[error("this host lacks {name}: {why}")]
    Lacking {
        /// The capability.
        name: &'static str,
        /// The reason, with a remedy.
        why: String,
    },
    /// A report cannot be encoded.
    #[error("cannot write the report: {source}")]
    Json {
        /// The encoder's error.
        source: serde_json::Error,
    },
    /// Standard output cannot be written.
    #[error("cannot write to standard output: {source}")]
    Stdout {
        /// The system's error.
        source: io::Error,
    },
}

impl From<CliError> for Error {
    fn from(error: CliError) -> Self {
        let kind = match error {
            CliError::NoCommand { .. } | CliError::Usage { .. } | CliError::NotSvg { .. } => {
                Kind::Usage
            }
            CliError::ConfigPath { .. }
            | CliError::SnapshotPath { .. }
            | CliError::ManPages { .. }
            | CliError::Json { .. }
            | CliError::Stdout { .. } => Kind::Failed,
            CliError::Lacking { .. } => Kind::Host,
        };
        Error::of(kind, error)
    }
}
