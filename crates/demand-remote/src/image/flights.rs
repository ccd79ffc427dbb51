// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests to the store that are in progress: one for each chunk or block, however many wait.

mod neighbours;
mod run;

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use demand_source::{Chunk, Destination, OtherSources, Priority, Request};
use tokio::sync::{Notify, Semaphore, SemaphorePermit, oneshot};
#[cfg(feature = "cache")]
use tokio::time::{Instant, sleep};

use super::around::{Around, AroundStats, FetchAround};
use super::block::Entry;
use super::error::ImageError;
use super::hedge::Hedges;
#[cfg(feature = "cache")]
use super::host::{HostReads, Keep, Room, Step};
use super::job::Part;
use super::layout::BLOCK_CHUNKS;
use super::recent::RecentChunks;
use super::snapshot::Snapshot;
use crate::runtime;
use run::Member;

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

/// An answer to a request for a chunk.
enum Answer {
    /// The stored bytes.
    Stored(Bytes),
    /// The content, from another source.
    Content(Vec<u8>),
}

/// Something that was read.
enum Got {
    Block,
    Chunk(Arc<Vec<u8>>),
    /// A chunk that the host cache keeps as well, and its stored bytes.
    #[cfg(feature = "cache")]
    Claimed(Arc<Vec<u8>>, Keep, Bytes),
}

impl Got {
    fn content(&self) -> Option<&Arc<Vec<u8>>> {
        match self {
            Got::Block => None,
            Got::Chunk(content) => Some(content),
            #[cfg(feature = "cache")]
            Got::Claimed(content, ..) => Some(content),
        }
    }
}

/// The priority of a request in progress, which only rises.
#[derive(Default)]
pub(crate) struct Urgency {
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

    /// Waits for a future, unless a thread waits for the request, or begins to.
    #[cfg(feature = "cache")]
    pub(crate) async fn until_raised<F: Future>(&self, future: F) -> Option<F::Output> {
        if self.is_raised() {
            return None;
        }
        tokio::select! {
            biased;
            () = self.changed.notified() => None,
            output = future => Some(output),
        }
    }

