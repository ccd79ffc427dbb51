// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The replay of a working set: a source that delivers its pages from it, and the others from the
//! image.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use demand_source::{
    Chunk, Completer, Completion, Destination, Extent, MappedBytes, MissingPages, PageSource,
    Priority, Request, SourceError, to_usize,
};

use super::WorkingSet;
use super::layout::{ZERO_PAGES, run_of};
use crate::image::layout::PAGE;
use crate::runtime;

/// Number of frames that are read at once, besides those that faults have promoted.
const READS: usize = 8;
/// Number of frames that are read ahead of background fill.
const AHEAD: usize = 8;
/// Maximum number of frames whose content is kept: 16 MiB.
const MOST_READY: usize = 64;
/// Longest time for which a fault waits for a frame. The page then comes from the image.
const PATIENCE: Duration = Duration::from_millis(500);
/// Longest time for a frame.
const LIMIT: Duration = Duration::from_secs(10);

/// The activity of a replay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplayStats {
    /// Frames that were read.
    pub frames: u64,
    /// Bytes of these frames, as stored.
    pub bytes: u64,
    /// Frames that could not be read, or not in time: their pages came from the image.
    pub failed: u64,
    /// Faults that have waited for a frame for so long that the image answered them.
    pub overdue: u64,
}

/// A source over an image's source that delivers the pages of a working set from the set.
///
/// Background fill that asks for the set's [ranges](WorkingSet::ranges) in their order replays the
/// set: up to 8 frames are read at once, ahead of it. A fault on a page whose frame is being read
/// waits for it; one whose frame is queued promotes it. If a fault has waited for half a second,
/// the image answers it, and further faults do not wait until a frame arrives again. Where a frame
/// cannot be read, or is damaged, its pages come from the image, as do all other pages. Each page
/// is checked against the hash that the set has for it.
pub struct ReplayedSource {
    shared: Arc<Shared>,
}

struct Shared {
    image: Arc<dyn PageSource>,
    set: WorkingSet,
    state: Mutex<State>,
}

struct State {
    frames: Vec<FrameState>,
    /// The frames that wait for their turn, in order.
    queued: VecDeque<usize>,
    /// Number of frames that are being read in their turn.
    reading: usize,
    /// The frames whose content is kept, in the order of their arrival.
    ready: VecDeque<usize>,
    stats: ReplayStats,
    /// Whether a fault has waited in vain since a frame last arrived: others do not wait.
    is_late: bool,
}

enum FrameState {
    /// Nothing was requested so far.
    Idle,
    /// It is queued, or being read, for these requests.
    Flying(Vec<Waiting>),
    Ready(Arc<Vec<u8>>),
    /// The image delivers its pages.
    Gone,
}

/// The reason for which a frame is read now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Queued,
    Promoted,
}

/// A request that waits for a frame.
struct Waiting {
    /// Offset in the image, in bytes.
    offset: u64,
    destination: Destination<'static>,
    completer: Completer,
    priority: Priority,
}

impl ReplayedSource {
    /// Creates the source. Nothing is read yet.
    pub fn new(image: Arc<dyn PageSource>, set: WorkingSet) -> Self {
        let states = set.frames().iter().map(|frame| match frame.stored {
            Some(_) => FrameState::Idle,
            None => FrameState::Gone,
        });
        let state = Mutex::new(State {
            frames: states.collect(),
            queued: VecDeque::new(),
            reading: 0,
            ready: VecDeque::new(),
            stats: ReplayStats::default(),
            is_late: false,
        });
        ReplayedSource { shared: Arc::new(Shared { image, set, state }) }
    }

    /// Begins to read the first frames, as soon as the set is open and before anything asks for
    /// them: a VM that is still being set up then does not delay them.
    pub fn begin(&self) {
        let mut state = self.shared.lock();
        let states = state.frames.iter().enumerate();
        let idle = states.filter(|(_, frame)| matches!(frame, FrameState::Idle));
        let first: Vec<_> = idle.map(|(number, _)| number).take(AHEAD).collect();
        for frame in first {
            self.shared.want(&mut state, frame, Priority::Fill);
        }
    }

