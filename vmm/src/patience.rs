// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A warning about a wait that has become long.

use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::signals::block_signals;
use crate::sync::LockExt;

/// Time after which a wait is reported: for a back-end, or for KVM.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

type Warn = Box<dyn FnOnce() + Send>;

/// The waits of the process, and the thread that reports them. One thread serves all: a guest can
/// cause many short waits, which must not cost a thread each.
#[derive(Default)]
struct Watch {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waits: Vec<(u64, Instant, Warn)>,
    next: u64,
    /// When the thread looks again; `None`: when it is woken.
    looks_at: Option<Instant>,
}

impl Watch {
    /// Returns the watch, whose thread runs. Without the thread, waits are only not reported.
    fn get() -> &'static Self {
        static WATCH: OnceLock<Watch> = OnceLock::new();
        static THREAD: OnceLock<()> = OnceLock::new();
        let watch = WATCH.get_or_init(Watch::default);
        THREAD.get_or_init(|| {
            let run = move || {
                let _ = block_signals();
                watch.run();
            };
            let _ = thread::Builder::new().name("patience".into()).spawn(run);
        });
        watch
    }

    fn run(&self) -> ! {
        let mut state = self.state.lock_always();
        let mut seen = state.next;
        loop {
            let now = Instant::now();
            let late: Vec<_> = state.waits.extract_if(.., |(_, due, _)| *due <= now).collect();
            if !late.is_empty() {
                drop(state);
                late.into_iter().for_each(|(.., warn)| warn());
                state = self.state.lock_always();
                continue;
            }
            let first = state.waits.iter().map(|(_, due, _)| *due).min();
            // While waits come and go, they wake this thread once in a while, not each time.
            let busy = std::mem::replace(&mut seen, state.next) != state.next;
            state.looks_at = first.or(busy.then_some(now + PATIENCE));
            state = match state.looks_at {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(due) => {
                    let left = due.saturating_duration_since(now);
                    let woken = self.changed.wait_timeout(state, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

/// A wait. Dropping it ends the wait.
#[derive(Debug)]
pub(crate) struct Wait(u64);

impl Wait {
    /// Begins a wait, and calls `warn` once if it lasts longer than `patience`.
    pub(crate) fn begin(patience: Duration, warn: impl FnOnce() + Send + 'static) -> Self {
        let (watch, due) = (Watch::get(), Instant::now() + patience);
        let mut state = watch.state.lock_always();
        let number = state.next;
        state.next += 1;
        state.waits.push((number, due, Box::new(warn)));
        if state.looks_at.is_none_or(|at| due < at) {
            watch.changed.notify_all();
        }
        Wait(number)
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        Watch::get().state.lock_always().waits.retain(|(number, ..)| *number != self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn only_long_waits_are_reported() {
        let (sender, warned) = channel();
        let begin = |millis, name: &'static str| {
            let sender = sender.clone();
            Wait::begin(Duration::from_millis(millis), move || sender.send(name).unwrap())
        };
        let next = || warned.recv_timeout(Duration::from_secs(60)).unwrap();
        drop(begin(20, "ended"));
        let slow = begin(3_600_000, "slow");
        // While the thread waits for a later one.
        let waits = [begin(60, "second"), begin(20, "first")];
        assert_eq!([next(), next()], ["first", "second"]);
        drop(waits);
        let third = begin(20, "third");
        assert_eq!(next(), "third");
        drop((third, slow));
        assert!(warned.try_recv().is_err());
    }
}
