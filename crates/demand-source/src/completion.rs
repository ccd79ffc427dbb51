// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A one-shot channel for the outcome of a request: the source completes it, the caller awaits it.

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

/// The caller's end: receives the outcome of a request. Dropping it withdraws the request: a source
/// that has not begun to read it need not.
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
#[must_use = "if the outcome of a request is not taken, its pages stay missing"]
pub struct Completion(Arc<Mutex<State>>);

/// The source's end: sends the outcome. If it is dropped without an outcome, it reports
/// [`SourceError::Abandoned`].
pub struct Completer(Option<Arc<Mutex<State>>>);

impl Completion {
    /// Returns a completion and the completer that completes it.
    pub fn pair() -> (Completer, Completion) {
        let state = Arc::new(Mutex::new(State::Waiting));
        (Completer(Some(state.clone())), Completion(state))
    }

    /// Returns a completion whose outcome is already known.
    pub fn ready(outcome: Result<(), SourceError>) -> Completion {
        Completion(Arc::new(Mutex::new(State::Done(outcome))))
    }

    /// Calls `callback` with the outcome: at once on this thread if it is known, otherwise later on
    /// the thread that completes the request.
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
    /// The source's errors.
    pub fn wait(self) -> Result<(), SourceError> {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.then(move |outcome| {
            // It cannot fail: the receiver stays on this function's stack until it has the outcome.
            let _ = sender.send(outcome);
        });
        receiver.recv().unwrap_or(Err(SourceError::Abandoned))
    }
}

impl Completer {
    /// Delivers the outcome to the caller.
    pub fn complete(mut self, outcome: Result<(), SourceError>) {
        self.finish(outcome);
    }

    /// Returns whether the outcome is still awaited: whether the completion exists, or has a
    /// callback. If not, a source may drop the request unanswered.
    pub fn is_awaited(&self) -> bool {
        self.0.as_ref().is_some_and(|shared| {
            // Only this end can hold the last reference, so nothing changes after that.
            Arc::strong_count(shared) > 1
                || matches!(
                    *shared.lock().unwrap_or_else(PoisonError::into_inner),
                    State::Listening(_)
                )
        })
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
    fn outcome_known_before_the_wait_arrives() {
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
    fn dropped_completion_is_not_awaited() {
        let (completer, completion) = Completion::pair();
        assert!(completer.is_awaited());
        completion.then(|_| {});
        assert!(completer.is_awaited());
        let (completer, completion) = Completion::pair();
        drop(completion);
        assert!(!completer.is_awaited());
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