    /// Returns the working set.
    pub fn set(&self) -> &WorkingSet {
        &self.shared.set
    }

    /// Returns the pages of zeros around those of zeros in the set, as ranges of page numbers: the
    /// rest of each run of zeros, up to the borders of its 2 MiB. Guests touch them next, and they
    /// take no byte of a store. Runs that the image cannot tell without a request are left out.
    pub fn zeros_around(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let frames = self.set().frames().iter().filter(|frame| frame.stored.is_none());
        // They are in order of their pages.
        for page in frames.flat_map(|frame| &frame.entries).map(|entry| entry.page) {
            if runs.last().is_none_or(|run| run.end <= page) {
                runs.extend(self.shared.zeros_at(page));
            }
        }
        runs
    }

    /// Returns the activity so far.
    pub fn stats(&self) -> ReplayStats {
        self.shared.lock().stats
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the frame that has all of these bytes one behind the other, and their place in its
    /// content.
    fn frame_of(&self, offset: u64, len: usize) -> Option<(usize, Range<usize>)> {
        let (page, within) = (offset / PAGE, to_usize(offset % PAGE));
        let (frame, at) = self.set.find(page)?;
        let entries = &self.set.frames()[frame].entries;
        let start = at * to_usize(PAGE) + within;
        let last = at * to_usize(PAGE) + to_usize(run_of(entries, at) * PAGE);
        (start.checked_add(len)? <= last).then(|| (frame, start..start + len))
    }

    /// Requests a frame, unless it was requested before.
    fn want(self: &Arc<Self>, state: &mut State, frame: usize, priority: Priority) {
        if !matches!(state.frames[frame], FrameState::Idle) {
            return;
        }
        state.frames[frame] = FrameState::Flying(Vec::new());
        match priority {
            Priority::Demand => self.begin(frame, Turn::Promoted),
            Priority::Fill => {
                state.queued.push_back(frame);
                self.begin_queued(state);
            }
        }
    }

    /// Begins to read the frames whose turn it is.
    fn begin_queued(self: &Arc<Self>, state: &mut State) {
        while state.reading < READS
            && let Some(frame) = state.queued.pop_front()
        {
            state.reading += 1;
            self.begin(frame, Turn::Queued);
        }
    }

    fn begin(self: &Arc<Self>, frame: usize, turn: Turn) {
        runtime::handle().spawn(fly(Arc::downgrade(self), frame, turn));
    }

    /// Requests the frames that follow one.
    fn read_ahead(self: &Arc<Self>, state: &mut State, frame: usize) {
        for next in (frame + 1..state.frames.len()).take(AHEAD) {
            self.want(state, next, Priority::Fill);
        }
    }

    /// Promotes a queued frame, and limits the wait of faults for it.
    fn promote(self: &Arc<Self>, frame: usize) {
        let is_late = {
            let mut state = self.lock();
            let place = state.queued.iter().position(|queued| *queued == frame);
            if let Some(place) = place.filter(|_| !state.is_late) {
                state.queued.remove(place);
                self.begin(frame, Turn::Promoted);
            }
            state.is_late
        };
        if is_late {
            return self.give_up_waits(frame);
        }
        let shared = Arc::downgrade(self);
        runtime::handle().spawn(async move {
            tokio::time::sleep(PATIENCE).await;
            if let Some(shared) = shared.upgrade() {
                shared.end_patience(frame);
            }
        });
    }

    /// Passes the faults that have waited for a frame for too long on to the image.
    fn end_patience(self: &Arc<Self>, frame: usize) {
        {
            let mut state = self.lock();
            let FrameState::Flying(waiting) = &state.frames[frame] else { return };
            let faults = waiting.iter().filter(|one| one.priority == Priority::Demand).count();
            if faults == 0 {
                return;
            }
            state.stats.overdue += faults as u64;
            state.is_late = true;
        }
        self.give_up_waits(frame);
    }

    /// Passes the faults that wait for a frame on to the image.
    fn give_up_waits(self: &Arc<Self>, frame: usize) {
        let faults: Vec<_> = {
            let mut state = self.lock();
            let FrameState::Flying(waiting) = &mut state.frames[frame] else { return };
            let is_fault = |one: &Waiting| one.priority == Priority::Demand;
            let (faults, others) = std::mem::take(waiting).into_iter().partition(is_fault);
            *waiting = others;
            faults
        };
        faults.into_iter().for_each(|one| self.ask_image(one));
    }

    fn ask_image(&self, one: Waiting) {
        let Waiting { offset, destination, completer, priority } = one;
        let chunks = vec![Chunk { offset, destination }];
        let answered = self.image.submit(Request { priority, chunks });
        answered.then(move |outcome| completer.complete(outcome));
    }

    /// Answers the requests that wait for a frame.
    fn land(self: &Arc<Self>, frame: usize, turn: Turn, content: Option<Vec<u8>>) {
        let content = content.map(Arc::new);
        let next = content.clone().map_or(FrameState::Gone, FrameState::Ready);
        let waiting = {
            let mut state = self.lock();
            state.reading -= usize::from(turn == Turn::Queued);
            self.begin_queued(&mut state);
            match &content {
                Some(_) => {
                    let stored = &self.set.frames()[frame].stored;
                    state.is_late = false;
                    state.stats.frames += 1;
                    state.stats.bytes += stored.map_or(0, |stored| stored.len);
                    state.ready.push_back(frame);
                }
                None => state.stats.failed += 1,
            }
            if state.ready.len() > MOST_READY
                && let Some(oldest) = state.ready.pop_front()
            {
                state.frames[oldest] = FrameState::Gone;
            }
            std::mem::replace(&mut state.frames[frame], next)
        };
        // Outside the lock: the requests complete, which calls the pager.
        let FrameState::Flying(waiting) = waiting else { return };
        for mut one in waiting {
            let place = self.frame_of(one.offset, one.destination.len());
            match (&content, place) {
                (Some(content), Some((_, place))) => {
                    one.destination.write_at(0, &content[place]);
                    drop(one.destination);
                    one.completer.complete(Ok(()));
                }
                _ => self.ask_image(one),
            }
        }
    }
}

/// Reads a frame.
async fn fly(shared: Weak<Shared>, frame: usize, turn: Turn) {
    let Some(shared) = shared.upgrade() else { return };
    let reader = shared.clone();
    // A task of its own: a panic in it must not leave the frame's requests unanswered.
    let read = tokio::spawn(async move { reader.set.read(frame).await });
    let content = match tokio::time::timeout(LIMIT, read).await {
        Ok(Ok(Ok(content))) => Some(content),
        Ok(Ok(Err(error))) => {
            log::warn!("{error}; these pages come from the image");
            None
        }
        // A panic, which is reported already.
        Ok(Err(_)) => None,
        Err(_) => {
            log::warn!(
                "cannot read a frame of {:?} within {LIMIT:?}: the store does not answer; these \
                 pages come from the image",
                shared.set
            );
            None
        }
    };
    shared.land(frame, turn, content);
}

impl PageSource for ReplayedSource {
    fn size(&self) -> u64 {
        self.shared.image.size()
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        match self.shared.known_extent(offset) {
            Some(extent) => Ok(extent),
            None => self.shared.image.extent(offset),
        }
    }

