// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ending threads that may be blocked in the kernel.

use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How often an end looks whether the threads are done.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Joins threads that were told to end, but waits for at most `within`; returns how many still
/// run. Those end with the process at the latest, and must own all that they use. The calling
/// thread is not waited for.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
///
/// let (sender, receiver) = std::sync::mpsc::channel::<()>();
/// let threads = vec![std::thread::spawn(|| {}), std::thread::spawn(move || drop(receiver.recv()))];
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
            // A panic was reported by the thread itself.
            let _ = done.join();
        }
        if left.is_empty() || Instant::now() >= due {
            return left.len();
        }
        thread::sleep(LOOK_EVERY);
    }
}
