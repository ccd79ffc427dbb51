// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Threads that serve the faults of several userfaultfds.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use demand_memory::{PageRange, Trap, join_within};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use crate::watch::{Fault, Watch};
use crate::{ArmedMapping, ServiceError, Userfaultfd};

/// Default number of threads of a service.
pub const DEFAULT_THREADS: usize = 2;

/// Longest time to wait at the end for threads that are blocked in a system call.
const END_WITHIN: Duration = Duration::from_secs(1);

/// Epoll tokens that do not stand for a userfaultfd.
const STOP: u64 = 0;
const DUE: u64 = 1;

/// Serves the faults of several userfaultfds, of this process and of others, on its own threads.
///
/// For a fault the [`ArmedMapping`]'s pager fetches the pages of the granule; when all of them are
/// present they are mapped for the faulter. The threads never wait for a page: if pages are still
/// missing when the pager returns, the fault is resolved when the last one is published, by the
/// publishing thread or, in another process' mapping, by a thread of the service. The threads wait
/// for nothing else either, except for the kernel: one faulter never delays another.
///
/// Dropping the service stops it. Faults then stay open; no missing page reads as zeros.
///
/// # Examples
///
/// A mapping whose pages come from a file as they are touched:
///
/// ```
/// use demand_memory::{
///     Backing, BackingKind, MemfdBacking, Pager, Path, Retrier, RetryPolicy, Stats,
/// };
/// use demand_source::LocalFile;
/// use demand_uffd::{ArmedMapping, FaultService, Features, Userfaultfd};
/// use std::sync::Arc;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let image = tempfile::NamedTempFile::new()?;
/// std::os::unix::fs::FileExt::write_all_at(image.as_file(), b"hello", 0x5000)?;
/// image.as_file().set_len(1 << 20)?;
///
/// let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, 1 << 20, true)?);
/// let retrier = Retrier::new(RetryPolicy::default(), |failure| eprintln!("{}", failure.error));
/// let source = Arc::new(LocalFile::open(image.path())?);
/// let pager = Pager::new(backing.clone(), source, 0, Arc::new(Stats::new()), retrier)?;
///
/// let uffd = match Userfaultfd::open(Features::GUEST_MEMORY) {
///     Ok(uffd) => Arc::new(uffd),
///     Err(error) => return Ok(eprintln!("{error}")),
/// };
/// let mapping = Arc::new(backing.map()?);
/// let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, Path::Vmm)?;
/// let service = FaultService::start(demand_uffd::DEFAULT_THREADS)?;
/// service.serve(&[armed])?;
///
/// // SAFETY: the byte lies in the mapping, and no thread writes it.
/// assert_eq!(unsafe { mapping.at(0x5001).as_ptr().read_volatile() }, b'e');
/// assert!(!pager.bitmap().is_missing(5));
/// # Ok(())
/// # }
/// ```
pub struct FaultService {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

pub(crate) struct Shared {
    epoll: Epoll,
    stop: EventFd,
    /// Expires when the next resolution in `again` is due. Any free thread sees it, because the
    /// thread that set it may be blocked by then.
    timer: Mutex<TimerFd>,
    stopped: AtomicBool,
    next: AtomicU64,
    watches: RwLock<HashMap<u64, Arc<Watch>>>,
    /// Resolutions that a thread of the service must run, with their due times, by mapping and
    /// granule: those that the kernel refused for now, and those of other processes' faults whose
    /// last page another thread has published. A resolution wakes all waiters of its granule, so
    /// there are at most as many as granules, however often a process touches them.
    again: Mutex<HashMap<(usize, u64), (Instant, Fault)>>,
    /// Number of faults that any thread is currently resolving and counting.
    resolving: AtomicUsize,
}

impl FaultService {
    /// Starts a service with `threads` threads, at least one.
    ///
    /// # Errors
    ///
    /// [`ServiceError::System`].
    pub fn start(threads: usize) -> Result<Self, ServiceError> {
        let refused = |error| ServiceError::System { asked: "start a fault service", error };
        let timer = TimerFd::new().map_err(|error| refused(error.into()))?;
        let timer_fd = timer.as_raw_fd();
        let shared = Arc::new(Shared {
            epoll: Epoll::new().map_err(refused)?,
            stop: EventFd::new(EFD_NONBLOCK).map_err(refused)?,
            timer: Mutex::new(timer),
            stopped: AtomicBool::new(false),
            next: AtomicU64::new(DUE + 1),
            watches: RwLock::default(),
            again: Mutex::default(),
            resolving: AtomicUsize::new(0),
        });
        for (fd, token) in [(shared.stop.as_raw_fd(), STOP), (timer_fd, DUE)] {
            let interest = EpollEvent::new(EventSet::IN, token);
            shared.epoll.ctl(ControlOperation::Add, fd, interest).map_err(refused)?;
        }
        // From here on dropping `service` ends the threads that were started.
        let service = FaultService { shared, threads: Mutex::default() };
        for index in 0..threads.max(1) {
            let shared = service.shared.clone();
            let thread = thread::Builder::new()
                .name(format!("uffd-{index}"))
                .spawn(move || shared.run())
                .map_err(refused)?;
            service.threads().push(thread);
        }
        Ok(service)
    }

