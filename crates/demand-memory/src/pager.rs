// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pager of a region: makes missing pages present, by claiming, populating, mapping and
//! publishing them.

use std::fmt;
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock, PoisonError, RwLock, Weak};

use demand_source::{
    Completion, Extent, OwnProcess, PageSource, Request, SourceError, ZeroPadded, to_usize,
};
use vm_memory::VolatileSlice;

use crate::errand::{Errand, SetAside};
use crate::fetch_notes::FetchNotes;
use crate::readahead::Readahead;
use crate::touches::FirstTouches;
use crate::{
    Backing, BitmapReader, FaultPath, FetchError, GuestMappingError, GuestTrapError, LoadUnit,
    MapPresent, Mapped, Mapping, MissingBitmap, PAGE_SIZE, PageRange, PagerError, Retrier,
    RetryPolicy, Stats, TouchLog, Wait, Waiter,
};

mod populate;
mod publish;

/// The configuration of a pager.
#[derive(Clone)]
pub struct PagerConfig {
    /// The memory object.
    pub backing: Arc<dyn Backing>,
    /// The source of its pages. If its image ends within a page, the rest of that page is zeros.
    pub source: Arc<dyn PageSource>,
    /// Offset of the region's first byte in the source's image, in bytes: a multiple of 4096.
    pub image_offset: u64,
    /// The statistics that the pager updates; one for the whole VM.
    pub stats: Arc<Stats>,
    /// The retrier of failed fetches; one for the whole VM.
    pub retrier: Retrier,
}

impl PagerConfig {
    /// Returns the configuration of a pager that fills `backing` from the beginning of `source`. It
    /// has its own statistics, and a retrier with the default policy that logs failures.
    pub fn new(backing: Arc<dyn Backing>, source: Arc<dyn PageSource>) -> Self {
        let retrier = Retrier::logging(RetryPolicy::default());
        PagerConfig { backing, source, image_offset: 0, stats: Arc::new(Stats::new()), retrier }
    }
}

impl fmt::Debug for PagerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagerConfig")
            .field("backing", &self.backing)
            .field("image_offset", &self.image_offset)
            .finish_non_exhaustive()
    }
}

/// Pages per request of readahead: 256 KiB, as of background fill.
const AHEAD: u64 = 64;

type Callback = Box<dyn FnOnce() + Send>;

/// The pager of one region.
///
/// vCPUs, the VMM, back-ends and background fill all ask it for pages. The thread that claims a
/// page populates it; other threads wait on the page. A failed fetch is retried and is never
/// answered with zeros.
pub struct Pager {
    bitmap: MissingBitmap,
    backing: Arc<dyn Backing>,
    /// The mapping through which content is written, except for units that are created with their
    /// content. It is not trapped, so its addresses leave the crate only for present pages.
    populate: Arc<Mapping>,
    source: Arc<dyn PageSource>,
    image_offset: u64,
    /// One bit for each unit that is known to exist; `None` where a unit is one page.
    allocated: Option<Box<[AtomicU64]>>,
    guest_trap: OnceLock<Arc<dyn MapPresent>>,
    /// The mappings under the memslots, which the memslots keep alive.
    guest_mappings: Mutex<Vec<Weak<Mapping>>>,
    unit_loader: OnceLock<Arc<dyn LoadUnit>>,
    /// Read-locked while a unit is created: the hypervisor may write to the unit as soon as it
    /// exists, and its pages are marked as populated only after that.
    loading: RwLock<()>,
    /// The notes that a fetch must take: none for nearly all fetches.
    notes: FetchNotes,
    /// Set at most once, together with a note.
    readahead: OnceLock<Readahead>,
    /// Set at most once, together with a note that ends with it.
    touches: OnceLock<FirstTouches>,
    /// Number of regions and guest mappings that need the pager.
    holders: AtomicUsize,
    /// Whether the pager was ever a region's.
    of_region: AtomicBool,
    /// Number of regions, each of which has the populate mapping, too.
    regions: AtomicUsize,
    on_complete: Mutex<Vec<Callback>>,
    stats: Arc<Stats>,
    retrier: Retrier,
    set_aside: SetAside,
    /// Which alone fetches pages: a child shares the memory object, but not the bitmap.
    process: OwnProcess,
    /// Done once the retrier looks at the waits for pages.
    looked_at: Once,
}

