// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tells a process from the children that it forks.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};

/// A word that the kernel zeroes in each child process, wherever the process forks.
static MARK: OnceLock<Option<Mark>> = OnceLock::new();

/// The next number for [`Mark`]. A child inherits it, so that its number is none of those of its
/// ancestors, whose values it inherits, too.
static NEXT: AtomicU64 = AtomicU64::new(1);

struct Mark(MmapRaw);

impl Mark {
    /// `None` if the kernel lacks the advice.
    fn new() -> Option<Self> {
        let len = size_of::<AtomicU64>();
        let page = MmapRaw::from(MmapOptions::new().len(len).map_anon().ok()?);
        // SAFETY: the range is this mapping, which is private as the advice demands. The advice
        // changes no byte of this process.
        let result = unsafe { libc::madvise(page.as_mut_ptr().cast(), len, libc::MADV_WIPEONFORK) };
        (result == 0).then_some(Mark(page))
    }

    fn word(&self) -> &AtomicU64 {
        // SAFETY: the mapping is aligned to a page, has room for the word, and lives as long as
        // `self`. Nothing accesses the word in another way: the kernel zeroes a child's own copy.
        unsafe { AtomicU64::from_ptr(self.0.as_mut_ptr().cast()) }
    }

    fn number(&self) -> u64 {
        let word = self.word();
        match word.load(Ordering::Relaxed) {
            0 => {
                let new = NEXT.fetch_add(1, Ordering::Relaxed);
                match word.compare_exchange(0, new, Ordering::Relaxed, Ordering::Relaxed) {
                    Ok(_) => new,
                    Err(other) => other,
                }
            }
            number => number,
        }
    }
}

/// The process that made this value. A child made by `fork` inherits all values of its parent,
/// but not the threads. Userfaultfds, event counters, sockets and memory objects are still the
/// parent's: a type that holds one checks this value before it ends or changes anything.
///
/// Every process is its own before Linux 4.14, which cannot tell.
///
/// # Examples
///
/// ```
/// use demand_source::OwnProcess;
///
/// let process = OwnProcess::current();
/// assert!(process.is_current());
/// ```
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct OwnProcess(u64);

impl OwnProcess {
    /// Returns the calling process.
    pub fn current() -> Self {
        OwnProcess(MARK.get_or_init(Mark::new).as_ref().map_or(0, Mark::number))
    }

    /// Returns whether the calling process is this one, and no child of it.
    #[inline]
    pub fn is_current(self) -> bool {
        // Initialised, because `current` made this value; so no lock is taken, which a thread of
        // the parent could have held.
        let mark = MARK.get().and_then(Option::as_ref);
        mark.is_none_or(|mark| mark.word().load(Ordering::Relaxed) == self.0)
    }
}

impl fmt::Debug for OwnProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnProcess").field("is_current", &self.is_current()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `check` in a child process; returns whether it returned true.
    fn in_child(check: impl FnOnce() -> bool) -> bool {
        // SAFETY: the child calls only `check`, which neither allocates nor locks, and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let status = i32::from(!check());
            // SAFETY: ends the child at once; nothing of it is needed any more.
            unsafe { libc::_exit(status) };
        }
        assert!(child > 0, "{}", std::io::Error::last_os_error());
        let mut status = 0;
        // SAFETY: the child is this process's own, and the pointer is valid.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        status == 0
    }

    #[test]
    fn child_is_another_process() {
        let parent = OwnProcess::current();
        assert!(parent.is_current() && parent == OwnProcess::current());
        assert!(in_child(|| !parent.is_current()));
        // Even once it has a number itself; and so is a child of the child.
        assert!(in_child(|| {
            let child = OwnProcess::current();
            child.is_current() && !parent.is_current() && in_child(|| !child.is_current())
        }));
        assert!(parent.is_current());
    }
}