    /// Returns the reference that faults hold to the service.
    #[cfg(test)]
    pub(crate) fn weak(&self) -> std::sync::Weak<Shared> {
        Arc::downgrade(&self.shared)
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves these mappings from now on. Pass all mappings of a userfaultfd at once, so that no
    /// fault is read before it can be served. A fault that was is repeated.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Stopped`], and [`ServiceError::System`] if a userfaultfd cannot be watched.
    pub fn serve(&self, mappings: &[Arc<ArmedMapping>]) -> Result<(), ServiceError> {
        if self.shared.stopped.load(Ordering::Acquire) {
            return Err(ServiceError::Stopped);
        }
        let mut watches = self.shared.watches_mut();
        let mut new: Vec<(u64, Arc<Watch>)> = Vec::new();
        for mapping in mappings {
            let same = |watch: &Arc<Watch>| Arc::ptr_eq(&watch.uffd, mapping.uffd());
            if let Some(watch) = watches.values().find(|watch| same(watch)) {
                watch.add(mapping);
            } else if let Some((_, watch)) = new.iter().find(|(_, watch)| same(watch)) {
                watch.add(mapping);
            } else {
                let token = self.shared.next.fetch_add(1, Ordering::Relaxed);
                let watch = Arc::new(Watch::new(mapping.uffd().clone()));
                watch.add(mapping);
                new.push((token, watch));
            }
        }
        for (token, watch) in new {
            let refused = |error| ServiceError::System { asked: "watch a userfaultfd", error };
            let fd = watch.uffd.fd().map_err(refused)?;
            watches.insert(token, watch);
            let interest = EpollEvent::new(EventSet::IN, token);
            if let Err(error) =
                self.shared.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), interest)
            {
                watches.remove(&token);
                return Err(refused(error));
            }
        }
        for mapping in mappings {
            // Makes faults repeat that were read earlier and either lay in no known mapping, or
            // were deferred and dropped with an earlier watch.
            if let Err(error) = mapping.uffd().wake(mapping.base(), mapping.len()) {
                log::debug!("{error}");
            }
        }
        Ok(())
    }

    /// Stops trapping accesses to the mappings of a userfaultfd, all of whose pages are present,
    /// and stops watching it. It stays open.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Incomplete`], without any effect, if pages are missing, or were missing when
    /// their region was dropped. [`ServiceError::System`] if the operating system refuses; the
    /// userfaultfd is then no longer watched.
    pub fn release(&self, uffd: &Arc<Userfaultfd>) -> Result<(), ServiceError> {
        let tokens = self.shared.tokens_of(Some(uffd));
        self.shared.release(&tokens)
    }

    /// Returns whether a thread is blocked on a fault in a mapping of this process, or was a moment
    /// ago. With all vCPUs outside the guest, such a fault belongs to one of the hypervisor's own
    /// threads.
    pub fn has_open_faults(&self) -> bool {
        let watches: Vec<_> = self.shared.watches().values().cloned().collect();
        watches.iter().any(|watch| {
            let mappings = watch.mappings();
            mappings.iter().any(|mapping| mapping.is_own())
                && (watch.uffd.has_messages() || mappings.iter().any(|m| m.has_pending()))
        })
    }

