// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finds faults that no thread reads: their mappings were never passed to a service, or it has
//! stopped. A thread that looks now and then costs the faults nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use crate::Userfaultfd;

/// Interval between looks.
const LOOK_EVERY: Duration = Duration::from_millis(1250);

/// Number of intervals after which an unread fault is reported. They are counted, not timed: while
/// the process is stopped (SIGSTOP, a debugger), time passes, and no thread can read the fault.
const REPORT_AFTER: u32 = 4;

/// The userfaultfds of this process's armed mappings.
static WATCH: Mutex<Watch> = Mutex::new(Watch { entries: Vec::new(), running: false });

struct Watch {
    entries: Vec<Watched>,
    /// Whether the thread runs. It ends with the last userfaultfd.
    running: bool,
}

struct Watched {
    uffd: Weak<Userfaultfd>,
    /// The number of reads when unread messages were first seen, and the number of looks since.
    unread: Option<(u64, u32)>,
    reported: bool,
}

impl Watched {
    /// Looks for messages; returns whether they must be reported. `None` once nothing can wait on
    /// the userfaultfd any more.
    fn look(&mut self) -> Option<bool> {
        let uffd = self.uffd.upgrade()?;
        if uffd.is_closed() {
            return None;
        }
        if !uffd.has_messages() {
            (self.unread, self.reported) = (None, false);
            return Some(false);
        }
        let reads = uffd.reads();
        let looks = match self.unread {
            Some((known, looks)) if known == reads => looks.saturating_add(1),
            _ => 0,
        };
        self.unread = Some((reads, looks));
        let due = !self.reported && looks >= REPORT_AFTER;
        self.reported |= due;
        Some(due)
    }
}

fn watched() -> MutexGuard<'static, Watch> {
    WATCH.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Watches a userfaultfd until it is closed.
pub(crate) fn watch(uffd: &Arc<Userfaultfd>) {
    let mut watch = watched();
    let known = |entry: &Watched| std::ptr::eq(entry.uffd.as_ptr(), Arc::as_ptr(uffd));
    if watch.entries.iter().any(known) {
        return;
    }
    watch.entries.push(Watched { uffd: Arc::downgrade(uffd), unread: None, reported: false });
    if !watch.running {
        let started = thread::Builder::new().name("uffd-watch".into()).spawn(run);
        watch.running = started.is_ok();
        if let Err(error) = started {
            log::debug!("cannot watch for faults that no thread reads: {error}");
        }
    }
}

fn run() {
    loop {
        thread::sleep(LOOK_EVERY);
        let mut due = 0;
        let mut watch = watched();
        watch.entries.retain_mut(|entry| {
            let look = entry.look();
            due += u32::from(look == Some(true));
            look.is_some()
        });
        watch.running = !watch.entries.is_empty();
        let ended = !watch.running;
        drop(watch);
        for _ in 0..due {
            log::error!(
                "a thread has waited for {} s at a missing page, and no thread serves its fault; \
                 pass the armed mapping to FaultService::add, and keep that service",
                (REPORT_AFTER * LOOK_EVERY).as_secs()
            );
        }
        if ended {
            return;
        }
    }
}
