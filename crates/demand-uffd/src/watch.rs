// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serves the events and faults of one userfaultfd.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use demand_memory::{PAGE_SIZE, PageRange};

use crate::service::Shared;
use crate::{ArmedMapping, BACK_END_CHUNK, Cause, Event, RangeError, Userfaultfd};

/// Number of pages that are fetched together. A unit of 1 GiB is claimed piece by piece, so that a
/// thread that needs one page of it does not wait for all others.
const FETCH: u64 = BACK_END_CHUNK / PAGE_SIZE;

/// Number of forks of one process after which it is no longer served: each costs a descriptor.
const FORKS: usize = 16;

/// Pause before retrying a resolution that a changing address space or an unread event prevented.
const AGAIN: Duration = Duration::from_millis(1);

/// Shortest and longest pause before retrying a resolution for which the kernel had no memory. Each
/// pause is twice as long as the one before.
const NO_MEMORY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// A userfaultfd that is served, with the mappings that are armed on it.
pub(crate) struct Watch {
    pub(crate) uffd: Arc<Userfaultfd>,
    mappings: RwLock<Vec<Arc<ArmedMapping>>>,
    /// Whether a fault outside all mappings was reported.
    strange: AtomicBool,
    /// Userfaultfds of forked children of the process. They are not served, but kept: if they were
    /// closed, missing pages would read as zeros in the children.
    forks: Mutex<Vec<OwnedFd>>,
}

/// A pending fault on a granule.
pub(crate) struct Fault {
    pub(crate) mapping: Arc<ArmedMapping>,
    pub(crate) granule: PageRange,
    /// The time when its message was read.
    pub(crate) begun: Instant,
    /// The pause before the current or latest retry; zero if the resolution was not retried yet.
    pub(crate) pause: Duration,
}

/// A fault whose granule is not complete yet. If it is dropped, as when the memory is stopped,
/// later faults on the granule count as new, because its pages may still become present.
struct Open(Option<Fault>);

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(fault) = self.0.take() {
            fault.mapping.end(fault.granule);
            log::debug!("cannot resolve a fault: the memory was stopped");
        }
    }
}

impl Watch {
    pub(crate) fn new(uffd: Arc<Userfaultfd>) -> Self {
        Watch {
            uffd,
            mappings: RwLock::default(),
            strange: AtomicBool::new(false),
            forks: Mutex::default(),
        }
    }

