// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The gate that each vCPU's thread passes before it enters the guest, and at which it is parked
//! while the VM is paused.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use demand_kvm::DemandVcpu;

use crate::sync::LockExt;

/// The state that the vCPUs must take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Wanted {
    Run,
    Pause,
    Stop,
}

/// Whether the pending I/O of a parked vCPU is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IoState {
    Complete,
    /// An instruction is incomplete, and its page is missing.
    Waiting {
        /// Guest physical address of the page.
        gpa: u64,
    },
}

/// The position of a vCPU's thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the guest, or handling an exit.
    Running,
    /// Parked at the gate, until it may run.
    Parked(IoState),
    /// Ended.
    Ended,
}

/// Work for a parked vCPU's thread.
pub(crate) type Job = Box<dyn FnOnce(&mut DemandVcpu) + Send>;

/// The next step of a vCPU's thread.
pub(crate) enum ParkAction {
    /// The thread enters the guest.
    Enter,
    /// The thread ends.
    End,
    /// The thread tries to complete the pending I/O, and returns to the gate.
    CompleteIo,
    /// The thread runs the job, and returns to the gate.
    Run(Job),
}

#[derive(Default)]
struct State {
    places: BTreeMap<u32, Place>,
    jobs: BTreeMap<u32, Job>,
    /// vCPUs that stay parked even while the VM runs.
    held: BTreeSet<u32>,
    /// For each vCPU the number of the last halt check that it answered, and whether it was halted
    /// for good.
    halted: BTreeMap<u32, (u64, bool)>,
}

/// Interval at which a vCPU with a pending job checks whether its missing page has become present.
const RETRY_EVERY: Duration = Duration::from_millis(2);

/// The gate of all vCPUs. While no request is pending, a vCPU passes it with three loads of words
/// that no thread then writes, and without a lock.
pub(crate) struct PauseGate {
    wanted: AtomicU8,
    /// Number of times when all vCPUs were reported held up.
    absences: AtomicU64,
    /// Number of halt checks so far.
    looks: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

impl PauseGate {
    pub(crate) fn new(wanted: Wanted) -> Self {
        PauseGate {
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

    /// Sets the wanted state. It holds the lock, so that a thread that has just checked the state
    /// does not miss the wake-up.
    pub(crate) fn want(&self, what: Wanted) {
        let state = self.state.lock_always();
        // A VM that is stopping cannot be resumed or paused.
        if !self.wants(Wanted::Stop) {
            self.wanted.store(what as u8, Ordering::Release);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Returns whether vCPUs may enter the guest.
    pub(crate) fn is_open(&self) -> bool {
        self.wants(Wanted::Run)
    }

    /// Records that the vCPUs were held up.
    pub(crate) fn note_absence(&self) {
        self.absences.fetch_add(1, Ordering::Release);
    }

    /// Returns the number of records by [`note_absence`](Self::note_absence).
    pub(crate) fn absences(&self) -> u64 {
        self.absences.load(Ordering::Acquire)
    }

    /// Asks each vCPU whether it is halted. Returns the number of this check.
    pub(crate) fn look(&self) -> u64 {
        self.looks.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Returns the number of the last check.
    pub(crate) fn looks(&self) -> u64 {
        self.looks.load(Ordering::Acquire)
    }

    /// Records a vCPU's answer to a check.
    pub(crate) fn note_halted(&self, cpu: u32, look: u64, halted: bool) {
        self.state.lock_always().halted.insert(cpu, (look, halted));
    }

    /// Returns whether all vCPUs have answered this check and are halted.
    pub(crate) fn are_halted(&self, look: u64) -> bool {
        let state = self.state.lock_always();
        state.places.keys().all(|cpu| state.halted.get(cpu) == Some(&(look, true)))
    }

    /// Returns whether vCPUs must park.
    pub(crate) fn is_pausing(&self) -> bool {
        self.wants(Wanted::Pause)
    }

    /// Parks a vCPU until its thread has a next step.
    pub(crate) fn wait(&self, cpu: u32, io: IoState) -> ParkAction {
        let mut state = self.state.lock_always();
        let mut looked = false;
        loop {
            if !self.wants(Wanted::Pause) {
                // The dropped job tells its sender that it was not run.
                state.jobs.remove(&cpu);
                if self.wants(Wanted::Run) && state.held.contains(&cpu) {
                    state = self.wait_changed(state);
                    continue;
                }
                state.places.insert(cpu, Place::Running);
                return if self.wants(Wanted::Run) { ParkAction::Enter } else { ParkAction::End };
            }
            let place = Place::Parked(io);
            if state.places.insert(cpu, place) != Some(place) {
                self.changed.notify_all();
            }
            if !state.jobs.contains_key(&cpu) {
                state = self.wait_changed(state);
                continue;
            }
            if io != IoState::Complete {
                if looked {
                    return ParkAction::CompleteIo;
                }
                looked = true;
                state = self.wait_changed_for(state, RETRY_EVERY);
                continue;
            }
            match state.jobs.remove(&cpu) {
                Some(job) => return ParkAction::Run(job),
                None => continue,
            }
        }
    }

    /// Keeps a vCPU parked until all are [released](Self::release).
    pub(crate) fn hold(&self, cpu: u32) {
        self.state.lock_always().held.insert(cpu);
    }

    /// Returns whether a vCPU stays parked even while the VM runs.
    pub(crate) fn is_held(&self, cpu: u32) -> bool {
        self.state.lock_always().held.contains(&cpu)
    }

    /// Returns whether any vCPU does so.
    pub(crate) fn holds_any(&self) -> bool {
        !self.state.lock_always().held.is_empty()
    }

    /// Ends the hold: all vCPUs enter the guest again once the VM runs.
    pub(crate) fn release(&self) {
        self.state.lock_always().held.clear();
        self.changed.notify_all();
    }

    /// Records that a vCPU's thread has started.
    pub(crate) fn begins(&self, cpu: u32) {
        self.state.lock_always().places.insert(cpu, Place::Running);
    }

    /// Records that a vCPU's thread is ending.
    pub(crate) fn ended(&self, cpu: u32) {
        let mut state = self.state.lock_always();
        state.jobs.remove(&cpu);
        state.places.insert(cpu, Place::Ended);
        drop(state);
        self.changed.notify_all();
    }

    /// Returns the position of a vCPU's thread, or `None` if it has no thread.
    pub(crate) fn place(&self, cpu: u32) -> Option<Place> {
        self.state.lock_always().places.get(&cpu).copied()
    }

    /// Waits until `there` holds for the positions of all vCPUs. Returns those for which it does
    /// not hold after `within`.
    pub(crate) fn until(&self, within: Duration, there: impl Fn(Place) -> bool) -> Vec<u32> {
        let due = Instant::now() + within;
        let mut state = self.state.lock_always();
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

    /// Asks a vCPU's thread to run a job once it is parked with complete I/O. The job is dropped
    /// unrun if that does not happen. Returns false if it cannot happen.
    pub(crate) fn ask(&self, cpu: u32, job: Job) -> bool {
        let mut state = self.state.lock_always();
        let asked = self.wants(Wanted::Pause)
            && matches!(state.places.get(&cpu), Some(Place::Parked(_) | Place::Running));
        if asked {
            state.jobs.insert(cpu, job);
        }
        drop(state);
        self.changed.notify_all();
        asked
    }

    /// Withdraws the job of a vCPU that has not started it.
    pub(crate) fn take_back(&self, cpu: u32) {
        drop(self.state.lock_always().jobs.remove(&cpu));
    }
}