    /// Stops watching a userfaultfd whose process has ended. Its mappings stay armed.
    pub fn forget(&self, uffd: &Arc<Userfaultfd>) {
        self.shared.forget(uffd);
    }

    /// Ends paging once all pages are present: stops trapping accesses on all userfaultfds, closes
    /// them, and stops the service.
    ///
    /// # Errors
    ///
    /// As for [`release`](Self::release). After [`ServiceError::Incomplete`] the service still
    /// runs.
    pub fn finish(&self) -> Result<(), ServiceError> {
        let tokens = self.shared.tokens_of(None);
        let uffds: Vec<_> = {
            let watches = self.shared.watches();
            tokens.iter().filter_map(|token| Some(watches.get(token)?.uffd.clone())).collect()
        };
        let released = self.shared.release(&tokens);
        if let Err(ServiceError::Incomplete { .. }) = released {
            return released;
        }
        uffds.iter().for_each(|uffd| uffd.close());
        self.stop();
        released
    }

    /// Ends the threads, waiting at most a second for them. Faults stay open as long as their
    /// userfaultfds do. All faults that were resolved before are counted when this returns.
    pub fn stop(&self) {
        self.shared.stopped.store(true, Ordering::Release);
        // Only a counter at its limit refuses the write, and then the threads are awake anyway.
        let _ = self.shared.stop.write(1);
        let threads = self.threads().drain(..).collect();
        let hanging = join_within(threads, END_WITHIN);
        if hanging > 0 {
            log::warn!(
                "cannot end {hanging} threads that serve faults: they are blocked in the kernel, \
                 possibly on another process's memory; they remain until the call returns, or \
                 until the process ends"
            );
        }
        // Threads of a source resolve faults too, and count them after the faulter resumes.
        let due = Instant::now() + END_WITHIN;
        while self.shared.resolving.load(Ordering::Acquire) > 0 && Instant::now() < due {
            thread::sleep(Duration::from_micros(100));
        }
    }
}

/// A fault that is being resolved, until it is counted.
pub(crate) struct Resolving(Arc<Shared>);

impl Drop for Resolving {
    fn drop(&mut self) {
        // Release: the end of the service sees the counted fault.
        self.0.resolving.fetch_sub(1, Ordering::Release);
    }
}

impl Shared {
    /// Notes that a fault is being resolved.
    pub(crate) fn resolving(self: Arc<Self>) -> Resolving {
        self.resolving.fetch_add(1, Ordering::Relaxed);
        Resolving(self)
    }

    fn watches(&self) -> RwLockReadGuard<'_, HashMap<u64, Arc<Watch>>> {
        self.watches.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn watches_mut(&self) -> RwLockWriteGuard<'_, HashMap<u64, Arc<Watch>>> {
        self.watches.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the tokens of the watches of one userfaultfd, or of all.
    fn tokens_of(&self, uffd: Option<&Arc<Userfaultfd>>) -> Vec<u64> {
        let chosen = |watch: &Watch| uffd.is_none_or(|uffd| Arc::ptr_eq(uffd, &watch.uffd));
        let watches = self.watches();
        watches.iter().filter(|(_, watch)| chosen(watch)).map(|(token, _)| *token).collect()
    }

    /// Stops watching a userfaultfd.
    fn unwatch(&self, token: u64) {
        let Some(watch) = self.watches_mut().remove(&token) else { return };
        if let Ok(fd) = watch.uffd.fd() {
            // An error means that it was not watched, which does no harm.
            let gone = EpollEvent::default();
            let _ = self.epoll.ctl(ControlOperation::Delete, fd.as_raw_fd(), gone);
        }
        self.again().retain(|_, (_, fault)| !Arc::ptr_eq(fault.mapping.uffd(), &watch.uffd));
    }