    fn extent_now(&self, offset: u64) -> Option<Result<Extent, SourceError>> {
        match self.shared.known_extent(offset) {
            Some(extent) => Some(Ok(extent)),
            None => self.shared.image.extent_now(offset),
        }
    }

    fn submit(&self, mut request: Request) -> Completion {
        let shared = &self.shared;
        let [chunk] = &request.chunks[..] else { return shared.image.submit(request) };
        let Some((frame, place)) = shared.frame_of(chunk.offset, chunk.destination.len()) else {
            return shared.image.submit(request);
        };
        let priority = request.priority;
        let mut state = shared.lock();
        let is_ready = matches!(state.frames[frame], FrameState::Ready(_));
        if priority == Priority::Demand && state.is_late && !is_ready {
            drop(state);
            return shared.image.submit(request);
        }
        shared.want(&mut state, frame, priority);
        if priority == Priority::Fill {
            shared.read_ahead(&mut state, frame);
        }
        let content = match &mut state.frames[frame] {
            FrameState::Ready(content) => content.clone(),
            FrameState::Flying(waiting) => {
                let Some(Chunk { offset, destination }) = request.chunks.pop() else {
                    return Completion::ready(Ok(()));
                };
                let (completer, completion) = Completion::pair();
                waiting.push(Waiting { offset, destination, completer, priority });
                drop(state);
                if priority == Priority::Demand {
                    shared.promote(frame);
                }
                return completion;
            }
            FrameState::Idle | FrameState::Gone => {
                drop(state);
                return shared.image.submit(request);
            }
        };
        drop(state);
        for mut chunk in request.chunks {
            chunk.destination.write_at(0, &content[place.clone()]);
        }
        Completion::ready(Ok(()))
    }

