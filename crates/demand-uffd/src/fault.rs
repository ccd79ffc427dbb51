// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves one fault, from its message to the wake-up. Only a mapping that the kernel refuses is
//! retried here; a failed fetch is retried by the pager (demand-memory, `retry`), while the fault
//! stays open.

use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use demand_memory::{PAGE_SIZE, PageRange};

use crate::armed::BACK_END_CHUNK;
use crate::deferred::DeferredQueue;
use crate::pending::Begun;
use crate::{ArmedMapping, Cause, RangeError, Userfaultfd};

/// Number of pages that are fetched together. A unit of 1 GiB is claimed piece by piece, so that a
/// thread that needs one page of it does not wait for all others.
const FETCH: u64 = BACK_END_CHUNK / PAGE_SIZE;

/// Pause before retrying a resolution that a changing address space or an unread event prevented.
const AGAIN: Duration = Duration::from_millis(1);

/// Shortest and longest pause before retrying a resolution for which the kernel had no memory. Each
/// pause is twice as long as the one before.
const NO_MEMORY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// Time after which a fault that stays open is reported.
const REPORT_AFTER: Duration = Duration::from_secs(5);

/// A granule of a mapping, by their numbers, and whether it is only to be reported. A report must
/// not pass for a resolution of the same granule, nor delay it.
pub(crate) type GranuleKey = (u64, u64, bool);

/// The mapping of a fault, which counts the fault while this exists.
struct Counted(Arc<ArmedMapping>);

impl Counted {
    fn new(mapping: Arc<ArmedMapping>) -> Self {
        mapping.begin_fault();
        Counted(mapping)
    }
}

impl Deref for Counted {
    type Target = Arc<ArmedMapping>;

    fn deref(&self) -> &Arc<ArmedMapping> {
        &self.0
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.end_fault();
    }
}

/// A pending fault on a granule.
pub(crate) struct Fault {
    mapping: Counted,
    granule: PageRange,
    /// The time when its message was read.
    begun: Instant,
    /// The pause before the current or latest retry; zero if the resolution was not retried yet.
    pause: Duration,
    /// Whether the memory was stopped, so that the fault stays open, and is only reported later.
    stopped: bool,
    /// Weak, because a deferred fault lies in there.
    resolutions: Weak<Resolutions>,
}

/// The outcome of handling a fault, for the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Outcome {
    /// The fault is resolved, or will be, or stays open for good.
    Handled,
    /// The process behind the userfaultfd has ended: no fault of it needs an answer.
    ProcessGone,
}

impl Outcome {
    /// Returns `ProcessGone` if one of the two is.
    pub(crate) fn or(self, other: Outcome) -> Outcome {
        if self == Outcome::ProcessGone { self } else { other }
    }
}

/// The resolutions of one service: those that are deferred, and those under way.
pub(crate) struct Resolutions {
    /// Resolutions that a thread of the service must run: those that the kernel refused for now,
    /// and those of other processes' faults whose last page another thread has published. A
    /// resolution wakes all waiters of its granule, so at most as many wait as granules exist,
    /// however often a process touches them.
    pub(crate) deferred: DeferredQueue<GranuleKey, Fault>,
    under_way: AtomicUsize,
}

impl Resolutions {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Resolutions { deferred: DeferredQueue::new()?, under_way: AtomicUsize::new(0) })
    }

    /// Returns whether any thread, of the service or of a source, is resolving a fault or counting
    /// it.
    pub(crate) fn are_under_way(&self) -> bool {
        self.under_way.load(Ordering::Acquire) > 0
    }

    /// Drops the deferred faults of a userfaultfd.
    pub(crate) fn forget(&self, uffd: &Arc<Userfaultfd>) {
        self.deferred.remove(|fault| Arc::ptr_eq(fault.uffd(), uffd));
    }
}

/// A fault that is being resolved, until it is counted.
struct UnderWay(Arc<Resolutions>);

impl UnderWay {
    fn new(resolutions: Arc<Resolutions>) -> Self {
        resolutions.under_way.fetch_add(1, Ordering::Relaxed);
        UnderWay(resolutions)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        // Release: the end of the service sees the counted fault.
        self.0.under_way.fetch_sub(1, Ordering::Release);
    }
}

/// A fault whose granule is not complete yet. If it is dropped, as when the memory is stopped,
/// later faults on the granule count as new, because its pages may still become present.
struct Incomplete(Option<Fault>);

impl Drop for Incomplete {
    fn drop(&mut self) {
        if let Some(fault) = self.0.take() {
            fault.mapping.pending().finish(fault.granule);
            fault.report_later();
        }
    }
}

