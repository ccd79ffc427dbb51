// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The threads that read userfaultfds and serve their faults, and the registration of mappings.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use demand_memory::{OwnProcess, PageRange, Pager, join_within};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::fault::Resolutions;
use crate::service_options::Counters;
use crate::spin::Processors;
use crate::uffd_entry::UffdEntry;
use crate::{ArmedMapping, ServiceCounts, ServiceError, ServiceOptions, Userfaultfd};

#[cfg(test)]
mod tests;
mod threads;

use threads::once;

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
/// Dropping the service stops it, unless a guest's mapping that it has
/// [armed](FaultService::arm_guest) exists: that keeps the threads. Faults of other mappings then
/// stay open, and no missing page reads as zeros. A fault that no thread has read for 5 seconds is
/// reported in the log.
///
/// # Examples
///
/// A mapping whose pages come from a file as they are touched:
///
/// ```
/// use demand_memory::{Backing, BackingKind, FaultPath, MemfdBacking, Pager, PagerConfig};
/// use demand_source::LocalFile;
/// use demand_uffd::{ArmedMapping, FaultService, Features, Userfaultfd};
/// use std::sync::Arc;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let image = tempfile::NamedTempFile::new()?;
/// std::os::unix::fs::FileExt::write_all_at(image.as_file(), b"hello", 0x5000)?;
/// image.as_file().set_len(1 << 20)?;
///
/// let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, 1 << 20)?);
/// let source = Arc::new(LocalFile::open(image.path())?);
/// let pager = Pager::new(PagerConfig::new(backing.clone(), source))?;
///
/// let uffd = match Userfaultfd::open(Features::GUEST_MEMORY) {
///     Ok(uffd) => Arc::new(uffd),
///     Err(error) => return Ok(eprintln!("{error}")),
/// };
/// let mapping = Arc::new(backing.map()?);
/// let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm)?;
/// let service = FaultService::start(demand_uffd::DEFAULT_THREADS)?;
/// service.add(&[armed])?;
///
/// // SAFETY: the byte lies in the mapping, and no thread writes it.
/// assert_eq!(unsafe { mapping.at(0x5001).as_ptr().read_volatile() }, b'e');
/// assert!(!pager.bitmap().is_missing(5));
/// # Ok(())
/// # }
/// ```
#[must_use = "faults are served until this is dropped"]
pub struct FaultService {
    running: Arc<Running>,
}

/// The threads of a service, which end when this is dropped.
pub(crate) struct Running {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    process: OwnProcess,
}

struct Shared {
    epoll: Epoll,
    stop: EventFd,
    next_token: AtomicU64,
    /// The userfaultfds that are read, by their epoll tokens.
    entries: RwLock<HashMap<u64, Arc<UffdEntry>>>,
    /// Held while mappings are added, and by the end until it refuses more: it misses none. Threads
    /// that serve faults do not wait for it.
    adding: Mutex<()>,
    resolutions: Arc<Resolutions>,
    options: ServiceOptions,
    /// `None` if no thread spins.
    processors: Option<Processors>,
    /// Whether a thread spins: a second one would wait for the same message.
    spins: AtomicBool,
    counters: Counters,
}

impl FaultService {
    /// Starts a service. A number stands for the default options with this number of threads.
    ///
    /// # Errors
    ///
    /// [`ServiceError::System`].
    pub fn start(options: impl Into<ServiceOptions>) -> Result<Self, ServiceError> {
        let options: ServiceOptions = options.into();
        let processors = (!options.spin.is_zero()).then(Processors::new);
        Self::start_on(processors, options)
    }

