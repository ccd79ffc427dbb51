// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Look-ups of an export's holes: in large steps, ahead of need, each answer remembered.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use demand_source::{Completer, Completion, Extent, SourceError};

use super::holes::{Holes, Run};

/// Bytes of a step. A look-up ends where a step ends.
const STEP: u64 = 1 << 30;
/// Bytes of a look-up after many failures, such as of a server that takes too long for a step.
const SHORTEST: u64 = 16 << 20;
/// Bytes after a read whose extents are looked up before they are needed.
const AHEAD: u64 = 1 << 30;
/// Most runs that are taken from one answer.
const MOST_RUNS: usize = 1 << 17;
/// Look-ups that continue an answer that did not cover its step, before the next need.
const CONTINUED: u32 = 64;
/// Pause after a failed look-up.
const PAUSE: Duration = Duration::from_secs(1);

/// The extents of an export.
pub(crate) struct Extents {
    size: u64,
    /// Look-ups begin at multiples of it (bytes), a power of two.
    align: u64,
    state: Mutex<State>,
}

struct State {
    /// `None` if the server does not tell zeros from data.
    holes: Option<Holes>,
    /// The steps that are being looked up, and the callers that wait for them.
    asked: BTreeMap<u64, Vec<Completer>>,
    /// Most bytes of a look-up: less after a failure, more after a success.
    most: u64,
    /// No look-up ahead of need before this time.
    pause: Option<Instant>,
}

/// A look-up. Dropped unfinished, it fails.
pub(crate) struct Query {
    pub(crate) range: Range<u64>,
    /// The answer so far.
    runs: Vec<Run>,
    /// Whether further runs are ignored.
    full: bool,
    /// Number of look-ups that may continue this one.
    budget: u32,
    extents: Arc<Extents>,
    finished: bool,
}

