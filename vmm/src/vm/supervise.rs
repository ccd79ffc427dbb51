// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the VM on its own thread, so that a blocked page fault cannot delay shutdown.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::thread;

use demand_memory::DemandMemory;

use crate::error::{Error, no_thread};
use crate::vm::error::VmError;
use crate::vm::interrupt::Interrupt;
use crate::vm::timeouts;

/// A message to the thread that supervises the work.
enum Message<T> {
    /// The work has ended.
    Ended(Box<Result<T, Error>>),
    /// The work must end.
    Interrupted,
}

/// Runs `work` on its own thread, and returns the outcome. After `interrupt` is raised, that takes
/// a few seconds at most: the waits for pages of `awaited`, the memory that the work uses, are
/// ended if the work does not end before.
///
/// # Errors
///
/// The errors of the work; or, if it does not end in time, an error with the reason of the
/// interrupt. The process should exit after an error, because the work may still run.
pub fn supervise<T: Send + 'static>(
    interrupt: &Interrupt,
    awaited: &Arc<OnceLock<DemandMemory>>,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    // This thread only receives messages, so that no page fault can block it.
    let (sender, messages) = channel();
    let interrupted = sender.clone();
    let _told = interrupt.when_raised(move || drop(interrupted.send(Message::Interrupted)));
    let body = move || drop(sender.send(Message::Ended(Box::new(work()))));
    thread::Builder::new()
        .name("run".into())
        .spawn(body)
        .map_err(|error| no_thread("run the VM", error))?;

    match messages.recv() {
        Ok(Message::Ended(outcome)) => return *outcome,
        Ok(Message::Interrupted) => {}
        Err(_) => return Err(VmError::NoResult.into()),
    }
    // Every wait for a page ends first, except KVM's own; then those, too, which would keep the
    // process from its exit.
    let steps: [Option<fn(&DemandMemory)>; 3] =
        [Some(DemandMemory::stop), Some(DemandMemory::revoke), None];
    for step in steps {
        if let Some(outcome) = outcome_in_time(&messages) {
            return outcome;
        }
        let (Some(step), Some(memory)) = (step, awaited.get()) else { break };
        step(memory);
    }
    let reason = interrupt.reason().unwrap_or_default();
    Err(VmError::NotInTime { reason }.into())
}

/// Returns the outcome of the work if it ends soon.
fn outcome_in_time<T>(messages: &Receiver<Message<T>>) -> Option<Result<T, Error>> {
    loop {
        match messages.recv_timeout(timeouts::SIGNAL) {
            Ok(Message::Ended(outcome)) => return Some(*outcome),
            Ok(Message::Interrupted) => {}
            Err(RecvTimeoutError::Timeout) => return None,
            Err(RecvTimeoutError::Disconnected) => return Some(Err(VmError::NoResult.into())),
        }
    }
}
