// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opens a snapshot that may be in several places: all at once, so that none that is away delays
//! the guest.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use demand_source::{PageSource, Replicas};

use crate::config::source::SnapshotPlace;
use crate::error::{Error, Kind};
use crate::snapshot::image::MemoryImage;
use crate::snapshot::open::OpenSnapshot;
#[cfg(feature = "remote")]
use crate::snapshot::remote::HostCache;
use crate::snapshot::remote::Reading;
use crate::snapshot::saved::{SavedMemory, SavedVm};
use crate::vm::restore::{RestoreError, RestoreOptions};
use crate::vm::session::Session;
use crate::vm::sources::Sources;

/// How long the other places may take to answer after the first one has. Later ones join when they
/// do.
const GRACE: Duration = Duration::from_millis(500);

/// A snapshot in one of several places, which has answered.
struct Found {
    /// The preference of the place: the lowest first.
    rank: usize,
    place: SnapshotPlace,
    snapshot: OpenSnapshot,
}

/// The answer of a place, by its rank.
type Answer = (usize, Result<(OpenSnapshot, SavedVm), Error>);

/// The places that have not answered yet.
struct Pending {
    places: Vec<SnapshotPlace>,
    answers: Receiver<Answer>,
}

/// A snapshot that was opened.
pub(crate) struct Opened {
    /// The preferred place of those that have answered.
    first: Found,
    others: Vec<Found>,
    pending: RefCell<Option<Pending>>,
    is_only: bool,
    sources: Arc<Sources>,
}

/// Opens the snapshot in the first place that answers, and the others that answer soon after it;
/// through the host cache if there is one. Returns it, and the state.
pub(crate) fn open(
    session: &Session,
    options: &RestoreOptions,
) -> Result<(Opened, SavedVm), Error> {
    let sources = session.sources();
    let reading = reading(&sources, options)?;
    let place = options.source.clone();
    if options.other_sources.is_empty() {
        let (snapshot, saved) = open_in(&place, &reading, true)?;
        let first = Found { rank: 0, place, snapshot };
        let (others, pending) = (Vec::new(), RefCell::new(None));
        return Ok((Opened { first, others, pending, is_only: true, sources }, saved));
    }
    let others = options.other_sources.iter().cloned();
    let places: Vec<SnapshotPlace> = [place].into_iter().chain(others).collect();
    sources.set_places(places.iter().map(ToString::to_string));
    let answers = open_all(&places, &reading)?;
    let (mut found, mut errors, mut until) = (Vec::new(), Vec::new(), None);
    while found.len() + errors.len() < places.len() {
        let answer = match until {
            None => answers.recv().map_err(RecvTimeoutError::from),
            Some(until) => answers.recv_timeout(remaining(until)),
        };
        match answer {
            Ok((rank, Ok((snapshot, saved)))) => {
                until.get_or_insert_with(|| Instant::now() + GRACE);
                found.push((Found { rank, place: places[rank].clone(), snapshot }, saved));
            }
            Ok((rank, Err(error))) => errors.push((rank, error)),
            Err(_) => break,
        }
    }
    let is_all = found.len() + errors.len() == places.len();
    errors.sort_by_key(|(rank, _)| *rank);
    if found.is_empty()
        && let Some((_, error)) = errors.pop()
    {
        errors.iter().for_each(|(_, error)| log::warn!("{error}"));
        return Err(error);
    }
    for (rank, error) in errors {
        leave_out(&sources, rank, &error);
    }
    found.sort_by_key(|(found, _)| found.rank);
    let mut found = found.into_iter();
    let (first, saved) = found.next().ok_or_else(|| {
        Error::failed("cannot open the snapshot: no place has answered; check the sources")
    })?;
    let others = found.map(|(found, _)| found).collect();
    let pending = RefCell::new((!is_all).then_some(Pending { places, answers }));
    Ok((Opened { first, others, pending, is_only: false, sources }, saved))
}

fn remaining(until: Instant) -> Duration {
    until.saturating_duration_since(Instant::now())
}

fn leave_out(sources: &Sources, rank: usize, error: &Error) {
    log::warn!("{error}; this source is left out");
    sources.leave_out(rank);
}

/// Begins to open all places, each on its own thread.
fn open_all(places: &[SnapshotPlace], reading: &Reading) -> Result<Receiver<Answer>, Error> {
    let (sender, answers) = channel();
    for (rank, place) in places.iter().cloned().enumerate() {
        let (sender, reading) = (sender.clone(), reading.clone());
        let open = move || {
            // The restore may have ended.
            let _ = sender.send((rank, open_in(&place, &reading, false)));
        };
        let begun = thread::Builder::new().name("open".into()).spawn(open);
        begun.map_err(|source| RestoreError::Thread { source })?;
    }
    Ok(answers)
}

/// Opens one place, which may be the `only` one, and reads the state.
fn open_in(
    place: &SnapshotPlace,
    reading: &Reading,
    only: bool,
) -> Result<(OpenSnapshot, SavedVm), Error> {
    let snapshot = OpenSnapshot::open_with(place, reading)?;
    if only && reading.cache.is_some() && !snapshot.is_pushed() {
        return Err(RestoreError::CacheOfFiles { snapshot: place.shown() }.into());
    }
    let saved = snapshot.read_state()?;
    Ok((snapshot, saved))
}