    /// Starts a service that spins only while these processors suffice.
    fn start_on(
        processors: Option<Processors>,
        options: ServiceOptions,
    ) -> Result<Self, ServiceError> {
        let options = ServiceOptions { threads: options.threads.max(1), ..options };
        let refused = |source| ServiceError::System { operation: "start a fault service", source };
        let resolutions = Arc::new(Resolutions::new().map_err(refused)?);
        let due_fd = resolutions.deferred.as_raw_fd();
        let shared = Arc::new(Shared {
            epoll: Epoll::new().map_err(refused)?,
            stop: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(refused)?,
            next_token: AtomicU64::new(DUE + 1),
            entries: RwLock::default(),
            adding: Mutex::default(),
            resolutions,
            options,
            processors,
            spins: AtomicBool::new(false),
            counters: Counters::default(),
        });
        // Every thread is told of the end, and one thread of each time that work is due: each time
        // is followed by another until no work is left.
        let ends = EpollEvent::new(EventSet::IN, STOP);
        for (fd, interest) in [(shared.stop.as_raw_fd(), ends), (due_fd, once(DUE))] {
            shared.epoll.ctl(ControlOperation::Add, fd, interest).map_err(refused)?;
        }
        // From here on dropping `running` ends the threads that were started.
        let running = Running { shared, threads: Mutex::default(), process: OwnProcess::current() };
        for index in 0..options.threads {
            let shared = running.shared.clone();
            let thread = thread::Builder::new()
                .name(format!("uffd-{index}"))
                .spawn(move || shared.run())
                .map_err(refused)?;
            running.threads().push(thread);
        }
        Ok(FaultService { running: Arc::new(running) })
    }

    #[cfg(test)]
    pub(crate) fn resolutions(&self) -> &Arc<Resolutions> {
        &self.shared().resolutions
    }

    /// Returns whether the threads are this process', and not its parent's.
    pub(crate) fn is_of_this_process(&self) -> bool {
        self.running.process.is_current()
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.running.shared
    }

    /// Returns a handle that keeps the threads, and the mapping served, until it is dropped.
    pub(crate) fn serving(&self, mapping: &Arc<ArmedMapping>) -> Serving {
        Serving { running: self.running.clone(), mapping: Arc::downgrade(mapping) }
    }

    /// Serves these mappings from now on. Pass all mappings of a userfaultfd at once, so that no
    /// fault is read before it can be served. A fault that was is repeated.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Stopped`], and [`ServiceError::System`] if a userfaultfd cannot be watched.
    pub fn add(&self, mappings: &[Arc<ArmedMapping>]) -> Result<(), ServiceError> {
        let _adding = self.shared().adding();
        if self.shared().resolutions.deferred.is_closed() {
            return Err(ServiceError::Stopped);
        }
        let mut entries = self.shared().entries_mut();
        let mut new: Vec<Arc<UffdEntry>> = Vec::new();
        for mapping in mappings {
            let same = |entry: &Arc<UffdEntry>| Arc::ptr_eq(entry.uffd(), mapping.uffd());
            if let Some(entry) = entries.values().find(|entry| same(entry)) {
                entry.add(mapping);
            } else if let Some(entry) = new.iter().find(|entry| same(entry)) {
                entry.add(mapping);
            } else {
                let entry = Arc::new(UffdEntry::new(mapping.uffd().clone()));
                entry.add(mapping);
                new.push(entry);
            }
        }
        new.into_iter().try_for_each(|entry| self.shared().watch_new(&mut entries, entry))?;
        for mapping in mappings {
            // Makes faults repeat that were read earlier and either lay in no known mapping, or
            // were deferred and dropped with an earlier entry.
            if let Err(error) = mapping.uffd().wake(mapping.base(), mapping.len()) {
                log::debug!("{error}");
            }
        }
        Ok(())
    }

