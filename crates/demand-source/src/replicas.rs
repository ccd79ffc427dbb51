// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Several sources of one image: while one fails, another delivers.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use crate::convert::to_usize;
use crate::{
    Chunk, Completer, Completion, Destination, Extent, MissingPages, OwnedBytes, PageSource,
    Priority, Request, Retry, SourceError,
};

/// Pause before a source that has failed is tried again; it doubles with each further failure.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Bytes of the read that tries a source again.
const PROBE: u64 = 4096;

/// An error from combining sources.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReplicasError {
    /// There is no source.
    #[error("cannot read an image from no source")]
    None,
    /// The sources are not of one image.
    #[error(
        "cannot use {first} and {other} for one image: they have {size} and {other_size} bytes"
    )]
    Sizes {
        /// The first source's name.
        first: String,
        /// The name of a source that differs.
        other: String,
        /// The first source's size, in bytes.
        size: u64,
        /// The other's, in bytes.
        other_size: u64,
    },
}

/// The condition of one of several sources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaState {
    /// The source's name.
    pub name: String,
    /// Whether it has failed, and not delivered since.
    pub is_down: bool,
    /// The time for which it has been down; `None` unless it is.
    pub down_for: Option<Duration>,
    /// Number of requests of which it has failed so far.
    pub failures: u64,
}

/// Several sources of one image, the preferred one first.
///
/// Each request goes to the first source that is not down. If that fails, the request goes to the
/// next one at once, and so on; it fails when all have. So one source whose content was altered, or
/// that has lost it, costs a log line: each source must check what it delivers, as
/// [`HashedSource`](crate::HashedSource) does.
///
/// A source that has failed is down until it has delivered: a small read of background fill's
/// priority tries it after a second, then after growing pauses of up to 30 seconds, as long as
/// pages are requested. A fault asks a source that is down only when all others have failed. A
/// source that does not answer is down when its own time limit says so; one that knows how long its
/// answers take may ask [another](OtherSources) before.
///
/// A source that can be opened only later [joins](Replicas::add) the others then.
///
/// All content passes through memory of this process; a single source spares that copy.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
///
/// use demand_source::{LocalFile, PageSource, Replicas};
///
/// # let folder = tempfile::tempdir().unwrap();
/// # let [near, far] = ["near", "far"].map(|name| folder.path().join(name));
/// # std::fs::write(&near, [1; 8192]).unwrap();
/// # std::fs::write(&far, [1; 8192]).unwrap();
/// let open = |path| -> Arc<dyn PageSource> { Arc::new(LocalFile::open(path).unwrap()) };
/// let source = Replicas::new([("near".into(), open(&near)), ("far".into(), open(&far))]).unwrap();
/// assert_eq!(source.size(), 8192);
/// assert!(source.states().iter().all(|state| !state.is_down));
/// ```
pub struct Replicas {
    shared: Arc<Shared>,
}

struct Shared {
    size: u64,
    /// By preference.
    replicas: RwLock<Vec<Arc<Replica>>>,
    /// The requests of background fill in progress.
    fills: Mutex<Vec<Weak<Fill>>>,
    /// For sources that are added later.
    missing: Mutex<Vec<MissingPages>>,
}

/// A request of background fill, which a fault may come to need.
struct Fill {
    /// Its ranges, in bytes.
    ranges: Vec<Range<u64>>,
    is_raised: AtomicBool,
}

struct Replica {
    name: String,
    /// Its preference: lower ones come first.
    rank: usize,
    source: Arc<dyn PageSource>,
    health: Mutex<Health>,
}

#[derive(Default)]
struct Health {
    /// When the source is to be tried again; `None` while it delivers.
    down_until: Option<Instant>,
    down_since: Option<Instant>,
    /// Number of times that it was down in a row.
    times: u32,
    /// Whether a read that tries it is in progress.
    is_tried: bool,
    failures: u64,
}

/// The other sources of an image, for one of them: see [`PageSource::set_others`].
#[derive(Clone)]
pub struct OtherSources {
    shared: Weak<Shared>,
    of: Weak<Replica>,
}

