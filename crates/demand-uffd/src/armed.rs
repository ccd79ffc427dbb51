// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mappings of a region whose readers are trapped.

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

/// Bytes that one fault of another process maps at least: it shares shared memory in chunks of
/// this size, and huge pages as they are.
pub const BACK_END_CHUNK: u64 = 2 << 20;

/// How often an operation is tried again at once while an address space changes its layout.
const TRIES: u32 = 64;

/// A mapping of a whole region, in this process or in another, that is registered with a
/// userfaultfd: who touches a page that is not mapped there waits.
///
/// What it shows is decided by [`FaultService`](crate::FaultService), which serves it, and for
/// the guest's mapping by the pager, which is given it as a
/// [`Trap`](demand_memory::Pager::set_guest_trap). The granularity is what one fault makes
/// present and maps: a granule becomes reachable only once all of its pages are present.
///
/// A mapping of this process keeps its userfaultfd itself: without a service a fault stalls, and
/// never shows zeros. Of another process' mapping keep this, and so the userfaultfd, for as long as
/// the process may read through it: once the last holder of a userfaultfd is gone, missing pages
/// read as zeros.
pub struct ArmedMapping {
    uffd: Arc<Userfaultfd>,
    /// The pager may own this as its guest trap.
    pager: Weak<Pager>,
    base: u64,
    pages: u64,
    /// Pages of a granule.
    granule: u64,
    /// Bytes of a page of the mapping: the backing's unit.
    unit: u64,
    modes: Modes,
    path: Path,
    /// First pages of granules that are being made present for somebody who waits, and whether
    /// somebody else was told since then that this lets him go on too.
    pending: Mutex<HashMap<u64, bool>>,
    /// Whether it was reported that the kernel had no memory to map pages here.
    short_of_memory: AtomicBool,
    /// Whether it was reported that a fault stays open for good.
    left_open: AtomicBool,
    /// Whether the pager maps pages here itself, as they arrive.
    mapped_by_pager: AtomicBool,
    /// Whether all pages are present. The pager, which knows it too, may be gone.
    complete: Arc<AtomicBool>,
    /// Keeps one's own mapping.
    _mapping: Option<Arc<Mapping>>,
}

