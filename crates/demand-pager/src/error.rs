// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of pagers.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use demand_source::{Retry, SourceError};

use crate::protocol::{Unread, VERSION};

/// An error of a [`PagerSource`](crate::PagerSource).
#[derive(Debug, thiserror::Error)]
#[error("cannot use {pager}: {kind}")]
pub struct PagerError {
    pager: String,
    #[source]
    kind: PagerErrorKind,
}

impl PagerError {
    pub(crate) fn new(pager: &str, kind: PagerErrorKind) -> Self {
        PagerError { pager: pager.to_owned(), kind }
    }

    /// Returns the reason.
    pub fn kind(&self) -> &PagerErrorKind {
        &self.kind
    }

    /// Returns whether another attempt may succeed by itself.
    pub fn retry(&self) -> Retry {
        match &self.kind {
            PagerErrorKind::Changed { .. } => Retry::Never,
            PagerErrorKind::Refused { retry, .. } | PagerErrorKind::Failed { retry, .. } => *retry,
            _ => Retry::Later,
        }
    }
}

impl From<PagerError> for SourceError {
    fn from(error: PagerError) -> Self {
        let retry = error.retry();
        SourceError::other(error, retry)
    }
}

/// Returns the error for one of the faults that failed for the same reason.
pub(crate) fn shared(error: &Arc<PagerError>) -> SourceError {
    SourceError::other(error.clone(), error.retry())
}

/// The reason of a [`PagerError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagerErrorKind {
    /// The pager cannot be reached.
    #[error("the pager cannot be reached: {source}; check that it runs and has this socket")]
    Connect {
        /// The system's error.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection broke: {source}; check the pager")]
    Lost {
        /// The system's error.
        source: io::Error,
    },
    /// This process cannot make the memory, or the descriptors, that the pager's pages take.
    #[error("this process cannot prepare for its pages: {source}")]
    Local {
        /// The system's error.
        source: io::Error,
    },
    /// The pager has not answered the handshake.
    #[error("the pager has not answered the handshake for {after:?}; check the pager")]
    Silent {
        /// The time limit.
        after: Duration,
    },
    /// The pager speaks another version of the protocol.
    #[error(
        "the pager speaks version {theirs} of the protocol, and this program version {VERSION}; \
         use a pager of version {VERSION}"
    )]
    Version {
        /// The pager's version.
        theirs: u16,
    },
    /// The pager does not keep to the protocol.
    #[error("the pager broke the protocol: {what}; check that a pager listens there")]
    Protocol {
        /// The violation.
        what: &'static str,
    },
    /// The pager serves another image than when the source was opened.
    #[error("the pager now has another image: its {what} differs; serve the original image")]
    Changed {
        /// The property that differs.
        what: &'static str,
    },
    /// The pager refuses the handshake.
    #[error("the pager refuses{}", Said(text))]
    Refused {
        /// Whether another attempt may succeed.
        retry: Retry,
        /// The pager's words.
        text: String,
    },
    /// The pager could not serve a range.
    #[error("the pager failed to serve {len} bytes at offset {offset}{}", Said(text))]
    Failed {
        /// Offset of the range, in bytes.
        offset: u64,
        /// Length of the range, in bytes.
        len: u64,
        /// Whether another attempt may succeed.
        retry: Retry,
        /// The pager's words.
        text: String,
    },
}

impl PagerErrorKind {
    /// Returns whether faults wait for a new connection, instead of failing.
    pub(crate) fn is_absence(&self) -> bool {
        matches!(self, PagerErrorKind::Connect { .. } | PagerErrorKind::Lost { .. })
    }
}

/// Returns the error of a pager that does not keep to the protocol.
pub(crate) fn violation<T>(what: &'static str) -> Result<T, PagerErrorKind> {
    Err(PagerErrorKind::Protocol { what })
}

/// Names the error of a stream.
pub(crate) fn lost(source: io::Error) -> PagerErrorKind {
    let source = match source.kind() {
        kind @ io::ErrorKind::UnexpectedEof => io::Error::new(kind, "the pager closed it"),
        _ => source,
    };
    PagerErrorKind::Lost { source }
}

impl From<Unread> for PagerErrorKind {
    fn from(error: Unread) -> Self {
        match error {
            Unread::Stream(error) => lost(error),
            Unread::Nonsense(what) => PagerErrorKind::Protocol { what },
        }
    }
}

/// A pager's words behind an error, or advice in their place.
struct Said<'a>(&'a String);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &**self.0 {
            "" => f.write_str("; see its log"),
            text => write!(f, ": {text}"),
        }
    }
}
