// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Probes whether this process may open the userfaultfd that post-copy needs.

use userfaultfd::UffdBuilder;

/// The reason why post-copy cannot be offered.
#[derive(Debug, thiserror::Error)]
#[error("this process cannot open a userfaultfd through /dev/userfaultfd ({0})")]
pub struct Unavailable(String);

impl Unavailable {
    /// Returns the hint for the user.
    pub fn advice(&self) -> &'static str {
        if self.0.contains("Too many open files") {
            "raise the limit of open files (ulimit -n)"
        } else {
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
        .map_err(|e| Unavailable(describe(&e)))
}

/// Returns the error and its causes on one line, without repetition.
fn describe(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(c) = cause {
        let part = c.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        cause = c.source();
    }
    text
}