    pub(crate) fn mappings(&self) -> Vec<Arc<ArmedMapping>> {
        self.mappings.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn add(&self, mapping: &Arc<ArmedMapping>) {
        let mut mappings = self.mappings.write().unwrap_or_else(PoisonError::into_inner);
        if !mappings.iter().any(|known| Arc::ptr_eq(known, mapping)) {
            mappings.push(mapping.clone());
        }
    }

    fn find(&self, address: u64) -> Option<(Arc<ArmedMapping>, PageRange)> {
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        mappings.iter().find_map(|mapping| Some((mapping.clone(), mapping.granule_at(address)?)))
    }

    /// Reads a batch of messages and serves them.
    ///
    /// # Errors
    ///
    /// The operating system's error: the userfaultfd cannot be read any more.
    pub(crate) fn serve(&self, shared: &Arc<Shared>, events: &mut Vec<Event>) -> io::Result<()> {
        self.uffd.read(events)?;
        let begun = Instant::now();
        // All faults of a batch are waiting already, so resolving a granule once wakes all of them.
        let mut seen = Vec::with_capacity(events.len());
        for event in events.drain(..) {
            match event {
                Event::Pagefault { address, .. } => match self.find(address) {
                    Some((mapping, granule)) => {
                        let place = (Arc::as_ptr(&mapping), granule.first);
                        if !seen.contains(&place) {
                            seen.push(place);
                            Fault { mapping, granule, begun, pause: Duration::ZERO }.serve(shared);
                        }
                    }
                    None => self.ignore(address),
                },
                Event::Fork(uffd) => {
                    log::error!(
                        "a process with demand-paged memory has forked: its child blocks forever \
                         on missing pages"
                    );
                    let mut forks = self.forks.lock().unwrap_or_else(PoisonError::into_inner);
                    forks.push(uffd);
                    if forks.len() > FORKS {
                        return Err(io::Error::other("its process forks too often"));
                    }
                }
                // Changes of the process to its own mappings show when a fault is resolved.
                Event::Remap { .. } | Event::Remove { .. } | Event::Unmap { .. } => {}
                Event::Unknown(event) => {
                    log::debug!("a userfaultfd reported unknown event {event}")
                }
            }
        }
        Ok(())
    }

    /// Ignores a fault on a range that this service does not know: the code that armed the range
    /// must serve it. If its thread were woken, it would fault again at once.
    fn ignore(&self, address: u64) {
        if !self.strange.swap(true, Ordering::Relaxed) {
            log::warn!(
                "cannot serve a fault at address {address:#x}: it lies in no mapping of guest \
                 memory; others like it are not reported"
            );
        }
    }
}

impl Fault {
    /// Starts fetching the granule, and resolves the fault when all of its pages are present. In a
    /// mapping of this process that happens at once or on the thread that publishes the last page;
    /// in another process' mapping it happens at once or on a thread of the service. Never waits
    /// for a page.
    fn serve(self, shared: &Arc<Shared>) {
        if !self.mapping.begin(self.granule) {
            return;
        }
        // Without the region no thread needs its pages.
        let Some(pager) = self.mapping.pager() else { return };
        let mut arrived = 0;
        let mut left = self.granule;
        while !left.is_empty() {
            let part = PageRange::new(left.first, left.count.min(FETCH));
            match pager.fetch(part, self.mapping.path()) {
                Ok(pages) => arrived += pages,
                // The memory was stopped. Faults on present pages are still resolved until the end;
                // any other fault stays open until the mapping is revoked.
                Err(error) => {
                    if pager.bitmap().first_missing(self.granule).is_none() {
                        return self.resolve(&Arc::downgrade(shared));
                    }
                    self.mapping.end(self.granule);
                    return log::debug!("cannot resolve a fault: {error}");
                }
            }
            left = PageRange::new(part.end(), left.count - part.count);
        }
        if arrived == self.granule.count && self.mapping.is_mapped_by_pager() {
            return self.mapped(&Arc::downgrade(shared));
        }
        let (shared, granule) = (Arc::downgrade(shared), self.granule);
        let here = self.mapping.is_own() || pager.bitmap().first_missing(granule).is_none();
        let mut open = Open(Some(self));
        pager.bitmap().when_present(granule, move || match open.0.take() {
            Some(fault) if here => fault.resolve(&shared),
            Some(fault) => fault.resolve_on_service(&shared),
            None => {}
        });
    }

    /// Ends a fault whose granule the pager has mapped on this thread, which has woken its waiters.
    /// Since then the page may have been reclaimed and touched again. If that second fault was read
    /// before `end`, it was left to this one, and no thread has woken its waiter.
    fn mapped(self, shared: &Weak<Shared>) {
        if self.mapping.end(self.granule) {
            self.let_go(shared);
        } else {
            self.count();
        }
    }

    /// Ends a fault whose granule is complete, and wakes its waiters.
    fn resolve(self, shared: &Weak<Shared>) {
        self.mapping.end(self.granule);
        self.let_go(shared);
    }

    /// Like [`resolve`](Self::resolve), but on a thread of the service: the other process may hold
    /// its address space locked, and the calling thread, which publishes a page, may be a vCPU's.
    fn resolve_on_service(self, shared: &Weak<Shared>) {
        match shared.upgrade().filter(|shared| !shared.is_stopped()) {
            Some(service) => {
                self.mapping.end(self.granule);
                service.resolve_again(self, Duration::ZERO);
            }
            None => self.resolve(shared),
        }
    }

    /// Maps the granule, which is complete, and wakes its waiters.
    pub(crate) fn let_go(self, shared: &Weak<Shared>) {
        let _resolving = shared.upgrade().map(Shared::resolving);
        match self.mapping.resolve(self.granule) {
            Ok(()) => self.count(),
            Err(error) => self.failed(&error, shared),
        }
    }

    /// Schedules a retry of a failed resolution, unless it is no longer needed.
    fn failed(self, error: &RangeError, shared: &Weak<Shared>) {
        match error.cause() {
            cause @ (Cause::Again | Cause::NoMemory) => {
                if cause == Cause::NoMemory && self.mapping.note_short_of_memory() {
                    log::warn!(
                        "cannot resolve a fault yet: {error}; retrying it and others like it"
                    );
                }
                match shared.upgrade() {
                    Some(shared) => {
                        let pause = pause(cause, self.pause);
                        shared.resolve_again(self, pause);
                    }
                    None => self.give_up(error),
                }
            }
            Cause::NotRegistered | Cause::ProcessGone | Cause::Closed => {
                log::debug!("a fault no longer needs an answer: {error}");
                if let (Cause::ProcessGone, Some(shared)) = (error.cause(), shared.upgrade()) {
                    shared.forget(self.mapping.uffd());
                }
            }
            _ => self.give_up(error),
        }
    }

