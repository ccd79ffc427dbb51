// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests to end a run at any moment: by a signal, or because the source has failed for too long.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crate::devices::terminal;
use crate::signals::{SIGNALS, block_signals};
use crate::sync::LockExt;

/// Time after a signal in which another one is the same request: `timeout`, for one, signals its
/// command and then the whole process group.
const SAME_REQUEST: Duration = Duration::from_millis(200);

type Callback = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    reason: Option<String>,
    callbacks: Vec<(u64, Callback)>,
    next: u64,
}

/// A request to end a run, shared by all clones. The first request counts.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<Mutex<State>>);

/// A callback of an [`Interrupt`]. Dropping it unregisters the callback, which may still run if the
/// run is asked to end at that moment.
#[must_use = "dropping it unregisters the callback"]
#[derive(Debug)]
pub struct Registered {
    state: Weak<Mutex<State>>,
    number: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Some(state) = self.state.upgrade() {
            let mut state = state.lock_always();
            let own = state.callbacks.iter().position(|(number, _)| *number == self.number);
            let callback = own.map(|own| state.callbacks.swap_remove(own));
            // The callback is dropped without the lock.
            drop(state);
            drop(callback);
        }
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("reason", &self.reason).finish_non_exhaustive()
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interrupt").field("reason", &self.reason()).finish_non_exhaustive()
    }
}

impl Interrupt {
    /// Asks the run to end, for a one-line reason. Later requests are ignored.
    pub fn raise(&self, reason: impl Into<String>) {
        let callbacks = {
            let mut state = self.0.lock_always();
            if state.reason.is_some() {
                return;
            }
            state.reason = Some(reason.into());
            std::mem::take(&mut state.callbacks)
        };
        callbacks.into_iter().for_each(|(_, callback)| callback());
    }

    /// Returns the reason, if the run was asked to end.
    pub fn reason(&self) -> Option<String> {
        self.0.lock_always().reason.clone()
    }

    /// Calls `callback` when the run is asked to end, on the thread that asks, or at once if it was
    /// asked already; not after the returned value is dropped. The callback must not block.
    pub fn when_raised(&self, callback: impl FnOnce() + Send + 'static) -> Registered {
        let mut state = self.0.lock_always();
        let number = state.next;
        state.next += 1;
        if state.reason.is_none() {
            state.callbacks.push((number, Box::new(callback)));
        } else {
            drop(state);
            callback();
        }
        Registered { state: Arc::downgrade(&self.0), number }
    }
}

/// Raises `interrupt` at the first SIGINT, SIGTERM or SIGHUP, and ends the process at once at the
/// next one, unless that comes within 200 ms and so is the same request. The caller must do this
/// before it starts other threads: they inherit the signals as blocked from this thread. A signal
/// that the process was started to ignore (`nohup`) stays ignored.
///
/// # Errors
///
/// If the system cannot block the signals or start a thread.
pub fn on_signals(interrupt: Interrupt) -> io::Result<()> {
    let set = block_signals()?;
    let wait = move || {
        let mut first: Option<Instant> = None;
        loop {
            let mut signal = 0;
            // SAFETY: the set is initialised, and the number is written to a variable of this
            // thread.
            if unsafe { libc::sigwait(&set, &mut signal) } != 0 {
                continue;
            }
            let name = SIGNALS.iter().find(|(number, _)| *number == signal).map_or("", |s| s.1);
            if first.is_some_and(|at| at.elapsed() < SAME_REQUEST) {
                continue;
            }
            if interrupt.reason().is_some() {
                // A second signal means that the user does not want to wait. The kernel cleans up,
                // except for the terminal.
                terminal::restore();
                // SAFETY: `_exit` ends the process and touches no memory.
                unsafe { libc::_exit(128 + signal) };
            }
            first = Some(Instant::now());
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
        let register = |name| {
            let sender = sender.clone();
            interrupt.when_raised(move || sender.send(name).unwrap())
        };
        let _kept = (register("before"), register("too"));
        assert_eq!(interrupt.reason(), None);
        interrupt.clone().raise("one");
        interrupt.raise("two");
        let _late = register("after");
        assert_eq!(interrupt.reason().as_deref(), Some("one"));
        assert_eq!(calls.try_iter().collect::<Vec<_>>(), ["before", "too", "after"]);
    }

    #[test]
    fn dropped_callbacks_are_unregistered() {
        let interrupt = Interrupt::default();
        let (sender, calls) = channel();
        let register = |number| {
            let sender = sender.clone();
            interrupt.when_raised(move || sender.send(number).unwrap())
        };
        let kept = (0..1000).map(register).filter(|callback| callback.number % 400 == 0);
        let kept: Vec<_> = kept.collect();
        assert_eq!(interrupt.0.lock_always().callbacks.len(), kept.len());
        interrupt.raise("one");
        let mut called: Vec<_> = calls.try_iter().collect();
        called.sort_unstable();
        assert_eq!(called, [0, 400, 800]);
    }
}
