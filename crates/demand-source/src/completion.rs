// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The two ends of a request's outcome.

use std::fmt;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};

use crate::SourceError;

type Outcome = Result<(), SourceError>;
type Callback = Box<dyn FnOnce(Outcome) + Send>;

enum State {
    Waiting,
    Listening(Callback),
    Done(Outcome),
    Taken,
}

/// The asker's end: what becomes of a request.
///
/// # Examples
///
/// ```
/// use demand_source::Completion;
///
/// let (completer, completion) = Completion::pair();
/// std::thread::spawn(move || completer.complete(Ok(())));
/// completion.wait().unwrap();
/// ```
#[must_use = "a request whose outcome nobody takes leaves its pages missing"]
pub struct Completion(Arc<Mutex<State>>);

/// The source's end. Dropped without an outcome, it reports [`SourceError::Abandoned`].
pub struct Completer(Option<Arc<Mutex<State>>>);

impl Completion {
    /// A completion and the end that completes it.
    pub fn pair() -> (Completer, Completion) {
        let state = Arc::new(Mutex::new(State::Waiting));
        (Completer(Some(state.clone())), Completion(state))
    }

    /// A completion whose outcome is known already.
    pub fn ready(outcome: Result<(), SourceError>) -> Completion {
        Completion(Arc::new(Mutex::new(State::Done(outcome))))
    }

    /// Calls `callback` with the outcome: now, on this thread, if it is known, else later on the
    /// thread that completes the request.
    pub fn then(self, callback: impl FnOnce(Result<(), SourceError>) + Send + 'static) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Done(outcome) = std::mem::replace(&mut *state, State::Taken) {
            drop(state);
            callback(outcome);
        } else {
            *state = State::Listening(Box::new(callback));
        }
    }

    /// Waits for the outcome.
    ///
    /// # Errors
    ///
    /// Those of the source.
    pub fn wait(self) -> Result<(), SourceError> {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.then(move |outcome| {
            // The receiver is on this function's stack until it has the outcome.
            let _ = sender.send(outcome);
        });
        receiver.recv().unwrap_or(Err(SourceError::Abandoned))
    }
}

impl Completer {
    /// Gives the outcome to whoever asked.
    pub fn complete(mut self, outcome: Result<(), SourceError>) {
        self.finish(outcome);
    }

    fn finish(&mut self, outcome: Outcome) {
        let Some(shared) = self.0.take() else { return };
        let mut state = shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Listening(callback) = std::mem::replace(&mut *state, State::Taken) {
            drop(state);
            callback(outcome);
        } else {
            *state = State::Done(outcome);
        }
    }
}

impl Drop for Completer {
    fn drop(&mut self) {
        self.finish(Err(SourceError::Abandoned));
    }
}

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completion").finish_non_exhaustive()
    }
}

impl fmt::Debug for Completer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completer").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_known_before_it_is_asked_for_arrives() {
        let (completer, completion) = Completion::pair();
        completer.complete(Ok(()));
        completion.wait().unwrap();
    }

    #[test]
    fn a_dropped_completer_is_a_failure() {
        let (completer, completion) = Completion::pair();
        drop(completer);
        assert!(matches!(completion.wait(), Err(SourceError::Abandoned)));
    }

    #[test]
    fn the_callback_runs_on_the_completing_thread() {
        let (completer, completion) = Completion::pair();
        let (sender, receiver) = mpsc::channel();
        completion.then(move |_| sender.send(std::thread::current().id()).unwrap());
        let thread = std::thread::spawn(move || {
            completer.complete(Ok(()));
            std::thread::current().id()
        });
        assert_eq!(thread.join().unwrap(), receiver.recv().unwrap());
    }
}
