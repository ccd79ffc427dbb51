// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mappings of a region whose readers are trapped at missing pages.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use demand_memory::{
    BackingError, BackingKind, Mapping, MappingGuard, PAGE_SIZE, PageRange, Pager, Path, Trap,
    Waiter,
};

use crate::{Cause, Modes, RangeError, Userfaultfd};

/// The least that one fault of another process maps, in bytes: shared memory is mapped in chunks of
/// this size, huge pages as a whole.
pub const BACK_END_CHUNK: u64 = 2 << 20;

/// Number of immediate retries of an operation while the layout of an address space changes.
const TRIES: u32 = 64;

/// Number of times that one operation fills holes in memory whose content has arrived: another
/// process can punch them again and again.
const HOLES: u32 = 8;

/// A mapping of a whole region, in this process or in another, that is registered with a
/// userfaultfd: a thread that touches an unmapped page of it waits.
///
/// [`FaultService`](crate::FaultService) serves the mapping and maps its pages. In the guest's
/// mapping the pager, which gets it as a [`Trap`](demand_memory::Pager::set_guest_trap), maps pages
/// too. One fault fetches and maps a granule, whose size is the granularity: a granule becomes
/// reachable only once all of its pages are present.
///
/// A mapping of this process keeps its userfaultfd itself: without a service a fault stalls, and
/// never reads zeros. For another process' mapping keep this value, and with it the userfaultfd,
/// for as long as the process may read through the mapping: once the last holder of a userfaultfd
/// is gone, missing pages read as zeros.
pub struct ArmedMapping {
    uffd: Arc<Userfaultfd>,
    /// Weak, because the pager may own this as its guest trap.
    pager: Weak<Pager>,
    base: u64,
    pages: u64,
    /// Number of pages of a granule.
    granule: u64,
    /// Page size of the mapping, in bytes: the backing's unit.
    unit: u64,
    modes: Modes,
    path: Path,
    /// First pages of the granules that are being fetched for a fault. The value tells whether
    /// later faults on the granule are left to the same resolution.
    pending: Mutex<HashMap<u64, bool>>,
    /// Whether it was reported that the kernel had no memory to map pages here.
    short_of_memory: AtomicBool,
    /// Whether it was reported that a fault stays open for good.
    left_open: AtomicBool,
    /// Whether the pager maps pages here itself as it publishes them.
    mapped_by_pager: AtomicBool,
    /// Whether all pages are present. The pager, which also knows, may be gone.
    complete: Arc<AtomicBool>,
    /// Keeps the mapping, if it is of this process.
    _mapping: Option<Arc<Mapping>>,
}

impl ArmedMapping {
    /// Arms a mapping of this process. `mapping` covers the whole region of `pager`, and `uffd` was
    /// opened by this process. One fault maps a unit of the backing: 4096 bytes of shared memory,
    /// or a huge page. Faults are counted for `path`.
    ///
    /// Pages that are already mapped, as in a process that locks its memory, are unmapped from the
    /// mapping. No thread may touch the mapping while this runs.
    /// # Errors
    ///
    /// [`RangeError`] with the operating system's error.
    ///
    /// # Panics
    ///
    /// If the lengths of the mapping and the region differ.
    pub fn own(
        uffd: &Arc<Userfaultfd>,
        mapping: Arc<Mapping>,
        pager: &Arc<Pager>,
        path: Path,
    ) -> Result<Arc<Self>, RangeError> {
        let unit = pager.backing().kind().unit();
        Self::own_with(uffd, mapping, pager, path, Modes::ALL, unit)
    }

    /// Arms a huge-page mapping of this process against wholly missing units only: once a unit
    /// exists, all of its pages can be accessed here, even those that are missing.
    ///
    /// Use it for a guest's mapping in whose partly present units KVM itself traps accesses. A unit
    /// that is being fetched is partly present, unless a [`UnitLoader`](crate::UnitLoader) creates
    /// it: a second reader that KVM does not trap gets through to it.
    ///
    /// Units that exist already, as in a process that locks its memory, are removed from the memory
    /// object. If any of a unit's pages is present, the unit is fetched instead, and this waits for
    /// it: see [`Pager::unmap_missing`]. Any mapping of the object that such a process creates
    /// later creates the units again.
    ///
    /// # Errors
    ///
    /// [`RangeError`] with the operating system's error.
    ///
    /// # Panics
    ///
    /// If the lengths of the mapping and the region differ, or if the region is shared memory, in
    /// which this would leave missing pages accessible.
    pub fn own_missing_units(
        uffd: &Arc<Userfaultfd>,
        mapping: Arc<Mapping>,
        pager: &Arc<Pager>,
        path: Path,
    ) -> Result<Arc<Self>, RangeError> {
        let kind = pager.backing().kind();
        assert_ne!(kind, BackingKind::Shmem, "pages of shared memory need both modes");
        Self::own_with(uffd, mapping, pager, path, Modes::MISSING, kind.unit())
    }

