// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A mapping whose readers are trapped at missing pages: how it is armed, and how pages get there.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, TryLockError, Weak};
use std::thread;
use std::time::Duration;

use demand_memory::{
    BackingError, FaultPath, MapPresent, Mapped, Mapping, PAGE_SIZE, PageRange, Pager, Waiter,
    to_usize,
};

use crate::markers::Markers;
use crate::own_guard::OwnGuard;
use crate::pending::PendingGranules;
use crate::watch::watch;
use crate::{Cause, Modes, OwnFaults, RangeError, Userfaultfd};

/// The least that one fault of another process maps, in bytes: shared memory is mapped in chunks of
/// this size, huge pages as a whole.
pub(crate) const BACK_END_CHUNK: u64 = 2 << 20;

/// Number of immediate retries of an operation while the layout of an address space changes.
const TRIES: u32 = 64;

/// Number of times that one operation fills holes in memory whose content has arrived: another
/// process can punch them again and again.
const HOLES: u32 = 8;

/// The next mapping's number.
static NEXT_NUMBER: AtomicU64 = AtomicU64::new(0);

/// A mapping of a whole region, in this process or in another, that is registered with a
/// userfaultfd: a thread that touches an unmapped page of it waits.
///
/// [`FaultService`](crate::FaultService) serves the mapping and maps its pages. In the guest's
/// mapping the pager, which gets it by [`set_guest_trap`](Pager::set_guest_trap), maps pages
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
    pages: u64,
    /// Page size of the mapping, in bytes: the backing's unit.
    unit: u64,
    scope: Scope,
    /// Identifies the mapping in this process.
    number: u64,
    pending: PendingGranules,
    /// Number of faults that are being served, up to the end of their resolution.
    faults: AtomicUsize,
    /// Whether it was reported that the kernel had no memory to map pages here.
    short_of_memory: AtomicBool,
    /// Whether it was reported that a fault stays open for good.
    left_open: AtomicBool,
    /// Whether the pager maps pages here itself as it publishes them.
    mapped_by_pager: AtomicBool,
    /// Whether all pages are present. The pager, which also knows, may be gone.
    complete: Arc<AtomicBool>,
    /// Whether another process has given the mapping up, so that its addresses may come to mean
    /// something else. Read-locked while pages are mapped there; only `retire` locks it otherwise.
    retired: RwLock<bool>,
    /// The markers by which vCPUs learn of missing pages, if they do.
    markers: Option<Markers>,
    /// Keeps the mapping, if it is of this process.
    _mapping: Option<Arc<Mapping>>,
}

/// The accesses that an armed mapping traps, and the answer to them.
#[derive(Clone, Copy)]
struct Scope {
    /// First address, in its process.
    base: u64,
    modes: Modes,
    /// The path that faults are counted for.
    path: FaultPath,
    /// Number of pages of a granule.
    granule: u64,
    /// Number of pages that one fault fetches, aligned to that number: a multiple of `granule`.
    around: u64,
}

impl ArmedMapping {
    /// Arms a mapping of this process. `mapping` covers the whole region of `pager`, and `uffd` was
    /// opened by this process. One fault maps a unit of the backing, 4096 bytes of shared memory or
    /// a huge page, and as many around it as `faults` say; a [`FaultPath`] stands for none.
    ///
    /// Pages that are already mapped, as in a process that locks its memory, are unmapped from the
    /// mapping. No thread may touch the mapping while this runs.
    ///
    /// # Errors
    ///
    /// [`RangeError`] with the operating system's error, which is `EBUSY` for a mapping that is armed
    /// on another userfaultfd; or if the mapping is not as long as the region.
    pub fn own(
        uffd: &Arc<Userfaultfd>,
        mapping: Arc<Mapping>,
        pager: &Arc<Pager>,
        faults: impl Into<OwnFaults>,
    ) -> Result<Arc<Self>, RangeError> {
        Ok(Arc::new(Self::arm_own(uffd, mapping, pager, faults.into(), Modes::ALL)?))
    }

