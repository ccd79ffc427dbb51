// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The faults that wait to be sent, and those that wait for an answer.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fmt;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use demand_source::{Completion, Extent, Part, Priority, Request, SourceError};

use crate::error::PagerErrorKind;
use crate::protocol::{Call, Fault, NO_TAG};

/// Number of parts from which a demand request waits for the shorter ones.
const LONG: usize = 16;
/// Bytes of messages that are sent at once.
const BATCH: usize = 4096;

/// The queue and the window that a fault belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lane {
    Demand,
    /// Demand of many parts, such as a huge page of 1 GiB. A fault of one page does not wait for it.
    Long,
    Fill,
}

const LANES: [Lane; 3] = [Lane::Demand, Lane::Long, Lane::Fill];

/// A fault without an answer.
pub(crate) struct Open {
    tag: u64,
    lane: Lane,
    since: Instant,
    pub(crate) part: Part,
}

impl Open {
    pub(crate) fn tag(&self) -> u64 {
        self.tag
    }

    fn fault(&self) -> Fault {
        let len = u32::try_from(self.part.len()).expect("parts have at most MOST bytes");
        let (offset, priority) = (self.part.offset(), self.part.priority());
        Fault { tag: self.tag, offset, len, priority }
    }
}

/// A message that is no fault, and a file that is passed with it.
struct Note {
    call: Call,
    file: Option<Arc<File>>,
}

/// Messages to send at once, and a file that is passed with the first one.
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) bytes: Vec<u8>,
    pub(crate) file: Option<Arc<File>>,
}

#[derive(Default)]
struct State {
    /// Faults to send, by lane.
    waiting: [VecDeque<Open>; 3],
    /// Faults that were sent on the present connection, by tag.
    sent: BTreeMap<u64, Open>,
    /// Number of these, and of those served by threads, by lane.
    counts: [usize; 3],
    /// Faults that threads of this process serve: their beginning, offset and length, by tag.
    served: BTreeMap<u64, (Instant, u64, usize)>,
    /// Other messages to send on the present connection.
    notes: VecDeque<Note>,
    last_tag: u64,
    /// The present connection, to be shut down by others.
    stream: Option<UnixStream>,
    /// The reason for which the present connection is over.
    over: Option<PagerErrorKind>,
    closed: bool,
}

/// The part of a source that its threads share.
pub(crate) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    windows: [usize; 3],
}

impl State {
    /// Removes the next fault to send.
    fn pop(&mut self, windows: &[usize; 3]) -> Option<Open> {
        LANES.into_iter().find_map(|lane| {
            let lane = lane as usize;
            let room = self.counts[lane] < windows[lane];
            if room { self.waiting[lane].pop_front() } else { None }
        })
    }

    fn count_sent(&mut self, open: Open) {
        self.counts[open.lane as usize] += 1;
        self.sent.insert(open.tag, open);
    }

    fn take_sent(&mut self, tag: u64) -> Option<Open> {
        let open = self.sent.remove(&tag)?;
        self.counts[open.lane as usize] -= 1;
        Some(open)
    }

    /// Removes all faults that were sent, in the order of their tags.
    fn take_all_sent(&mut self) -> Vec<Open> {
        let sent: Vec<Open> = std::mem::take(&mut self.sent).into_values().collect();
        sent.iter().for_each(|open| self.counts[open.lane as usize] -= 1);
        sent
    }

    fn open(&self) -> impl Iterator<Item = &Open> {
        self.sent.values().chain(self.waiting.iter().flatten())
    }
}