impl Pager {
    /// Creates a pager.
    ///
    /// # Errors
    ///
    /// [`PagerError`] names the part that does not fit or could not be created. Memory that ends
    /// after the last page of the image is [`PagerError::ImageShort`]; if zeros are right there,
    /// pad the source ([`ZeroPadded`]).
    pub fn new(mut config: PagerConfig) -> Result<Arc<Self>, PagerError> {
        config.source = ZeroPadded::to_pages(config.source);
        let (size, image_size) = (config.backing.size(), config.source.size());
        let image_offset = config.image_offset;
        if !image_offset.is_multiple_of(PAGE_SIZE) {
            return Err(PagerError::Unaligned(image_offset));
        }
        if image_offset.checked_add(size).is_none_or(|end| end > image_size) {
            return Err(PagerError::ImageShort { size, image_offset, image_size });
        }
        let pager = Self::with_bitmap(MissingBitmap::new, config)?;
        pager.share_missing();
        Ok(pager)
    }

    /// Creates a pager of memory that is present from the start and initially zero, for a VM that
    /// boots. Nothing is ever fetched. No memory is allocated here: each page is allocated when it
    /// is first touched. Huge pages that were not reserved must therefore be free at that time (see
    /// [`MemfdBacking::with_reservation`](crate::MemfdBacking::with_reservation)), as with any other
    /// VMM.
    ///
    /// # Errors
    ///
    /// [`PagerError::Backing`] and [`PagerError::Bitmap`].
    pub fn new_present(
        backing: Arc<dyn Backing>,
        stats: Arc<Stats>,
    ) -> Result<Arc<Self>, PagerError> {
        let config = PagerConfig { stats, ..PagerConfig::new(backing, Arc::new(NoSource)) };
        Self::with_bitmap(MissingBitmap::all_present, config)
    }

    /// Gives the source a view of the bitmap. The model checker has no file for its words.
    fn share_missing(&self) {
        #[cfg(not(loom))]
        self.source.share_missing(&demand_source::MissingPages::new(
            self.image_offset,
            self.pages(),
            self.bitmap.words().file(),
        ));
    }

    fn with_bitmap(
        bitmap: impl FnOnce(u64) -> io::Result<MissingBitmap>,
        config: PagerConfig,
    ) -> Result<Arc<Self>, PagerError> {
        let PagerConfig { backing, source, image_offset, stats, retrier } = config;
        let size = backing.size();
        let pages = size / PAGE_SIZE;
        // Before the bitmap, which takes memory: refusing a size that cannot be mapped costs
        // nothing.
        let populate = Arc::new(backing.map()?);
        // Content is written through it: past the end of a short mapping lies unrelated memory.
        if populate.len() < size {
            return Err(PagerError::MappingShort { size, mapped: populate.len() });
        }
        let bitmap = bitmap(pages).map_err(|source| PagerError::Bitmap { pages, source })?;
        let unit = backing.kind().unit();
        let allocated = (unit > PAGE_SIZE)
            .then(|| (0..(size / unit).div_ceil(64)).map(|_| AtomicU64::new(0)).collect());
        Ok(Arc::new(Pager {
            bitmap,
            backing,
            populate,
            source,
            image_offset,
            allocated,
            guest_trap: OnceLock::new(),
            guest_mappings: Mutex::default(),
            unit_loader: OnceLock::new(),
            loading: RwLock::default(),
            notes: FetchNotes::default(),
            readahead: OnceLock::new(),
            touches: OnceLock::new(),
            holders: AtomicUsize::new(0),
            of_region: AtomicBool::new(false),
            regions: AtomicUsize::new(0),
            on_complete: Mutex::default(),
            stats,
            retrier,
            set_aside: SetAside::default(),
            process: OwnProcess::current(),
            looked_at: Once::new(),
        }))
    }

    /// Returns the missing bitmap.
    #[inline]
    pub fn bitmap(&self) -> &BitmapReader {
        &self.bitmap
    }

    /// Returns the memory object.
    pub fn backing(&self) -> &Arc<dyn Backing> {
        &self.backing
    }

    /// Returns the statistics that this pager updates.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Returns the number of pages of the region.
    pub fn pages(&self) -> u64 {
        self.bitmap.pages()
    }

    /// Returns the number of pages in one unit of the backing.
    pub fn unit_pages(&self) -> u64 {
        self.backing.kind().unit() / PAGE_SIZE
    }