    fn share_missing(&self, missing: &MissingPages) {
        self.shared.image.share_missing(missing);
    }

    fn raise(&self, offset: u64, len: u64) {
        let shared = &self.shared;
        shared.image.raise(offset, len);
        let end = offset.saturating_add(len);
        let mut flying = Vec::new();
        {
            let mut state = shared.lock();
            for page in offset / PAGE..end.div_ceil(PAGE) {
                let Some((frame, _)) = shared.set.find(page) else { continue };
                let FrameState::Flying(waiting) = &mut state.frames[frame] else { continue };
                for one in waiting.iter_mut() {
                    let its_end = one.offset + one.destination.len() as u64;
                    if one.offset < end && offset < its_end {
                        one.priority = Priority::Demand;
                    }
                }
                if flying.last() != Some(&frame) {
                    flying.push(frame);
                }
            }
        }
        flying.into_iter().for_each(|frame| shared.promote(frame));
    }

    fn read_now(
        &self,
        offset: u64,
        destination: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        if let Some((frame, place)) = self.shared.frame_of(offset, destination.len()) {
            let content = match &self.shared.lock().frames[frame] {
                FrameState::Ready(content) => Some(content.clone()),
                _ => None,
            };
            if let Some(content) = content {
                destination.write_at(0, &content[place]);
                return Some(Ok(()));
            }
        }
        self.shared.image.read_now(offset, destination)
    }

    fn mapped(&self, offset: u64, len: u64) -> Option<MappedBytes<'_>> {
        self.shared.image.mapped(offset, len)
    }

    fn is_intact(&self) -> bool {
        self.shared.image.is_intact()
    }
}

impl Shared {
    /// Returns the run of zeros of the image at `page`, within 2 MiB.
    fn zeros_at(&self, page: u64) -> Option<Range<u64>> {
        let first = page - page % ZERO_PAGES as u64;
        let end = (first + ZERO_PAGES as u64).min(self.image.size() / PAGE);
        let mut at = first;
        while at <= page {
            let extent = self.image.extent_now(at * PAGE)?.ok()?;
            let behind = (extent.end() / PAGE).clamp(at + 1, end);
            if extent.is_hole() && behind > page {
                return Some(at..behind);
            }
            at = behind;
        }
        None
    }

    /// Returns the extent at `offset` if its page is in the set: it ends where the pages of the
    /// frame no longer follow one another.
    fn known_extent(&self, offset: u64) -> Option<Extent> {
        let page = offset / PAGE;
        let (frame, at) = self.set.find(page)?;
        let frame = &self.set.frames()[frame];
        let end = (page + run_of(&frame.entries, at)) * PAGE;
        Some(if frame.stored.is_none() { Extent::Hole { end } } else { Extent::Data { end } })
    }
}

impl fmt::Debug for ReplayedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplayedSource").field("set", &self.shared.set).finish_non_exhaustive()
    }
}
