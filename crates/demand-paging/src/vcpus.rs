// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The vCPUs of a VM as its end sees them: each inside a step, or outside.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use demand_kvm::VcpuKick;

use crate::Error;

/// Interval between checks whether the vCPUs have left their steps.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Whether a VM has ended, which all of its vCPUs watch.
#[derive(Debug, Default)]
pub(crate) struct End(AtomicBool);

impl End {
    /// Returns whether the VM has ended.
    pub(crate) fn is_reached(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Ends the VM: no step begins any more.
    pub(crate) fn reach(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Returns an error if the VM has ended.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.is_reached() { Err(Error::Ended) } else { Ok(()) }
    }
}

/// The whereabouts of one vCPU.
#[derive(Debug)]
pub(crate) struct Place {
    kick: VcpuKick,
    inside: AtomicBool,
    end: Arc<End>,
}

impl Place {
    pub(crate) fn end(&self) -> &End {
        &self.end
    }

    /// Begins a step, which lasts until the result is dropped.
    pub(crate) fn enter(&self) -> Result<Inside<'_>, Error> {
        // In this order, and the end in the other: either this step sees the end, or the end sees
        // the vCPU inside and kicks it.
        self.inside.store(true, Ordering::SeqCst);
        let inside = Inside(self);
        self.end.check()?;
        Ok(inside)
    }
}

/// A step of a vCPU.
pub(crate) struct Inside<'a>(&'a Place);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.store(false, Ordering::SeqCst);
    }
}

/// All vCPUs of a VM.
#[derive(Debug, Default)]
pub(crate) struct Vcpus {
    places: Mutex<Vec<Weak<Place>>>,
    end: Arc<End>,
}

impl Vcpus {
    pub(crate) fn end(&self) -> &End {
        &self.end
    }

    /// Adds a vCPU.
    pub(crate) fn add(&self, kick: VcpuKick) -> Arc<Place> {
        let (inside, end) = (AtomicBool::new(false), self.end.clone());
        let place = Arc::new(Place { kick, inside, end });
        let mut places = self.places();
        places.retain(|place| place.strong_count() > 0);
        places.push(Arc::downgrade(&place));
        place
    }

    fn places(&self) -> MutexGuard<'_, Vec<Weak<Place>>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kicks all vCPUs: each leaves its step, and begins another.
    pub(crate) fn kick_all(&self) {
        self.places().iter().filter_map(Weak::upgrade).for_each(|place| place.kick.kick());
    }

    /// Kicks the vCPUs of a VM that has ended, and waits for at most `within` until all of them are
    /// outside their steps. Returns the number of those that are not.
    pub(crate) fn call_out(&self, within: Duration) -> usize {
        let mut inside: Vec<_> = self.places().iter().filter_map(Weak::upgrade).collect();
        inside.iter().for_each(|place| place.kick.kick());
        let due = Instant::now() + within;
        loop {
            inside.retain(|place| place.inside.load(Ordering::SeqCst));
            if inside.is_empty() || Instant::now() >= due {
                return inside.len();
            }
            thread::sleep(LOOK_EVERY);
        }
    }
}
