// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The events of a VM's life, and the log that holds the latest of them for any number of readers.
//!
//! The log is the one queue of all readers: each has only its place in it. So an event costs the
//! VM's threads the same with readers or without, a slow reader delays no thread, and the memory is
//! bounded. A reader that falls too far behind gets the number of lost events.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::report::{micros, size};
use crate::sync::LockExt;

/// Number of events that the log keeps. A new reader gets these first.
pub const KEPT_EVENTS: usize = 256;

/// Maximum number of readers at a time. It leaves half of the API's connections to other requests.
pub const MAX_READERS: usize = 16;

/// An event of the VM's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmEvent {
    /// The event's number: 1 for the first one of the process, then one more each.
    pub seq: u64,
    /// The time of the event by the host's clock, in microseconds since 1970 (UTC).
    pub time_us: u64,
    /// The event.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// The kinds of events, with what is known of each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum EventKind {
    /// A VM was defined by `vm.create`.
    Created {
        /// Size of its memory, in bytes.
        memory_bytes: u64,
        /// Number of its vCPUs.
        cpus: u32,
    },
    /// The VM is being set up, to boot its kernel.
    Booting {
        /// The kernel.
        kernel: PathBuf,
    },
    /// The VM is being set up from a snapshot.
    Restoring {
        /// The snapshot's directory or URL, without secrets.
        source: PathBuf,
    },
    /// The VM could not be set up. The process is without a VM again.
    StartFailed {
        /// The cause: one line.
        error: String,
    },
    /// The vCPUs run for the first time.
    Running,
    /// The vCPUs have stopped.
    Paused {
        /// The reason.
        reason: PauseReason,
        /// The error that is the reason: one line.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// The vCPUs run again.
    Resumed,
    /// A snapshot has begun: the vCPUs have stopped for it.
    SnapshotBegun {
        /// Its directory.
        destination: PathBuf,
    },
    /// A snapshot is complete.
    SnapshotWritten {
        /// Its directory.
        destination: PathBuf,
        /// Number of bytes written, tables and state included.
        bytes: u64,
    },
    /// A snapshot has failed, and nothing of it remains.
    SnapshotFailed {
        /// Its directory.
        destination: PathBuf,
        /// The cause: one line.
        error: String,
    },
    /// The source of the memory's pages fails, or does not answer. Accesses to missing pages wait.
    SourceFailing {
        /// The cause: one line.
        error: String,
    },
    /// The source answers again.
    SourceBack,
    /// The back-end of a device has hung up, which ends the VM.
    BackEndDisconnected {
        /// The device and its socket: one line.
        error: String,
    },
    /// The guest's kernel has reported a panic.
    GuestPanicked,
    /// All vCPUs are halted with interrupts off, so that nothing can wake them.
    GuestHalted,
    /// The guest resets itself, and boots again in the same VM.
    GuestReset,
    /// The last page is present, and demand paging has been removed.
    PagingComplete,
    /// This reader was too slow for the log: events are lost. The number of this one is the last
    /// lost one's.
    Dropped {
        /// Number of lost events.
        count: u64,
    },
    /// The VM has ended, and the process ends. This is the last event.
    Ended {
        /// The process's exit status, unless its report cannot be written.
        status: u8,
        /// The error that ended the VM: one line.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
}

impl EventKind {
    /// Returns the line of the log for the event, unless it has a warning already.
    fn line(&self) -> Option<String> {
        Some(match self {
            EventKind::Created { memory_bytes, cpus } => {
                format!("defined a VM: {} of memory, {cpus} vCPUs", size(*memory_bytes))
            }
            EventKind::Booting { kernel } => format!("booting {}", kernel.display()),
            EventKind::Restoring { source } => format!("restoring {}", source.display()),
            EventKind::Running => "the guest runs".into(),
            EventKind::Paused { error: None, .. } => "the VM is paused".into(),
            EventKind::Resumed => "the VM is resumed".into(),
            EventKind::SnapshotBegun { destination } => {
                format!("writing snapshot {}", destination.display())
            }
            EventKind::SnapshotWritten { destination, bytes } => {
                format!("snapshot {} is complete: {}", destination.display(), size(*bytes))
            }
            EventKind::SnapshotFailed { destination, error } => {
                format!("snapshot {} failed: {error}", destination.display())
            }
            EventKind::SourceBack => "the source of the pages answers again".into(),
            EventKind::PagingComplete => "all pages are present; paging is removed".into(),
            EventKind::Ended { status, .. } => format!("the VM has ended, with status {status}"),
            EventKind::StartFailed { .. }
            | EventKind::Paused { .. }
            | EventKind::SourceFailing { .. }
            | EventKind::BackEndDisconnected { .. }
            | EventKind::GuestPanicked
            | EventKind::GuestHalted
            | EventKind::GuestReset
            | EventKind::Dropped { .. } => return None,
        })
    }

    /// Returns the few words of the event in the picture of the run, if it is shown there.
    pub(crate) fn moment(&self) -> Option<&'static str> {
        Some(match self {
            EventKind::Running => "guest runs",
            EventKind::Paused { .. } => "paused",
            EventKind::Resumed => "resumed",
            EventKind::SnapshotBegun { .. } => "snapshot",
            EventKind::SnapshotWritten { .. } => "snapshot written",
            EventKind::SourceFailing { .. } => "source fails",
            EventKind::SourceBack => "source answers",
            EventKind::BackEndDisconnected { .. } => "back-end hung up",
            EventKind::GuestReset => "guest reset",
            EventKind::PagingComplete => "all pages present",
            _ => return None,
        })
    }
}