    /// Serves, from now on, the messages of KVM on a userfaultfd that it was given: pages for which
    /// it waits itself. `find` returns the region's pager, and the page in it, of a memslot's number
    /// and a guest frame number; it must not block. The same threads read faults and messages.
    ///
    /// # Errors
    ///
    /// As for [`add`](Self::add).
    pub fn serve_gfns(
        &self,
        uffd: &Arc<Userfaultfd>,
        find: impl Fn(u32, u64) -> Option<(Arc<Pager>, u64)> + Send + Sync + 'static,
    ) -> Result<(), ServiceError> {
        let _adding = self.shared().adding();
        if self.shared().resolutions.deferred.is_closed() {
            return Err(ServiceError::Stopped);
        }
        let known = self.shared().tokens_of(Some(uffd));
        let mut entries = self.shared().entries_mut();
        if let Some(entry) = known.first().and_then(|token| entries.get(token)) {
            entry.set_find_page(Arc::new(find));
            return Ok(());
        }
        let entry = Arc::new(UffdEntry::new(uffd.clone()));
        entry.set_find_page(Arc::new(find));
        self.shared().watch_new(&mut entries, entry)
    }

    /// Stops trapping accesses to the mappings of a userfaultfd, all of whose pages are present,
    /// and stops watching it. It stays open.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Incomplete`], without any effect, if pages are missing, or were missing when
    /// their region was dropped. [`ServiceError::Range`] if the operating system refuses; the
    /// userfaultfd is then no longer watched.
    pub fn release(&self, uffd: &Arc<Userfaultfd>) -> Result<(), ServiceError> {
        let tokens = self.shared().tokens_of(Some(uffd));
        self.shared().release_entries(&tokens)
    }

    /// Returns whether a thread is blocked on a fault in a mapping of this process, or was a moment
    /// ago. With all vCPUs outside the guest, such a fault belongs to one of the hypervisor's own
    /// threads.
    pub fn has_open_faults(&self) -> bool {
        let entries: Vec<_> = self.shared().entries().values().cloned().collect();
        entries.iter().any(|entry| entry.has_open_faults())
    }

    /// Returns the work of the threads so far.
    pub fn counts(&self) -> ServiceCounts {
        self.shared().counters.counts()
    }

    /// Stops watching a userfaultfd whose process has ended. Its mappings stay armed.
    pub fn forget(&self, uffd: &Arc<Userfaultfd>) {
        for token in self.shared().tokens_of(Some(uffd)) {
            self.shared().remove_entry(token);
        }
    }

    /// Serves another process' mapping no longer, because that process has given it up: nothing is
    /// mapped there any more, not even for a fault that was read before, and the process may use
    /// the addresses for something else. The mapping stays armed, so a thread of the process that
    /// touches a missing page there after all waits. The other mappings of its userfaultfd are
    /// served as before.
    pub fn remove(&self, mapping: &Arc<ArmedMapping>) {
        mapping.retire();
        let entries: Vec<_> = self.shared().entries().values().cloned().collect();
        for entry in entries {
            // An entry without mappings is kept: its userfaultfd may get another one.
            entry.remove(&Arc::downgrade(mapping));
        }
    }

    /// Ends paging once all pages are present: stops trapping accesses on all userfaultfds, closes
    /// them, and stops the service.
    ///
    /// # Errors
    ///
    /// As for [`release`](Self::release). After [`ServiceError::Incomplete`] the service still
    /// runs; otherwise nothing can be [added](Self::add) any more, by a concurrent call either.
    pub fn finish(&self) -> Result<(), ServiceError> {
        let adding = self.shared().adding();
        let tokens = self.shared().tokens_of(None);
        let uffds: Vec<_> = {
            let entries = self.shared().entries();
            tokens.iter().filter_map(|token| Some(entries.get(token)?.uffd().clone())).collect()
        };
        let released = self.shared().release_entries(&tokens);
        if let Err(ServiceError::Incomplete { .. }) = released {
            return released;
        }
        self.shared().close();
        drop(adding);
        uffds.iter().for_each(|uffd| uffd.close());
        self.stop();
        released
    }

    /// Ends the threads, waiting at most a second for them. Faults stay open as long as their
    /// userfaultfds do. All faults that were resolved before are counted when this returns.
    pub fn stop(&self) {
        self.running.stop();
    }
}