impl Fault {
    /// A fault on `granule` of `mapping`, whose message was read at `begun`.
    pub(crate) fn new(
        mapping: Arc<ArmedMapping>,
        granule: PageRange,
        begun: Instant,
        resolutions: &Arc<Resolutions>,
    ) -> Self {
        let (mapping, resolutions) = (Counted::new(mapping), Arc::downgrade(resolutions));
        Fault { mapping, granule, begun, pause: Duration::ZERO, stopped: false, resolutions }
    }

    /// Returns the key that it shares with all faults on the granule that need the same.
    pub(crate) fn key(&self) -> GranuleKey {
        (self.mapping.number(), self.granule.first, self.stopped)
    }

    pub(crate) fn uffd(&self) -> &Arc<Userfaultfd> {
        self.mapping.uffd()
    }

    /// Starts fetching the granule and the pages around it that the mapping's faults fetch, and
    /// resolves the fault when all pages of the granule are present. In a
    /// mapping of this process that happens at once or on the thread that publishes the last page;
    /// in another process' mapping it happens at once or on a thread of the service. Never waits
    /// for a page.
    pub(crate) fn start(self) -> Outcome {
        if self.mapping.pending().join_or_start(self.granule) == Begun::Joined {
            return Outcome::Handled;
        }
        // Without the region nothing fetches its pages.
        let Some(pager) = self.mapping.pager() else {
            self.mapping.pending().finish(self.granule);
            self.report_later();
            return Outcome::Handled;
        };
        let is_complete = || pager.bitmap().first_missing(self.granule).is_none();
        let around = self.mapping.around(self.granule);
        let (mut arrived, mut left) = (0, around);
        while !left.is_empty() {
            let part = PageRange::new(left.first, left.count.min(FETCH));
            match pager.fetch(part, self.mapping.path()) {
                Ok(pages) => arrived += pages,
                // The memory was stopped. Faults on present pages are still resolved until the end;
                // any other fault stays open until the mapping is revoked.
                Err(_) if is_complete() => return self.complete(),
                Err(error) => {
                    self.mapping.pending().finish(self.granule);
                    log::debug!("cannot resolve a fault: {error}");
                    self.report_later();
                    return Outcome::Handled;
                }
            }
            left = PageRange::new(part.end(), left.count - part.count);
        }
        let is_fetched = arrived == around.count;
        if is_fetched && around == self.granule && self.mapping.is_mapped_by_pager() {
            return self.finish_mapped();
        }
        if is_fetched || is_complete() {
            return self.complete();
        }
        let (granule, own) = (self.granule, self.mapping.is_own());
        let mut incomplete = Incomplete(Some(self));
        pager.when_present(granule, move || {
            let Some(fault) = incomplete.0.take() else { return };
            if own {
                // This process has not ended.
                let _ = fault.complete();
            } else {
                fault.leave_to_service();
            }
        });
        Outcome::Handled
    }

    /// Ends a fault whose granule the pager has mapped on this thread, which has woken its waiters.
    /// Since then the page may have been reclaimed and touched again. If that second fault was read
    /// before `finish`, it has joined this one, and no thread has woken its waiter.
    fn finish_mapped(self) -> Outcome {
        let had_late_waiters = self.mapping.pending().finish(self.granule);
        if had_late_waiters {
            return self.resolve();
        }
        self.count(self.granule.bytes());
        Outcome::Handled
    }

    /// Ends a fault whose granule is complete: maps the granule, and wakes its waiters.
    fn complete(self) -> Outcome {
        self.mapping.pending().finish(self.granule);
        self.resolve()
    }

    /// Like [`complete`](Self::complete), but on a thread of the service: the other process may
    /// hold its address space locked, and the calling thread, which publishes a page, may be a
    /// vCPU's.
    fn leave_to_service(self) {
        self.mapping.pending().finish(self.granule);
        if let Err(fault) = self.defer(Duration::ZERO) {
            // Without the service no thread waits for the outcome.
            let _ = fault.resolve();
        }
    }

    /// Defers a report on a fault that stays open because the memory was stopped. By then the
    /// mapping should be revoked.
    fn report_later(mut self) {
        self.stopped = true;
        // Without the service nothing reports it.
        let _ = self.defer(REPORT_AFTER);
    }

    /// Reports a fault that is still open, once for each mapping.
    fn report_open(&self) {
        let own = self.mapping.is_own();
        let revoked = own && self.mapping.is_revoked();
        if revoked
            || self.uffd().is_closed()
            || self.mapping.count_missing(self.granule) == 0
            || !self.mapping.note_left_open()
        {
            return;
        }
        let (waited, page) = (self.begun.elapsed().as_secs(), self.granule.first);
        if own {
            log::error!(
                "a thread has waited for {waited} s at page {page} of a mapping: the memory was \
                 stopped, and the page does not arrive; revoke the mapping (DemandMemory::revoke)"
            );
        } else {
            log::error!(
                "a thread of another process has waited for {waited} s at page {page} of its \
                 mapping: the memory was stopped, and the page does not arrive; end that process, \
                 which cannot use the memory any more"
            );
        }
    }