    /// Sets the trap of the guest's mapping. From then on, pages are mapped there before their bits
    /// are cleared. Must be called at most once, before the memslot is created and the first page
    /// is fetched.
    ///
    /// # Errors
    ///
    /// [`GuestTrapError`]; nothing has changed then.
    pub fn set_guest_trap(&self, trap: Arc<dyn MapPresent>) -> Result<(), GuestTrapError> {
        self.can_set_guest_trap()?;
        self.guest_trap.set(trap).map_err(|_| GuestTrapError::Twice)
    }

    /// Checks whether [`set_guest_trap`](Self::set_guest_trap) would succeed.
    ///
    /// # Errors
    ///
    /// As for [`set_guest_trap`](Self::set_guest_trap).
    pub fn can_set_guest_trap(&self) -> Result<(), GuestTrapError> {
        if self.guest_trap.get().is_some() {
            return Err(GuestTrapError::Twice);
        }
        if self.guest_mappings().iter().any(|mapping| self.is_lent(mapping)) {
            return Err(GuestTrapError::AfterUnarmed);
        }
        // A flag and not the bitmap's count: every start runs this, and memory may have any size.
        if self.notes.has_begun() {
            let requested = |page: &u64| !self.bitmap.is_untouched(PageRange::page(*page));
            let mut pages = (0..self.pages()).filter(requested);
            if let Some(first) = pages.next() {
                return Err(GuestTrapError::AfterFetch { first, pages: 1 + pages.count() as u64 });
            }
        }
        Ok(())
    }

    /// Maps a unit of the backing, all of whose pages are present, in the guest's mapping: a vCPU
    /// has met a marker there ([`VcpuTrap::Markers`](crate::VcpuTrap::Markers)).
    ///
    /// # Errors
    ///
    /// Those of [`MapPresent::map_unit`]; `Unsupported` if the mapping is not armed.
    pub fn map_unit(&self, unit: PageRange) -> io::Result<Mapped> {
        debug_assert_eq!(self.bitmap.first_missing(unit), None, "a missing page would be zero");
        let trap = self.guest_trap.get().ok_or(io::ErrorKind::Unsupported)?;
        trap.map_unit(unit)
    }

    /// Records the guest's mapping, which is armed.
    pub(crate) fn note_guest_mapping(&self, mapping: &Arc<Mapping>) {
        let mut mappings = self.guest_mappings();
        mappings.retain(|known| self.is_lent(known));
        mappings.push(Arc::downgrade(mapping));
    }

    /// Records a mapping of the guest that is not armed, so that the region is not armed later.
    pub(crate) fn note_unarmed(&self, mapping: &Arc<Mapping>) -> Result<(), GuestTrapError> {
        if self.guest_trap.get().is_some() && !self.bitmap.is_complete() {
            return Err(GuestTrapError::Twice);
        }
        self.note_guest_mapping(mapping);
        Ok(())
    }

    /// Returns whether a guest has this mapping. The pager and its region keep the one for
    /// populating, which a guest without a trap has, too.
    fn is_lent(&self, mapping: &Weak<Mapping>) -> bool {
        let regions = || self.regions.load(Ordering::Acquire);
        let (before, count, after) = (regions(), mapping.strong_count(), regions());
        let is_own = mapping.as_ptr() == Arc::as_ptr(&self.populate);
        // A region that comes or goes meanwhile may count as a guest, and never a guest as none.
        count > if is_own { 1 + before.min(after) } else { 0 }
    }

    fn guest_mappings(&self) -> MutexGuard<'_, Vec<Weak<Mapping>>> {
        self.guest_mappings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the loader that creates units together with their content. If the pager has one
    /// already, or all pages are present, the new loader is [finished](LoadUnit::finish) at once.
    pub fn set_unit_loader(&self, loader: Arc<dyn LoadUnit>) {
        let refused = self.unit_loader.set(loader).err();
        // The thread that publishes the last page looks for a loader after that, so one of the two
        // sees it.
        let complete = self.bitmap.is_complete().then(|| self.unit_loader.get()).flatten();
        refused.iter().chain(complete).for_each(|loader| loader.finish());
    }

    /// Calls `callback` when the last page is present: at once if it already is, else on the thread
    /// that publishes it. The callback must not block.
    pub fn on_complete(&self, callback: impl FnOnce() + Send + 'static) {
        let mut callbacks = self.on_complete.lock().unwrap_or_else(PoisonError::into_inner);
        if self.bitmap.is_complete() {
            drop(callbacks);
            callback();
        } else {
            callbacks.push(Box::new(callback));
        }
    }

    /// Ends all waits: the VM is shutting down. Later fetches are refused, and failed ones are not
    /// retried.
    pub fn stop(&self) {
        self.bitmap.stop();
        // Attempts that wait for a request keep their pager. Those of this one end now.
        self.retrier.retry_now();
    }