    fn give_up(&self, error: &RangeError) {
        // A process that wakes its own threads can repeat the same fault for ever.
        if self.mapping.note_left_open() {
            log::error!("cannot resolve a fault: {error}; others like it are not reported");
        } else {
            log::debug!("cannot resolve a fault: {error}");
        }
    }

    fn count(&self) {
        if let Some(pager) = self.mapping.pager() {
            let bytes = self.granule.bytes();
            pager.stats().fault(self.mapping.path(), bytes, self.begun.elapsed());
        }
    }
}

/// Returns the pause before the next retry of a resolution, after a pause of `before`.
fn pause(cause: Cause, before: Duration) -> Duration {
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
        Backing, BackingKind, Mapping, MemfdBacking, Pager, Path, Retrier, RetryPolicy, Stats,
        Trap, Waiter,
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
        let backing = MemfdBacking::new(BackingKind::Shmem, 8 * PAGE_SIZE, false).unwrap();
        let mapping = Arc::new(backing.map().unwrap());
        let retrier = Retrier::new(RetryPolicy::default(), |_| {});
        let stats = Arc::new(Stats::new());
        let pager = Pager::new(Arc::new(backing), source, 0, stats, retrier).unwrap();
        let uffd = Arc::new(Userfaultfd::open(Features::GUEST_MEMORY).unwrap());
        let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, Path::Guest).unwrap();
        pager.ensure(PAGE, Path::Fill, &Waiter::new()).unwrap();
        Memory { mapping, armed, pager }
    }

    impl Memory {
        fn fault(&self) -> Fault {
            let (mapping, granule) = (self.armed.clone(), PAGE);
            Fault { mapping, granule, begun: Instant::now(), pause: Duration::ZERO }
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
        let error = io::Error::from_raw_os_error(libc::ENOMEM);
        RangeError { operation: "map", address: 0, len: PAGE_SIZE, done: 0, error }
    }

    #[test]
    fn pauses_grow_up_to_a_limit() {
        let mut last = Duration::ZERO;
        for expected in [10, 20, 40, 80, 160, 320, 500, 500] {
            last = pause(Cause::NoMemory, last);
            assert_eq!(last, Duration::from_millis(expected));
        }
        assert_eq!(pause(Cause::Again, last), AGAIN);
    }

    #[test]
    fn fault_without_memory_is_retried_after_a_pause() {
        let memory = memory();
        let service = FaultService::start(1).unwrap();
        let reader = memory.touch();
        let begun = Instant::now();
        // Several faults on one granule are retried as one.
        for _ in 0..3 {
            memory.fault().failed(&no_memory(), &service.weak());
        }
        expect(&reader);
        assert!(begun.elapsed() >= NO_MEMORY.0, "{:?}", begun.elapsed());
        while memory.pager.stats().path(Path::Guest).faults == 0 {
            assert!(begun.elapsed() < Duration::from_secs(20), "the fault is counted");
            thread::yield_now();
        }
        service.stop();
        assert_eq!(memory.pager.stats().path(Path::Guest).faults, 1);
        assert!(!memory.armed.note_short_of_memory(), "it was reported");
    }

    #[test]
    fn second_faulter_on_a_mapped_page_is_woken() {
        let memory = memory();
        let service = FaultService::start(1).unwrap();
        assert!(memory.armed.begin(PAGE));
        memory.armed.map_present(PAGE).unwrap();
        let address = memory.mapping.at(PAGE.offset()).as_ptr();
        // SAFETY: the page belongs to the mapping, nothing refers to it, and its object keeps the
        // bytes.
        unsafe { libc::madvise(address.cast(), PAGE_SIZE as usize, libc::MADV_DONTNEED) };
        let reader = memory.touch();
        assert!(!memory.armed.begin(PAGE));
        memory.fault().mapped(&service.weak());
        expect(&reader);
        // No waiter is left: the next fault is new, and no other was left to it.
        assert!(memory.armed.begin(PAGE));
        assert!(!memory.armed.end(PAGE));
    }
}