    fn own_with(
        uffd: &Arc<Userfaultfd>,
        mapping: Arc<Mapping>,
        pager: &Arc<Pager>,
        path: Path,
        modes: Modes,
        granularity: u64,
    ) -> Result<Arc<Self>, RangeError> {
        let len = pager.pages() * PAGE_SIZE;
        assert_eq!(mapping.len(), len, "an armed mapping must be as long as its region");
        let base = mapping.address().as_ptr() as u64;
        Self::arm(uffd, base, pager, path, modes, granularity, Some(mapping))
    }

    /// Arms another process' mapping of the whole region of `pager`, at address `base` in that
    /// process, on the userfaultfd that it has sent. One fault maps a huge page, or
    /// [`BACK_END_CHUNK`] of shared memory. Faults are counted for [`Path::BackEnd`].
    ///
    /// If the process has registered the range itself, this adds the missing modes.
    ///
    /// # Errors
    ///
    /// [`RangeError`] with the operating system's error: the process may have sent a wrong address.
    pub fn foreign(
        uffd: &Arc<Userfaultfd>,
        base: u64,
        pager: &Arc<Pager>,
    ) -> Result<Arc<Self>, RangeError> {
        let granularity = pager.backing().kind().unit().max(BACK_END_CHUNK);
        Self::arm(uffd, base, pager, Path::BackEnd, Modes::ALL, granularity, None)
    }

    fn arm(
        uffd: &Arc<Userfaultfd>,
        base: u64,
        pager: &Arc<Pager>,
        path: Path,
        modes: Modes,
        granularity: u64,
        mapping: Option<Arc<Mapping>>,
    ) -> Result<Arc<Self>, RangeError> {
        let len = pager.pages() * PAGE_SIZE;
        if let Some(mapping) = &mapping {
            // Pages that are already mapped are not trapped: in memory that the process locks, mmap
            // maps zeroed pages. Unmap them before registering the range, because a userfaultfd
            // with removal events would make this call wait for its reader.
            unmap(mapping, pager, modes).map_err(|error| RangeError {
                operation: "unmap",
                address: base,
                len,
                done: 0,
                error,
            })?;
        }
        uffd.register(base, len, modes)?;
        if let Some(mapping) = &mapping {
            mapping.set_guard(Arc::new(OwnGuard { uffd: uffd.clone(), base, len, modes }));
        }
        let complete = Arc::new(AtomicBool::new(false));
        pager.on_complete({
            let complete = complete.clone();
            move || complete.store(true, Ordering::Release)
        });
        Ok(Arc::new(ArmedMapping {
            uffd: uffd.clone(),
            pager: Arc::downgrade(pager),
            base,
            pages: pager.pages(),
            granule: granularity / PAGE_SIZE,
            unit: pager.backing().kind().unit(),
            modes,
            path,
            pending: Mutex::default(),
            short_of_memory: AtomicBool::new(false),
            left_open: AtomicBool::new(false),
            mapped_by_pager: AtomicBool::new(false),
            complete,
            _mapping: mapping,
        }))
    }

    /// Returns the userfaultfd.
    pub fn uffd(&self) -> &Arc<Userfaultfd> {
        &self.uffd
    }