    /// [Stops](Self::stop) the region and revokes the guest's access to it: see
    /// [`DemandMemory::revoke`](crate::DemandMemory::revoke).
    ///
    /// # Errors
    ///
    /// The system's error for the first mapping that cannot be revoked. The others are revoked all
    /// the same.
    pub fn revoke(&self) -> io::Result<()> {
        self.stop();
        let mappings: Vec<_> = self.guest_mappings().iter().filter_map(Weak::upgrade).collect();
        let mut outcome = Ok(());
        for mapping in mappings {
            outcome = outcome.and(mapping.revoke());
        }
        outcome
    }

    /// Starts to fetch the pages of `range` that are missing and unclaimed. If the source answers
    /// at once, they are present on return; otherwise they arrive later, on the source's threads.
    /// Returns the number of pages that this call made present.
    ///
    /// # Errors
    ///
    /// [`FetchError::OutOfRange`], and [`FetchError::Stopped`], also in a child process.
    pub fn fetch(self: &Arc<Self>, range: PageRange, path: FaultPath) -> Result<u64, FetchError> {
        let pages = self.pages();
        if range.first.checked_add(range.count).is_none_or(|end| end > pages) {
            return Err(FetchError::OutOfRange { first: range.first, count: range.count, pages });
        }
        if self.bitmap.is_stopped() || !self.process.is_current() {
            return Err(FetchError::Stopped);
        }
        if self.notes.are_wanted() {
            return Ok(self.fetch_and_note(range, path));
        }
        Ok(self.fetch_inside(range, path))
    }

    /// Fetches pages that lie in the region.
    #[inline(always)]
    fn fetch_inside(self: &Arc<Self>, range: PageRange, path: FaultPath) -> u64 {
        if range.count == 1 {
            let claimed = self.bitmap.claim_page(range.first);
            return if claimed { self.populate(range, Errand::new(path)) } else { 0 };
        }
        // All claims of the range are taken before the first byte is read, so that content written
        // for this range cannot reach a page that another thread has claimed.
        let claimed = self.bitmap.claim(range);
        claimed.iter().map(|run| self.populate(*run, Errand::new(path))).sum()
    }

    /// Fetches pages, takes the notes that are wanted, and fetches more ahead of a sequential
    /// reader.
    #[cold]
    fn fetch_and_note(self: &Arc<Self>, range: PageRange, path: FaultPath) -> u64 {
        self.notes.take(range, path);
        let mut arrived = 0;
        if let Some(touches) = self.touches.get().filter(|_| path != FaultPath::Fill) {
            arrived += self.publish_taken(touches.touch(&self.bitmap, range, path));
        }
        arrived += self.fetch_inside(range, path);
        let readahead = self.readahead.get().filter(|_| path != FaultPath::Fill);
        let Some(readahead) = readahead else { return arrived };
        // A source that answers at once needs none.
        if arrived > 0 && self.bitmap.first_missing(range).is_none() {
            return arrived;
        }
        let Some(ahead) = readahead.fault(range, self.pages()) else { return arrived };
        for first in (ahead.first..ahead.end()).step_by(to_usize(AHEAD)) {
            let pages = PageRange::new(first, AHEAD.min(ahead.end() - first));
            if self.fetch_inside(pages, FaultPath::Fill) > 0 {
                readahead.ended_at(ahead, pages.end());
                break;
            }
        }
        arrived
    }

    /// Makes all pages of `range` present: fetches the unclaimed ones and waits for the others. The
    /// wait lasts as long as the source is unavailable.
    ///
    /// # Errors
    ///
    /// [`FetchError::Kicked`] if `waiter` was kicked (pages that were requested still arrive), and
    /// the errors of [`fetch`](Self::fetch).
    pub fn ensure(
        self: &Arc<Self>,
        range: PageRange,
        path: FaultPath,
        waiter: &Waiter,
    ) -> Result<(), FetchError> {
        if self.fetch(range, path)? == range.count {
            return Ok(());
        }
        let raise = || {
            if path != FaultPath::Fill {
                self.raise(range);
            } else if !waiter.is_background() {
                self.publish_held(range);
            }
        };
        match self.bitmap.wait_listed(range, waiter, raise) {
            Wait::Present => Ok(()),
            Wait::Kicked => {
                // The wait may have ended before it began.
                raise();
                Err(FetchError::Kicked)
            }
            Wait::Stopped => Err(FetchError::Stopped),
        }
    }

