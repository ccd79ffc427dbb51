// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors as the user sees them: one line, and an exit status.

use std::error::Error as StdError;
use std::fmt;
use std::process::ExitCode;

use crate::limits::advise;

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

/// An error of the VMM: one line with the operation, the cause, and a remedy.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    message: String,
}

impl Error {
    /// Returns an error of kind [`Failed`](Kind::Failed).
    pub fn failed(message: impl fmt::Display) -> Self {
        Error::new(Kind::Failed, message)
    }

    /// Returns an error of kind [`Usage`](Kind::Usage).
    pub fn usage(message: impl fmt::Display) -> Self {
        Error::new(Kind::Usage, message)
    }

    /// Returns an error of kind [`Host`](Kind::Host).
    pub fn host(message: impl fmt::Display) -> Self {
        Error::new(Kind::Host, message)
    }

    fn new(kind: Kind, message: impl fmt::Display) -> Self {
        // Causes may contain line breaks.
        let message = message.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        let (message, is_limit) = advise(message);
        // Another host or another user could perform the operation.
        let kind = if is_limit && kind == Kind::Failed { Kind::Host } else { kind };
        Error { kind, message }
    }

    /// Returns the kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the exit status of the process.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self.kind {
            Kind::Failed => 1,
            Kind::Usage => 2,
            Kind::Host => 3,
        })
    }
}

/// The hint for a state from a snapshot that KVM refuses.
pub(crate) const STATE_REFUSED: &str = "the snapshot may be damaged or from another kind of host, \
                                        and the kernel's log may say more";

/// Returns the error for a thread that cannot be started; `what` is its duty.
pub(crate) fn no_thread(what: &str, error: std::io::Error) -> Error {
    Error::host(format!(
        "cannot start a thread to {what}: {error}; raise the limit of threads (ulimit -u)"
    ))
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line() {
        let error = Error::host("open /dev/kvm:\n  no such file;\tload kvm");
        assert_eq!(error.to_string(), "open /dev/kvm: no such file; load kvm");
        assert_eq!(error.kind(), Kind::Host);
    }
}