    /// Returns the first address of the mapping, in its process.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Returns the length of the mapping, in bytes.
    pub fn len(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// Returns whether the mapping has no bytes; never true.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Returns the trapped modes.
    pub fn modes(&self) -> Modes {
        self.modes
    }

    /// Returns the path that the mapping's faults are counted for.
    pub fn path(&self) -> Path {
        self.path
    }

    /// Returns whether a thread waits here for a missing page, and so only for the source.
    pub fn is_waited_for(&self) -> bool {
        let Some(pager) = self.pager() else { return false };
        if pager.bitmap().is_stopped() {
            return false; // The source gets no more requests.
        }
        let granule = |first| PageRange::page(first).grow_to_units(self.granule, self.pages);
        let missing = |first| pager.bitmap().first_missing(granule(first)).is_some();
        self.pending().keys().any(|first| missing(*first))
    }

    /// Returns the pager, unless the region is gone.
    pub(crate) fn pager(&self) -> Option<Arc<Pager>> {
        self.pager.upgrade()
    }

    /// Returns the granule that is fetched and mapped for a fault at `address`; `None` if the
    /// address is outside the mapping.
    pub(crate) fn granule_at(&self, address: u64) -> Option<PageRange> {
        let page = address.checked_sub(self.base)? / PAGE_SIZE;
        (page < self.pages).then(|| PageRange::page(page).grow_to_units(self.granule, self.pages))
    }

    /// Returns whether this is a mapping of this process.
    pub(crate) fn is_own(&self) -> bool {
        self._mapping.is_some()
    }

    /// Returns whether a fault was read and is not resolved yet.
    pub(crate) fn has_pending(&self) -> bool {
        !self.pending().is_empty()
    }

    /// Returns the number of missing pages of the range. If the region is gone, pages count as
    /// missing unless all pages of the region were present.
    pub(crate) fn count_missing(&self, pages: PageRange) -> u64 {
        match self.pager() {
            Some(pager) => pager.bitmap().count_missing(pages),
            None if self.complete.load(Ordering::Acquire) => 0,
            None => pages.count,
        }
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<u64, bool>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a fault on a granule. Returns false if the granule already had one: the resolution
    /// under way then wakes this faulter as well, because [`end`](Self::end) reports it.
    pub(crate) fn begin(&self, granule: PageRange) -> bool {
        match self.pending().entry(granule.first) {
            Entry::Occupied(mut known) => {
                known.insert(true);
                false
            }
            Entry::Vacant(new) => {
                new.insert(false);
                true
            }
        }
    }

    /// Notes that a granule is about to be resolved. The resolution that follows wakes the faulters
    /// so far; a fault that is read after this counts as new. Returns whether `begin` has returned
    /// false for the granule: if so, a resolution must follow even if the granule was mapped before
    /// this.
    pub(crate) fn end(&self, granule: PageRange) -> bool {
        self.pending().remove(&granule.first).unwrap_or(false)
    }

    /// Notes that the kernel had no memory to map pages here; returns whether this is the first
    /// time.
    pub(crate) fn note_short_of_memory(&self) -> bool {
        !self.short_of_memory.swap(true, Ordering::Relaxed)
    }

    /// Notes that a fault stays open here for good; returns whether this is the first time.
    pub(crate) fn note_left_open(&self) -> bool {
        !self.left_open.swap(true, Ordering::Relaxed)
    }

    /// Returns whether the pager maps each page here before it publishes the page.
    pub(crate) fn is_mapped_by_pager(&self) -> bool {
        self.mapped_by_pager.load(Ordering::Relaxed)
    }

    /// Maps a granule, all of whose pages are present, and wakes the threads that wait for it.
    pub(crate) fn resolve(&self, granule: PageRange) -> Result<(), RangeError> {
        debug_assert_eq!(
            self.pager().and_then(|pager| pager.bitmap().first_missing(granule)),
            None,
            "a granule was mapped with missing pages"
        );
        if self.modes.contains(Modes::MINOR) {
            self.map(granule)
        } else {
            self.make_exist(granule)?;
            // A thread that was trapped because the unit did not exist finds it now.
            self.uffd.wake(self.base + granule.offset(), granule.bytes())
        }
    }

    /// Makes sure that units exist whose content has arrived. Another process that has the memory
    /// object may have punched a hole in it, as it may have written zeros. Without this, a thread
    /// that touches the hole would fault again for ever, or stay blocked.
    fn make_exist(&self, granule: PageRange) -> Result<(), RangeError> {
        let Some(pager) = self.pager() else { return Ok(()) };
        pager.backing().allocate(granule).map_err(|error| {
            let error = match error {
                BackingError::Allocate { error, .. } => error,
                error => io::Error::other(error),
            };
            let (address, len) = (self.base + granule.offset(), granule.bytes());
            RangeError { operation: "allocate", address, len, done: 0, error }
        })
    }

    /// Refuses pages outside the mapping: the addresses there may belong to another mapping, even
    /// on the same userfaultfd.
    fn expect_inside(&self, pages: PageRange) -> io::Result<()> {
        match pages.first.checked_add(pages.count) {
            Some(end) if end <= self.pages => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "cannot use {} pages from page {}: the mapping has {} pages",
                    pages.count, pages.first, self.pages
                ),
            )),
        }
    }

    /// Maps present pages, skips those that are mapped already, and wakes the threads that wait for
    /// any.
    fn map(&self, pages: PageRange) -> Result<(), RangeError> {
        let mut at = self.base + pages.offset();
        let end = at + pages.bytes();
        let mut stepped_over = None;
        let (mut tries, mut holes) = (0, 0);
        let result = loop {
            if at >= end {
                break Ok(());
            }
            let Err(error) = self.uffd.r#continue(at, end - at) else { break Ok(()) };
            at += error.done;
            match error.cause() {
                Cause::Exists => {
                    stepped_over.get_or_insert(at);
                    at += self.unit;
                }
                Cause::Again if tries < TRIES => {
                    tries += 1;
                    if tries % 8 == 0 {
                        thread::sleep(Duration::from_micros(20));
                    } else {
                        thread::yield_now();
                    }
                }
                Cause::NoPage if holes < HOLES => {
                    holes += 1;
                    let page = (at - self.base) / PAGE_SIZE;
                    let rest = PageRange::new(page, pages.end() - page);
                    if let Err(error) = self.make_exist(rest) {
                        break Err(error);
                    }
                }
                _ => break Err(error),
            }
        };
        if let Some(first) = stepped_over {
            // The skipped pages were mapped already, so the kernel woke no thread for them. But a
            // thread that touched such a page just before it was mapped may still wait.
            let last = at.min(end);
            self.uffd.wake(first, last - first)?;
        }
        result
    }
}