/// The reason for a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PauseReason {
    /// A client asked for it.
    Request,
    /// The source has failed for longer than the user's limit.
    Source,
    /// The guest's kernel has panicked, and the user wants the VM to be paused then.
    Panic,
    /// A client asked for a snapshot that leaves the VM paused, or the devices did not resume after
    /// one.
    Snapshot,
}

#[derive(Debug, Default)]
struct Kept {
    events: VecDeque<VmEvent>,
    /// Number of the latest event.
    latest: u64,
    ended: Option<Instant>,
    readers: usize,
}

/// The latest events of a VM.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use demand_vmm::api::events::{EventKind, EventLog, Next};
///
/// let log = std::sync::Arc::new(EventLog::default());
/// let mut reader = log.read().unwrap();
/// log.add(EventKind::Running);
/// log.end(0, None);
/// let Next::Event(event) = reader.next(Duration::ZERO) else { panic!() };
/// assert_eq!((event.seq, event.kind), (1, EventKind::Running));
/// assert!(matches!(reader.next(Duration::ZERO), Next::Event(last) if last.seq == 2));
/// assert!(matches!(reader.next(Duration::ZERO), Next::Ended));
/// ```
#[derive(Debug, Default)]
pub struct EventLog {
    kept: Mutex<Kept>,
    /// Notified at each event.
    added: Condvar,
}

impl EventLog {
    /// Adds an event, and wakes the readers. Nothing follows the end.
    pub fn add(&self, kind: EventKind) {
        let mut kept = self.kept.lock_always();
        if kept.ended.is_some() {
            return;
        }
        let line = kind.line();
        if matches!(kind, EventKind::Ended { .. }) {
            kept.ended = Some(Instant::now());
        }
        kept.latest += 1;
        let event = VmEvent { seq: kept.latest, time_us: now_us(), kind };
        if kept.events.len() == KEPT_EVENTS {
            kept.events.pop_front();
        }
        kept.events.push_back(event);
        drop(kept);
        self.added.notify_all();
        if let Some(line) = line {
            log::info!("{line}");
        }
    }

    /// Adds the last event, unless the log has it.
    pub fn end(&self, status: u8, error: Option<String>) {
        self.add(EventKind::Ended { status, error });
    }

    /// Returns the events that are kept, the oldest first.
    pub(crate) fn kept(&self) -> Vec<VmEvent> {
        self.kept.lock_always().events.iter().cloned().collect()
    }

    /// Returns how long ago the last event was added, if it was.
    pub(super) fn ended_for(&self) -> Option<Duration> {
        self.kept.lock_always().ended.map(|at| at.elapsed())
    }

    /// Returns a reader that begins with the oldest event that the log has, or `None` if there are
    /// too many readers.
    pub fn read(self: &Arc<Self>) -> Option<EventReader> {
        let mut kept = self.kept.lock_always();
        if kept.readers == MAX_READERS {
            return None;
        }
        kept.readers += 1;
        let oldest = kept.events.front().map_or(kept.latest + 1, |event| event.seq);
        Some(EventReader { log: self.clone(), next: oldest })
    }
}

pub(crate) fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, micros)
}

/// The outcome of a wait for an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// An event.
    Event(VmEvent),
    /// There was none for the whole time.
    Nothing,
    /// The last event was returned before.
    Ended,
}

