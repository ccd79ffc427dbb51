// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests to end a run at any moment: by a signal, or because the source has failed for too long.

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

/// The signals that end a run.
const SIGNALS: [(libc::c_int, &str); 3] =
    [(libc::SIGINT, "SIGINT"), (libc::SIGTERM, "SIGTERM"), (libc::SIGHUP, "SIGHUP")];

/// Whether the process ignores a signal, as one that `nohup` starts ignores SIGHUP.
fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: a null pointer means that the action is not changed, and the call writes the current
    // one if it succeeds, which is checked before it is read.
    unsafe {
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// Blocks the signals that end a run in this thread, and in the threads that it starts later.
/// Returns the set of these signals. An ignored signal is not among them: Linux would queue it if it
/// were blocked.
///
/// # Errors
///
/// If the system call fails.
pub(crate) fn block_signals() -> io::Result<libc::sigset_t> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set before it is used, and the signal numbers are
    // valid.
    let set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for (signal, _) in SIGNALS.into_iter().filter(|(signal, _)| !is_ignored(*signal)) {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    };
    // SAFETY: the set is initialised, and a null pointer means that the old mask is not returned.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut()) } {
        0 => Ok(set),
        error => Err(io::Error::from_raw_os_error(error)),
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
    fn ignored_signals_stay_ignored() {
        // SAFETY: ignoring a signal runs no handler.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
        let set = block_signals().unwrap();
        // SAFETY: the set is initialised, and the signal numbers are valid.
        let [hangup, terminate] = [libc::SIGHUP, libc::SIGTERM]
            .map(|signal| unsafe { libc::sigismember(&set, signal) } == 1);
        assert!(!hangup && terminate);
    }

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
