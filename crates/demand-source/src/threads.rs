// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Joins threads that may be blocked in the kernel, within a time limit.

use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Interval at which `join_within` checks for finished threads.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Joins threads that have been asked to end, but waits for at most `within`; returns the number of
/// threads that still run. Those end when the process does, at the latest, so they must own
/// everything that they use. The calling thread is skipped.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
///
/// let (sender, receiver) = std::sync::mpsc::channel::<()>();
/// let threads =
///     vec![std::thread::spawn(|| {}), std::thread::spawn(move || drop(receiver.recv()))];
/// assert_eq!(demand_source::join_within(threads, Duration::from_millis(50)), 1);
/// drop(sender);
/// ```
pub fn join_within(threads: Vec<JoinHandle<()>>, within: Duration) -> usize {
    let due = Instant::now() + within;
    let this_thread = thread::current().id();
    let mut left: Vec<_> =
        threads.into_iter().filter(|handle| handle.thread().id() != this_thread).collect();
    loop {
        for done in left.extract_if(.., |handle| handle.is_finished()) {
            // The panic hook has already reported a panic of the thread.
            let _ = done.join();
        }
        if left.is_empty() || Instant::now() >= due {
            return left.len();
        }
        thread::sleep(LOOK_EVERY);
    }
}