    /// Calls `callback` when all pages of `range`, which were [fetched](Self::fetch) for a fault,
    /// are present: see [`BitmapReader::when_present`]. Pages that background fill has requested
    /// before are requested with the priority of a fault from now on.
    pub fn when_present(
        self: &Arc<Self>,
        range: PageRange,
        callback: impl FnOnce() + Send + 'static,
    ) {
        self.bitmap.when_present(range, callback);
        if self.bitmap.first_missing(range).is_some() {
            self.raise(range);
        }
    }

    /// Publishes the held pages of the range, for which a thread waits, and raises the source's
    /// queued fill requests for the others to demand.
    ///
    /// Neither a page that fill populates at this moment is missed: `hold` holds it first and then
    /// looks for waiters.
    ///
    /// A request that fill submits at this moment is not missed: `populate_extent` submits first
    /// and then looks for waiters, and the callers are listed as waiters before they call this.
    fn raise(self: &Arc<Self>, range: PageRange) {
        self.publish_held(range);
        let raise = || self.source.raise(self.image_offset_of(range.first), range.bytes());
        // A panic in the source's code must not end a thread that serves faults.
        let _ = panic::catch_unwind(AssertUnwindSafe(raise));
    }

    /// Checks that nothing has written to the memory object, past the pager. It reads what exists
    /// of the object: normally nothing, and in a process that locks its memory zeros.
    ///
    /// # Errors
    ///
    /// [`GuestMappingError`]; [`GuestTrapError::AfterWrite`] if a page holds data that the source's
    /// content would replace.
    pub fn expect_unwritten(&self) -> Result<(), GuestMappingError> {
        let (mut first, mut pages) = (None, 0);
        self.for_each_written(|page| {
            first.get_or_insert(page);
            pages += 1;
        })?;
        match first {
            Some(first) => Err(GuestTrapError::AfterWrite { first, pages }.into()),
            None => Ok(()),
        }
    }

    /// From now on fetches pages ahead of readers that touch pages in ascending order, at most
    /// `bytes` ahead of each. It is background fill to the source, which lets faults overtake it,
    /// and in [`Stats`]. A source that answers at once gets no readahead, and without this call a
    /// fault costs what it did. A second call has no effect.
    ///
    /// # Examples
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use demand_memory::{BackingKind, MemfdBacking, Pager, PagerConfig};
    /// # use demand_source::LocalFile;
    /// # let image = tempfile::NamedTempFile::new().unwrap();
    /// # image.as_file().set_len(1 << 20).unwrap();
    /// # let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, 1 << 20).unwrap());
    /// # let source = Arc::new(LocalFile::open(image.path()).unwrap());
    /// let pager = Pager::new(PagerConfig::new(backing, source)).unwrap();
    /// pager.read_ahead(8 << 20);
    /// ```
    pub fn read_ahead(&self, bytes: u64) {
        let pages = bytes / PAGE_SIZE;
        if pages > 0 && self.readahead.set(Readahead::new(pages)).is_ok() {
            self.notes.read_ahead();
        }
    }

    /// From now on notes the first touches of this region's pages in `log`, and holds pages that
    /// background fill brings, as the log says, until their first touch or
    /// [`end_touches`](Self::end_touches). Held pages are populated and count as missing, so the
    /// memory is not complete before the end. `expected` are the pages of the region that an
    /// earlier run has touched. A second call has no effect.
    ///
    /// Without this call a fault costs what it did.
    ///
    /// # Errors
    ///
    /// The system's error if memory cannot be allocated.
    pub fn note_touches(&self, log: &Arc<TouchLog>, expected: &[PageRange]) -> io::Result<()> {
        let touches = FirstTouches::new(log, self.pages(), self.image_offset, expected)?;
        if self.touches.set(touches).is_ok() {
            self.notes.note_touches();
        }
        Ok(())
    }

    /// Ends the notes of first touches, and publishes all held pages. Further calls change nothing.
    pub fn end_touches(self: &Arc<Self>) {
        let Some(touches) = self.touches.get() else { return };
        self.notes.end_touches();
        touches.end();
        // Pairs with the fence in `hold`: either this finds the held page, or that thread the end.
        fence(Ordering::SeqCst);
        self.publish_held(PageRange::new(0, self.pages()));
    }

    /// From now on notes the page of the latest fault, for [`take_fault`](Self::take_fault).
    pub(crate) fn note_faults(&self) {
        self.notes.note_faults();
    }

