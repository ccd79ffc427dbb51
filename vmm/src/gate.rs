// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What each vCPU's thread passes before it enters the guest, and where it waits while the VM is
//! paused.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use demand_kvm::DemandVcpu;

/// What the vCPUs are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Wanted {
    Run,
    Pause,
    Stop,
}

/// Whether a parked vCPU's state is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    Yes,
    /// An instruction is half done, and waits for a page.
    Waiting {
        /// Guest physical address.
        gpa: u64,
    },
}

/// Where a vCPU's thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the guest, or serving an exit.
    Running,
    /// At the gate, until it is told to go on.
    Parked(Settled),
    /// Its thread has nothing more to do.
    Ended,
}

/// What a parked vCPU's thread is asked to do.
pub(crate) type Job = Box<dyn FnOnce(&mut DemandVcpu) + Send>;

/// What a vCPU's thread does next.
pub(crate) enum Turn {
    /// Enters the guest.
    Go,
    /// Ends.
    Stop,
    /// Tries to make its state whole, and comes back.
    Settle,
    /// Does this, and comes back.
    Do(Job),
}

#[derive(Default)]
struct State {
    places: BTreeMap<u32, Place>,
    jobs: BTreeMap<u32, Job>,
    /// vCPUs that stay out of the guest although it runs.
    held: BTreeSet<u32>,
    /// At which look each vCPU has last said whether it is halted for good, and what.
    halted: BTreeMap<u32, (u64, bool)>,
}

/// How often a vCPU whose state is wanted looks again whether its page has come.
const SETTLE_EVERY: Duration = Duration::from_millis(2);

