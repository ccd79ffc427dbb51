// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options of a fault service, and the counters of its threads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Default number of threads of a service.
pub const DEFAULT_THREADS: usize = 2;

/// Default of [`ServiceOptions::spin`].
pub const DEFAULT_SPIN: Duration = Duration::from_micros(50);

/// The threads of a [`FaultService`](crate::FaultService), and how they wait for the next fault.
///
/// # Examples
///
/// ```
/// use demand_uffd::{DEFAULT_THREADS, ServiceOptions};
/// use std::time::Duration;
///
/// // Costs no processor time beyond that of the faults themselves.
/// let thrifty = ServiceOptions { spin: Duration::ZERO, ..ServiceOptions::default() };
/// assert_eq!(thrifty, ServiceOptions { threads: DEFAULT_THREADS, spin: Duration::ZERO });
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceOptions {
    /// Number of threads, at least one.
    pub threads: usize,
    /// Longest time that a thread which has just served a fault keeps asking for the next one
    /// before it sleeps; meant to be some ten microseconds, at most a thousand.
    ///
    /// A faulter also waits until the thread that serves it is awake. So while faults come thick,
    /// each within this time of the one before, a thread does not sleep between them, and keeps a
    /// processor busy: in the `host` part of `rust-vmm-ci/bench`, both figures stand side by side.
    /// A thread spins only
    ///
    /// * after a fault that came within this time: a fault now and then costs no spinning;
    /// * while the host has an idle processor for it: no more threads can run than there are
    ///   processors, and no other thread has displaced this one. Where that cannot be seen, because
    ///   `/proc/loadavg` cannot be read or this process may use one processor only, no thread
    ///   spins.
    ///
    /// Zero turns spinning off.
    pub spin: Duration,
}

impl Default for ServiceOptions {
    fn default() -> Self {
        ServiceOptions { threads: DEFAULT_THREADS, spin: DEFAULT_SPIN }
    }
}

impl From<usize> for ServiceOptions {
    /// Returns the default options with this number of threads.
    fn from(threads: usize) -> Self {
        ServiceOptions { threads, ..ServiceOptions::default() }
    }
}

/// The work of a service's threads so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceCounts {
    /// Number of messages that were read: faults, and changes of a process to its own memory.
    pub messages: u64,
    /// Number of times that a sleeping thread was woken. At most one thread is woken for a message.
    pub wake_ups: u64,
    /// Number of times that a thread found the next message while it was spinning.
    pub spun: u64,
}

/// The counters behind [`ServiceCounts`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    messages: AtomicU64,
    wake_ups: AtomicU64,
    spun: AtomicU64,
}

impl Counters {
    pub(crate) fn read(&self, messages: usize) {
        self.messages.fetch_add(messages as u64, Ordering::Relaxed);
    }

    pub(crate) fn woken(&self) {
        self.wake_ups.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn spun(&self) {
        self.spun.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn counts(&self) -> ServiceCounts {
        ServiceCounts {
            messages: self.messages.load(Ordering::Relaxed),
            wake_ups: self.wake_ups.load(Ordering::Relaxed),
            spun: self.spun.load(Ordering::Relaxed),
        }
    }
}
