// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of the source over TCP.

use std::io;
use std::time::Duration;

use demand_source::{Retry, SourceError};

/// The reason why pages could not be read from a server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TcpError {
    /// The server cannot be reached.
    #[error("cannot connect to {address}: {source}; start the page server there")]
    Connect {
        /// The server, as the user named it.
        address: String,
        /// The system's error.
        source: io::Error,
    },
    /// The connection broke.
    #[error("lost the connection to {address}: {source}; check the page server there")]
    Lost {
        /// The server, as the user named it.
        address: String,
        /// The system's error.
        source: io::Error,
    },
    /// A query was not answered in time.
    #[error("{address} has not answered for {waited:?}; check the page server there")]
    NoAnswer {
        /// The server, as the user named it.
        address: String,
        /// Time since the query.
        waited: Duration,
    },
    /// The peer does not keep to the protocol.
    #[error("{address} sent {what}; check that a page server of this version listens there")]
    Nonsense {
        /// The server, as the user named it.
        address: String,
        /// The unexpected message.
        what: &'static str,
    },
    /// The server serves another image than before.
    #[error("{address} now serves another image; serve the original image there")]
    OtherImage {
        /// The server, as the user named it.
        address: String,
    },
    /// The server could not read the bytes.
    #[error("{address} cannot read its image at offset {offset}; see its messages")]
    Refused {
        /// The server, as the user named it.
        address: String,
        /// Offset in the image, in bytes.
        offset: u64,
        /// Whether a later query may succeed.
        retry: Retry,
    },
}

impl TcpError {
    /// Returns whether another attempt may succeed by itself. Waiting helps against a server that
    /// is away, and not against one that serves the wrong bytes.
    pub fn retry(&self) -> Retry {
        match self {
            TcpError::OtherImage { .. } => Retry::Never,
            TcpError::Refused { retry, .. } => *retry,
            _ => Retry::Later,
        }
    }
}

impl From<TcpError> for SourceError {
    fn from(error: TcpError) -> Self {
        let retry = error.retry();
        SourceError::other(error, retry)
    }
}
