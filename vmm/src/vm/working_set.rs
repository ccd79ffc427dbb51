// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The working set of a restored VM: its replay while the guest runs, and its recording.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use demand_memory::{
    DemandMemory, FillOptions, FillOrder, FillRange, Hold, PAGE_SIZE, PageRange, Pager, TouchLog,
    join_within,
};
use demand_remote::working_set::{
    ImageId, Recording, ReplayedSource, Saved, WorkingSet, WorkingSetError, beside_directory,
    beside_image, record,
};
use demand_remote::{Location, LocationError};
use demand_source::PageSource;

use crate::arch::placement::Placement;
use crate::config::pager::PagerKind;
use crate::config::source::SnapshotPlace;
use crate::config::{WorkingSetConfig, WorkingSetMode};
use crate::error::{Error, Kind, no_thread};
use crate::report::WorkingSetReport;
use crate::snapshot::open::OpenSnapshot;
use crate::sync::LockExt;
use crate::vm::restore::RestoreError;
use crate::vm::timeouts;

impl From<WorkingSetError> for Error {
    fn from(error: WorkingSetError) -> Self {
        Error::of(Kind::Failed, error)
    }
}

/// Returns the place that a user has given; `None` if no working set can be there.
fn location(place: &SnapshotPlace) -> Result<Option<Location>, LocationError> {
    match place {
        SnapshotPlace::Directory(path) => Ok(Some(Location::Path(path.clone()))),
        SnapshotPlace::Url(url) if PagerKind::of(url).is_some() => Ok(None),
        SnapshotPlace::Url(url) => url.parse().map(Some),
    }
}

/// Returns the place of the working set beside a snapshot, if there is one.
fn beside(snapshot: &OpenSnapshot, place: &SnapshotPlace) -> Option<Location> {
    // Exports of an NBD server and images of a pager have nothing beside them.
    let location = location(place).ok().flatten()?;
    let Some(index) = snapshot.index() else { return Some(beside_directory(&location)) };
    let (store, _) = location.split()?;
    Some(beside_image(&store, index))
}

/// Returns pages of the image as those of the regions at `regions`.
fn in_regions(ranges: impl Iterator<Item = Range<u64>>, regions: &[Placement]) -> Vec<FillRange> {
    let mut placed = Vec::new();
    for pages in ranges {
        for (region, placement) in regions.iter().enumerate() {
            let first = placement.image_offset / PAGE_SIZE;
            let end = first + placement.size / PAGE_SIZE;
            let (from, to) = (pages.start.max(first), pages.end.min(end));
            if from < to {
                let pages = PageRange::new(from - first, to - from);
                placed.push(FillRange { region, pages });
            }
        }
    }
    placed
}