    fn release(&self, tokens: &[u64]) -> Result<(), ServiceError> {
        let mappings: Vec<_> = {
            let watches = self.watches();
            tokens
                .iter()
                .filter_map(|token| watches.get(token))
                .flat_map(|w| w.mappings())
                .collect()
        };
        let all = |mapping: &ArmedMapping| PageRange::of_bytes(0, mapping.len());
        let missing = mappings.iter().map(|mapping| mapping.count_missing(all(mapping))).sum();
        if missing > 0 {
            return Err(ServiceError::Incomplete { missing });
        }
        let mut released = Ok(());
        for mapping in mappings {
            if let Err(error) = mapping.release(all(&mapping)) {
                let asked = "unregister guest memory";
                released = Err(ServiceError::System { asked, error });
            }
        }
        for token in tokens {
            self.unwatch(*token);
        }
        released
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    fn again(&self) -> MutexGuard<'_, HashMap<(usize, u64), (Instant, Fault)>> {
        self.again.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a resolution after a pause, on a thread of the service. Meanwhile the service reads the
    /// events that may block the resolution.
    pub(crate) fn resolve_again(&self, mut fault: Fault, pause: Duration) {
        fault.pause = pause;
        let place = (Arc::as_ptr(&fault.mapping) as usize, fault.granule.first);
        let mut again = self.again();
        again.entry(place).or_insert((Instant::now() + pause, fault));
        self.set_timer(&again);
    }

    /// Sets the timer for the resolution that is due next. The lock on `again` keeps two threads
    /// from setting it in the wrong order.
    fn set_timer(&self, again: &HashMap<(usize, u64), (Instant, Fault)>) {
        let Some(due) = again.values().map(|(due, _)| *due).min() else { return };
        // Zero would disarm the timer.
        let left = due.saturating_duration_since(Instant::now()).max(Duration::from_micros(1));
        let mut timer = self.timer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = timer.reset(left, None) {
            log::error!("cannot set a timer: {error}; a fault may stay unresolved");
        }
    }

    /// Runs the resolutions that are due.
    fn resolve_due(self: &Arc<Self>) {
        {
            // Disarming the timer makes it unreadable. Reading it would too, but could block.
            let mut timer = self.timer.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = timer.clear() {
                log::debug!("cannot clear a timer: {error}");
            }
        }
        let due: Vec<_> = {
            let mut again = self.again();
            let now = Instant::now();
            let due = again.extract_if(|_, (due, _)| *due <= now).collect();
            self.set_timer(&again);
            due
        };
        for (_, (_, fault)) in due {
            fault.let_go(&Arc::downgrade(self));
        }
    }

    /// Stops watching a userfaultfd whose process has ended.
    pub(crate) fn forget(&self, uffd: &Arc<Userfaultfd>) {
        for token in self.tokens_of(Some(uffd)) {
            self.unwatch(token);
        }
    }

    /// Runs a thread of the service until it is stopped.
    fn run(self: &Arc<Self>) {
        let mut ready = [EpollEvent::default(); 8];
        let mut events = Vec::new();
        loop {
            let count = match self.epoll.wait(-1, &mut ready) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return log::error!(
                        "cannot wait for faults: {error}; this thread no longer serves them"
                    );
                }
            };
            for event in &ready[..count] {
                match event.data() {
                    // The event is not consumed, so that the other threads see it too.
                    STOP => return,
                    DUE => self.resolve_due(),
                    token => self.serve(token, event.event_set(), &mut events),
                }
            }
        }
    }

    fn serve(self: &Arc<Self>, token: u64, ready: EventSet, events: &mut Vec<crate::Event>) {
        let Some(watch) = self.watches().get(&token).cloned() else { return };
        let served = if ready.contains(EventSet::IN) {
            watch.serve(self, events)
        } else {
            Err(io::Error::other("the userfaultfd reports an error"))
        };
        if let Err(error) = served {
            // If it stayed watched, epoll would report it again and again.
            log::warn!("cannot read faults from a userfaultfd: {error}; they are no longer served");
            self.unwatch(token);
        }
    }
}

impl Drop for FaultService {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for FaultService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultService")
            .field("userfaultfds", &self.shared.watches().len())
            .field("threads", &self.threads().len())
            .finish()
    }
}
