// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The loop of the service's threads: how they wait for messages, and which of them serves one.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::{DUE, STOP, Shared};
use crate::Event;
use crate::fault::Outcome;
use crate::read::BATCH;
use crate::spin::Spinner;
use crate::uffd_entry::UffdEntry;

/// Number of reads of one userfaultfd after which its reader looks for other work: a process that
/// faults without end must not keep a thread to itself.
const ROUNDS: u32 = 16;

/// The state of one thread.
struct Worker {
    events: Vec<Event>,
    spinner: Spinner,
}

impl Shared {
    /// Runs a thread of the service until it is stopped.
    pub(super) fn run(&self) {
        // One at a time: while this thread serves one descriptor, others are woken for the rest.
        let mut ready = [EpollEvent::default()];
        let spinner = Spinner::new(self.options.spin);
        let mut worker = Worker { events: Vec::new(), spinner };
        loop {
            match self.epoll.wait(-1, &mut ready) {
                Ok(0) => continue,
                Ok(_) => self.counters.woken(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return log::error!(
                        "cannot wait for faults: {error}; this thread no longer serves them"
                    );
                }
            }
            match ready[0].data() {
                // The event is not consumed, so that the other threads see it too.
                STOP => return,
                DUE => self.resolve_due(),
                token => self.serve_entry(token, ready[0].event_set(), &mut worker),
            }
        }
    }

    fn serve_entry(&self, token: u64, ready: EventSet, worker: &mut Worker) {
        let Some(entry) = self.entries().get(&token).cloned() else { return };
        let served = if ready.contains(EventSet::IN) {
            worker.spinner.woken();
            self.serve_messages(token, &entry, worker)
        } else {
            Err(io::Error::other("the userfaultfd reports an error"))
        };
        match served {
            Ok(Outcome::Handled) => {}
            Ok(Outcome::ProcessGone) => self.remove_entry(token),
            // This thread was still looking for messages when the end closed it.
            Err(_) if entry.uffd().is_closed() => {}
            Err(error) => {
                // If it stayed watched, epoll would report it again and again.
                log::warn!(
                    "cannot read faults from a userfaultfd: {error}; they are no longer served"
                );
                self.remove_entry(token);
            }
        }
    }

    /// Serves messages until none is left. The kernel wakes one thread for each message, once: the
    /// thread may sleep only if the userfaultfd was empty since, or must have itself woken again.
    fn serve_messages(
        &self,
        token: u64,
        entry: &UffdEntry,
        worker: &mut Worker,
    ) -> io::Result<Outcome> {
        let (mut outcome, mut is_empty) = (Outcome::Handled, false);
        for round in 0..ROUNDS {
            let mut count = if is_empty { 0 } else { entry.read(&mut worker.events)? };
            if count == 0 {
                worker.spinner.idle();
                count = self.spin(token, entry, worker)?;
            }
            if count == 0 {
                return Ok(outcome);
            }
            if round > 0 {
                worker.spinner.hurried();
            }
            self.counters.read(count);
            if count >= BATCH {
                // More may wait, and must not wait for these.
                self.watch(token, entry, once(token));
            }
            outcome = outcome.or(entry.dispatch(&self.resolutions, &mut worker.events)?);
            // In another process' userfaultfd, the next message may have been an error.
            is_empty = count < BATCH && entry.is_own();
        }
        worker.spinner.idle();
        if !is_empty {
            self.watch(token, entry, once(token));
        }
        Ok(outcome)
    }

    /// Looks for the next messages for a moment, if faults come thick and a processor is idle.
    /// Returns their number.
    fn spin(&self, token: u64, entry: &UffdEntry, worker: &mut Worker) -> io::Result<usize> {
        let Worker { events, spinner } = worker;
        if !self.processors.as_ref().is_some_and(|processors| spinner.may_spin(processors))
            || self.spins.swap(true, Ordering::Relaxed)
        {
            return Ok(0);
        }
        // The next message wakes no sleeping thread. From the end of the spin on, it does again:
        // this thread may not return from serving it soon.
        let unwatched = self.options.threads > 1;
        if unwatched {
            self.watch(token, entry, EpollEvent::new(EventSet::EDGE_TRIGGERED, token));
        }
        let found = spinner.spin(|| match entry.read(events) {
            Ok(0) => None,
            read => Some(read),
        });
        self.spins.store(false, Ordering::Relaxed);
        if unwatched {
            self.watch(token, entry, once(token));
        }
        let count = found.unwrap_or(Ok(0))?;
        if count > 0 {
            self.counters.spun();
        }
        Ok(count)
    }

    /// Changes what wakes a thread for a userfaultfd that is watched. A thread is woken at once if
    /// a message waits.
    fn watch(&self, token: u64, entry: &UffdEntry, interest: EpollEvent) {
        let Ok(fd) = entry.uffd().fd() else { return };
        let changed = self.epoll.ctl(ControlOperation::Modify, fd.as_raw_fd(), interest);
        if let Err(error) = changed
            && self.entries().contains_key(&token)
        {
            log::error!("cannot watch a userfaultfd: {error}; some faults may stay unresolved");
        }
    }

    /// Runs the resolutions that are due.
    fn resolve_due(&self) {
        for fault in self.resolutions.deferred.take_due(Instant::now()) {
            let uffd = fault.uffd().clone();
            if fault.resolve() == Outcome::ProcessGone {
                for token in self.tokens_of(Some(&uffd)) {
                    self.remove_entry(token);
                }
            }
        }
    }
}

/// Returns the interest in a descriptor for which each message, or each time that work is due,
/// wakes one thread. Level-triggered, epoll would wake the next thread as soon as the first has
/// taken the event, and that one would mostly find nothing.
pub(super) fn once(token: u64) -> EpollEvent {
    EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token)
}
