// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waits for other threads and processes.

use std::collections::HashSet;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

/// Time limit for an event that must happen, on a busy host.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Time to wait for an event that must not happen.
pub const A_WHILE: Duration = Duration::from_millis(150);

/// Waits until `done` returns true.
///
/// # Panics
///
/// With `what`, if that takes longer than [`PATIENCE`].
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Returns whether the process accepts connections on a Unix socket. The existence of the socket's
/// file does not imply that: binding creates it, and listening comes later.
pub fn listens(process: u32) -> bool {
    // See proc_net(5): the flags contain __SO_ACCEPTCON, followed by type, state and inode.
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
