// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Counts how often a thread waits for pages of guest memory.

use std::fs;
use std::io;
use std::mem::MaybeUninit;

/// Returns whether this process has a userfaultfd, so that pages of guest memory may be missing.
pub(crate) fn userfaultfd_is_open() -> bool {
    let Ok(descriptors) = fs::read_dir("/proc/self/fd") else {
        return false;
    };
    let mut targets = descriptors.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    targets.any(|target| target.as_os_str() == "anon_inode:[userfaultfd]")
}

/// Calls `access`, which only accesses memory. Returns its result, and how often the thread slept
/// meanwhile: once for each page that it had to wait for.
pub(crate) fn count_waits<T>(access: impl FnOnce() -> T) -> (T, u64) {
    let before = sleeps();
    let result = access();
    let waits = match (before, sleeps()) {
        (Ok(before), Ok(after)) => after.saturating_sub(before),
        _ => 0,
    };
    (result, waits)
}

/// Returns how often this thread has given up the processor of its own accord.
fn sleeps() -> io::Result<u64> {
    let mut usage = MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: the call writes the whole structure if it succeeds, which is checked before it is
    // read.
    let usage = unsafe {
        match libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) {
            0 => usage.assume_init(),
            _ => return Err(io::Error::last_os_error()),
        }
    };
    u64::try_from(usage.ru_nvcsw).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn waits_are_counted() {
        assert_eq!(count_waits(|| 1), (1, 0));
        let twice = || (0..2).for_each(|_| std::thread::sleep(Duration::from_millis(1)));
        assert_eq!(count_waits(twice).1, 2);
    }
}