    /// Waits for a permit of `fill`, or, once raised, for one of `demand`.
    async fn turn<'a>(&self, demand: &'a Semaphore, fill: &'a Semaphore) -> Turn<'a> {
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

/// The right to have one request in progress.
type Turn<'a> = Option<SemaphorePermit<'a>>;

/// The outcome of looking for a chunk in the host cache.
#[cfg(feature = "cache")]
enum Looked<'a> {
    Found(Vec<u8>),
    /// The chunk's request has ended, since no part waits for it.
    Unwanted,
    /// This process fetches the chunk, and keeps it for the others if it can.
    Fetch(Turn<'a>, Option<Keep>),
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
    /// Whether it waits for the turn of a run, which then makes the request.
    in_run: bool,
    /// Whether it is wanted without a part: its chunk lies beside one that a fault needs.
    is_neighbour: bool,
}

struct State {
    recent: RecentChunks,
    flights: HashMap<Key, Flight>,
    around: Around,
}

/// The requests in progress of one image, and its decoded chunks.
pub(crate) struct Flights {
    snapshot: Snapshot,
    #[cfg(feature = "cache")]
    host: Option<HostReads>,
    demand: Semaphore,
    fill: Semaphore,
    /// One thread of the runtime at most decodes for fill, so that one is free for faults.
    fill_decoder: Semaphore,
    demand_decoders: Semaphore,
    pub(crate) hedges: Hedges,
    /// The other sources of the image, if it has any.
    pub(crate) others: OnceLock<OtherSources>,
    /// No part may be dropped while it is locked: that may call the pager.
    state: Mutex<State>,
}

impl Flights {
    pub(crate) fn new(
        snapshot: Snapshot,
        recent_bytes: usize,
        limits: Limits,
        around: FetchAround,
        #[cfg(feature = "cache")] host: Option<HostReads>,
    ) -> Arc<Self> {
        let around = Around::new(around, snapshot.head.geometry.chunk_size());
        let recent = RecentChunks::new(recent_bytes);
        let state = State { recent, flights: HashMap::new(), around };
        let semaphore = |permits: usize| Semaphore::new(permits.clamp(1, Semaphore::MAX_PERMITS));
        Arc::new(Flights {
            snapshot,
            #[cfg(feature = "cache")]
            host,
            demand: semaphore(limits.demand),
            fill: semaphore(limits.fill),
            fill_decoder: Semaphore::new(1),
            demand_decoders: Semaphore::new(Semaphore::MAX_PERMITS),
            hedges: Hedges::default(),
            others: OnceLock::new(),
            state: Mutex::new(state),
        })
    }

    pub(crate) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes `len` bytes of a chunk, from `start` on, to `deliver` and returns `true`; or returns
    /// `false` if that would have to wait.
    pub(crate) fn read_now(
        &self,
        chunk: u64,
        entry: &Entry,
        (start, len): (usize, usize),
        deliver: impl FnOnce(&[u8]),
    ) -> bool {
        let recent = {
            let mut state = self.state();
            let recent = state.recent.get(chunk);
            if recent.is_some() {
                state.around.used(chunk, len);
            }
            recent
        };
        if let Some(bytes) = recent.as_ref().and_then(|content| content.get(start..start + len)) {
            deliver(bytes);
            return true;
        }
        #[cfg(feature = "cache")]
        if let Some(host) = &self.host {
            let found = host.read_now(&self.snapshot, chunk, entry, (start, len), deliver);
            if found {
                self.state().around.used(chunk, len);
            }
            return found;
        }
        #[cfg(not(feature = "cache"))]
        let _ = entry;
        false
    }

    /// Delivers the parts of a request at once where that is possible, and otherwise lets them wait
    /// for what they need.
    pub(crate) fn route_all(self: &Arc<Self>, parts: Vec<Part>) {
        let mut queued = Vec::new();
        for part in parts {
            self.route(part, Some(&mut queued));
        }
        self.start_runs(queued);
    }

    /// Delivers a part at once if that is possible, and otherwise lets it wait for what it needs. A
    /// request of fill for a chunk that does not begin yet is added to `queue`, if there is one.
    fn route(self: &Arc<Self>, part: Part, queue: Option<&mut Vec<Member>>) {
        let chunk = part.chunk;
        let entry = self.snapshot.known_entry(chunk);
        let key = match entry {
            Some(None) => return part.deliver_zeros(),
            Some(Some(_)) => Key::Chunk(chunk),
            None => Key::Block(chunk / BLOCK_CHUNKS),
        };
        let mut state = self.state();
        if let Key::Chunk(chunk) = key
            && let Some(content) = state.recent.get(chunk)
        {
            if part.priority == Priority::Demand {
                state.around.used(chunk, part.len());
            }
            drop(state);
            return part.deliver(&content);
        }
        if let Key::Block(block) = key
            && self.snapshot.known_block(block).is_some()
        {
            // It was read since the look above.
            drop(state);
            return self.route(part, queue);
        }
        #[cfg(feature = "cache")]
        let part = if let Some(host) = &self.host
            && let Some(Some(entry)) = entry
            && !state.flights.contains_key(&key)
        {
            drop(state);
            let Some(part) = host.deliver_now(&self.snapshot, &entry, part) else { return };
            state = self.state();
            part
        } else {
            part
        };
        let is_demand = part.priority == Priority::Demand;
        if let (Slot::Vacant(slot), Some(queue), Some(Some(entry)), false) =
            (state.flights.entry(key), queue, entry, is_demand)
        {
            slot.insert(Flight { parts: vec![part], in_run: true, ..Flight::default() });
            return queue.push(Member { chunk, entry });
        }
        let is_new = !state.flights.contains_key(&key);
        if is_demand && let Key::Chunk(chunk) = key {
            state.around.used(chunk, part.len());
        }
        let flight = self.flight(&mut state, key);
        flight.parts.push(part);
        if is_demand {
            self.raise_flight(key, flight);
            if is_new && let Key::Chunk(chunk) = key {
                self.add_neighbours(state, chunk);
            }
        }
    }

    /// Returns the request for `key`, which begins now unless it is in progress.
    fn flight<'a>(self: &Arc<Self>, state: &'a mut State, key: Key) -> &'a mut Flight {
        match state.flights.entry(key) {
            Slot::Occupied(slot) => slot.into_mut(),
            Slot::Vacant(slot) => {
                let flight = slot.insert(Flight::default());
                self.begin(key, flight);
                flight
            }
        }
    }

