// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests to end a run at any moment: by a signal, or because the source has failed for too long.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::signals::{SIGNALS, block_signals};

type Callback = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    reason: Option<String>,
    callbacks: Vec<Callback>,
}

/// A request to end a run, shared by all clones. The first request counts.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<Mutex<State>>);

impl Interrupt {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the run to end, for a one-line reason. Later requests are ignored.
    pub fn raise(&self, reason: impl Into<String>) {
        let callbacks = {
            let mut state = self.lock();
            if state.reason.is_some() {
                return;
            }
            state.reason = Some(reason.into());
            std::mem::take(&mut state.callbacks)
        };
        callbacks.into_iter().for_each(|callback| callback());
    }

    /// Returns the reason, if the run was asked to end.
    pub fn reason(&self) -> Option<String> {
        self.lock().reason.clone()
    }

    /// Calls `callback` when the run is asked to end, on the thread that asks, or at once if it was
    /// asked already. The callback must not block.
    pub fn when_raised(&self, callback: impl FnOnce() + Send + 'static) {
        let mut state = self.lock();
        if state.reason.is_none() {
            state.callbacks.push(Box::new(callback));
        } else {
            drop(state);
            callback();
        }
    }
}

/// Raises `interrupt` at the first SIGINT, SIGTERM or SIGHUP, and ends the process at once at the
/// second. The caller must do this before it starts other threads: they inherit the signals as
/// blocked from this thread. A signal that the process was started to ignore (`nohup`) stays
/// ignored.
///
/// # Errors
///
/// If the system cannot block the signals or start a thread.
pub fn on_signals(interrupt: Interrupt) -> io::Result<()> {
    let set = block_signals()?;
    let wait = move || {
        loop {
            let mut signal = 0;
            // SAFETY: the set is initialised, and the number is written to a variable of this
            // thread.
            if unsafe { libc::sigwait(&set, &mut signal) } != 0 {
                continue;
            }
            let name = SIGNALS.iter().find(|(number, _)| *number == signal).map_or("", |s| s.1);
            if interrupt.reason().is_some() {
                // A second signal means that the user does not want to wait. The kernel cleans up.
                // SAFETY: `_exit` ends the process and touches no memory.
                unsafe { libc::_exit(128 + signal) };
            }
            interrupt.raise(format!("ended by {name}"));
        }
    };
    thread::Builder::new().name("signals".into()).spawn(wait)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn first_reason_counts_and_callbacks_run_once() {
        let interrupt = Interrupt::default();
        let (sender, calls) = channel();
        for name in ["before", "too"] {
            let sender = sender.clone();
            interrupt.when_raised(move || sender.send(name).unwrap());
        }
        assert_eq!(interrupt.reason(), None);
        interrupt.clone().raise("one");
        interrupt.raise("two");
        interrupt.when_raised(move || sender.send("after").unwrap());
        assert_eq!(interrupt.reason().as_deref(), Some("one"));
        assert_eq!(calls.try_iter().collect::<Vec<_>>(), ["before", "too", "after"]);
    }
}