    /// Defers the resolution to a thread of the service, which meanwhile reads the events that may
    /// block it. Returns the fault if the service was stopped.
    fn defer(mut self, pause: Duration) -> Result<(), Self> {
        let Some(resolutions) = self.resolutions.upgrade() else { return Err(self) };
        self.pause = pause;
        resolutions.deferred.defer(self.key(), self, Instant::now() + pause)
    }

    /// Maps the granule, which is complete, and wakes its waiters.
    pub(crate) fn resolve(self) -> Outcome {
        if self.stopped {
            self.report_open();
            return Outcome::Handled;
        }
        let _under_way = self.resolutions.upgrade().map(UnderWay::new);
        match self.mapping.map_around(self.granule) {
            Ok(bytes) => self.count(bytes),
            Err(error) => return self.retry_later(&error),
        }
        Outcome::Handled
    }

    /// Defers another attempt after a failed one, unless it is no longer needed.
    fn retry_later(self, error: &RangeError) -> Outcome {
        match error.cause() {
            cause @ (Cause::Again | Cause::NoMemory) => {
                let (mapping, pause) = (self.mapping.0.clone(), next_pause(cause, self.pause));
                if self.defer(pause).is_err() {
                    log::debug!("cannot resolve a fault: {error}; the service was stopped");
                } else if cause == Cause::NoMemory && mapping.note_short_of_memory() {
                    log::warn!(
                        "cannot resolve a fault yet: {error}; retrying it and others like it"
                    );
                }
                Outcome::Handled
            }
            cause @ (Cause::NotRegistered | Cause::ProcessGone | Cause::Closed) => {
                log::debug!("a fault no longer needs an answer: {error}");
                if cause == Cause::ProcessGone { Outcome::ProcessGone } else { Outcome::Handled }
            }
            _ => {
                self.leave_open(error);
                Outcome::Handled
            }
        }
    }

    fn leave_open(&self, error: &RangeError) {
        // A process that wakes its own threads can repeat the same fault for ever.
        if self.mapping.note_left_open() {
            log::error!("cannot resolve a fault: {error}; others like it are not reported");
        } else {
            log::debug!("cannot resolve a fault: {error}");
        }
    }

    fn count(&self, bytes: u64) {
        if let Some(pager) = self.mapping.pager() {
            pager.stats().fault(self.mapping.path(), bytes, self.begun.elapsed());
        }
    }
}