impl Trap for ArmedMapping {
    fn granularity(&self) -> u64 {
        self.granule * PAGE_SIZE
    }

    fn map_present(&self, pages: PageRange) -> io::Result<()> {
        if self.granule > 1 {
            // If a thread waits for the unit, the service gets a callback from the bitmap once all
            // of its pages are present.
            return Ok(());
        }
        if !self.is_mapped_by_pager() {
            self.mapped_by_pager.store(true, Ordering::Relaxed);
        }
        self.expect_inside(pages)?;
        match self.map(pages) {
            // The trap is gone, as after its memslot. Nothing can be mapped here any more, and
            // other readers need the pages. If a part of the range is still registered, a fault
            // maps its pages later.
            Err(error) if matches!(error.cause(), Cause::NotRegistered | Cause::Closed) => {
                log::debug!("{error}");
                Ok(())
            }
            outcome => Ok(outcome?),
        }
    }

    fn release(&self, pages: PageRange) -> io::Result<()> {
        self.expect_inside(pages)?;
        let missing = self.count_missing(pages);
        if missing > 0 {
            return Err(io::Error::other(crate::ServiceError::Incomplete { missing }));
        }
        let (address, len) = (self.base + pages.offset(), pages.bytes());
        match self.uffd.unregister(address, len) {
            Ok(()) => Ok(()),
            // A process that has ended needs no release.
            Err(error) if error.cause() == Cause::Closed => Ok(()),
            Err(_) if !self.uffd.is_process_alive(self.base) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Makes sure that every missing page of a mapping of this process is trapped.
fn unmap(mapping: &Mapping, pager: &Arc<Pager>, modes: Modes) -> io::Result<()> {
    if modes.contains(Modes::MINOR) {
        match mapping.unmap_pages() {
            // Linux before 5.18 supports this neither for huge pages nor for locked memory.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            outcome => return outcome,
        }
    }
    pager.unmap_missing(&Waiter::new()).map_err(io::Error::other)
}

/// The trap of a mapping of this process, kept by the mapping. It is a separate type because an
/// armed mapping keeps the mapping: as the guard, it would form a reference cycle.
#[derive(Debug)]
struct OwnGuard {
    uffd: Arc<Userfaultfd>,
    base: u64,
    len: u64,
    modes: Modes,
}

impl MappingGuard for OwnGuard {
    fn traps_all(&self) -> bool {
        self.is_active() && self.modes == Modes::ALL
    }

    fn is_active(&self) -> bool {
        !self.uffd.is_closed()
    }

    fn wake(&self) {
        if let Err(error) = self.uffd.wake(self.base, self.len) {
            log::debug!("{error}");
        }
    }

    fn remove(&self) {
        if let Err(error) = self.uffd.unregister(self.base, self.len) {
            log::debug!("{error}");
        }
    }
}

impl fmt::Debug for ArmedMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ArmedMapping")
            .field("base", &format_args!("{:#x}", self.base))
            .field("len", &self.len())
            .field("granularity", &self.granularity())
            .field("modes", &self.modes)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}