impl OtherSources {
    /// Sends a request to the preferred one of the others that deliver. Returns `None`, and makes no
    /// request, if there is none.
    pub fn submit(&self, request: Request) -> Option<Completion> {
        let all = self.shared.upgrade()?.all();
        let is_up = |replica: &Arc<Replica>| replica.health().down_until.is_none();
        let is_other = |replica: &Arc<Replica>| Arc::as_ptr(replica) != self.of.as_ptr();
        let other = all.into_iter().find(|replica| is_other(replica) && is_up(replica))?;
        let (completer, completion) = Completion::pair();
        let answered = other.source.submit(request);
        answered.then(move |outcome| {
            other.note(&outcome);
            completer.complete(outcome);
        });
        Some(completion)
    }
}

impl fmt::Debug for OtherSources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OtherSources").finish_non_exhaustive()
    }
}

/// A request that some sources may have failed.
struct Attempt {
    /// Unless it is a fault's.
    fill: Option<Arc<Fill>>,
    chunks: Vec<Chunk>,
    /// The sources that are left, the next one last.
    left: Vec<Arc<Replica>>,
    /// The failure that says the most.
    error: Option<SourceError>,
    completer: Completer,
}

impl Replicas {
    /// Combines sources, which have the same content; each has a name for log lines.
    ///
    /// # Errors
    ///
    /// [`ReplicasError`] without a source, or if their sizes differ.
    pub fn new(
        sources: impl IntoIterator<Item = (String, Arc<dyn PageSource>)>,
    ) -> Result<Self, ReplicasError> {
        Replicas::ranked((0..).zip(sources).map(|(rank, (name, source))| (rank, name, source)))
    }

    /// Like [`new`](Self::new), with the preference of each source: the lowest first. They leave
    /// room for those that [`add`](Self::add) adds.
    ///
    /// # Errors
    ///
    /// The same as those of [`new`](Self::new).
    pub fn ranked(
        sources: impl IntoIterator<Item = (usize, String, Arc<dyn PageSource>)>,
    ) -> Result<Self, ReplicasError> {
        let mut sources = sources.into_iter();
        let (rank, name, source) = sources.next().ok_or(ReplicasError::None)?;
        let size = source.size();
        let first = Arc::new(Replica { name, rank, source, health: Mutex::default() });
        let replicas = RwLock::new(vec![first.clone()]);
        let shared =
            Arc::new(Shared { size, replicas, fills: Mutex::default(), missing: Mutex::default() });
        shared.introduce(&first);
        let replicas = Replicas { shared };
        for (rank, name, source) in sources {
            replicas.add(rank, name, source)?;
        }
        Ok(replicas)
    }

    /// Adds a source of the same content with this preference, after those that have the same.
    ///
    /// # Errors
    ///
    /// [`ReplicasError::Sizes`] if its size differs.
    pub fn add(
        &self,
        rank: usize,
        name: String,
        source: Arc<dyn PageSource>,
    ) -> Result<(), ReplicasError> {
        let (size, other_size) = (self.shared.size, source.size());
        let mut replicas = self.shared.replicas.write().unwrap_or_else(PoisonError::into_inner);
        if other_size != size {
            let first = replicas.first().map_or_else(String::new, |first| first.name.clone());
            return Err(ReplicasError::Sizes { first, other: name, size, other_size });
        }
        // With the lock held, so that each source gets each view once.
        self.shared.missing().iter().for_each(|missing| source.share_missing(missing));
        let at = replicas.partition_point(|other| other.rank <= rank);
        let replica = Arc::new(Replica { name, rank, source, health: Mutex::default() });
        replicas.insert(at, replica.clone());
        drop(replicas);
        self.shared.introduce(&replica);
        Ok(())
    }

    /// Returns the condition of each source, in order of preference.
    pub fn states(&self) -> Vec<ReplicaState> {
        let state = |replica: Arc<Replica>| {
            let health = replica.health();
            ReplicaState {
                name: replica.name.clone(),
                is_down: health.down_until.is_some(),
                down_for: health.down_since.map(|since| since.elapsed()),
                failures: health.failures,
            }
        };
        self.shared.all().into_iter().map(state).collect()
    }
}