impl Extents {
    /// `supported` is whether the server tells zeros from data; if not, all is data.
    pub(crate) fn new(size: u64, least_block: u32, supported: bool) -> Self {
        let holes = supported.then(|| Holes::new(size));
        let state = State { holes, asked: BTreeMap::new(), most: STEP, pause: None };
        Extents { size, align: u64::from(least_block).max(4096), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the extent at an offset, if it is known.
    pub(crate) fn known(&self, offset: u64) -> Option<Extent> {
        match &self.state().holes {
            Some(holes) if offset < self.size => holes.extent(offset),
            _ => Some(Extent::Data { end: self.size.max(offset) }),
        }
    }

    /// Returns the look-up that is due when bytes at an offset are read, if any.
    pub(crate) fn look_ahead(self: &Arc<Self>, offset: u64) -> Option<Query> {
        let mut state = self.state();
        if state.pause.is_some_and(|until| Instant::now() < until) {
            return None;
        }
        let at = state.holes.as_ref()?.first_unknown(offset, offset.saturating_add(AHEAD))?;
        self.query(&mut state, at, CONTINUED)
    }

    /// Returns a completion of the look-up at an offset, and the look-up if it is due.
    pub(crate) fn ask(self: &Arc<Self>, offset: u64) -> (Option<Query>, Completion) {
        let mut state = self.state();
        let query = self.query(&mut state, offset, CONTINUED);
        match state.asked.get_mut(&(offset / STEP)) {
            Some(waiting) => {
                let (completer, completion) = Completion::pair();
                waiting.push(completer);
                (query, completion)
            }
            None => (query, Completion::ready(Ok(()))),
        }
    }

    /// Begins the look-up from `at` on, unless one in its step is under way.
    fn query(self: &Arc<Self>, state: &mut State, at: u64, budget: u32) -> Option<Query> {
        let step = at / STEP;
        let start = at & !(self.align - 1);
        let end = (step + 1).saturating_mul(STEP).min(self.size).min(start + state.most);
        if start >= end || state.asked.contains_key(&step) {
            return None;
        }
        state.asked.insert(step, Vec::new());
        Some(Query {
            range: start..end,
            runs: Vec::new(),
            full: false,
            budget,
            extents: self.clone(),
            finished: false,
        })
    }
}

impl Query {
    /// Takes the next run of the answer. Runs after the end of the range are ignored.
    pub(crate) fn add(&mut self, len: u32, zero: bool) {
        let at = self.runs.last().map_or(self.range.start, |run| run.end);
        if self.full || at >= self.range.end {
            return;
        }
        let end = at.saturating_add(len.into()).min(self.range.end);
        // The remainder is asked for again.
        self.full = self.runs.len() >= MOST_RUNS;
        match self.runs.last_mut() {
            Some(run) if run.zero == zero => (run.end, self.full) = (end, false),
            _ if self.full => {}
            _ => self.runs.push(Run { end, zero }),
        }
    }

    /// Ends the look-up with its answer, and returns the one that continues it.
    pub(crate) fn succeed(mut self) -> Option<Query> {
        let runs = std::mem::take(&mut self.runs);
        self.end(&runs, None)
    }

    /// Ends a look-up that the server does not support: all is data.
    pub(crate) fn unsupported(mut self) -> Option<Query> {
        let all = Run { end: self.range.end, zero: false };
        self.end(&[all], None)
    }

    /// Ends the look-up with a failure. It is repeated when it is needed, after a pause.
    pub(crate) fn fail(mut self, error: impl Fn() -> SourceError) {
        self.end(&[], Some(&error));
    }

    fn end(&mut self, runs: &[Run], error: Option<&dyn Fn() -> SourceError>) -> Option<Query> {
        self.finished = true;
        let extents = self.extents.clone();
        let mut state = extents.state();
        let step = self.range.start / STEP;
        let waiting = state.asked.remove(&step).unwrap_or_default();
        state.pause = error.map(|_| Instant::now() + PAUSE);
        state.most = match error {
            Some(_) => (state.most / 4).max(SHORTEST),
            None => (state.most * 2).min(STEP),
        };
        let mut next = None;
        if let Some(holes) = &mut state.holes {
            holes.learn(self.range.clone(), runs);
            let left = holes.first_unknown(self.range.start, (step + 1).saturating_mul(STEP));
            if let (Some(at), None, 1..) = (left, error, self.budget) {
                next = extents.query(&mut state, at, self.budget - 1);
            }
        }
        drop(state);
        for completer in waiting {
            completer.complete(error.map_or(Ok(()), |error| Err(error())));
        }
        next
    }
}

impl Drop for Query {
    fn drop(&mut self) {
        if !self.finished {
            self.end(&[], Some(&|| SourceError::Abandoned));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 3 * STEP + 100;

    fn extents() -> Arc<Extents> {
        Arc::new(Extents::new(SIZE, 512, true))
    }

    #[test]
    fn extents_are_looked_up_ahead() {
        let extents = extents();
        let mut query = extents.look_ahead(5000).unwrap();
        assert_eq!(query.range, 4096..STEP);
        assert!(extents.look_ahead(0).is_none(), "the step is being looked up");
        query.add(4096, false);
        query.add(u32::MAX, true);
        query.add(1, false);
        assert!(query.succeed().is_none());
        assert_eq!(extents.known(8192), Some(Extent::Hole { end: STEP }));
        let mut query = extents.look_ahead(8192).expect("the next step is due");
        assert_eq!(query.range, STEP..2 * STEP);
        query.add(4096, true);
        let mut rest = query.succeed().expect("the step is continued");
        assert_eq!(rest.range, STEP + 4096..2 * STEP);
        rest.add(u32::MAX, true);
        assert!(rest.succeed().is_none());
        assert_eq!(extents.known(8192), Some(Extent::Hole { end: 2 * STEP }));
        let query = extents.look_ahead(3 * STEP + 50).unwrap();
        assert_eq!(query.range, 3 * STEP..SIZE);
        query.unsupported();
        assert_eq!(extents.known(3 * STEP), Some(Extent::Data { end: SIZE }));
    }

    #[test]
    fn failed_look_up_reaches_its_callers() {
        let extents = extents();
        let (query, first) = extents.ask(4096);
        let (none, second) = extents.ask(8192);
        assert!(none.is_none());
        drop(query);
        assert!(matches!(first.wait(), Err(SourceError::Abandoned)));
        assert!(matches!(second.wait(), Err(SourceError::Abandoned)));
        assert!(extents.look_ahead(0).is_none(), "a pause follows");
        let (query, waiting) = extents.ask(4096);
        let mut query = query.expect("a caller is waiting");
        assert_eq!(query.range, 4096..4096 + STEP / 4, "a shorter one");
        query.add(8192, true);
        query.succeed();
        waiting.wait().unwrap();
        assert_eq!(extents.known(4096), Some(Extent::Hole { end: 12288 }));
    }

    #[test]
    fn runs_beyond_the_limit_are_asked_again() {
        let extents = extents();
        let mut query = extents.look_ahead(0).unwrap();
        for at in 0..MOST_RUNS + 10 {
            query.add(4096, at % 2 == 1);
        }
        // It would continue the last run that was taken.
        query.add(4096, true);
        let rest = query.succeed().unwrap();
        assert_eq!(rest.range.start, MOST_RUNS as u64 * 4096);
    }

    #[test]
    fn all_is_data_without_support() {
        let extents = Arc::new(Extents::new(SIZE, 1, false));
        assert_eq!(extents.known(7), Some(Extent::Data { end: SIZE }));
        assert!(extents.look_ahead(0).is_none());
    }
}