/// Returns the pause before the next retry of a resolution, after a pause of `before`.
fn next_pause(cause: Cause, before: Duration) -> Duration {
    match cause {
        Cause::NoMemory => (before * 2).clamp(NO_MEMORY.0, NO_MEMORY.1),
        _ => AGAIN,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, Receiver};
    use std::thread;

    use demand_memory::{
        Backing, BackingKind, FaultPath, MapPresent, Mapping, MemfdBacking, Pager, PagerConfig,
        Retrier, RetryPolicy, Stats, Waiter, to_usize,
    };
    use demand_source::LocalFile;

    use super::*;
    use crate::{FaultService, Features};

    const PAGE: PageRange = PageRange::new(3, 1);

    struct Memory {
        mapping: Arc<Mapping>,
        armed: Arc<ArmedMapping>,
        /// The armed mapping does not keep the pager.
        pager: Arc<Pager>,
    }

    /// Creates memory whose page is present but not mapped, with a userfaultfd that no service
    /// reads.
    fn memory() -> Memory {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(8 * PAGE_SIZE).unwrap();
        std::os::unix::fs::FileExt::write_all_at(image.as_file(), &[7; 8], PAGE.offset()).unwrap();
        let source = Arc::new(LocalFile::open(image.path()).unwrap());
        let backing = MemfdBacking::new(BackingKind::Shmem, 8 * PAGE_SIZE).unwrap();
        let mapping = Arc::new(backing.map().unwrap());
        let retrier = Retrier::new(RetryPolicy::default(), |_| {});
        let stats = Arc::new(Stats::new());
        let pager = Pager::new(PagerConfig {
            stats,
            retrier,
            ..PagerConfig::new(Arc::new(backing), source)
        })
        .unwrap();
        let uffd = Arc::new(Userfaultfd::open(Features::GUEST_MEMORY).unwrap());
        let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Guest).unwrap();
        pager.ensure(PAGE, FaultPath::Fill, &Waiter::new()).unwrap();
        Memory { mapping, armed, pager }
    }

    impl Memory {
        fn fault(&self, resolutions: &Arc<Resolutions>) -> Fault {
            Fault::new(self.armed.clone(), PAGE, Instant::now(), resolutions)
        }

        /// Touches the page on a new thread, and waits until its fault is read.
        fn touch(&self) -> Receiver<u64> {
            let (sender, reader) = mpsc::channel();
            let mapping = self.mapping.clone();
            thread::spawn(move || {
                let word = mapping.at(PAGE.offset()).cast::<u64>().as_ptr();
                // SAFETY: the word lies in the mapping, which this thread keeps, and no thread
                // writes to it.
                let _ = sender.send(unsafe { word.read_volatile() });
            });
            let begun = Instant::now();
            let mut events = Vec::new();
            while self.armed.uffd().read(&mut events).unwrap() == 0 {
                assert!(begun.elapsed() < Duration::from_secs(20), "no fault is told");
                thread::yield_now();
            }
            reader
        }
    }

    fn expect(reader: &Receiver<u64>) {
        let word = reader.recv_timeout(Duration::from_secs(20)).expect("the fault is resolved");
        assert_eq!(word, u64::from_ne_bytes([7; 8]));
    }

    fn no_memory() -> RangeError {
        let source = io::Error::from_raw_os_error(libc::ENOMEM);
        RangeError { operation: "map", address: 0, len: PAGE_SIZE, done: 0, source }
    }

    #[test]
    fn pauses_grow_up_to_a_limit() {
        let mut last = Duration::ZERO;
        for expected in [10, 20, 40, 80, 160, 320, 500, 500] {
            last = next_pause(Cause::NoMemory, last);
            assert_eq!(last, Duration::from_millis(expected));
        }
        assert_eq!(next_pause(Cause::Again, last), AGAIN);
    }

    #[test]
    fn fault_without_memory_is_retried_after_a_pause() {
        let memory = memory();
        let service = FaultService::start(1).unwrap();
        let reader = memory.touch();
        let begun = Instant::now();
        for _ in 0..3 {
            let outcome = memory.fault(service.resolutions()).retry_later(&no_memory());
            assert_eq!(outcome, Outcome::Handled);
        }
        // On a busy machine, the first may be retried before the others come.
        let together = begun.elapsed() < NO_MEMORY.0;
        expect(&reader);
        assert!(begun.elapsed() >= NO_MEMORY.0, "{:?}", begun.elapsed());
        while memory.pager.stats().path(FaultPath::Guest).faults == 0 {
            assert!(begun.elapsed() < Duration::from_secs(20), "the fault is counted");
            thread::yield_now();
        }
        service.stop();
        let faults = memory.pager.stats().path(FaultPath::Guest).faults;
        assert!(faults == 1 || !together, "{faults} faults on one granule, retried as one");
        assert!(!memory.armed.note_short_of_memory(), "it was reported");
    }

    #[test]
    fn report_delays_no_resolution() {
        let memory = memory();
        let service = FaultService::start(1).unwrap();
        let reader = memory.touch();
        // A fault before the page arrived, in memory that was stopped.
        memory.fault(service.resolutions()).report_later();
        let begun = Instant::now();
        let outcome = memory.fault(service.resolutions()).retry_later(&no_memory());
        assert_eq!(outcome, Outcome::Handled);
        expect(&reader);
        assert!(begun.elapsed() < REPORT_AFTER, "{:?}", begun.elapsed());
    }

    #[test]
    fn second_faulter_on_a_mapped_page_is_woken() {
        let memory = memory();
        let service = FaultService::start(1).unwrap();
        assert_eq!(memory.armed.pending().join_or_start(PAGE), Begun::Started);
        memory.armed.map_present(PAGE).unwrap();
        let address = memory.mapping.at(PAGE.offset()).as_ptr();
        // SAFETY: the page belongs to the mapping, nothing refers to it, and its object keeps the
        // bytes.
        unsafe { libc::madvise(address.cast(), to_usize(PAGE_SIZE), libc::MADV_DONTNEED) };
        let reader = memory.touch();
        assert_eq!(memory.armed.pending().join_or_start(PAGE), Begun::Joined);
        let outcome = memory.fault(service.resolutions()).finish_mapped();
        assert_eq!(outcome, Outcome::Handled);
        expect(&reader);
        // No waiter is left: the next fault is new, and no other was left to it.
        assert_eq!(memory.armed.pending().join_or_start(PAGE), Begun::Started);
        assert!(!memory.armed.pending().finish(PAGE));
    }
}
