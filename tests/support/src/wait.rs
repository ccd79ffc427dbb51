// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waiting for what other threads and processes do.

use std::thread;
use std::time::{Duration, Instant};

/// Long enough for whatever does arrive, on a busy host.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough for what must not arrive to do so.
pub const A_WHILE: Duration = Duration::from_millis(150);

/// Waits for something to be so.
///
/// # Panics
///
/// With `what`, if it is not within [`PATIENCE`].
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}
