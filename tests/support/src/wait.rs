// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waiting for what other threads and processes do.

use std::collections::HashSet;
use std::fs;
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

/// Whether the process accepts connections on a Unix socket. That the socket's file is there does
/// not say so: binding makes it, and listening comes after.
pub fn listens(process: u32) -> bool {
    // See proc_net(5): the flags say __SO_ACCEPTCON, then come type, state and inode.
    let sockets = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let listening: HashSet<String> = sockets
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|words| words.len() >= 7 && words[3] == "00010000")
        .map(|words| format!("socket:[{}]", words[6]))
        .collect();
    let Ok(descriptors) = fs::read_dir(format!("/proc/{process}/fd")) else { return false };
    descriptors
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .any(|target| listening.contains(&*target.to_string_lossy()))
}
