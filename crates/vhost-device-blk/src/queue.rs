// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A queue: chains off the available ring, and back onto the used ring.
//!
//! The ring's lock is held for each single step on the ring, never while data moves; a fault under
//! it delays messages about this ring, and no other ring.

use std::sync::atomic::{AtomicBool, Ordering};

use vhost_user_backend::{VringState, VringT};
use virtio_queue::{Error, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryLoadGuard};

use crate::device::{AtomicMemory, Memory, Vring};
use crate::execute::{Chain, Executor};

/// Serves `vring` until it is empty or stopped.
pub fn process(
    executor: &Executor,
    index: usize,
    vring: &Vring,
    mem: &AtomicMemory,
    stopping: &AtomicBool,
) -> Result<(), Error> {
    let mut idle_rounds = 0;
    loop {
        {
            let mut state = vring.get_mut();
            if !may_run(&state, stopping) {
                return Ok(());
            }
            state.disable_notification()?;
        }
        let mut served = false;
        while let Some((chain, mem)) = next_chain(vring, mem, stopping)? {
            let head = chain.head_index();
            let written = executor.serve(index, chain, &mem);
            complete(vring, head, written)?;
            served = true;
        }
        let mut state = vring.get_mut();
        if !state.get_queue().ready() {
            return Ok(());
        }
        if !state.enable_notification()? {
            return Ok(());
        }
        // More has come in between. If nothing of it can be had twice in a row, the ring is
        // stopped or broken.
        idle_rounds = if served { 0 } else { idle_rounds + 1 };
        if idle_rounds > 1 {
            return Ok(());
        }
    }
}

fn may_run(state: &VringState<AtomicMemory>, stopping: &AtomicBool) -> bool {
    state.get_queue().ready() && state.is_enabled() && !stopping.load(Ordering::SeqCst)
}

fn next_chain(
    vring: &Vring,
    mem: &AtomicMemory,
    stopping: &AtomicBool,
) -> Result<Option<(Chain, GuestMemoryLoadGuard<Memory>)>, Error> {
    let mut state = vring.get_mut();
    if !may_run(&state, stopping) {
        return Ok(None);
    }
    let mem = mem.memory();
    let chain = state.get_queue_mut().iter(mem.clone())?.next();
    Ok(chain.map(|chain| (chain, mem)))
}

/// Puts a chain on the used ring and tells the driver if it wants to know.
fn complete(vring: &Vring, head: u16, written: u32) -> Result<(), Error> {
    let mut state = vring.get_mut();
    match state.add_used(head, written) {
        Ok(()) => {}
        // The driver made up a head beyond its queue: there is nothing to give back.
        Err(Error::InvalidDescriptorIndex) => return Ok(()),
        Err(e) => return Err(e),
    }
    if state.needs_notification()?
        && let Err(e) = state.signal_used_queue()
    {
        log::error!("signalling the front-end: {e}; the guest may miss a completion");
    }
    Ok(())
}
