// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Running something that may wait for pages, so that nothing it waits for keeps its end from it.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use demand_memory::DemandMemory;

use crate::error::{Error, no_thread};
use crate::interrupt::Interrupt;

/// How long an end that was asked for from outside waits for what it ends, while pages still
/// arrive, and once more when they do not.
const END_WITHIN: Duration = Duration::from_millis(2500);

/// What the thread that listens is told.
enum Said<T> {
    /// The work is over.
    Ended(Box<Result<T, Error>>),
    /// It is to end.
    Interrupted,
}

/// Does `work` on a thread of its own, and returns what came of it; when `interrupt` is raised, at
/// the latest after a few seconds. `memory` is what the work waits for, as soon as it is there.
///
/// # Errors
///
/// The errors of the work, and the reason of the interrupt. After an error the process should end:
/// the work may go on.
pub(crate) fn supervise<T: Send + 'static>(
    interrupt: &Interrupt,
    memory: &Arc<OnceLock<DemandMemory>>,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    // This thread only listens, so that nothing that waits for a page keeps the end from it.
    let (sender, said) = channel();
    let interrupted = sender.clone();
    interrupt.when_raised(move || drop(interrupted.send(Said::Interrupted)));
    let body = move || drop(sender.send(Said::Ended(Box::new(work()))));
    thread::Builder::new()
        .name("run".into())
        .spawn(body)
        .map_err(|error| no_thread("run the VM", error))?;

    let mut patience = Duration::MAX;
    let outcome = loop {
        match said.recv_timeout(patience) {
            Ok(Said::Ended(outcome)) => break Some(*outcome),
            Ok(Said::Interrupted) => patience = END_WITHIN,
            Err(RecvTimeoutError::Timeout) => match memory.get() {
                // Ends every wait for a page, but for KVM's own.
                Some(memory) if !memory.is_stopped() => memory.stop(),
                Some(memory) => {
                    // Those too, or the process could not end.
                    memory.revoke();
                    break None;
                }
                None => break None,
            },
            Err(RecvTimeoutError::Disconnected) => {
                break Some(Err(Error::failed("the run ended without a word")));
            }
        }
    };
    match (outcome, interrupt.reason()) {
        (Some(Ok(report)), _) => Ok(report),
        // What went wrong then went wrong because of that.
        (_, Some(reason)) => Err(Error::failed(reason)),
        (Some(Err(error)), None) => Err(error),
        (None, None) => Err(Error::failed("the run did not end")),
    }
}
