// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Probes whether this process may open the userfaultfd that post-copy needs.

use std::path::Path;

use userfaultfd::UffdBuilder;

/// The reason why post-copy cannot be offered.
#[derive(Debug, thiserror::Error)]
#[error("this process cannot open a userfaultfd ({})", describe(source))]
pub struct Unavailable {
    source: userfaultfd::Error,
}

impl Unavailable {
    /// Returns the hint for the user.
    pub fn advice(&self) -> &'static str {
        // The library's error has no number.
        if describe(&self.source).contains("Too many open files") {
            "raise the limit of open files (ulimit -n)"
        } else if !Path::new("/dev/userfaultfd").exists() {
            "give this process CAP_SYS_PTRACE, or set the sysctl vm.unprivileged_userfaultfd to 1"
        } else {
            // The library tries no other way where the device exists.
            "let this user read and write /dev/userfaultfd"
        }
    }
}

/// Opens a userfaultfd exactly as `POSTCOPY_ADVISE` will (including faults in system calls, so that
/// I/O into missing memory waits instead of failing), and closes it again.
///
/// # Errors
/// [`Unavailable`] carries the host's error.
pub fn probe() -> Result<(), Unavailable> {
    UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        .user_mode_only(false)
        .create()
        .map(drop)
        .map_err(|source| Unavailable { source })
}

/// Returns the error and its causes on one line, without repetition.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(c) = cause {
        let part = c.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        cause = c.source();
    }
    text
}