    /// Arms a guest's mapping in which vCPUs learn of missing pages from markers, which are set
    /// around their first faults.
    ///
    /// # Errors
    ///
    /// As for [`own`](Self::own).
    pub(crate) fn own_marked(
        uffd: &Arc<Userfaultfd>,
        mapping: Arc<Mapping>,
        pager: &Arc<Pager>,
        path: FaultPath,
    ) -> Result<Arc<Self>, RangeError> {
        let armed = Self::arm_own(uffd, mapping, pager, path.into(), Modes::ALL)?;
        let markers = Markers::new(armed.len() / armed.unit);
        Ok(Arc::new(ArmedMapping { markers: Some(markers), ..armed }))
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
    /// As for [`own`](Self::own).
    ///
    /// # Panics
    ///
    /// If the region does not consist of huge pages: this would leave missing pages accessible.
    pub fn own_missing_units(
        uffd: &Arc<Userfaultfd>,
        mapping: Arc<Mapping>,
        pager: &Arc<Pager>,
        path: FaultPath,
    ) -> Result<Arc<Self>, RangeError> {
        let kind = pager.backing().kind();
        assert!(kind.is_hugetlb(), "pages of {kind} need both modes");
        Ok(Arc::new(Self::arm_own(uffd, mapping, pager, path.into(), Modes::MISSING)?))
    }

    fn arm_own(
        uffd: &Arc<Userfaultfd>,
        mapping: Arc<Mapping>,
        pager: &Arc<Pager>,
        faults: OwnFaults,
        modes: Modes,
    ) -> Result<Self, RangeError> {
        let len = pager.pages() * PAGE_SIZE;
        let base = mapping.address().as_ptr() as u64;
        let unit = pager.backing().kind().unit();
        let why = if mapping.len() != len {
            Some(format!("its region has {len} bytes; map the region's backing"))
        } else if pager.populates_through(&mapping) {
            // The pager's own write would wait for itself.
            Some("the pager writes content through it; map the region's backing".into())
        } else {
            None
        };
        if let Some(why) = why {
            let source = io::Error::new(io::ErrorKind::InvalidInput, why);
            let len = mapping.len();
            return Err(RangeError { operation: "arm", address: base, len, done: 0, source });
        }
        // Pages that are already mapped are not trapped: in memory that the process locks, mmap maps
        // zeroed pages. Unmap them before registering the range, because a userfaultfd with removal
        // events would make this call wait for its reader.
        unmap(&mapping, pager, modes).map_err(|source| RangeError {
            operation: "unmap",
            address: base,
            len,
            done: 0,
            source,
        })?;
        // A child process inherits the pages that are mapped but not the trap: missing pages would
        // read as zeros there.
        mapping.hide_from_children().map_err(|source| RangeError {
            operation: "hide from child processes",
            address: base,
            len,
            done: 0,
            source,
        })?;
        uffd.register(base, len, modes)?;
        mapping.set_guard(Arc::new(OwnGuard { uffd: uffd.clone(), base, len, modes }));
        let granule = unit / PAGE_SIZE;
        // No block is larger than the region, so nothing overflows.
        let around = faults.around.min(len).div_ceil(unit).max(1) * granule;
        let scope = Scope { base, modes, path: faults.path, granule, around };
        Ok(Self::new(uffd, pager, scope, Some(mapping)))
    }

    /// Arms another process' mapping of the whole region of `pager`, at address `base` in that
    /// process, on the userfaultfd that it has sent. One fault maps a huge page, or 2 MiB of shared
    /// memory. Faults are counted for [`FaultPath::BackEnd`].
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
        let (path, modes) = (FaultPath::BackEnd, Modes::ALL);
        uffd.register(base, pager.pages() * PAGE_SIZE, modes)?;
        let granularity = pager.backing().kind().unit().max(BACK_END_CHUNK);
        let granule = granularity / PAGE_SIZE;
        let scope = Scope { base, modes, path, granule, around: granule };
        Ok(Arc::new(Self::new(uffd, pager, scope, None)))
    }

    /// Describes a mapping that is registered.
    fn new(
        uffd: &Arc<Userfaultfd>,
        pager: &Arc<Pager>,
        scope: Scope,
        mapping: Option<Arc<Mapping>>,
    ) -> Self {
        watch(uffd);
        let complete = Arc::new(AtomicBool::new(false));
        pager.on_complete({
            let complete = complete.clone();
            move || complete.store(true, Ordering::Release)
        });
        ArmedMapping {
            uffd: uffd.clone(),
            pager: Arc::downgrade(pager),
            pages: pager.pages(),
            unit: pager.backing().kind().unit(),
            scope,
            number: NEXT_NUMBER.fetch_add(1, Ordering::Relaxed),
            pending: PendingGranules::default(),
            faults: AtomicUsize::new(0),
            short_of_memory: AtomicBool::new(false),
            left_open: AtomicBool::new(false),
            mapped_by_pager: AtomicBool::new(false),
            complete,
            retired: RwLock::new(false),
            markers: None,
            _mapping: mapping,
        }
    }

    /// Returns the userfaultfd.
    pub fn uffd(&self) -> &Arc<Userfaultfd> {
        &self.uffd
    }