/// The working set of a VM.
pub(crate) struct WorkingSetRun {
    mode: WorkingSetMode,
    place: Location,
    image: ImageId,
    /// The image itself, from which recorded pages are read.
    source: Arc<dyn PageSource>,
    replayed: Option<Arc<ReplayedSource>>,
    /// The set of earlier runs, if it is not replayed.
    before: Option<WorkingSet>,
    log: Arc<TouchLog>,
    seconds: u64,
    pagers: OnceLock<Vec<Weak<Pager>>>,
    outcome: OnceLock<Result<Saved, String>>,
    /// The time at which the VM's end was begun.
    ended: Mutex<Option<Instant>>,
    changed: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl WorkingSetRun {
    /// Opens the working set of a snapshot, which `of` has with its place, if it exists. The image
    /// has this generation id and size, and this source.
    ///
    /// # Errors
    ///
    /// If the place is unusable, or the set must be replayed and cannot be.
    pub(crate) fn open(
        config: &WorkingSetConfig,
        of: (&OpenSnapshot, &SnapshotPlace),
        (generation, size): ([u8; 16], u64),
        source: Arc<dyn PageSource>,
    ) -> Result<Arc<Self>, Error> {
        let (mode, (snapshot, at)) = (config.mode, of);
        let place = match &config.at {
            Some(at) => location(at).map_err(|error| Error::of(Kind::Usage, error))?,
            None => beside(snapshot, at),
        };
        let no_place = || RestoreError::NoWorkingSetPlace { snapshot: at.shown() };
        let place = place.ok_or_else(no_place)?;
        let image = match snapshot.index() {
            Some(index) => ImageId::of_index(index, size),
            None => ImageId::of_generation(generation, size),
        };
        let set = match WorkingSet::open(&place, image) {
            Ok(set) => Some(set),
            Err(error) if mode == WorkingSetMode::Replay => return Err(error.into()),
            Err(WorkingSetError::Missing { .. }) => None,
            Err(error) => {
                log::warn!("{error}; the guest is restored without it");
                None
            }
        };
        let (replayed, before) = match set {
            Some(set) if mode.replays() => {
                let replayed = ReplayedSource::new(source.clone(), set);
                replayed.begin();
                (Some(Arc::new(replayed)), None)
            }
            set => (None, set),
        };
        let hold = if mode.records() { Hold::All } else { Hold::Sample };
        Ok(Arc::new(WorkingSetRun {
            mode,
            place,
            image,
            source,
            replayed,
            before,
            log: Arc::new(TouchLog::new(hold)),
            seconds: config.seconds,
            pagers: OnceLock::new(),
            outcome: OnceLock::new(),
            ended: Mutex::new(None),
            changed: Condvar::new(),
            thread: Mutex::default(),
        }))
    }

    /// Returns the source of the memory's pages.
    pub(crate) fn source(&self) -> Arc<dyn PageSource> {
        match &self.replayed {
            Some(replayed) => replayed.clone(),
            None => self.source.clone(),
        }
    }

    /// Notes the first touches from now on, of memory whose regions are at `regions`.
    ///
    /// # Errors
    ///
    /// If the host has no memory left.
    pub(crate) fn note(&self, memory: &DemandMemory, regions: &[Placement]) -> Result<(), Error> {
        let expected = self.expected(regions);
        for (region, pager) in memory.pagers().enumerate() {
            let its = expected.iter().filter(|range| range.region == region);
            let its: Vec<_> = its.map(|range| range.pages).collect();
            pager.note_touches(&self.log, &its).map_err(|source| {
                let line = format!("cannot note the guest's first touches: {source}");
                Error::of(Kind::Host, std::io::Error::new(source.kind(), line))
            })?;
        }
        let _ = self.pagers.set(memory.pagers().map(Arc::downgrade).collect());
        Ok(())
    }

    /// Returns the pages of the set that is replayed, in order.
    fn expected(&self, regions: &[Placement]) -> Vec<FillRange> {
        let ranges = self.replayed.iter().flat_map(|replayed| replayed.set().ranges());
        in_regions(ranges, regions)
    }

    /// Returns the background fill that replays the set, and then does what `fill` says.
    pub(crate) fn fill(
        &self,
        fill: Option<FillOptions>,
        regions: &[Placement],
    ) -> Option<FillOptions> {
        let mut ranges = self.expected(regions);
        if ranges.is_empty() {
            return fill;
        }
        Some(match fill {
            Some(options) => {
                let around = self.replayed.iter().flat_map(|replayed| replayed.zeros_around());
                ranges.extend(in_regions(around, regions));
                FillOptions { order: FillOrder::RangesFirst(ranges), ..options }
            }
            // Pages that are not touched take no memory then.
            None => FillOptions { order: FillOrder::RangesOnly(ranges), ..FillOptions::default() },
        })
    }

    /// Begins the time for which touches are noted: the guest runs.
    ///
    /// # Errors
    ///
    /// If the host has no more threads.
    pub(crate) fn begin(self: &Arc<Self>) -> Result<(), Error> {
        let run = self.clone();
        let thread = thread::Builder::new().name("working-set".into()).spawn(move || run.follow());
        let thread = thread.map_err(|error| no_thread("record the working set", error))?;
        *self.thread.lock_always() = Some(thread);
        Ok(())
    }

    /// Ends the notes when their time is over, or the VM ends, and writes the recording.
    fn follow(&self) {
        let limit = Duration::from_secs(self.seconds);
        let ended = self.ended.lock_always();
        let wait = self.changed.wait_timeout_while(ended, limit, |ended| ended.is_none());
        let has_ended = wait.unwrap_or_else(std::sync::PoisonError::into_inner).0.is_some();
        if !has_ended {
            let pagers = self.pagers.get().into_iter().flatten().filter_map(Weak::upgrade);
            pagers.for_each(|pager| pager.end_touches());
        }
        if self.mode.records() {
            self.save();
        }
    }

    fn save(&self) {
        let touched: Vec<u64> = self.log.touches().iter().map(|touch| touch.page).collect();
        if touched.is_empty() {
            return log::info!("no page was touched; the working set stays as it was");
        }
        if self.log.left_out() > 0 {
            log::warn!(
                "the working set has the first {} of {} pages that were touched; record for a \
                 shorter time",
                touched.len(),
                self.log.len()
            );
        }
        let before = self.replayed.as_ref().map(|replayed| replayed.set()).or(self.before.as_ref());
        let recording =
            Recording { image: self.image, source: &*self.source, touched: &touched, before };
        let go_on = || {
            let ended = *self.ended.lock_always();
            ended.is_none_or(|ended| ended.elapsed() < timeouts::WORKING_SET)
        };
        let outcome = record(&self.place, recording, &go_on);
        match &outcome {
            Ok(saved) => log::info!(
                "working set {}: {} pages, {} bytes",
                self.place,
                saved.pages,
                saved.bytes
            ),
            Err(error) => log::warn!("{error}; the guest is not affected"),
        }
        let _ = self.outcome.set(outcome.map_err(|error| error.to_string()));
    }

    /// Ends the notes, because the guest has ended, and waits until the recording is written: a
    /// limited time.
    pub(crate) fn end(&self) {
        self.ended.lock_always().get_or_insert_with(Instant::now);
        self.changed.notify_all();
        let thread = self.thread.lock_always().take();
        // A request in progress may take a little longer.
        let within = timeouts::WORKING_SET + timeouts::WORKING_SET / 3;
        if join_within(thread.into_iter().collect(), within) > 0 {
            log::warn!(
                "cannot record the working set {}: its store or the image does not answer",
                self.place
            );
        }
    }

    /// Returns the figures so far.
    pub(crate) fn report(&self) -> WorkingSetReport {
        let (counts, replayed) = (self.log.counts(), self.replayed.as_ref());
        let stats = replayed.map(|replayed| replayed.stats()).unwrap_or_default();
        let (saved, error) = match self.outcome.get() {
            Some(Ok(saved)) => (Some(saved), None),
            Some(Err(error)) => (None, Some(error.clone())),
            None => (None, None),
        };
        WorkingSetReport {
            mode: self.mode.name().into(),
            replayed_pages: replayed.map_or(0, |replayed| replayed.set().pages()),
            fetched_bytes: stats.bytes,
            failed_frames: stats.failed,
            hits: counts.arrived.saturating_sub(counts.waste()),
            late: counts.late,
            misses: counts.misses,
            waste: counts.waste(),
            recorded_pages: saved.map_or(0, |saved| saved.pages),
            recorded_bytes: saved.map_or(0, |saved| saved.bytes),
            error,
        }
    }
}

impl std::fmt::Debug for WorkingSetRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut run = f.debug_struct("WorkingSetRun");
        run.field("mode", &self.mode).field("place", &self.place).finish_non_exhaustive()
    }
}