impl Queue {
    pub(crate) fn new(windows: [usize; 3]) -> Self {
        let state = State { last_tag: NO_TAG, ..State::default() };
        Queue { state: Mutex::new(state), changed: Condvar::new(), windows }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a request in parts of at most `most` bytes, for an image of `size` bytes with this
    /// name.
    pub(crate) fn submit(
        &self,
        request: Request,
        most: usize,
        size: u64,
        image: &str,
    ) -> Completion {
        for chunk in &request.chunks {
            let (offset, len) = (chunk.offset, chunk.destination.len() as u64);
            if offset.checked_add(len).is_none_or(|end| end > size) {
                let image = image.to_owned();
                drop(request);
                return Completion::ready(Err(SourceError::OutOfRange {
                    image,
                    offset,
                    len,
                    size,
                }));
            }
        }
        let priority = request.priority;
        let (parts, completion) = Part::all_of(request, most);
        self.push(priority, parts);
        completion
    }

    /// Queues the parts of a request.
    pub(crate) fn push(&self, priority: Priority, parts: Vec<Part>) {
        let lane = match priority {
            Priority::Fill => Lane::Fill,
            Priority::Demand if parts.len() > LONG => Lane::Long,
            Priority::Demand => Lane::Demand,
        };
        let since = Instant::now();
        let mut state = self.lock();
        if state.closed {
            // They are dropped, with no lock held.
            drop(state);
            return;
        }
        for part in parts {
            state.last_tag += 1;
            let tag = state.last_tag;
            state.waiting[lane as usize].push_back(Open { tag, lane, since, part });
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Gives fill that touches these bytes the priority of demand, also where it was sent. A request
    /// is raised as a whole: its pages become present together.
    pub(crate) fn raise(&self, offset: u64, len: u64) {
        let mut state = self.lock();
        let fill = |open: &&Open| open.lane == Lane::Fill;
        let touched = |open: &Open| open.part.touches(offset, len).then(|| open.part.request());
        let wanted: HashSet<usize> = state.open().filter(fill).filter_map(touched).collect();
        if wanted.is_empty() {
            return;
        }
        let is_raised = |open: &Open| wanted.contains(&open.part.request());
        for mut open in std::mem::take(&mut state.waiting[Lane::Fill as usize]) {
            if is_raised(&open) {
                open.part.set_demand();
                open.lane = Lane::Demand;
            }
            state.waiting[open.lane as usize].push_back(open);
        }
        let is_sent = |open: &&Open| open.lane == Lane::Fill && is_raised(open);
        let sent: Vec<u64> = state.sent.values().filter(is_sent).map(Open::tag).collect();
        for tag in sent {
            let Some(mut open) = state.take_sent(tag) else { continue };
            open.part.set_demand();
            open.lane = Lane::Demand;
            state.count_sent(open);
            state.notes.push_back(Note { call: Call::Raise(tag), file: None });
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Queues a message for the present connection, and the file that is passed with it.
    pub(crate) fn note(&self, call: Call, file: Option<Arc<File>>) {
        self.lock().notes.push_back(Note { call, file });
        self.changed.notify_all();
    }

    /// Returns the next messages, and waits for them if there are none; `None` when the connection is
    /// over.
    pub(crate) fn next(&self) -> Option<Batch> {
        let mut batch = Batch::default();
        let mut state = self.lock();
        loop {
            if state.closed || state.over.is_some() {
                return None;
            }
            while let Some(note) = state.notes.pop_front() {
                if note.file.is_some() && !batch.bytes.is_empty() {
                    state.notes.push_front(note);
                    return Some(batch);
                }
                note.call.encode(&mut batch.bytes);
                if note.file.is_some() {
                    return Some(Batch { file: note.file, ..batch });
                }
            }
            let mut unwanted = Vec::new();
            while batch.bytes.len() < BATCH
                && let Some(open) = state.pop(&self.windows)
            {
                if open.part.is_wanted() {
                    Call::Fault(open.fault()).encode(&mut batch.bytes);
                    // Before it is sent: the answer may be quick.
                    state.count_sent(open);
                } else {
                    unwanted.push(open);
                }
            }
            if !unwanted.is_empty() {
                // Callbacks run with no lock held.
                drop(state);
                unwanted.into_iter().for_each(|open| open.part.fail(SourceError::Withdrawn));
                state = self.lock();
            } else if batch.bytes.is_empty() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if !batch.bytes.is_empty() {
                return Some(batch);
            }
        }
    }

    /// Waits for the next fault, for the thread of this process that serves it. Returns `None` when
    /// the source is closed.
    #[cfg(feature = "firecracker")]
    pub(crate) fn begin_next(&self) -> Option<Open> {
        let mut state = self.lock();
        while !state.closed {
            if let Some(open) = state.pop(&self.windows) {
                state.counts[open.lane as usize] += 1;
                let served = (open.since, open.part.offset(), open.part.len());
                state.served.insert(open.tag, served);
                return Some(open);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    /// Ends a fault that a thread of this process has served.
    #[cfg(feature = "firecracker")]
    pub(crate) fn finish(&self, open: Open) -> Part {
        let mut state = self.lock();
        state.served.remove(&open.tag);
        state.counts[open.lane as usize] -= 1;
        drop(state);
        self.changed.notify_all();
        open.part
    }

    /// Takes the fault that an answer belongs to.
    pub(crate) fn take(&self, tag: u64) -> Option<Open> {
        let open = self.lock().take_sent(tag);
        self.changed.notify_all();
        open
    }

    /// Returns a fault that was taken, and has no whole answer.
    pub(crate) fn give_back(&self, open: Open) {
        self.lock().count_sent(open);
    }

    /// Records that a connection works. Returns false if the source is closed.
    pub(crate) fn begin(&self, stream: UnixStream) -> bool {
        let mut state = self.lock();
        state.stream = Some(stream);
        !state.closed
    }

    /// Records the reason for which the present connection is over.
    pub(crate) fn end(&self, kind: PagerErrorKind) {
        let mut state = self.lock();
        // A failed write says less than the pager's last message.
        if state.over.as_ref().is_none_or(PagerErrorKind::is_absence) {
            state.over = Some(kind);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Forgets the present connection, and returns why it is over. The faults that were sent wait
    /// again, before those that were not.
    pub(crate) fn ended(&self) -> Option<PagerErrorKind> {
        let mut state = self.lock();
        state.stream = None;
        state.notes.clear();
        for open in state.take_all_sent().into_iter().rev() {
            state.waiting[open.lane as usize].push_front(open);
        }
        state.over.take()
    }

    /// Removes all faults.
    #[must_use = "faults are failed with no lock held"]
    pub(crate) fn take_all(&self) -> Vec<Part> {
        let mut state = self.lock();
        let sent = state.take_all_sent();
        let waiting = std::mem::take(&mut state.waiting).into_iter().flatten();
        sent.into_iter().chain(waiting).map(|open| open.part).collect()
    }

    /// Removes the faults that are no longer wanted.
    #[must_use = "faults are failed with no lock held"]
    pub(crate) fn take_unwanted(&self) -> Vec<Part> {
        let mut state = self.lock();
        let mut unwanted = Vec::new();
        for lane in &mut state.waiting {
            for open in std::mem::take(lane) {
                if open.part.is_wanted() {
                    lane.push_back(open);
                } else {
                    unwanted.push(open.part);
                }
            }
        }
        unwanted
    }

    /// Returns the faults without an answer, for the log.
    pub(crate) fn waits(&self) -> Waits {
        let state = self.lock();
        let open = state.open().map(|open| (open.since, open.part.offset(), open.part.len()));
        let faults = open.chain(state.served.values().copied());
        let (mut count, mut oldest) = (0, None);
        for fault in faults {
            count += 1;
            oldest = Some(oldest.map_or(fault, |oldest| fault.min(oldest)));
        }
        Waits { faults: count, oldest }
    }

    /// Waits for a time, or until the source is closed. Returns whether it is open.
    pub(crate) fn pause(&self, pause: Duration) -> bool {
        let due = Instant::now() + pause;
        let mut state = self.lock();
        while !state.closed {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    /// Returns whether the source is open.
    pub(crate) fn is_open(&self) -> bool {
        !self.lock().closed
    }

    /// Ends the source: its threads return.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        if let Some(stream) = &state.stream {
            // Ends a read or write that waits for the pager.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        drop(state);
        self.changed.notify_all();
    }
}

/// Returns the extent at `offset` of an image of `size` bytes with this name, all of which is data.
pub(crate) fn all_data(offset: u64, size: u64, image: &str) -> Result<Extent, SourceError> {
    if offset < size {
        return Ok(Extent::Data { end: size });
    }
    Err(SourceError::OutOfRange { image: image.to_owned(), offset, len: 1, size })
}

/// The faults that have no answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waits {
    pub(crate) faults: usize,
    /// Beginning, offset in the image and length of the oldest one.
    oldest: Option<(Instant, u64, usize)>,
}

impl fmt::Display for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((since, offset, len)) = self.oldest else { return f.write_str("no fault waits") };
        let (faults, seconds) = (self.faults, since.elapsed().as_secs_f64());
        let wait = if faults == 1 { "1 fault waits" } else { &*format!("{faults} faults wait") };
        write!(f, "{wait}, the oldest for {seconds:.1} s: {len} bytes at offset {offset}")
    }
}