    /// Returns the first address of the mapping, in its process.
    pub fn base(&self) -> u64 {
        self.scope.base
    }

    /// Returns the length of the mapping, in bytes.
    pub fn len(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// Returns the number of pages of the mapping.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Returns the page size of the mapping, in bytes: the backing's unit.
    pub(crate) fn unit(&self) -> u64 {
        self.unit
    }

    /// Returns the markers by which vCPUs learn of missing pages, if they do.
    pub(crate) fn markers(&self) -> Option<&Markers> {
        self.markers.as_ref()
    }

    /// Returns whether the mapping has no bytes; never true.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Returns the trapped modes.
    pub fn modes(&self) -> Modes {
        self.scope.modes
    }

    /// Returns the number of bytes that one resolution maps: a power of two, at least one page.
    pub fn granularity(&self) -> u64 {
        self.scope.granule * PAGE_SIZE
    }

    /// Returns the path that the mapping's faults are counted for.
    pub fn path(&self) -> FaultPath {
        self.scope.path
    }

    /// Returns whether a thread waits here for a missing page, and so only for the source.
    pub fn is_waited_for(&self) -> bool {
        let Some(pager) = self.pager() else { return false };
        if pager.bitmap().is_stopped() {
            return false; // The source gets no more requests.
        }
        let granule = |first| PageRange::page(first).grow_to_units(self.scope.granule, self.pages);
        let missing = |first| pager.bitmap().first_missing(granule(first)).is_some();
        self.pending.any(missing)
    }

    /// Returns whether faults here are being served: their pages are missing, or are being mapped.
    /// Once the memory is stopped, none is.
    pub fn has_open_faults(&self) -> bool {
        let served = self.pager().is_some_and(|pager| !pager.bitmap().is_stopped());
        served && self.faults.load(Ordering::Acquire) > 0
    }

    /// Stops trapping accesses. All pages must be present: missing ones would read as zeros. If the
    /// process has ended, nothing is left to do.
    ///
    /// # Errors
    ///
    /// [`RangeError`] with the operating system's error.
    pub(crate) fn disarm(&self) -> Result<(), RangeError> {
        self.remove_markers()?;
        match self.uffd.unregister(self.base(), self.len()) {
            Err(error) if error.cause() == Cause::Closed => Ok(()),
            Err(_) if !self.uffd.is_process_alive(self.base()) => Ok(()),
            result => result,
        }
    }

    /// Begins to count a fault.
    pub(crate) fn begin_fault(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends what [`begin_fault`](Self::begin_fault) has begun.
    pub(crate) fn end_fault(&self) {
        // Release: who sees no open fault sees its pages mapped.
        self.faults.fetch_sub(1, Ordering::Release);
    }

    /// Maps nothing here from now on, because another process has given the mapping up. Waits until
    /// what is being mapped there is mapped.
    pub(crate) fn retire(&self) {
        *self.retired.write().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Returns the pager, unless the region is gone.
    pub(crate) fn pager(&self) -> Option<Arc<Pager>> {
        self.pager.upgrade()
    }

    /// Returns the granule that is fetched and mapped for a fault at `address`; `None` if the
    /// address is outside the mapping.
    pub(crate) fn granule_at(&self, address: u64) -> Option<PageRange> {
        let page = address.checked_sub(self.scope.base)? / PAGE_SIZE;
        (page < self.pages)
            .then(|| PageRange::page(page).grow_to_units(self.scope.granule, self.pages))
    }

    /// Returns the pages that a fault on this granule fetches.
    pub(crate) fn around(&self, granule: PageRange) -> PageRange {
        if self.scope.around == self.scope.granule {
            return granule;
        }
        granule.grow_to_units(self.scope.around, self.pages)
    }

    /// Returns whether this is a mapping of this process.
    pub(crate) fn is_own(&self) -> bool {
        self._mapping.is_some()
    }

    /// Returns whether this is a mapping of this process that was revoked.
    pub(crate) fn is_revoked(&self) -> bool {
        self._mapping.as_ref().is_some_and(|mapping| mapping.is_revoked())
    }

    /// Returns the mapping's number, which no other mapping of this process has.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Returns the granules on which a fault is being served.
    pub(crate) fn pending(&self) -> &PendingGranules {
        &self.pending
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
    pub(crate) fn map_granule(&self, granule: PageRange) -> Result<(), RangeError> {
        debug_assert_eq!(
            self.pager().and_then(|pager| pager.bitmap().first_missing(granule)),
            None,
            "a granule was mapped with missing pages"
        );
        if self.scope.modes.contains(Modes::MINOR) {
            self.map(granule).map(drop)
        } else {
            self.make_exist(granule)?;
            // A thread that was trapped because the unit did not exist finds it now.
            self.uffd.wake(self.scope.base + granule.offset(), granule.bytes())
        }
    }

    /// Like [`map_granule`](Self::map_granule), but also maps the units around the granule that are
    /// present, as far as the kernel allows that at once: a fault on any other maps it later.
    /// Returns the number of bytes.
    pub(crate) fn map_around(&self, granule: PageRange) -> Result<u64, RangeError> {
        let around = self.around(granule);
        let pager = self.pager().filter(|_| around != granule);
        // The guest's mapping gets each page from the pager as it arrives.
        let Some(pager) = pager.filter(|_| !self.is_mapped_by_pager()) else {
            return self.map_granule(granule).map(|()| granule.bytes());
        };
        let mut mapped = 0;
        let mut own = granule;
        for run in present_runs(&pager, around, self.scope.granule) {
            if run.contains(granule.first) {
                own = run;
            } else if self.map(run).is_ok() {
                mapped += run.bytes();
            }
        }
        // Last, because it wakes the faulter, and as a whole: otherwise the faulter would fault on
        // the next unit before that is mapped.
        if own != granule && self.map(own).is_ok() {
            return Ok(mapped + own.bytes());
        }
        self.map_granule(granule).map(|()| mapped + granule.bytes())
    }

    /// Makes sure that units exist whose content has arrived. Another process that has the memory
    /// object may have punched a hole in it, as it may have written zeros. Without this, a thread
    /// that touches the hole would fault again for ever, or stay blocked.
    fn make_exist(&self, granule: PageRange) -> Result<(), RangeError> {
        let Some(pager) = self.pager() else { return Ok(()) };
        pager.backing().allocate(granule).map_err(|error| {
            let source = match error {
                BackingError::Allocate { source, .. } => source,
                error => io::Error::other(error),
            };
            let (address, len) = (self.scope.base + granule.offset(), granule.bytes());
            RangeError { operation: "allocate", address, len, done: 0, source }
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
    /// any. Returns whether any page was not mapped before.
    pub(crate) fn map(&self, pages: PageRange) -> Result<bool, RangeError> {
        let mut at = self.scope.base + pages.offset();
        let end = at + pages.bytes();
        // A mapping of this process is never retired. A lock that is not free is about to say so: a
        // thread that serves faults must not wait for another one's call to end.
        let retired = (!self.is_own()).then(|| match self.retired.try_read() {
            Ok(retired) => Some(retired),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        });
        if retired.as_ref().is_some_and(|retired| retired.as_deref() != Some(&false)) {
            let source = io::Error::from_raw_os_error(libc::ENOENT);
            let len = pages.bytes();
            return Err(RangeError { operation: "map", address: at, len, done: 0, source });
        }
        let (mut stepped_over, mut mapped) = (None, false);
        let (mut tries, mut holes) = (0, 0);
        let result = loop {
            if at >= end {
                break Ok(mapped);
            }
            let Err(error) = self.uffd.r#continue(at, end - at) else { break Ok(true) };
            at += error.done;
            mapped |= error.done > 0;
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
                    let page = (at - self.scope.base) / PAGE_SIZE;
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

impl MapPresent for ArmedMapping {
    fn map_present(&self, pages: PageRange) -> io::Result<()> {
        if self.scope.granule > 1 {
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
            outcome => Ok(outcome.map(drop)?),
        }
    }

    fn map_unit(&self, unit: PageRange) -> io::Result<Mapped> {
        self.expect_inside(unit)?;
        self.map_marked(unit)
    }
}

/// Returns the runs of units of the range all of whose pages are present.
fn present_runs(pager: &Pager, range: PageRange, unit: u64) -> Vec<PageRange> {
    let mut runs: Vec<PageRange> = Vec::new();
    for first in (range.first..range.end()).step_by(to_usize(unit)) {
        let pages = PageRange::new(first, unit);
        if pager.bitmap().first_missing(pages).is_none() {
            match runs.last_mut() {
                Some(last) if last.end() == first => last.count += unit,
                _ => runs.push(pages),
            }
        }
    }
    runs
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

impl fmt::Debug for ArmedMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ArmedMapping")
            .field("base", &format_args!("{:#x}", self.scope.base))
            .field("len", &self.len())
            .field("granularity", &self.granularity())
            .field("modes", &self.scope.modes)
            .field("path", &self.scope.path)
            .finish_non_exhaustive()
    }
}
