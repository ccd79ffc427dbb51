// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A limit on repeated messages.

use std::fmt;
use std::mem;
use std::time::{Duration, Instant};

/// Passes at most one message a second.
#[derive(Debug)]
pub(crate) struct OncePerSecond {
    last: Option<Instant>,
    left_out: u64,
}

/// The number of messages left out before the one that passes; empty text if there were none.
pub(crate) struct LeftOut(u64);

impl OncePerSecond {
    pub(crate) const fn new() -> Self {
        OncePerSecond { last: None, left_out: 0 }
    }

    /// Returns `None` if the message must not be logged.
    pub(crate) fn pass(&mut self) -> Option<LeftOut> {
        if self.last.is_some_and(|at| at.elapsed() < Duration::from_secs(1)) {
            self.left_out += 1;
            return None;
        }
        self.last = Some(Instant::now());
        Some(LeftOut(mem::take(&mut self.left_out)))
    }
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            n => write!(f, " ({n} more were not reported)"),
        }
    }
}