/// Opens the host cache, if there is to be one.
#[cfg(feature = "remote")]
fn reading(sources: &Sources, options: &RestoreOptions) -> Result<Reading, Error> {
    let around = options.fetch_around;
    let Some(config) = &options.cache else { return Ok(Reading { cache: None, around }) };
    if options.other_sources.is_empty() && options.source.directory().is_some() {
        return Err(RestoreError::CacheOfFiles { snapshot: options.source.shown() }.into());
    }
    let cache = HostCache::open(&config.dir, config.size)?;
    sources.set_cache(cache.clone());
    Ok(Reading { cache: Some(cache), around })
}

/// Without remote snapshots none has chunks.
#[cfg(not(feature = "remote"))]
fn reading(_: &Sources, options: &RestoreOptions) -> Result<Reading, Error> {
    let unfit = || RestoreError::CacheOfFiles { snapshot: options.source.shown() };
    let none = Reading { cache: None, around: options.fetch_around };
    options.cache.as_ref().map_or(Ok(none), |_| Err(unfit().into()))
}

/// Opens the memory's image in a place; `None` if it does not belong to the state.
fn memory_in(
    snapshot: &OpenSnapshot,
    saved: &SavedMemory,
    sources: &Sources,
) -> Result<Option<MemoryImage>, Error> {
    let image = snapshot.memory(saved.size)?;
    let is_its = image.generation()[..] == saved.generation[..] && image.size() == saved.size;
    #[cfg(feature = "remote")]
    if let Some(pushed) = snapshot.pushed() {
        sources.add_image(pushed.watch());
    }
    #[cfg(not(feature = "remote"))]
    let _ = sources;
    Ok(is_its.then_some(image))
}

impl Opened {
    /// Returns the snapshot that the state was read from.
    pub(crate) fn snapshot(&self) -> &OpenSnapshot {
        &self.first.snapshot
    }

    /// Returns the place of that snapshot.
    pub(crate) fn place(&self) -> &SnapshotPlace {
        &self.first.place
    }

    fn other_snapshot(&self, other: &SnapshotPlace) -> RestoreError {
        let (snapshot, other) = (self.first.place.shown(), other.shown());
        RestoreError::OtherSnapshot { snapshot, other }
    }

    /// Opens the image of the memory, and those of the other places. A place that cannot be used is
    /// left out, and one that has not answered joins them when it does.
    pub(crate) fn memory(&self, saved: &SavedMemory) -> Result<MemoryImage, Error> {
        let Found { rank, place, snapshot } = &self.first;
        let Some(image) = memory_in(snapshot, saved, &self.sources)? else {
            return Err(RestoreError::MixedFiles { snapshot: place.shown() }.into());
        };
        if self.is_only {
            return Ok(image);
        }
        let (generation, name) = (image.generation(), place.to_string());
        let mut sources: Vec<(usize, String, Arc<dyn PageSource>)> =
            vec![(*rank, name.clone(), image.into_source())];
        for Found { rank, place, snapshot } in &self.others {
            match memory_in(snapshot, saved, &self.sources) {
                Ok(Some(image)) => sources.push((*rank, place.to_string(), image.into_source())),
                Ok(None) => return Err(self.other_snapshot(place).into()),
                Err(error) => leave_out(&self.sources, *rank, &error),
            }
        }
        let replicas = Replicas::ranked(sources);
        let replicas = Arc::new(replicas.map_err(|error| Error::of(Kind::Failed, error))?);
        self.sources.set_replicas(replicas.clone());
        if let Some(pending) = self.pending.take() {
            self.await_rest(pending, saved, replicas.clone())?;
        }
        Ok(MemoryImage::Remote { source: replicas, generation, name })
    }

    /// Joins the places that have not answered with the others when they do.
    fn await_rest(
        &self,
        Pending { places, answers }: Pending,
        saved: &SavedMemory,
        replicas: Arc<Replicas>,
    ) -> Result<(), Error> {
        let (sources, saved) = (self.sources.clone(), saved.clone());
        let others: Vec<_> = places.iter().map(|place| self.other_snapshot(place)).collect();
        let join = move || {
            for (rank, answer) in answers {
                let name = places[rank].to_string();
                let image = answer.and_then(|(snapshot, _)| memory_in(&snapshot, &saved, &sources));
                let joined = match image {
                    Ok(Some(image)) => replicas
                        .add(rank, name.clone(), image.into_source())
                        .map_err(|error| Error::of(Kind::Failed, error)),
                    Ok(None) => Err(Error::usage(&others[rank])),
                    Err(error) => Err(error),
                };
                match joined {
                    Ok(()) => log::info!("source {name} has answered, and is used as well"),
                    Err(error) => leave_out(&sources, rank, &error),
                }
            }
        };
        let begun = thread::Builder::new().name("open-rest".into()).spawn(join);
        Ok(begun.map(drop).map_err(|source| RestoreError::Thread { source })?)
    }
}