/// A reader of an [`EventLog`].
#[derive(Debug)]
pub struct EventReader {
    log: Arc<EventLog>,
    /// Number of the next event for this reader.
    next: u64,
}

impl EventReader {
    /// Returns the next event, for which it waits at most this long.
    pub fn next(&mut self, within: Duration) -> Next {
        let kept = self.log.kept.lock_always();
        let is_behind = |kept: &Kept| kept.latest >= self.next || kept.ended.is_some();
        let waited = self.log.added.wait_timeout_while(kept, within, |kept| !is_behind(kept));
        let kept = waited.unwrap_or_else(PoisonError::into_inner).0;
        if kept.latest < self.next {
            return if kept.ended.is_some() { Next::Ended } else { Next::Nothing };
        }
        let oldest = kept.events.front().map_or(self.next, |event| event.seq);
        let event = match oldest.checked_sub(self.next) {
            None | Some(0) => {
                let index = usize::try_from(self.next - oldest).unwrap_or(usize::MAX);
                kept.events.get(index).cloned()
            }
            Some(count) => {
                let kind = EventKind::Dropped { count };
                Some(VmEvent { seq: oldest - 1, time_us: now_us(), kind })
            }
        };
        match event {
            Some(event) => {
                self.next = event.seq + 1;
                Next::Event(event)
            }
            None => Next::Nothing,
        }
    }

    /// Returns the log.
    pub(super) fn log(&self) -> &EventLog {
        &self.log
    }
}

impl Drop for EventReader {
    fn drop(&mut self) {
        self.log.kept.lock_always().readers -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn numbers(reader: &mut EventReader) -> Vec<(u64, Option<u64>)> {
        let mut all = Vec::new();
        while let Next::Event(event) = reader.next(Duration::ZERO) {
            let dropped = match event.kind {
                EventKind::Dropped { count } => Some(count),
                _ => None,
            };
            all.push((event.seq, dropped));
        }
        all
    }

    #[test]
    fn slow_reader_learns_what_it_lost() {
        let log = Arc::new(EventLog::default());
        let mut slow = log.read().unwrap();
        log.add(EventKind::Running);
        assert_eq!(numbers(&mut slow), [(1, None)]);
        for _ in 0..KEPT_EVENTS + 10 {
            log.add(EventKind::Resumed);
        }
        assert_eq!(log.kept.lock_always().events.len(), KEPT_EVENTS);
        let seen = numbers(&mut slow);
        assert_eq!(seen[..2], [(11, Some(10)), (12, None)]);
        assert_eq!(seen.len(), KEPT_EVENTS + 1);
        // A reader that comes later has lost nothing.
        assert_eq!(numbers(&mut log.read().unwrap())[0], (12, None));
    }

    #[test]
    fn nothing_follows_the_end() {
        let log = Arc::new(EventLog::default());
        log.end(1, Some("it failed".into()));
        log.end(0, None);
        log.add(EventKind::Running);
        let mut reader = log.read().unwrap();
        let Next::Event(event) = reader.next(Duration::ZERO) else { panic!("no event") };
        assert_eq!(event.kind, EventKind::Ended { status: 1, error: Some("it failed".into()) });
        assert_eq!(reader.next(Duration::from_secs(60)), Next::Ended);
    }

    #[test]
    fn number_of_readers_is_limited() {
        let log = Arc::new(EventLog::default());
        let mut readers: Vec<_> = (0..MAX_READERS).map(|_| log.read().unwrap()).collect();
        assert!(log.read().is_none());
        readers.pop();
        assert!(log.read().is_some());
    }

    #[test]
    fn event_wakes_its_reader() {
        let log = Arc::new(EventLog::default());
        let mut reader = log.read().unwrap();
        let waiting = thread::spawn(move || reader.next(Duration::from_secs(60)));
        log.add(EventKind::GuestReset);
        assert!(matches!(waiting.join().unwrap(), Next::Event(event) if event.seq == 1));
    }

    #[test]
    fn an_event_is_one_line_of_json() {
        let kind = EventKind::Paused { reason: PauseReason::Source, error: Some("gone".into()) };
        let json = serde_json::to_string(&VmEvent { seq: 7, time_us: 5, kind }).unwrap();
        assert_eq!(
            json,
            r#"{"seq":7,"time_us":5,"event":"paused","reason":"source","error":"gone"}"#
        );
    }
}
