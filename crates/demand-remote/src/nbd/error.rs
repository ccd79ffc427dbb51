// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of the NBD client.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use demand_source::{Retry, SourceError};

/// Longest part of a server's message that an error shows, in characters.
const LONGEST_MESSAGE: usize = 400;

/// An error of an [`NbdSource`](super::NbdSource).
#[derive(Debug, thiserror::Error)]
#[error("cannot use {export}: {kind}")]
pub struct NbdError {
    export: String,
    #[source]
    kind: NbdErrorKind,
}

impl NbdError {
    pub(crate) fn new(export: &str, kind: NbdErrorKind) -> Self {
        NbdError { export: export.to_owned(), kind }
    }

    /// Returns the reason.
    pub fn kind(&self) -> &NbdErrorKind {
        &self.kind
    }

    /// Returns whether another attempt may succeed by itself. Waiting helps against a server that
    /// is away, or that restarts and has not added its exports yet; it does not help against one
    /// that has another export than before, or differs in TLS.
    pub fn retry(&self) -> Retry {
        match &self.kind {
            NbdErrorKind::Refused { refusal: Refusal::TlsRequired, .. }
            | NbdErrorKind::NoTls
            | NbdErrorKind::Changed { .. } => Retry::Never,
            _ => Retry::Later,
        }
    }
}

impl From<NbdError> for SourceError {
    fn from(error: NbdError) -> Self {
        let retry = error.retry();
        SourceError::other(error, retry)
    }
}

/// Returns the error of a server that does not keep to the protocol.
pub(crate) fn violation<T>(what: &'static str) -> Result<T, NbdErrorKind> {
    Err(NbdErrorKind::Protocol { what })
}

/// Names the error of a stream.
pub(crate) fn lost(source: io::Error) -> NbdErrorKind {
    let source = match source.kind() {
        kind @ io::ErrorKind::UnexpectedEof => io::Error::new(kind, "the server closed it"),
        _ => source,
    };
    NbdErrorKind::Lost { source }
}

/// Returns the error for one of the requests that failed for the same reason.
pub(crate) fn shared(error: &Arc<NbdError>) -> SourceError {
    SourceError::other(error.clone(), error.retry())
}

/// The reason of an [`NbdError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NbdErrorKind {
    /// The server cannot be reached.
    #[error("the server cannot be reached: {source}; check that it runs at this address")]
    Connect {
        /// The system's error.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection broke: {source}; check the server and the network")]
    Lost {
        /// The system's error.
        source: io::Error,
    },
    /// The server has been silent for too long.
    #[error(
        "the server has not answered for {after:?}; check the server, the network, and how many \
         connections the server allows"
    )]
    Silent {
        /// The time limit.
        after: Duration,
    },
    /// The TLS handshake failed.
    #[error("TLS failed: {source}; check the certificates of both sides and the server's name")]
    Tls {
        /// The reason.
        source: io::Error,
    },
    /// A certificate or key cannot be used.
    #[error("the certificates in {} are unusable: {cause}; check the file", file.display())]
    Certificates {
        /// The file.
        file: PathBuf,
        /// The reason.
        cause: String,
    },
    /// The system has no certificates of authorities.
    #[error("the system has no usable certificates of authorities; name a file that has them")]
    NoAuthorities,
    /// The server does not encrypt.
    #[error("the server offers no TLS; start it with TLS, or write nbd instead of nbds")]
    NoTls,
    /// The server refuses the export or an option.
    #[error("the server refuses: {refusal}{}", Said(message))]
    Refused {
        /// The class of the refusal.
        refusal: Refusal,
        /// The server's message, with control characters escaped.
        message: String,
    },
    /// The server does not keep to the protocol.
    #[error("the server broke the NBD protocol: {what}; check that an NBD server listens there")]
    Protocol {
        /// The violation.
        what: &'static str,
    },
    /// The server has another export than when the source was opened.
    #[error(
        "the server now has another export: its {what} was {was} bytes, and is {now}; serve the \
         original export"
    )]
    Changed {
        /// The property that differs.
        what: &'static str,
        /// Its value when the source was opened, in bytes.
        was: u64,
        /// Its value now, in bytes.
        now: u64,
    },
    /// The server could not serve a range.
    #[error("the server failed to serve {len} bytes at offset {offset}: {error}{}", Said(message))]
    Failed {
        /// Offset of the range, in bytes.
        offset: u64,
        /// Length of the range, in bytes.
        len: u64,
        /// The server's error.
        error: Errno,
        /// The server's message, with control characters escaped.
        message: String,
    },
}

/// A server's message behind an error, or advice in its place.
struct Said<'a>(&'a String);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &**self.0 {
            "" => f.write_str("; see its log"),
            message => write!(f, "; it says: {message}"),
        }
    }
}

/// The class of a server's refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The server does not know the option.
    #[error("it does not know an option that this client needs")]
    Unsupported,
    /// The server's policy forbids it.
    #[error("its policy forbids it")]
    Policy,
    /// The server takes the option for invalid.
    #[error("it takes an option for invalid")]
    Invalid,
    /// The server's platform cannot do it.
    #[error("its platform does not support it")]
    Platform,
    /// The server serves the export with TLS only.
    #[error("it requires TLS (write nbds instead of nbd)")]
    TlsRequired,
    /// The server has no such export.
    #[error("it has no such export")]
    UnknownExport,
    /// The server is shutting down.
    #[error("it is shutting down")]
    ShuttingDown,
    /// The server wants a client that respects its block sizes.
    #[error("it wants its block sizes respected")]
    BlockSizes,
    /// The option is too big for the server.
    #[error("an option is too big for it")]
    TooBig,
    /// Another refusal, by its number in the protocol.
    #[error("error {0:#x}")]
    Other(u32),
}

/// An error number of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(
    /// The number.
    pub u32,
);

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            1 => "operation not permitted (EPERM)",
            5 => "input/output error (EIO)",
            12 => "out of memory (ENOMEM)",
            22 => "invalid argument (EINVAL)",
            28 => "no space left (ENOSPC)",
            75 => "value too large (EOVERFLOW)",
            95 => "not supported (ENOTSUP)",
            108 => "the server is shutting down (ESHUTDOWN)",
            other => return write!(f, "error {other}"),
        };
        f.write_str(name)
    }
}

/// Returns a server's message as one line: control characters are escaped, and what is very long is
/// cut.
pub(crate) fn one_line(message: &[u8]) -> String {
    let text = String::from_utf8_lossy(message);
    let mut line = String::new();
    for char in text.trim().chars().take(LONGEST_MESSAGE) {
        if char.is_control() {
            line.extend(char.escape_default());
        } else {
            line.push(char);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_servers_are_one_line() {
        assert_eq!(one_line(b"gone\x1b[2J\nnow\xff\n"), "gone\\u{1b}[2J\\nnow\u{fffd}");
        assert_eq!(one_line(&[b'x'; 5000]).len(), LONGEST_MESSAGE);
    }

    #[test]
    fn other_export_is_not_retried() {
        let refused = |refusal| NbdErrorKind::Refused { refusal, message: "no vm7".into() };
        let error = NbdError::new("nbd://host/vm7", refused(Refusal::UnknownExport));
        assert_eq!(
            error.to_string(),
            "cannot use nbd://host/vm7: the server refuses: it has no such export; it says: no vm7"
        );
        assert_eq!(error.retry(), Retry::Later);
        let changed = NbdErrorKind::Changed { what: "size", was: 8192, now: 4096 };
        let error = SourceError::from(NbdError::new("nbd://host/vm7", changed));
        assert_eq!(error.retry(), Retry::Never);
    }
}