impl ArmedMapping {
    /// Arms a mapping of this process: `mapping` is one of the whole region of `pager`, `uffd`
    /// one that this process has opened. One fault maps a unit of the backing: 4096 bytes of
    /// shared memory, or a huge page. Faults are counted for `path`.
    ///
    /// Pages that the mapping has already, as in a process that locks its memory, are unmapped from
    /// it. No thread may touch the mapping while this runs.
    ///
    /// # Errors
    ///
    /// [`RangeError`] with the system's error.
    ///
    /// # Panics
    ///
    /// If the mapping is not as long as the region.
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
    /// exists, all of it can be touched here, whether its pages have arrived or not.
    ///
    /// It is for a guest's mapping whose half-filled units KVM guards itself. A unit that is on
    /// its way is half-filled, unless a [`UnitLoader`](crate::UnitLoader) creates it: a second
    /// reader that KVM does not guard gets through to it.
    ///
    /// Units that exist already, as in a process that locks its memory, are removed from the memory
    /// object, or fetched and waited for if any of their pages is present: see
    /// [`Pager::unmap_missing`]. Any mapping of the object that such a process makes later creates
    /// them anew.
    ///
    /// # Errors
    ///
    /// [`RangeError`] with the system's error.
    ///
    /// # Panics
    ///
    /// If the mapping is not as long as the region, or the region is shared memory: there,
    /// nothing would be guarded.
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
        assert_eq!(mapping.len(), len, "an armed mapping is as long as its region");
        let base = mapping.address().as_ptr() as u64;
        Self::arm(uffd, base, pager, path, modes, granularity, Some(mapping))
    }

    /// Arms the mapping that another process has of the whole region of `pager`, at `base` of its
    /// address space, on the userfaultfd that it has sent. One fault maps a huge page, or
    /// [`BACK_END_CHUNK`] of shared memory. Faults are counted for [`Path::BackEnd`].
    ///
    /// If the process has registered the range itself, this adds what it left out.
    ///
    /// # Errors
    ///
    /// [`RangeError`] with the system's error: the process may have named a wrong address.
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
            // What is mapped already is not trapped: memory that the process locks is mapped, and
            // zeroed, by mmap. Before the range is registered, as a userfaultfd that tells of
            // removals would make this wait for its reader.
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

    /// The userfaultfd.
    pub fn uffd(&self) -> &Arc<Userfaultfd> {
        &self.uffd
    }

    /// First address of the mapping, in its process.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Length of the mapping, in bytes.
    pub fn len(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// Whether the mapping has no bytes; never.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// What is trapped.
    pub fn modes(&self) -> Modes {
        self.modes
    }

    /// Whose faults they are.
    pub fn path(&self) -> Path {
        self.path
    }

    /// Whether somebody waits here for a page that has not arrived: for the source, that is, and
    /// for nothing else.
    pub fn is_waited_for(&self) -> bool {
        let Some(pager) = self.pager() else { return false };
        if pager.bitmap().is_stopped() {
            return false; // The source is asked no more.
        }
        let granule = |first| PageRange::page(first).grow_to_units(self.granule, self.pages);
        let missing = |first| pager.bitmap().first_missing(granule(first)).is_some();
        self.pending().keys().any(|first| missing(*first))
    }

    /// The pager, unless the region is gone.
    pub(crate) fn pager(&self) -> Option<Arc<Pager>> {
        self.pager.upgrade()
    }

    /// The pages that are made present and mapped together for who touches `address`; `None` if
    /// it does not lie in the mapping.
    pub(crate) fn granule_at(&self, address: u64) -> Option<PageRange> {
        let page = address.checked_sub(self.base)? / PAGE_SIZE;
        (page < self.pages).then(|| PageRange::page(page).grow_to_units(self.granule, self.pages))
    }

    /// Whether it is a mapping of this process.
    pub(crate) fn is_own(&self) -> bool {
        self._mapping.is_some()
    }

    /// Whether a fault was read that is not resolved yet.
    pub(crate) fn has_pending(&self) -> bool {
        !self.pending().is_empty()
    }

    /// Number of pages of the range that are missing; of a region that is gone, all that may be.
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

    /// Notes that somebody waits for a granule; false if that was known, and the resolution that
    /// is under way will let this one go on as well: [`end`](Self::end) tells it to.
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

    /// Notes that a granule is about to be resolved. Whoever waits already is woken by what
    /// follows; whose fault is read after this counts as new. Returns whether `begin` has refused
    /// anybody: something must follow then, even if the granule was mapped before this.
    pub(crate) fn end(&self, granule: PageRange) -> bool {
        self.pending().remove(&granule.first).unwrap_or(false)
    }

    /// Notes that the kernel had no memory to map pages here; false if it was known.
    pub(crate) fn note_short_of_memory(&self) -> bool {
        !self.short_of_memory.swap(true, Ordering::Relaxed)
    }

    /// Notes that a fault stays open here for good; false if that was known of one.
    pub(crate) fn note_left_open(&self) -> bool {
        !self.left_open.swap(true, Ordering::Relaxed)
    }

    /// Whether the pager maps each page here before it tells that the page is present.
    pub(crate) fn is_mapped_by_pager(&self) -> bool {
        self.mapped_by_pager.load(Ordering::Relaxed)
    }

    /// Lets those go on that wait for a granule, all of whose pages are present.
    pub(crate) fn resolve(&self, granule: PageRange) -> Result<(), RangeError> {
        debug_assert_eq!(
            self.pager().and_then(|pager| pager.bitmap().first_missing(granule)),
            None,
            "a granule is mapped only when it is whole"
        );
        if self.modes.contains(Modes::MINOR) {
            self.map(granule)
        } else {
            self.make_exist(granule)?;
            // Who was trapped because the unit did not exist finds it now.
            self.uffd.wake(self.base + granule.offset(), granule.bytes())
        }
    }

    /// Makes sure that units exist whose pages are present. Another process that holds the memory
    /// object can have punched a hole, as it can have written zeros: without this, a thread that
    /// touches the hole would be woken and fault again, without end.
    fn make_exist(&self, granule: PageRange) -> Result<(), RangeError> {
        let Some(pager) = self.pager() else { return Ok(()) };
        pager.backing().allocate(granule).map_err(|error| {
            let error = match error {
                BackingError::Allocate { error, .. } => error,
                error => io::Error::other(error),
            };
            let (address, len) = (self.base + granule.offset(), granule.bytes());
            RangeError { operation: "make exist", address, len, done: 0, error }
        })
    }

    /// Refuses pages that do not lie in the mapping: what lies there may be another's, also on the
    /// same userfaultfd.
    fn expect_inside(&self, pages: PageRange) -> io::Result<()> {
        match pages.first.checked_add(pages.count) {
            Some(end) if end <= self.pages => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "cannot use {} pages from page {} on: the mapping has {}",
                    pages.count, pages.first, self.pages
                ),
            )),
        }
    }

    /// Maps present pages, steps over those that are mapped, and wakes who waits for any.
    fn map(&self, pages: PageRange) -> Result<(), RangeError> {
        let mut at = self.base + pages.offset();
        let end = at + pages.bytes();
        let mut stepped_over = None;
        let mut tries = 0;
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
                _ => break Err(error),
            }
        };
        if let Some(first) = stepped_over {
            // Nothing new was mapped there, so nobody was woken; and yet somebody may wait that
            // touched the page just before it was mapped.
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
            // The service learns from the bitmap when a unit is whole, if somebody waits for it.
            return Ok(());
        }
        if !self.is_mapped_by_pager() {
            self.mapped_by_pager.store(true, Ordering::Relaxed);
        }
        self.expect_inside(pages)?;
        match self.map(pages) {
            // The trap is gone, as after its memslot: nothing can be shown here any more, and other
            // readers need the pages. Should the range be registered yet, a fault maps them.
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

/// Makes sure that each missing page of a mapping of this process is trapped.
fn unmap(mapping: &Mapping, pager: &Arc<Pager>, modes: Modes) -> io::Result<()> {
    if modes.contains(Modes::MINOR) {
        match mapping.unmap_pages() {
            // Linux before 5.18 does that neither to huge pages nor to locked memory.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            outcome => return outcome,
        }
    }
    pager.unmap_missing(&Waiter::new()).map_err(io::Error::other)
}

/// The trap of a mapping of this process, kept by the mapping. An own type, as an armed mapping
/// keeps the mapping.
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