    /// Begins a request by itself.
    fn begin(self: &Arc<Self>, key: Key, flight: &Flight) {
        let (this, urgency) = (self.clone(), flight.urgency.clone());
        runtime::handle().spawn(async move { this.fly(key, &urgency).await });
    }

    /// Begins a request by itself that a run leaves.
    #[cfg(feature = "cache")]
    fn depart(self: &Arc<Self>, key: Key) {
        if let Some(flight) = self.state().flights.get(&key) {
            self.begin(key, flight);
        }
    }

    /// Gives a request the priority of demand. It does not wait for the turn of a run.
    fn raise_flight(self: &Arc<Self>, key: Key, flight: &mut Flight) {
        flight.urgency.raise();
        if std::mem::take(&mut flight.in_run) {
            self.begin(key, flight);
        }
    }

    /// Takes a request out of its run, whose turn has come, and returns its priority; `None` if it
    /// has left the run.
    fn leave_run(&self, key: Key) -> Option<Arc<Urgency>> {
        let mut state = self.state();
        let flight = state.flights.get_mut(&key)?;
        std::mem::take(&mut flight.in_run).then(|| flight.urgency.clone())
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
    pub(crate) fn raise(self: &Arc<Self>, first: u64, last: u64) {
        let chunks = first..=last;
        for (key, flight) in &mut self.state().flights {
            let mut found = matches!(key, Key::Chunk(chunk) if chunks.contains(chunk));
            for part in flight.parts.iter_mut().filter(|part| chunks.contains(&part.chunk)) {
                part.priority = Priority::Demand;
                found = true;
            }
            if found {
                self.raise_flight(*key, flight);
            }
        }
    }

    /// Returns the number of requests that are in progress or queued for faults, and of the others.
    pub(crate) fn queues(&self) -> (usize, usize) {
        let state = self.state();
        let demand = state.flights.values().filter(|flight| flight.urgency.is_raised()).count();
        (demand, state.flights.len() - demand)
    }

    /// Ends the wait of all parts.
    pub(crate) fn abandon(&self) {
        let mut parts = Vec::new();
        for flight in self.state().flights.values_mut() {
            parts.append(&mut flight.parts);
            flight.is_neighbour = false;
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
        self.finish(landing, got.map_err(Arc::new));
    }

    /// Ends a request, and answers all parts that wait for it.
    fn finish(self: &Arc<Self>, landing: Landing<'_>, got: Result<Got, Arc<ImageError>>) {
        let Flight { parts, listeners, .. } = landing.land(got.as_ref().ok());
        match got {
            Ok(Got::Block) => {
                answer(listeners, &Ok(()));
                self.route_all(parts);
            }
            Ok(Got::Chunk(content)) => {
                parts.into_iter().for_each(|part| part.deliver(&content));
            }
            #[cfg(feature = "cache")]
            Ok(Got::Claimed(content, keep, stored)) => {
                // Faults first: other processes can wait.
                parts.into_iter().for_each(|part| part.deliver(&content));
                if let Some(host) = &self.host {
                    host.keep(keep, &stored, content);
                }
            }
            Err(error) => {
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
        #[cfg(feature = "cache")]
        let (turn, keep) = match self.look_in_host(chunk, &entry, urgency, turn).await {
            Looked::Found(content) => return Ok(Some(Got::Chunk(Arc::new(content)))),
            Looked::Unwanted => return Ok(None),
            Looked::Fetch(turn, keep) => (turn, keep),
        };
        let len = u64::from(entry.len);
        let begun = std::time::Instant::now();
        let (snapshot, stored) = (&self.snapshot, &entry);
        let request = || async move { snapshot.read_stored(stored).await.map(Answer::Stored) };
        let answer = match urgency.is_raised() {
            true => self.hedges.read(len, request, || self.read_elsewhere(chunk)).await?,
            false => request().await?,
        };
        let stored = match answer {
            Answer::Stored(stored) => stored,
            // The host cache is left to a request to this store.
            Answer::Content(content) => return Ok(Some(Got::Chunk(Arc::new(content)))),
        };
        self.state().around.answered(len, 1, begun.elapsed());
        drop(turn);
        let _turn = urgency.turn(&self.demand_decoders, &self.fill_decoder).await;
        let content = Arc::new(self.snapshot.decode(chunk, &entry, &stored)?);
        #[cfg(feature = "cache")]
        if let Some(keep) = keep {
            return Ok(Some(Got::Claimed(content, keep, stored)));
        }
        Ok(Some(Got::Chunk(content)))
    }

    /// Begins to read a chunk at another source of the image, which checks it. Returns `None` if no
    /// other source delivers.
    fn read_elsewhere(
        &self,
        chunk: u64,
    ) -> Option<impl Future<Output = Option<Answer>> + Send + use<>> {
        let geometry = self.snapshot.head.geometry;
        let (destination, bytes) = Destination::owned(vec![0; geometry.chunk_len(chunk)]);
        let chunks = vec![Chunk { offset: geometry.offset(chunk), destination }];
        let request = Request { priority: Priority::Demand, chunks };
        let completion = self.others.get()?.submit(request)?;
        let (answer, answered) = oneshot::channel();
        completion.then(move |outcome| {
            let content = outcome.and_then(|()| bytes.take());
            // The first request may have been answered meanwhile.
            let _ = answer.send(content.ok().map(Answer::Content));
        });
        Some(async move { answered.await.ok().flatten() })
    }

    /// Looks for a chunk in the host cache, until it is there or this process is the one that
    /// fetches it. The request has no turn while another process makes it.
    #[cfg(feature = "cache")]
    async fn look_in_host<'a>(
        &'a self,
        chunk: u64,
        entry: &Entry,
        urgency: &Urgency,
        mut turn: Turn<'a>,
    ) -> Looked<'a> {
        let Some(host) = &self.host else { return Looked::Fetch(turn, None) };
        let since = Instant::now();
        loop {
            let room = Room::Unless(urgency);
            match host.step(&self.snapshot, chunk, entry, since, room).await {
                Step::Found(content) => return Looked::Found(content),
                Step::Fetch(keep) => return Looked::Fetch(turn, keep),
                Step::Wait(pause) => {
                    drop(turn);
                    sleep(pause).await;
                    turn = urgency.turn(&self.demand, &self.fill).await;
                    if !self.is_wanted(Key::Chunk(chunk)) {
                        return Looked::Unwanted;
                    }
                }
            }
        }
    }

    /// Removes the parts of a request that are not wanted any more. If none is left, the request
    /// ends.
    fn is_wanted(&self, key: Key) -> bool {
        let mut unwanted = Vec::new();
        let mut state = self.state();
        let wanted = match state.flights.entry(key) {
            Slot::Occupied(mut slot) => {
                let Flight { parts, is_neighbour, .. } = slot.get_mut();
                unwanted.extend(parts.extract_if(.., |part| !part.is_wanted()));
                let wanted = !parts.is_empty() || *is_neighbour;
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
        if let (Key::Chunk(chunk), Some(content)) = (key, got.and_then(Got::content)) {
            state.around.fetched(chunk);
            // Once all of a chunk is delivered, nothing of it is requested again.
            if flight.parts.iter().all(|part| part.len() < content.len()) {
                state.recent.insert(chunk, content.clone());
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
