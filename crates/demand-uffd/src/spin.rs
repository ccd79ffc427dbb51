// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Decides whether a thread that has served a fault spins until the next one, or sleeps.

use std::fs::File;
use std::hint;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Interval between looks at the host's load.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Number of pauses between two tries, so that a thread that reports a fault gets the lock of its
/// userfaultfd.
const PAUSES: u32 = 8;

/// The processors of the host, and how many threads want one.
#[derive(Debug)]
pub(crate) struct Processors {
    count: u64,
    /// `None` if nothing tells how many threads run.
    load: Option<File>,
    /// Returns how often the calling thread has left its processor to another against its will.
    displacements: fn() -> i64,
}

impl Processors {
    pub(crate) fn new() -> Self {
        let ours = std::thread::available_parallelism().map_or(1, usize::from);
        // SAFETY: sysconf touches no memory of this process.
        let online = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
        let load = (ours > 1).then(|| File::open("/proc/loadavg").ok()).flatten();
        Processors { count: u64::try_from(online).unwrap_or(0), load, displacements }
    }

    /// Returns processors of which one is always idle.
    #[cfg(test)]
    pub(crate) fn idle() -> Self {
        let load = tempfile::tempfile().unwrap();
        load.write_all_at(b"0.00 0.00 0.00 1/100 7", 0).unwrap();
        Processors { count: 1, load: Some(load), displacements: || 0 }
    }

    /// Returns whether every thread of the host that can run has a processor: if the caller slept,
    /// its processor would be idle.
    fn suffice(&self) -> bool {
        let Some(load) = &self.load else { return false };
        let mut text = [0; 64];
        let running = load.read_at(&mut text, 0).ok().and_then(|len| running(&text[..len]));
        running.is_some_and(|running| running <= self.count)
    }
}

/// Returns the number of threads that run or want to, from the text of `/proc/loadavg`.
fn running(load: &[u8]) -> Option<u64> {
    let counts = load.split(|byte| *byte == b' ').nth(3)?;
    let running = counts.split(|byte| *byte == b'/').next()?;
    std::str::from_utf8(running).ok()?.parse().ok()
}

/// The spinning of one thread.
pub(crate) struct Spinner {
    /// Longest time of one spin; zero for none.
    limit: Duration,
    /// When the thread last had nothing left to serve.
    idle_since: Option<Instant>,
    /// Whether the latest fault came within `limit` of the one before.
    thick: bool,
    looked: Option<Look>,
}

/// A look at the host's load.
struct Look {
    at: Instant,
    /// How often this thread had to leave its processor to another by then.
    displaced: i64,
    may_spin: bool,
}

impl Spinner {
    pub(crate) fn new(limit: Duration) -> Self {
        Spinner { limit, idle_since: None, thick: false, looked: None }
    }

    /// Notes that a message came for which the thread was woken.
    pub(crate) fn woken(&mut self) {
        self.thick = self.idle_since.take().is_some_and(|since| since.elapsed() <= self.limit);
    }

    /// Notes that the next message was there when the thread had served the one before.
    pub(crate) fn hurried(&mut self) {
        self.thick = true;
    }

    /// Notes that the thread has served all messages, and begins to wait for the next.
    pub(crate) fn idle(&mut self) {
        if self.limit > Duration::ZERO {
            self.idle_since = Some(Instant::now());
        }
    }

    /// Returns whether it is worth while to spin now, and costs no other thread its processor.
    pub(crate) fn may_spin(&mut self, processors: &Processors) -> bool {
        let Some(now) = self.idle_since.filter(|_| self.thick) else { return false };
        match &self.looked {
            Some(look) if now.duration_since(look.at) < LOOK_EVERY => look.may_spin,
            looked => {
                let displaced = (processors.displacements)();
                let alone = looked.as_ref().is_none_or(|look| look.displaced == displaced);
                let may_spin = alone && processors.suffice();
                self.looked = Some(Look { at: now, displaced, may_spin });
                may_spin
            }
        }
    }

    /// Tries until something is found or the time is over.
    pub(crate) fn spin<T>(&mut self, mut find: impl FnMut() -> Option<T>) -> Option<T> {
        let begun = self.idle_since?;
        loop {
            for _ in 0..PAUSES {
                hint::spin_loop();
            }
            if let Some(found) = find() {
                return Some(found);
            }
            if begun.elapsed() >= self.limit {
                self.thick = false;
                return None;
            }
        }
    }
}

/// Returns how often the calling thread has left its processor to another against its will.
fn displacements() -> i64 {
    // SAFETY: all bytes zero are a valid value of this structure of numbers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes the structure, which lives until the call returns.
    match unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) } {
        0 => usage.ru_nivcsw,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn running_threads_are_read_from_the_load() {
        assert_eq!(running(b"0.20 0.18 0.12 3/80 11206\n"), Some(3));
        assert_eq!(running(b"0.20 0.18"), None);
        assert_eq!(running(b"a b c d/e"), None);
        let mut processors = Processors::idle();
        assert!(processors.suffice());
        processors.count = 0;
        assert!(!processors.suffice(), "one thread has no processor");
        processors.load = None;
        processors.count = 8;
        assert!(!processors.suffice(), "nothing tells");
    }

    #[test]
    fn spinning_follows_a_fault_that_came_soon() {
        let processors = Processors::idle();
        let mut spinner = Spinner::new(LONG);
        spinner.woken();
        spinner.idle();
        assert!(!spinner.may_spin(&processors), "the first fault");
        spinner.woken();
        spinner.idle();
        assert!(spinner.may_spin(&processors));
        assert_eq!(spinner.spin(|| Some(7)), Some(7));
        spinner.limit = Duration::ZERO;
        assert_eq!(spinner.spin(|| None::<()>), None);
        assert!(!spinner.may_spin(&processors), "the time passed without a fault");
    }

    #[test]
    fn busy_host_is_looked_at_again() {
        let (mut processors, mut spinner) = (Processors::idle(), Spinner::new(LONG));
        spinner.idle();
        spinner.woken();
        spinner.idle();
        processors.count = 0;
        assert!(!spinner.may_spin(&processors));
        processors.count = 1;
        std::thread::sleep(2 * LOOK_EVERY);
        spinner.idle();
        assert!(spinner.may_spin(&processors));
    }

    #[test]
    fn displaced_thread_does_not_spin() {
        let (processors, mut spinner) = (Processors::idle(), Spinner::new(LONG));
        spinner.idle();
        spinner.woken();
        spinner.idle();
        let at = Instant::now().checked_sub(2 * LOOK_EVERY).unwrap();
        spinner.looked = Some(Look { at, displaced: -1, may_spin: true });
        assert!(!spinner.may_spin(&processors));
    }
}
