// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A queue: takes chains from the available ring and puts them on the used ring.
//!
//! One thread takes the chains in order; the threads of the queue's pool execute them and put each
//! on the used ring when it is done. The ring's lock is held for each single step on the ring,
//! never while data moves; a fault under it delays messages about this ring, but no other ring.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost_user_backend::{VringState, VringT};
use virtio_queue::{Error, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryLoadGuard};

use crate::execute::{Chain, Executor};
use crate::memory::{AtomicMemory, Memory, Vring};
use crate::pool::Pool;

/// A queue of the device.
pub(crate) struct Queue {
    index: usize,
    executor: Arc<Executor>,
    mem: AtomicMemory,
    pool: Arc<Pool>,
    /// Whether the driver's broken ring has been reported; it is reported once, not at each kick.
    reported: Arc<AtomicBool>,
    /// Whether requests are taken.
    runs: AtomicBool,
}

impl Queue {
    pub(crate) fn new(
        index: usize,
        executor: Arc<Executor>,
        mem: AtomicMemory,
        threads: usize,
    ) -> Self {
        let pool = Arc::new(Pool::new(format!("queue {index}"), threads));
        let reported = Arc::new(AtomicBool::new(false));
        Queue { index, executor, mem, pool, reported, runs: AtomicBool::new(false) }
    }

    /// Returns the pool that holds the queue's requests in flight.
    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Takes the chains on `vring` until it is empty or stopped. Waits while the maximum number of
    /// requests is in flight. Must be called from one thread only.
    pub(crate) fn process(&self, vring: &Vring) {
        if let Err(error) = self.take_all(vring) {
            report(&self.reported, self.index, &error);
        }
    }

    /// Waits until no request is in flight. The ring must be stopped, or more chains would be
    /// taken.
    pub(crate) fn drain(&self) {
        self.pool.drain();
        self.reported.store(false, Ordering::Relaxed);
        if self.runs.swap(false, Ordering::Relaxed) {
            log::info!("queue {} stopped", self.index);
        }
    }

    fn take_all(&self, vring: &Vring) -> Result<(), Error> {
        let mut idle_rounds = 0;
        loop {
            {
                let mut state = vring.get_mut();
                if !may_run(&state) {
                    return Ok(());
                }
                if !self.runs.swap(true, Ordering::Relaxed) {
                    let size = state.get_queue().size();
                    log::info!("queue {} runs, with {size} entries", self.index);
                }
                state.disable_notification()?;
            }
            let mut taken = false;
            loop {
                // Reserve the place before taking the chain: a thread that stops the ring and then
                // finds no place taken knows that no chain is being taken either.
                let Some(place) = self.pool.reserve() else {
                    return Ok(());
                };
                let Some((chain, mem)) = self.next_chain(vring)? else {
                    break;
                };
                taken = true;
                self.executor.count_taken(self.index, self.pool.taken());
                let (index, vring, executor) = (self.index, vring.clone(), self.executor.clone());
                let reported = self.reported.clone();
                self.pool.run(place, move || {
                    let head = chain.head_index();
                    let written = executor.serve(index, chain, &mem);
                    if let Err(error) = complete(&vring, head, written) {
                        report(&reported, index, &error);
                    }
                });
            }
            let mut state = vring.get_mut();
            if !state.get_queue().ready() {
                return Ok(());
            }
            if !state.enable_notification()? {
                return Ok(());
            }
            // More chains were added in between. If none of them can be taken twice in a row, the
            // ring is stopped or broken.
            idle_rounds = if taken { 0 } else { idle_rounds + 1 };
            if idle_rounds > 1 {
                return Ok(());
            }
        }
    }

    fn next_chain(
        &self,
        vring: &Vring,
    ) -> Result<Option<(Chain, GuestMemoryLoadGuard<Memory>)>, Error> {
        let mut state = vring.get_mut();
        if !may_run(&state) {
            return Ok(None);
        }
        let mem = self.mem.memory();
        let chain = state.get_queue_mut().iter(mem.clone())?.next();
        Ok(chain.map(|chain| (chain, mem)))
    }
}

fn may_run(state: &VringState<AtomicMemory>) -> bool {
    state.get_queue().ready() && state.is_enabled()
}

/// Puts a chain on the used ring and notifies the driver if it asked for that; both under one lock,
/// because the decision depends on the chains added since the last one.
fn complete(vring: &Vring, head: u16, written: u32) -> Result<(), Error> {
    let mut state = vring.get_mut();
    if head >= state.get_queue().size() {
        // The driver made up this index: there is no descriptor to return.
        return Ok(());
    }
    state.add_used(head, written)?;
    if state.needs_notification()?
        && let Err(error) = state.signal_used_queue()
    {
        log::error!("cannot signal the front-end: {error}; the guest may miss a completion");
    }
    Ok(())
}

fn report(reported: &AtomicBool, index: usize, error: &Error) {
    if !reported.swap(true, Ordering::Relaxed) {
        log::error!("cannot serve queue {index}: {error}; the driver's ring is unusable");
    }
}
