// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread that removes demand paging when the last page is present.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use demand_memory::join_within;

use crate::Error;
use crate::builder::OnFinish;
use crate::current::Current;
use crate::vm::Inner;

/// Longest wait at the end for the thread, which may wait for a back-end.
const END_WITHIN: Duration = Duration::from_secs(1);

/// The event that the thread waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Complete,
    Ended,
}

#[derive(Debug, Default)]
struct Signal {
    event: Mutex<Option<Event>>,
    raised: Condvar,
}

impl Signal {
    fn event(&self) -> MutexGuard<'_, Option<Event>> {
        self.event.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Raises an event, unless the end was raised before.
    fn raise(&self, event: Event) {
        let mut raised = self.event();
        if *raised != Some(Event::Ended) {
            *raised = Some(event);
        }
        self.raised.notify_all();
    }

    /// Waits for an event, and takes it.
    fn wait(&self) -> Event {
        let mut event = self.event();
        loop {
            if let Some(event) = event.take() {
                return event;
            }
            event = self.raised.wait(event).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The thread that removes demand paging. Dropping this ends it.
#[derive(Debug)]
pub(crate) struct Completion {
    signal: Arc<Signal>,
    thread: Option<JoinHandle<()>>,
}

impl Completion {
    /// Starts the thread. It holds the VM only while it removes demand paging.
    pub(crate) fn start(
        current: &Arc<Current>,
        vm: Weak<Inner>,
        on_finish: OnFinish,
    ) -> Result<Self, Error> {
        let signal = Arc::new(Signal::default());
        let complete = {
            let signal = signal.clone();
            move |current: &Current| {
                let signal = signal.clone();
                current.on_complete(move || signal.raise(Event::Complete));
            }
        };
        complete(current);
        let thread = {
            let signal = signal.clone();
            let body = move || {
                while signal.wait() == Event::Complete {
                    let Some(vm) = vm.upgrade() else { return };
                    match vm.finish() {
                        // A region came meanwhile.
                        Err(Error::Missing { .. }) => complete(&vm.current),
                        outcome => {
                            drop(vm);
                            return on_finish(outcome);
                        }
                    }
                }
            };
            let thread = thread::Builder::new().name("complete".into()).spawn(body);
            thread.map_err(|source| Error::Thread { duty: "remove demand paging", source })?
        };
        Ok(Completion { signal, thread: Some(thread) })
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        self.signal.raise(Event::Ended);
        if join_within(self.thread.take().into_iter().collect(), END_WITHIN) > 0 {
            log::warn!(
                "cannot end the removal of demand paging: it waits for a back-end; its thread \
                 remains until that answers, or until the process ends"
            );
        }
    }
}