/// A mapping that is served until this is dropped.
pub(crate) struct Serving {
    running: Arc<Running>,
    mapping: Weak<ArmedMapping>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        let shared = &self.running.shared;
        let mut left = Vec::new();
        shared.entries().iter().for_each(|(token, entry)| {
            if entry.remove(&self.mapping) {
                left.push(*token);
            }
        });
        left.into_iter().for_each(|token| shared.remove_entry(token));
    }
}

impl Running {
    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        // A child shares the descriptors that wake the threads, but has no threads.
        if !self.process.is_current() {
            return;
        }
        let adding = self.shared.adding();
        self.shared.close();
        drop(adding);
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
        while self.shared.resolutions.are_under_way() && Instant::now() < due {
            thread::sleep(Duration::from_micros(100));
        }
    }
}

impl Shared {
    fn adding(&self) -> MutexGuard<'_, ()> {
        self.adding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entries(&self) -> RwLockReadGuard<'_, HashMap<u64, Arc<UffdEntry>>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn entries_mut(&self) -> RwLockWriteGuard<'_, HashMap<u64, Arc<UffdEntry>>> {
        self.entries.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses mappings from now on. The caller holds `adding`.
    fn close(&self) {
        self.resolutions.deferred.close();
    }

    /// Returns the tokens of the entries of one userfaultfd, or of all.
    fn tokens_of(&self, uffd: Option<&Arc<Userfaultfd>>) -> Vec<u64> {
        let chosen = |entry: &UffdEntry| uffd.is_none_or(|uffd| Arc::ptr_eq(uffd, entry.uffd()));
        let entries = self.entries();
        entries.iter().filter(|(_, entry)| chosen(entry)).map(|(token, _)| *token).collect()
    }

    /// Starts watching a userfaultfd. The caller holds `adding`.
    fn watch_new(
        &self,
        entries: &mut HashMap<u64, Arc<UffdEntry>>,
        entry: Arc<UffdEntry>,
    ) -> Result<(), ServiceError> {
        let refused = |source| ServiceError::System { operation: "watch a userfaultfd", source };
        let token = self.next_token.fetch_add(1, Ordering::Relaxed);
        let fd = entry.uffd().fd().map_err(refused)?;
        entries.insert(token, entry);
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), once(token)).map_err(|error| {
            entries.remove(&token);
            refused(error)
        })
    }

    /// Stops watching a userfaultfd.
    fn remove_entry(&self, token: u64) {
        let Some(entry) = self.entries_mut().remove(&token) else { return };
        if let Ok(fd) = entry.uffd().fd() {
            // An error means that it was not watched, which does no harm.
            let gone = EpollEvent::default();
            let _ = self.epoll.ctl(ControlOperation::Delete, fd.as_raw_fd(), gone);
        }
        self.resolutions.forget(entry.uffd());
    }

    /// Stops trapping accesses to all mappings of these entries, and stops watching them.
    fn release_entries(&self, tokens: &[u64]) -> Result<(), ServiceError> {
        let mappings: Vec<_> = {
            let entries = self.entries();
            tokens
                .iter()
                .filter_map(|token| entries.get(token))
                .flat_map(|entry| entry.mappings())
                .collect()
        };
        let all = |mapping: &ArmedMapping| PageRange::of_bytes(0, mapping.len());
        let missing = mappings.iter().map(|mapping| mapping.count_missing(all(mapping))).sum();
        if missing > 0 {
            return Err(ServiceError::Incomplete { missing });
        }
        let mut released = Ok(());
        for mapping in mappings {
            if let Err(error) = mapping.disarm() {
                released = Err(error.into());
            }
        }
        for token in tokens {
            self.remove_entry(*token);
        }
        released
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for FaultService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultService")
            .field("userfaultfds", &self.shared().entries().len())
            .field("threads", &self.running.threads().len())
            .finish()
    }
}