    /// Returns the page of the latest fault, if one came since the last call.
    pub(crate) fn take_fault(&self) -> Option<u64> {
        self.notes.take_fault()
    }

    /// Returns the bitmap through which pages are claimed.
    pub(crate) fn claims(&self) -> &MissingBitmap {
        &self.bitmap
    }

    /// Returns whether each missing page of the range has failed when fetched by itself. A caller
    /// that does not need them may continue: they are retried.
    pub(crate) fn is_set_aside(&self, range: PageRange) -> bool {
        self.set_aside.has_all(range, |page| self.bitmap.is_missing(page))
    }

    /// Returns whether the page's fetch has failed, and waits for its next attempt.
    pub(crate) fn is_to_retry(&self, page: u64) -> bool {
        self.retrier.is_failing_at(self.image_offset_of(page))
    }

    /// Returns the offset of a page in the image, in bytes.
    pub(crate) fn image_offset_of(&self, page: u64) -> u64 {
        self.image_offset + page * PAGE_SIZE
    }

    /// Returns the source of missing pages and the region's offset in it, in bytes.
    pub(crate) fn source(&self) -> (&Arc<dyn PageSource>, u64) {
        (&self.source, self.image_offset)
    }

    /// Reads bytes of the memory object that exist, whether the pages are present or not. Through
    /// the object's file, if that can be read: a page that ceases to exist meanwhile is not created
    /// again.
    pub(crate) fn read_existing(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if let Some(file) = self.backing.readable_file() {
            return file.read_exact_at(buffer, offset);
        }
        let end = offset.checked_add(buffer.len() as u64);
        assert!(end.is_some_and(|end| end <= self.populate.len()));
        let from = self.populate.at(offset).as_ptr();
        // SAFETY: the assertion keeps the bytes within the populate mapping, which `self` keeps
        // mapped for longer than the slice lives. All others access them volatilely, as this does.
        let bytes = unsafe { VolatileSlice::new(from, buffer.len()) };
        bytes.copy_to(buffer);
        Ok(())
    }

    /// Returns whether this is the mapping through which the pager writes content, which must not be
    /// trapped.
    pub fn populates_through(&self, mapping: &Mapping) -> bool {
        std::ptr::eq(mapping, Arc::as_ptr(&self.populate))
    }

    /// Returns the populate mapping. The caller must access only populated pages in it.
    pub(crate) fn populate_mapping(&self) -> &Arc<Mapping> {
        &self.populate
    }
}

impl fmt::Debug for Pager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pager")
            .field("backing", &self.backing)
            .field("bitmap", &self.bitmap)
            .finish_non_exhaustive()
    }
}

/// A pager in use by a region or by a guest's mapping. Once the region and all of these are
/// dropped, the pager is [stopped](Pager::stop): fetches in progress keep it, but no access can
/// wait for their pages any more. A pager without a region is left to its creator.
#[derive(Debug)]
pub(crate) struct Held {
    pager: Arc<Pager>,
    /// Whether a region holds it, which also has the populate mapping.
    by_region: bool,
}

impl Held {
    pub(crate) fn new(pager: &Arc<Pager>) -> Self {
        pager.holders.fetch_add(1, Ordering::Relaxed);
        Held { pager: pager.clone(), by_region: false }
    }

    pub(crate) fn of_region(pager: &Arc<Pager>) -> Self {
        pager.of_region.store(true, Ordering::Relaxed);
        pager.regions.fetch_add(1, Ordering::AcqRel);
        pager.holders.fetch_add(1, Ordering::Relaxed);
        Held { pager: pager.clone(), by_region: true }
    }

    #[inline]
    pub(crate) fn pager(&self) -> &Arc<Pager> {
        &self.pager
    }
}

impl Clone for Held {
    fn clone(&self) -> Self {
        Held::new(&self.pager)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.by_region {
            self.pager.regions.fetch_sub(1, Ordering::AcqRel);
        }
        let last = self.pager.holders.fetch_sub(1, Ordering::AcqRel) == 1;
        if last && self.pager.of_region.load(Ordering::Relaxed) {
            self.pager.stop();
        }
    }
}

/// The source of memory that is present from the start. The pager never asks it for a page.
struct NoSource;

impl PageSource for NoSource {
    fn size(&self) -> u64 {
        0
    }

    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        Err(SourceError::Abandoned)
    }

    fn submit(&self, _: Request) -> Completion {
        Completion::ready(Err(SourceError::Abandoned))
    }
}