impl Replica {
    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what a request to the source has shown. Returns whether the outcome is final: no other
    /// source can do better.
    fn note(&self, outcome: &Result<(), SourceError>) -> bool {
        let error = match outcome {
            Ok(()) => {
                let mut health = self.health();
                let was_down = health.down_until.take().is_some();
                health.down_since = None;
                health.times = 0;
                drop(health);
                if was_down {
                    log::info!("page source {} delivers again", self.name);
                }
                return true;
            }
            // Nothing that the source could help.
            Err(SourceError::OutOfRange { .. } | SourceError::Withdrawn) => return true,
            Err(error) => error,
        };
        let now = Instant::now();
        let mut health = self.health();
        health.failures += 1;
        // Requests that were in progress together fail together.
        let is_news = health.down_until.is_none_or(|until| until <= now);
        let was_down = health.down_until.is_some();
        if is_news {
            let pause = FIRST_PAUSE.saturating_mul(1 << health.times.min(5)).min(LONGEST_PAUSE);
            health.down_until = Some(now + pause);
            health.down_since.get_or_insert(now);
            health.times += 1;
        }
        drop(health);
        if !was_down {
            log::warn!("page source {} fails, and others are asked: {error}", self.name);
        }
        false
    }
}

impl Shared {
    /// Returns the sources in the order in which a request asks them, the first one last: those
    /// that deliver, by preference; then those that are down, by the time of their next trial.
    fn order(&self) -> Vec<Arc<Replica>> {
        let mut order = self.all();
        // Equal ones keep their order.
        order.sort_by_cached_key(|replica| replica.health().down_until);
        order.reverse();
        order
    }

    fn missing(&self) -> MutexGuard<'_, Vec<MissingPages>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns all sources, by preference.
    fn all(&self) -> Vec<Arc<Replica>> {
        self.replicas.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives a source the others.
    fn introduce(self: &Arc<Self>, replica: &Arc<Replica>) {
        let others = OtherSources { shared: Arc::downgrade(self), of: Arc::downgrade(replica) };
        replica.source.set_others(others);
    }

    fn fills(&self) -> MutexGuard<'_, Vec<Weak<Fill>>> {
        self.fills.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a request of background fill, until it ends.
    fn note_fill(&self, chunks: &[Chunk]) -> Arc<Fill> {
        let ranges = chunks
            .iter()
            .map(|chunk| chunk.offset..chunk.offset.saturating_add(chunk.destination.len() as u64));
        let fill = Fill { ranges: ranges.collect(), is_raised: AtomicBool::new(false) };
        let fill = Arc::new(fill);
        let mut fills = self.fills();
        fills.retain(|fill| fill.strong_count() > 0);
        fills.push(Arc::downgrade(&fill));
        fill
    }

    /// Gives the requests of background fill that have some of these bytes the priority of a fault,
    /// whichever source has them next.
    fn raise_fills(&self, bytes: Range<u64>) {
        for fill in self.fills().iter().filter_map(Weak::upgrade) {
            let has_some = |range: &Range<u64>| range.start < bytes.end && bytes.start < range.end;
            if fill.ranges.iter().any(has_some) {
                fill.is_raised.store(true, Ordering::SeqCst);
            }
        }
    }

    /// Tries sources that are down and whose pause has passed, by a read at `offset`.
    fn try_again(self: &Arc<Self>, offset: u64) {
        let now = Instant::now();
        for replica in self.all() {
            {
                let mut health = replica.health();
                if health.is_tried || health.down_until.is_none_or(|until| now < until) {
                    continue;
                }
                health.is_tried = true;
            }
            let offset = offset - offset % PROBE;
            let len = to_usize(PROBE.min(self.size - offset));
            let (destination, bytes) = Destination::owned(vec![0; len]);
            let chunks = vec![Chunk { offset, destination }];
            let request = Request { priority: Priority::Fill, chunks };
            let source = replica.source.clone();
            source.submit(request).then(move |outcome| {
                replica.note(&outcome.and_then(|()| bytes.take().map(drop)));
                replica.health().is_tried = false;
            });
        }
    }

    /// Sends a request to the next source that is left.
    fn attempt(self: &Arc<Self>, mut attempt: Attempt) {
        let is_wanted = attempt.chunks.iter().all(|chunk| chunk.destination.is_wanted());
        if !is_wanted || !attempt.completer.is_awaited() {
            return attempt.end(Err(SourceError::Withdrawn));
        }
        let Some(replica) = attempt.left.pop() else {
            let error = attempt.error.take().unwrap_or(SourceError::Abandoned);
            return attempt.end(Err(error));
        };
        let (mut chunks, mut read) = (Vec::new(), Vec::new());
        for chunk in &attempt.chunks {
            let (destination, bytes) = Destination::owned(vec![0; chunk.destination.len()]);
            chunks.push(Chunk { offset: chunk.offset, destination });
            read.push(bytes);
        }
        let (priority, fill) = (attempt.priority(), attempt.fill.clone());
        let request = Request { priority, chunks };
        let (shared, source) = (self.clone(), replica.source.clone());
        let answered = source.submit(request);
        // It was raised before this source had the request.
        if let Some(fill) = fill.filter(|fill| priority == Priority::Fill && fill.is_raised()) {
            fill.ranges.iter().for_each(|range| source.raise(range.start, range.end - range.start));
        }
        answered.then(move |outcome| {
            let content = outcome.and_then(|()| {
                read.into_iter().map(OwnedBytes::take).collect::<Result<Vec<_>, _>>()
            });
            let (outcome, content) = match content {
                Ok(content) => (Ok(()), content),
                Err(error) => (Err(error), Vec::new()),
            };
            if replica.note(&outcome) {
                for (chunk, content) in attempt.chunks.iter_mut().zip(content) {
                    chunk.destination.write_at(0, &content);
                }
                return attempt.end(outcome);
            }
            attempt.failed(outcome);
            shared.attempt(attempt);
        });
    }
}

impl Fill {
    fn is_raised(&self) -> bool {
        self.is_raised.load(Ordering::SeqCst)
    }
}

impl Attempt {
    fn priority(&self) -> Priority {
        match &self.fill {
            Some(fill) if !fill.is_raised() => Priority::Fill,
            _ => Priority::Demand,
        }
    }

