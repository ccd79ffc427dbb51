// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors as the user meets them: one line, and an exit status.

use std::error::Error as StdError;
use std::fmt;
use std::process::ExitCode;

use crate::limits::advise;

/// Whose fault it is, which is what the exit status tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What was asked was begun and failed: status 1.
    Failed,
    /// The command line is wrong: status 2.
    Usage,
    /// This host cannot do what was asked: status 3.
    Host,
}

/// An error of the VMM: one line that says what was asked, what the host said, and what to do
/// about it.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    message: String,
}

impl Error {
    /// What was asked failed.
    pub fn failed(message: impl fmt::Display) -> Self {
        Error::new(Kind::Failed, message)
    }

    /// The command line is wrong.
    pub fn usage(message: impl fmt::Display) -> Self {
        Error::new(Kind::Usage, message)
    }

    /// The host cannot do what was asked.
    pub fn host(message: impl fmt::Display) -> Self {
        Error::new(Kind::Host, message)
    }

    fn new(kind: Kind, message: impl fmt::Display) -> Self {
        // One line, whatever the message was made of.
        let message = message.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        let (message, is_limit) = advise(message);
        // Another host, or another user, could do it.
        let kind = if is_limit && kind == Kind::Failed { Kind::Host } else { kind };
        Error { kind, message }
    }

    /// Whose fault it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The exit status of the process.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self.kind {
            Kind::Failed => 1,
            Kind::Usage => 2,
            Kind::Host => 3,
        })
    }
}

/// What to do if KVM refuses a state that was read from a snapshot.
pub(crate) const STATE_REFUSED: &str = "the snapshot may be damaged or from another kind of host, \
                                        and the kernel's log may say more";

/// The host has no thread to `what` with.
pub(crate) fn no_thread(what: &str, error: std::io::Error) -> Error {
    Error::host(format!(
        "start a thread to {what}: {error}; raise the limit of threads (ulimit -u)"
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
