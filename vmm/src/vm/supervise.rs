// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the VM on its own thread, so that a blocked page fault cannot delay shutdown.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use demand_memory::WaitWatch;

use crate::error::{Error, no_thread};
use crate::vm::interrupt::Interrupt;
use crate::vm::source_watch::Awaited;
use crate::vm::timeouts;

/// Interval between looks for pages that the source leaves unanswered.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A message to the thread that supervises the work.
enum Said<T> {
    /// The work has ended.
    Ended(Box<Result<T, Error>>),
    /// The work must end.
    Interrupted,
}

/// Runs `work` on its own thread, and returns the outcome. After `interrupt` is raised, that takes
/// a few seconds at most. `awaited` is the memory that the work waits for, once it exists.
///
/// # Errors
///
/// The errors of the work, or the reason of the interrupt. The process should exit after an error,
/// because the work may still run.
pub(crate) fn supervise<T: Send + 'static>(
    interrupt: &Interrupt,
    awaited: &Arc<OnceLock<Awaited>>,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    // This thread only receives messages, so that no page fault can block it.
    let (sender, said) = channel();
    let interrupted = sender.clone();
    interrupt.when_raised(move || drop(interrupted.send(Said::Interrupted)));
    let body = move || drop(sender.send(Said::Ended(Box::new(work()))));
    thread::Builder::new()
        .name("run".into())
        .spawn(body)
        .map_err(|error| no_thread("run the VM", error))?;

    let (mut ending, mut waits) = (false, WaitWatch::default());
    let outcome = loop {
        match said.recv_timeout(if ending { timeouts::SIGNAL } else { LOOK_EVERY }) {
            Ok(Said::Ended(outcome)) => break Some(*outcome),
            Ok(Said::Interrupted) => ending = true,
            Err(RecvTimeoutError::Timeout) if !ending => {
                awaited.get().into_iter().for_each(|awaited| awaited.look(&mut waits));
            }
            Err(RecvTimeoutError::Timeout) => match awaited.get().map(|awaited| &awaited.memory) {
                // Ends every wait for a page except KVM's own.
                Some(memory) if !memory.is_stopped() => memory.stop(),
                Some(memory) => {
                    // Ends KVM's own waits, too, because they would keep the process from its exit.
                    memory.revoke();
                    break None;
                }
                None => break None,
            },
            Err(RecvTimeoutError::Disconnected) => {
                break Some(Err(Error::failed("the run's thread ended without a result")));
            }
        }
    };
    match (outcome, interrupt.reason()) {
        (Some(Ok(report)), _) => Ok(report),
        // The interrupt is the cause of any later error.
        (_, Some(reason)) => Err(Error::failed(reason)),
        (Some(Err(error)), None) => Err(error),
        (None, None) => Err(Error::failed("the run did not stop in time")),
    }
}
