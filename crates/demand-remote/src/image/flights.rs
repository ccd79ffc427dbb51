// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests to the store that are in progress: one for each chunk or block, however many wait.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use demand_source::Priority;
use tokio::sync::{Notify, Semaphore, SemaphorePermit, oneshot};

use super::cache::Cache;
use super::error::ImageError;
use super::job::Part;
use super::layout::BLOCK_CHUNKS;
use super::snapshot::Snapshot;
use crate::runtime;

/// Numbers of requests to the store that may be in progress.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) demand: usize,
    pub(crate) fill: usize,
}

/// Something that is read by one request to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    Block(u64),
    Chunk(u64),
}

/// Something that was read.
enum Got {
    Block,
    Chunk(Arc<Vec<u8>>),
}

/// The priority of a request in progress, which only rises.
#[derive(Default)]
struct Urgency {
    raised: AtomicBool,
    changed: Notify,
}

impl Urgency {
    fn raise(&self) {
        self.raised.store(true, Ordering::Release);
        // Only the request's own task waits, and a call before it waits counts as well.
        self.changed.notify_one();
    }

    fn is_raised(&self) -> bool {
        self.raised.load(Ordering::Acquire)
    }

    /// Waits for a permit of `fill`, or, once raised, for one of `demand`.
    async fn turn<'a>(
        &self,
        demand: &'a Semaphore,
        fill: &'a Semaphore,
    ) -> Option<SemaphorePermit<'a>> {
        // Neither semaphore is ever closed.
        if self.is_raised() {
            return demand.acquire().await.ok();
        }
        tokio::select! {
            biased;
            () = self.changed.notified() => demand.acquire().await.ok(),
            permit = fill.acquire() => permit.ok(),
        }
    }
}

/// Receives the outcome of reading a block.
type Listener = oneshot::Sender<Result<(), Arc<ImageError>>>;

/// A request to the store, and the parts of the pager's requests that wait for it.
#[derive(Default)]
struct Flight {
    parts: Vec<Part>,
    /// Threads that wait for a block.
    listeners: Vec<Listener>,
    urgency: Arc<Urgency>,
}

struct State {
    cache: Cache,
    flights: HashMap<Key, Flight>,
}

/// The requests in progress of one image, and its decoded chunks.
pub(crate) struct Flights {
    snapshot: Snapshot,
    demand: Semaphore,
    fill: Semaphore,
    /// One thread of the runtime at most decodes for fill, so that one is free for faults.
    fill_decoder: Semaphore,
    demand_decoders: Semaphore,
    /// No part may be dropped while it is locked: that may call the pager.
    state: Mutex<State>,
}

impl Flights {
    pub(crate) fn new(snapshot: Snapshot, cache_bytes: usize, limits: Limits) -> Arc<Self> {
        let state = State { cache: Cache::new(cache_bytes), flights: HashMap::new() };
        let semaphore = |permits: usize| Semaphore::new(permits.clamp(1, Semaphore::MAX_PERMITS));
        Arc::new(Flights {
            snapshot,
            demand: semaphore(limits.demand),
            fill: semaphore(limits.fill),
            fill_decoder: Semaphore::new(1),
            demand_decoders: Semaphore::new(Semaphore::MAX_PERMITS),
            state: Mutex::new(state),
        })
    }

    pub(crate) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the content of a chunk that is kept.
    pub(crate) fn kept(&self, chunk: u64) -> Option<Arc<Vec<u8>>> {
        self.state().cache.get(chunk)
    }

    /// Delivers a part at once if that is possible, and otherwise lets it wait for what it needs.
    pub(crate) fn route(self: &Arc<Self>, part: Part) {
        let chunk = part.chunk;
        let key = match self.snapshot.known_entry(chunk) {
            Some(None) => return part.deliver_zeros(),
            Some(Some(_)) => Key::Chunk(chunk),
            None => Key::Block(chunk / BLOCK_CHUNKS),
        };
        let mut state = self.state();
        if let Key::Chunk(chunk) = key
            && let Some(content) = state.cache.get(chunk)
        {
            drop(state);
            return part.deliver(&content);
        }
        if let Key::Block(block) = key
            && self.snapshot.known_block(block).is_some()
        {
            // It was read since the look above.
            drop(state);
            return self.route(part);
        }
        let flight = self.flight(&mut state, key);
        if part.priority == Priority::Demand {
            flight.urgency.raise();
        }
        flight.parts.push(part);
    }