/// While nobody wants anything, passing is one load of a word that nobody writes.
pub(crate) struct Gate {
    wanted: AtomicU8,
    /// How often all vCPUs were said to have been held up.
    absences: AtomicU64,
    /// How often it was asked whether the vCPUs are halted.
    looks: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    pub(crate) fn new(wanted: Wanted) -> Self {
        Gate {
            wanted: AtomicU8::new(wanted as u8),
            absences: AtomicU64::new(0),
            looks: AtomicU64::new(0),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn wants(&self, what: Wanted) -> bool {
        self.wanted.load(Ordering::Acquire) == what as u8
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_changed<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_changed_for<'a>(
        &self,
        state: MutexGuard<'a, State>,
        within: Duration,
    ) -> MutexGuard<'a, State> {
        let woken = self.changed.wait_timeout(state, within);
        woken.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Says what is wanted. Under the lock, so that nobody who has just looked goes to sleep.
    pub(crate) fn want(&self, what: Wanted) {
        let state = self.lock();
        // A VM that is going away is not called back.
        if !self.wants(Wanted::Stop) {
            self.wanted.store(what as u8, Ordering::Release);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Whether vCPUs may enter the guest.
    pub(crate) fn is_open(&self) -> bool {
        self.wants(Wanted::Run)
    }

    /// Notes that the vCPUs were held up.
    pub(crate) fn note_absence(&self) {
        self.absences.fetch_add(1, Ordering::Release);
    }

    /// How often that was noted.
    pub(crate) fn absences(&self) -> u64 {
        self.absences.load(Ordering::Acquire)
    }

    /// Asks each vCPU whether it is halted; returns the number of this look.
    pub(crate) fn look(&self) -> u64 {
        self.looks.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// The last look.
    pub(crate) fn looks(&self) -> u64 {
        self.looks.load(Ordering::Acquire)
    }

    /// Answers a look.
    pub(crate) fn note_halted(&self, cpu: u32, look: u64, halted: bool) {
        self.lock().halted.insert(cpu, (look, halted));
    }

    /// Whether all vCPUs have answered a look by now, and are halted.
    pub(crate) fn are_halted(&self, look: u64) -> bool {
        let state = self.lock();
        state.places.keys().all(|cpu| state.halted.get(cpu) == Some(&(look, true)))
    }

    /// Whether vCPUs are to be parked.
    pub(crate) fn is_pausing(&self) -> bool {
        self.wants(Wanted::Pause)
    }

    /// Parks a vCPU until there is something for it to do.
    pub(crate) fn wait(&self, cpu: u32, settled: Settled) -> Turn {
        let mut state = self.lock();
        let mut looked = false;
        loop {
            if !self.wants(Wanted::Pause) {
                // Whoever asked for something finds out that it was not done.
                state.jobs.remove(&cpu);
                if self.wants(Wanted::Run) && state.held.contains(&cpu) {
                    state = self.wait_changed(state);
                    continue;
                }
                state.places.insert(cpu, Place::Running);
                return if self.wants(Wanted::Run) { Turn::Go } else { Turn::Stop };
            }
            let place = Place::Parked(settled);
            if state.places.insert(cpu, place) != Some(place) {
                self.changed.notify_all();
            }
            if !state.jobs.contains_key(&cpu) {
                state = self.wait_changed(state);
                continue;
            }
            if settled != Settled::Yes {
                if looked {
                    return Turn::Settle;
                }
                looked = true;
                state = self.wait_changed_for(state, SETTLE_EVERY);
                continue;
            }
            match state.jobs.remove(&cpu) {
                Some(job) => return Turn::Do(job),
                None => continue,
            }
        }
    }

    /// Keeps a vCPU out of the guest until all are [released](Self::release).
    pub(crate) fn hold(&self, cpu: u32) {
        self.lock().held.insert(cpu);
    }

    /// Whether a vCPU is kept out of the guest.
    pub(crate) fn is_held(&self, cpu: u32) -> bool {
        self.lock().held.contains(&cpu)
    }

    /// Whether some vCPU is kept out of the guest.
    pub(crate) fn holds_any(&self) -> bool {
        !self.lock().held.is_empty()
    }

    /// Lets all vCPUs into the guest again, when it runs.
    pub(crate) fn release(&self) {
        self.lock().held.clear();
        self.changed.notify_all();
    }

    /// Notes that a vCPU's thread begins.
    pub(crate) fn begins(&self, cpu: u32) {
        self.lock().places.insert(cpu, Place::Running);
    }

    /// Notes that a vCPU's thread has nothing more to do.
    pub(crate) fn ended(&self, cpu: u32) {
        let mut state = self.lock();
        state.jobs.remove(&cpu);
        state.places.insert(cpu, Place::Ended);
        drop(state);
        self.changed.notify_all();
    }

    /// Where a vCPU's thread is; `None` if it has none.
    pub(crate) fn place(&self, cpu: u32) -> Option<Place> {
        self.lock().places.get(&cpu).copied()
    }

    /// Waits until all vCPUs are where they are wanted; those that are not after `within` are
    /// returned.
    pub(crate) fn until(&self, within: Duration, there: impl Fn(Place) -> bool) -> Vec<u32> {
        let due = Instant::now() + within;
        let mut state = self.lock();
        loop {
            let others = state.places.iter().filter(|(_, place)| !there(**place));
            let others: Vec<u32> = others.map(|(cpu, _)| *cpu).collect();
            let left = due.saturating_duration_since(Instant::now());
            if others.is_empty() || left.is_zero() {
                return others;
            }
            state = self.wait_changed_for(state, left);
        }
    }

    /// Asks a vCPU's thread to do something while it is parked with its state whole. The job is
    /// dropped undone if the vCPU does not come to that; false if it is not going to.
    pub(crate) fn ask(&self, cpu: u32, job: Job) -> bool {
        let mut state = self.lock();
        let asked = self.wants(Wanted::Pause)
            && matches!(state.places.get(&cpu), Some(Place::Parked(_) | Place::Running));
        if asked {
            state.jobs.insert(cpu, job);
        }
        drop(state);
        self.changed.notify_all();
        asked
    }

    /// Takes back what was asked, if it was not begun.
    pub(crate) fn take_back(&self, cpu: u32) {
        drop(self.lock().jobs.remove(&cpu));
    }
}
