// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ending a run from outside, at any moment: signals, and a source that has been away for too
//! long.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

type Callback = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    reason: Option<String>,
    callbacks: Vec<Callback>,
}

/// Asks a run to end. Clones are the same one; what comes first counts.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<Mutex<State>>);

impl Interrupt {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the run to end, and says why: one line. Only the first reason is kept.
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

    /// Why the run is to end, if it is.
    pub fn reason(&self) -> Option<String> {
        self.lock().reason.clone()
    }

    /// Calls `callback` when the run is asked to end, on the thread that asks; at once if it was.
    /// It must not wait.
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

/// The signals that end a run.
const SIGNALS: [(libc::c_int, &str); 3] =
    [(libc::SIGINT, "SIGINT"), (libc::SIGTERM, "SIGTERM"), (libc::SIGHUP, "SIGHUP")];

/// Blocks the signals that end a run, in this thread and those that it starts; the set of them.
///
/// # Errors
///
/// The system's.
pub(crate) fn block_signals() -> io::Result<libc::sigset_t> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` makes it a set, and the signals' numbers are valid.
    let set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for (signal, _) in SIGNALS {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    };
    // SAFETY: the set is one, and the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut()) } {
        0 => Ok(set),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Raises `interrupt` at the first SIGINT, SIGTERM or SIGHUP, and at the second ends the process at
/// once. To be called before other threads are started: they must have the signals blocked, as
/// this thread has from now on.
///
/// A signal that the process was started to ignore (`nohup`) stays ignored.
///
/// # Errors
///
/// The system's, if there is no thread to be had.
pub fn on_signals(interrupt: Interrupt) -> io::Result<()> {
    let set = block_signals()?;
    let wait = move || {
        loop {
            let mut signal = 0;
            // SAFETY: the set is one, and the number is written to a variable of this thread.
            if unsafe { libc::sigwait(&set, &mut signal) } != 0 {
                continue;
            }
            let name = SIGNALS.iter().find(|(number, _)| *number == signal).map_or("", |s| s.1);
            if interrupt.reason().is_some() {
                // Whoever asks twice wants no more ceremony. The kernel takes everything down.
                // SAFETY: ending the process touches no memory.
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
    fn the_first_reason_counts_and_each_callback_runs_once() {
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