    /// Returns the request for `key`, which begins now unless it is in progress.
    fn flight<'a>(self: &Arc<Self>, state: &'a mut State, key: Key) -> &'a mut Flight {
        match state.flights.entry(key) {
            Slot::Occupied(slot) => slot.into_mut(),
            Slot::Vacant(slot) => {
                let flight = slot.insert(Flight::default());
                let (this, urgency) = (self.clone(), flight.urgency.clone());
                runtime::handle().spawn(async move { this.fly(key, &urgency).await });
                flight
            }
        }
    }

    /// Begins to read a block of the index, unless it is known.
    pub(crate) fn want_block(self: &Arc<Self>, block: u64) {
        let mut state = self.state();
        if self.snapshot.known_block(block).is_none() {
            self.flight(&mut state, Key::Block(block)).urgency.raise();
        }
    }

    /// Waits until a block of the index is known.
    pub(crate) async fn block(self: &Arc<Self>, block: u64) -> Result<(), Arc<ImageError>> {
        let outcome = {
            let mut state = self.state();
            if self.snapshot.known_block(block).is_some() {
                return Ok(());
            }
            let flight = self.flight(&mut state, Key::Block(block));
            flight.urgency.raise();
            let (listener, outcome) = oneshot::channel();
            flight.listeners.push(listener);
            outcome
        };
        outcome.await.unwrap_or_else(|_| Err(Arc::new(ImageError::Panicked)))
    }

    /// Gives the parts of these chunks, the last included, the priority of demand.
    pub(crate) fn raise(&self, first: u64, last: u64) {
        let chunks = first..=last;
        for (key, flight) in &mut self.state().flights {
            let mut found = matches!(key, Key::Chunk(chunk) if chunks.contains(chunk));
            for part in flight.parts.iter_mut().filter(|part| chunks.contains(&part.chunk)) {
                part.priority = Priority::Demand;
                found = true;
            }
            if found {
                flight.urgency.raise();
            }
        }
    }

    /// Ends the wait of all parts.
    pub(crate) fn abandon(&self) {
        let mut parts = Vec::new();
        for flight in self.state().flights.values_mut() {
            parts.append(&mut flight.parts);
        }
        drop(parts);
    }

    /// Makes one request to the store and answers all parts that wait for it.
    async fn fly(self: Arc<Self>, key: Key, urgency: &Urgency) {
        // If a panic ends the task, the request ends as well, and its parts as abandoned.
        let landing = Landing { flights: &self, key };
        let got = self.read(key, urgency).await;
        let Some(got) = got.transpose() else {
            // It has ended already, and another one may have begun.
            return std::mem::forget(landing);
        };
        let Flight { parts, listeners, .. } = landing.land(got.as_ref().ok());
        match got {
            Ok(Got::Block) => {
                answer(listeners, &Ok(()));
                parts.into_iter().for_each(|part| self.route(part));
            }
            Ok(Got::Chunk(content)) => {
                parts.into_iter().for_each(|part| part.deliver(&content));
            }
            Err(error) => {
                let error = Arc::new(error);
                answer(listeners, &Err(error.clone()));
                parts.into_iter().for_each(|part| part.fail(&error));
            }
        }
    }

    /// Reads a block or chunk when its turn comes. Returns `None` for a chunk that is not wanted by
    /// then, whose request has ended.
    async fn read(&self, key: Key, urgency: &Urgency) -> Result<Option<Got>, ImageError> {
        let turn = urgency.turn(&self.demand, &self.fill).await;
        let chunk = match key {
            Key::Block(block) => {
                self.snapshot.read_block(block).await?;
                return Ok(Some(Got::Block));
            }
            Key::Chunk(chunk) => chunk,
        };
        if !self.is_wanted(key) {
            return Ok(None);
        }
        // The block is known: otherwise the parts would wait for it.
        let Some(Some(entry)) = self.snapshot.known_entry(chunk) else {
            return Err(ImageError::Panicked);
        };
        let stored = self.snapshot.read_stored(&entry).await?;
        drop(turn);
        let _turn = urgency.turn(&self.demand_decoders, &self.fill_decoder).await;
        let content = self.snapshot.decode(chunk, &entry, &stored)?;
        Ok(Some(Got::Chunk(Arc::new(content))))
    }

    /// Removes the parts of a request that are not wanted any more. If none is left, the request
    /// ends.
    fn is_wanted(&self, key: Key) -> bool {
        let mut unwanted = Vec::new();
        let mut state = self.state();
        let wanted = match state.flights.entry(key) {
            Slot::Occupied(mut slot) => {
                let parts = &mut slot.get_mut().parts;
                unwanted.extend(parts.extract_if(.., |part| !part.is_wanted()));
                let wanted = !parts.is_empty();
                if !wanted {
                    slot.remove();
                }
                wanted
            }
            Slot::Vacant(_) => false,
        };
        drop(state);
        unwanted.into_iter().for_each(Part::withdraw);
        wanted
    }

    /// Ends a request: keeps what was read, if it may be needed again, and returns those that wait.
    fn end(&self, key: Key, got: Option<&Got>) -> Flight {
        let mut state = self.state();
        let flight = state.flights.remove(&key).unwrap_or_default();
        if let (Key::Chunk(chunk), Some(Got::Chunk(content))) = (key, got) {
            // Once all of a chunk is delivered, nothing of it is requested again.
            if flight.parts.iter().all(|part| part.len() < content.len()) {
                state.cache.insert(chunk, content.clone());
            }
        }
        flight
    }
}

fn answer(listeners: Vec<Listener>, outcome: &Result<(), Arc<ImageError>>) {
    for listener in listeners {
        // A thread that does not wait any more needs no answer.
        let _ = listener.send(outcome.clone());
    }
}

/// The end of a request, which happens in any case.
struct Landing<'a> {
    flights: &'a Flights,
    key: Key,
}

impl Landing<'_> {
    fn land(self, got: Option<&Got>) -> Flight {
        let flight = self.flights.end(self.key, got);
        std::mem::forget(self);
        flight
    }
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        drop(self.flights.end(self.key, None));
    }
}