    /// Keeps an error, unless the one before says more: that another attempt may succeed.
    fn failed(&mut self, outcome: Result<(), SourceError>) {
        let is_better = |error: &SourceError| {
            let before = self.error.as_ref().map(SourceError::retry);
            before.is_none_or(|before| before == Retry::Never && error.retry() == Retry::Later)
        };
        if let Some(error) = outcome.err().filter(is_better) {
            self.error = Some(error);
        }
    }

    fn end(self, outcome: Result<(), SourceError>) {
        // The outcome takes effect when the destinations are dropped.
        drop(self.chunks);
        self.completer.complete(outcome);
    }
}

impl PageSource for Replicas {
    fn size(&self) -> u64 {
        self.shared.size
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        let mut left = self.shared.order();
        loop {
            let replica = left.pop().ok_or(SourceError::Abandoned)?;
            match replica.source.extent(offset) {
                Ok(extent) => return Ok(extent),
                Err(error) => {
                    let outcome = Err(error);
                    if replica.note(&outcome) || left.is_empty() {
                        return outcome.map(|()| Extent::Data { end: self.shared.size });
                    }
                }
            }
        }
    }

    fn extent_now(&self, offset: u64) -> Option<Result<Extent, SourceError>> {
        self.shared.order().last()?.source.extent_now(offset)
    }

    fn submit(&self, request: Request) -> Completion {
        let (completer, completion) = Completion::pair();
        let Request { priority, chunks } = request;
        if let Some(chunk) = chunks.first().filter(|chunk| chunk.offset < self.shared.size) {
            self.shared.try_again(chunk.offset);
        }
        let left = self.shared.order();
        let fill = (priority == Priority::Fill).then(|| self.shared.note_fill(&chunks));
        self.shared.attempt(Attempt { fill, chunks, left, error: None, completer });
        completion
    }

    fn raise(&self, offset: u64, len: u64) {
        self.shared.raise_fills(offset..offset.saturating_add(len));
        self.shared.all().iter().for_each(|replica| replica.source.raise(offset, len));
    }

    fn share_missing(&self, missing: &MissingPages) {
        let replicas = self.shared.replicas.read().unwrap_or_else(PoisonError::into_inner);
        let mut shared = self.shared.missing();
        shared.retain(|missing| missing.words().is_some());
        shared.push(missing.clone());
        replicas.iter().for_each(|replica| replica.source.share_missing(missing));
    }

    fn read_now(
        &self,
        offset: u64,
        destination: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        let outcome = self.shared.order().last()?.source.read_now(offset, destination)?;
        // Otherwise by a request, which asks the others.
        outcome.is_ok().then_some(outcome)
    }
}

impl fmt::Debug for Replicas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replicas").field("states", &self.states()).finish_non_exhaustive()
    }
}
