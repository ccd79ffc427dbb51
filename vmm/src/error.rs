// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors as the user sees them: one line, and an exit status.
//!
//! Each module of this crate has its typed errors, which state facts; `From` gives each of them its
//! [`Kind`], and [`Error`] its line. The one advice that is added here is about resource limits.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::process::ExitCode;

use crate::limits::{Limit, advise};

/// The kind of an error, which decides the exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The operation started and failed: status 1.
    Failed,
    /// The command line is wrong: status 2.
    Usage,
    /// This host cannot do what was asked: status 3.
    Host,
}

/// An error of the VMM: one line with the operation, the cause, and a remedy. Its
/// [`source`](StdError::source) is the typed error that it was made of.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// Returns an error of this kind, with the line of `source`, which it keeps.
    pub fn of(kind: Kind, source: impl StdError + Send + Sync + 'static) -> Self {
        let error = Error::new(kind, &source);
        Error { source: Some(Box::new(source)), ..error }
    }

    /// Returns an error of kind [`Failed`](Kind::Failed), for a program without a typed error.
    pub fn failed(message: impl fmt::Display) -> Self {
        Error::new(Kind::Failed, message)
    }

    /// Returns an error of kind [`Usage`](Kind::Usage), as above.
    pub fn usage(message: impl fmt::Display) -> Self {
        Error::new(Kind::Usage, message)
    }

    /// Returns an error of kind [`Host`](Kind::Host), as above.
    pub fn host(message: impl fmt::Display) -> Self {
        Error::new(Kind::Host, message)
    }

    fn new(kind: Kind, message: impl fmt::Display) -> Self {
        // Causes may contain line breaks.
        let message = message.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        let (message, limit) = advise(message);
        let of_host = limit == Some(Limit::Host) && kind == Kind::Failed;
        let kind = if of_host { Kind::Host } else { kind };
        Error { kind, message, source: None }
    }

    /// Returns the same error with another line.
    pub(crate) fn map_line(self, line: impl FnOnce(&str) -> String) -> Self {
        Error { message: line(&self.message), ..self }
    }

    /// Returns the kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the exit status of the process.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.exit_status())
    }

    /// Returns the same, as a number.
    pub(crate) fn exit_status(&self) -> u8 {
        match self.kind {
            Kind::Failed => 1,
            Kind::Usage => 2,
            Kind::Host => 3,
        }
    }
}

/// Error for a thread that cannot be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start a thread to {duty}: {source}; raise the limit of threads (ulimit -u)")]
pub struct ThreadError {
    pub(crate) duty: &'static str,
    pub(crate) source: io::Error,
}

/// Returns the error for a thread that cannot be started.
pub(crate) fn no_thread(duty: &'static str, source: io::Error) -> Error {
    Error::of(Kind::Host, ThreadError { duty, source })
}

/// Gives errors of one kind their [`Kind`].
macro_rules! kinds {
    ($($error:ty: $kind:ident,)+) => {
        $(
            impl From<$error> for Error {
                fn from(error: $error) -> Self {
                    Error::of(Kind::$kind, error)
                }
            }
        )+
    };
}

// The errors of the libraries, where they need no more words.
kinds! {
    demand_kvm::FaultError: Failed,
    demand_kvm::KvmError: Host,
    demand_memory::FetchError: Failed,
    demand_memory::WriteImageError: Failed,
    demand_source::ImageWriterError: Failed,
    demand_source::SourceError: Failed,
    demand_vhost::Error: Failed,
}

#[cfg(feature = "remote")]
kinds! {
    demand_remote::CacheError: Failed,
    demand_remote::StoreError: Failed,
    demand_remote::image::ImageError: Failed,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line() {
        let error = Error::host("open /dev/kvm:\n  no such file;\tload kvm");
        assert_eq!(error.to_string(), "open /dev/kvm: no such file; load kvm");
        assert_eq!(error.kind(), Kind::Host);
    }

    #[test]
    fn error_keeps_its_source() {
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        let error = Error::of(Kind::Failed, full);
        assert_eq!(error.kind(), Kind::Failed);
        let source = error.source().unwrap().downcast_ref::<io::Error>().unwrap();
        assert!(error.to_string().starts_with(&format!("{source}; free some space")), "{error}");
        // A limit of the host is the host's.
        let limit = io::Error::from_raw_os_error(libc::EMFILE);
        assert_eq!(Error::of(Kind::Failed, limit).kind(), Kind::Host);
    }
}
