// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pager of a region: makes missing pages present, by claiming, populating, mapping and
//! publishing them.

use std::fmt;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, TryLockError, Weak};
use std::time::Instant;

use demand_source::{
    Chunk, Completion, Destination, Extent, PageSource, Priority, Request, SourceError,
};

use crate::arrival::Arrival;
use crate::errand::{Errand, Left, Role, SetAside, probe_of};
use crate::retry::{Attempts, Retrier, RetryPolicy};
use crate::{
    Backing, BackingError, BitmapReader, LoadUnit, Mapping, MissingBitmap, PAGE_SIZE, PageRange,
    Path, Published, Stats, Trap, Wait, Waiter,
};

/// Errors from creating a pager.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// A backing that could not be mapped.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// A missing bitmap that could not be created.
    #[error(
        "cannot create a missing bitmap for {pages} pages: {error}; free memory, or use less \
         guest memory"
    )]
    Bitmap {
        /// Number of pages of the region.
        pages: u64,
        /// The system's error.
        error: io::Error,
    },
    /// An image that ends before the region does.
    #[error(
        "cannot fill {size} bytes of memory from offset {image_offset} of the image: it has only \
         {image_size} bytes; use an image of at least {} bytes, or less memory",
        image_offset.saturating_add(*size)
    )]
    ImageShort {
        /// Size of the region, in bytes.
        size: u64,
        /// Offset of the region in the image, in bytes.
        image_offset: u64,
        /// Size of the image, in bytes.
        image_size: u64,
    },
    /// A mapping that is shorter than the size that the backing reports.
    #[error(
        "cannot use a backing of {size} bytes: its mapping has only {mapped} bytes; this is a bug \
         in the backing"
    )]
    MappingShort {
        /// Size of the backing, in bytes.
        size: u64,
        /// Length of its mapping, in bytes.
        mapped: u64,
    },
    /// A region whose last byte would lie past the last guest address.
    #[error(
        "cannot place {size} bytes of memory at guest address {start:#x}: they exceed the last \
         guest address; choose a lower address"
    )]
    PastTheEnd {
        /// Guest physical address of the region.
        start: u64,
        /// Size of the region, in bytes.
        size: u64,
    },
    /// An image offset that is not a multiple of the page size.
    #[error("cannot fill memory from offset {0} of the image: it is not a multiple of 4096 bytes")]
    Unaligned(u64),
}

/// Errors from fetching pages or waiting for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// A wait that a kick ended; the caller may ask again.
    #[error("the wait for a page was interrupted by a kick; call again to resume")]
    Kicked,
    /// A stop of the memory: the VM is shutting down, and the pages will not arrive.
    #[error("the wait for missing pages ended: the memory was stopped")]
    Stopped,
    /// A range that does not lie in the region.
    #[error("cannot fetch {count} pages from page {first}: the region has {pages} pages")]
    OutOfRange {
        /// First page of the request.
        first: u64,
        /// Number of pages of the request.
        count: u64,
        /// Number of pages of the region.
        pages: u64,
    },
}

/// Errors from arming the guest's mapping of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GuestTrapError {
    /// A guest mapping that is armed already.
    #[error("cannot arm the guest's mapping: the region already has an armed one")]
    Twice,
    /// A memslot that was created earlier: its mapping may have shown zeros.
    #[error(
        "cannot arm the guest's mapping: a memslot of this region already exists; arm the mapping \
         before creating the memslot"
    )]
    AfterSlot,
    /// A page that was requested earlier.
    #[error(
        "cannot arm the guest's mapping: pages were already requested; arm it before the first \
         request"
    )]
    AfterFetch,
}

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
    guest_trap: OnceLock<Arc<dyn Trap>>,
    /// The mappings under the memslots, which the memslots keep alive.
    guest_mappings: Mutex<Vec<Weak<Mapping>>>,
    unit_loader: OnceLock<Arc<dyn LoadUnit>>,
    /// Read-locked while a unit is created: the hypervisor may write to the unit as soon as it
    /// exists, and its pages are marked as populated only after that.
    loading: RwLock<()>,
    /// Whether any page was ever requested.
    begun: AtomicBool,
    on_complete: Mutex<Vec<Callback>>,
    stats: Arc<Stats>,
    retrier: Arc<Retrier>,
    set_aside: SetAside,
}

impl Pager {
    /// Creates a pager that fills `backing` from `source`. Byte `image_offset` of the source is the
    /// region's first byte.
    ///
    /// # Errors
    ///
    /// [`PagerError`] names the part that does not fit or could not be created.
    pub fn new(
        backing: Arc<dyn Backing>,
        source: Arc<dyn PageSource>,
        image_offset: u64,
        stats: Arc<Stats>,
        retrier: Arc<Retrier>,
    ) -> Result<Arc<Self>, PagerError> {
        let (size, image_size) = (backing.size(), source.size());
        if !image_offset.is_multiple_of(PAGE_SIZE) {
            return Err(PagerError::Unaligned(image_offset));
        }
        if image_offset.checked_add(size).is_none_or(|end| end > image_size) {
            return Err(PagerError::ImageShort { size, image_offset, image_size });
        }
        Self::with_bitmap(MissingBitmap::new, backing, source, image_offset, stats, retrier)
    }

    /// Creates a pager of memory that is present from the start and initially zero, for a VM that
    /// boots. Nothing is ever fetched. No memory is allocated here: each page is allocated when it
    /// is first touched. Huge pages that were not reserved must therefore be free at that time (see
    /// [`MemfdBacking::new`](crate::MemfdBacking::new)), as with any other VMM.
    ///
    /// # Errors
    ///
    /// [`PagerError::Backing`] and [`PagerError::Bitmap`].
    pub fn present(backing: Arc<dyn Backing>, stats: Arc<Stats>) -> Result<Arc<Self>, PagerError> {
        let retrier = Retrier::new(RetryPolicy::default(), |_| {});
        Self::with_bitmap(MissingBitmap::present, backing, Arc::new(NoSource), 0, stats, retrier)
    }

    fn with_bitmap(
        bitmap: impl FnOnce(u64) -> io::Result<MissingBitmap>,
        backing: Arc<dyn Backing>,
        source: Arc<dyn PageSource>,
        image_offset: u64,
        stats: Arc<Stats>,
        retrier: Arc<Retrier>,
    ) -> Result<Arc<Self>, PagerError> {
        let size = backing.size();
        let pages = size / PAGE_SIZE;
        // Before the bitmap, which takes memory: refusing a size that cannot be mapped costs
        // nothing.
        let populate = Arc::new(backing.map()?);
        // Content is written through it: past the end of a short mapping lies unrelated memory.
        if populate.len() < size {
            return Err(PagerError::MappingShort { size, mapped: populate.len() });
        }
        let bitmap = bitmap(pages).map_err(|error| PagerError::Bitmap { pages, error })?;
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
            begun: AtomicBool::new(false),
            on_complete: Mutex::default(),
            stats,
            retrier,
            set_aside: SetAside::default(),
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
    pub fn set_guest_trap(&self, trap: Arc<dyn Trap>) -> Result<(), GuestTrapError> {
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
        if self.guest_mappings().iter().any(|mapping| mapping.strong_count() > 0) {
            return Err(GuestTrapError::AfterSlot);
        }
        // A flag and not the bitmap's count: every start runs this, and memory may have any size.
        if self.begun.load(Ordering::Relaxed) {
            return Err(GuestTrapError::AfterFetch);
        }
        Ok(())
    }

    /// Records that a memslot is about to be created over `mapping`.
    pub fn note_memslot(&self, mapping: &Arc<Mapping>) {
        let mut mappings = self.guest_mappings();
        mappings.retain(|known| known.strong_count() > 0);
        mappings.push(Arc::downgrade(mapping));
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
    /// [`FetchError::OutOfRange`] and [`FetchError::Stopped`].
    pub fn fetch(self: &Arc<Self>, range: PageRange, path: Path) -> Result<u64, FetchError> {
        let pages = self.pages();
        if range.first.checked_add(range.count).is_none_or(|end| end > pages) {
            return Err(FetchError::OutOfRange { first: range.first, count: range.count, pages });
        }
        if self.bitmap.is_stopped() {
            return Err(FetchError::Stopped);
        }
        // Loaded first: threads on disjoint pages must not share a line that is written repeatedly.
        if !self.begun.load(Ordering::Relaxed) {
            self.begun.store(true, Ordering::Relaxed);
        }
        if range.count == 1 {
            let claimed = self.bitmap.claim_page(range.first);
            return Ok(if claimed { self.populate(range, Errand::new(path)) } else { 0 });
        }
        // All claims of the range are taken before the first byte is read, so that content written
        // for this range cannot reach a page that another thread has claimed.
        let claimed = self.bitmap.claim(range);
        Ok(claimed.iter().map(|run| self.populate(*run, Errand::new(path))).sum())
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
        path: Path,
        waiter: &Arc<Waiter>,
    ) -> Result<(), FetchError> {
        if self.fetch(range, path)? == range.count {
            return Ok(());
        }
        match self.bitmap.wait(range, waiter) {
            Wait::Present => Ok(()),
            Wait::Kicked => Err(FetchError::Kicked),
            Wait::Stopped => Err(FetchError::Stopped),
        }
    }

    /// Populates claimed pages and returns how many are present on return. The source still works
    /// on the others, or they will be retried.
    fn populate(self: &Arc<Self>, run: PageRange, errand: Errand) -> u64 {
        let mut left = run;
        let mut present = 0;
        while !left.is_empty() {
            // This thread holds the claims: a panic in the source's code must not lose them.
            let populate = AssertUnwindSafe(|| self.populate_extent(left, errand));
            let outcome = panic::catch_unwind(populate)
                .unwrap_or(Err(PopulateError::Source(SourceError::Panicked)));
            match outcome {
                Ok((done, bytes_read)) => {
                    // Outside the part that catches panics: present pages must not be retried.
                    let pages = PageRange::new(left.first, done);
                    let arrived = bytes_read.is_some_and(|read| self.publish(pages, errand, read));
                    left = PageRange::new(pages.end(), left.count - done);
                    present += if arrived { done } else { 0 };
                }
                Err(error) => {
                    self.failed(left, Left::Populate, errand, &error);
                    break;
                }
            }
        }
        present
    }

    /// Populates the pages at the beginning of `run` that lie in one extent of the image. Returns
    /// their number and, if their content is already complete, how many bytes of it were read.
    fn populate_extent(
        self: &Arc<Self>,
        run: PageRange,
        errand: Errand,
    ) -> Result<(u64, Option<u64>), PopulateError> {
        let offset = self.image_offset + run.offset();
        let extent = extent_now(&*self.source, offset)?;
        let (pages, hole) = pages_of(extent, offset, run.count);
        let pages = pages.min(self.to_unit_border(run.first).unwrap_or(pages));
        let run = PageRange::new(run.first, pages);
        if hole {
            // New memory reads as zeros, as a hole does.
            self.allocate(run, true)?;
            return Ok((pages, Some(0)));
        }
        if let Some(unit) = self.load_unit(run) {
            return Ok((unit.count, Some(unit.bytes())));
        }
        self.allocate(run, false)?;
        let (address, len) = (self.populate.at(run.offset()), run.bytes() as usize);
        // SAFETY: `at` and the range check in `fetch` keep the loan within the populate mapping,
        // which `self` keeps mapped writable during this call. No Rust reference to guest memory is
        // ever created, and this call holds the claims on the pages, so no other thread writes
        // them.
        let mut destination = unsafe { Destination::new(address, len, None) };
        if let Some(read) = self.source.read_now(offset, &mut destination) {
            read.and_then(|()| destination.check_filled())?;
            return Ok((pages, Some(run.bytes())));
        }
        // A page that cannot be allocated must fail here, not as a signal in a thread of the
        // source.
        self.allocate(run, true)?;
        let arrival = Arc::new(Arrival::new(self.clone(), run, errand));
        // SAFETY: as above; `arrival` keeps the mapping alive, and the pages stay claimed until it
        // is dropped, which happens after the loan has ended.
        let destination = unsafe { Destination::new(address, len, Some(arrival.clone())) };
        let priority = if errand.is_wanted() { Priority::Demand } else { Priority::Fill };
        let request = Request { priority, chunks: vec![Chunk { offset, destination }] };
        let told = move |outcome| arrival.tell(outcome);
        // A panic drops the request and `told`, and with them the arrival, which reports a failure.
        let submit = AssertUnwindSafe(|| self.source.submit(request).then(told));
        let _ = panic::catch_unwind(submit);
        Ok((pages, None))
    }

    /// Returns the number of pages up to the next unit, which may be created as a whole. `None` at
    /// the beginning of a unit, and without a loader.
    fn to_unit_border(&self, first: u64) -> Option<u64> {
        self.unit_loader.get()?;
        match first % self.unit_pages() {
            0 => None,
            within => Some(self.unit_pages() - within),
        }
    }

    /// Creates the unit at the beginning of `run` together with its content. Returns `None` if the
    /// run, which is data throughout, does not begin with a whole unit, or if the unit cannot be
    /// created like this, for example because it exists.
    fn load_unit(&self, run: PageRange) -> Option<PageRange> {
        let (loader, allocated) = (self.unit_loader.get()?, self.allocated.as_ref()?);
        let unit = PageRange::new(run.first, self.unit_pages());
        if !unit.first.is_multiple_of(unit.count) || run.count < unit.count {
            return None;
        }
        let index = unit.first / unit.count;
        let (word, bit) = (&allocated[(index / 64) as usize], 1 << (index % 64));
        if word.load(Ordering::Relaxed) & bit != 0 {
            return None;
        }
        let content = self.source.mapped(self.image_offset + unit.offset(), unit.bytes())?;
        // Longer content would reach into pages that other threads have claimed.
        if content.len() as u64 != unit.bytes() {
            return None;
        }
        let _loading = self.loading.read().unwrap_or_else(PoisonError::into_inner);
        loader.load(unit.offset(), content).ok()?;
        word.fetch_or(bit, Ordering::Relaxed);
        // Checked after the last byte was read. If the source has changed, the bits stay set, and
        // the ordinary read reports the cause.
        self.source.is_intact().then(|| {
            self.bitmap.mark_populated(unit);
            unit
        })
    }

    /// Ensures that memory for `run` exists. Without `always`, pages of ordinary shared memory are
    /// left to their first write.
    fn allocate(&self, run: PageRange, always: bool) -> Result<(), BackingError> {
        let Some(allocated) = &self.allocated else {
            return if always { self.backing.allocate(run) } else { Ok(()) };
        };
        let unit = self.unit_pages();
        for index in run.first / unit..run.end().div_ceil(unit) {
            let (word, bit) = (&allocated[(index / 64) as usize], 1 << (index % 64));
            if word.load(Ordering::Relaxed) & bit == 0 {
                // Two threads may both get here: allocating an existing unit changes nothing.
                self.backing.allocate(PageRange::new(index * unit, unit))?;
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Returns whether no unit is being created at this moment. If so, every page that was written
    /// in a unit created earlier is found by [`BitmapReader::is_populated`].
    pub(crate) fn is_no_unit_loading(&self) -> bool {
        !matches!(self.loading.try_write(), Err(TryLockError::WouldBlock))
    }

    /// Makes pages present whose content is complete. Returns false if they could not be mapped;
    /// the retrier then tries again. The order keeps readers from seeing incomplete pages, and
    /// their writes from being lost: content, populated mark, the guest's armed mapping, missing
    /// bit, waiters.
    pub(crate) fn publish(
        self: &Arc<Self>,
        run: PageRange,
        errand: Errand,
        bytes_read: u64,
    ) -> bool {
        if let Some(trap) = self.guest_trap.get() {
            self.bitmap.mark_populated(run);
            if let Err(error) = trap.map_present(run) {
                // Some of the pages may be mapped, and the guest may already have written to them:
                // their content must not be fetched again.
                let left = Left::Publish { bytes_read };
                self.failed(run, left, errand, &PopulateError::Map(error));
                return false;
            }
        }
        self.stats.arrived(errand.path, run.count, bytes_read);
        self.set_aside.take_back(run);
        if self.bitmap.publish(run) == Published::Last {
            if let Some(loader) = self.unit_loader.get() {
                loader.finish();
            }
            let callbacks = std::mem::take(
                &mut *self.on_complete.lock().unwrap_or_else(PoisonError::into_inner),
            );
            for callback in callbacks {
                // The other callbacks must still run, and the thread serves more than this.
                let _ = panic::catch_unwind(AssertUnwindSafe(callback));
            }
        }
        self.populate_rest(run, errand);
        true
    }

    /// Populates the rest of a failed run once one of its pages has arrived: the source answers, so
    /// it fails only on some of the pages.
    fn populate_rest(self: &Arc<Self>, probe: PageRange, errand: Errand) {
        let Role::Probe { of } = errand.role else { return };
        let rest = Errand { role: Role::Part, ..errand };
        for part in [
            PageRange::new(of.first, probe.first - of.first),
            PageRange::new(probe.end(), of.end() - probe.end()),
        ] {
            if !part.is_empty() {
                self.populate(part, rest);
            }
        }
    }

    /// Handles claimed pages that could not be populated or mapped. They stay missing and claimed,
    /// and faults on them stay open.
    ///
    /// A run on which the source fails is split into halves, down to the pages that fail alone, so
    /// that no other page waits for them. One page is tried first, to learn whether the source
    /// delivers anything: an unavailable source is asked only for the run and for this page.
    pub(crate) fn failed(
        self: &Arc<Self>,
        run: PageRange,
        left: Left,
        errand: Errand,
        error: &PopulateError,
    ) {
        if self.bitmap.is_stopped() {
            return;
        }
        self.stats.failed();
        if run.count > 1 && matches!(error, PopulateError::Source(_)) {
            match errand.role {
                Role::Whole => {
                    let probe = Errand { role: Role::Probe { of: run }, ..errand };
                    self.populate(probe_of(run, errand.tried), probe);
                    return;
                }
                Role::Part => {
                    let half = run.count / 2;
                    self.populate(PageRange::new(run.first, half), errand);
                    self.populate(PageRange::new(run.first + half, run.count - half), errand);
                    return;
                }
                Role::Probe { .. } => {}
            }
        }
        match (left, errand.role) {
            (Left::Populate, Role::Probe { of }) => self.retry(of, left, errand, error),
            _ => {
                self.retry(run, left, errand, error);
                // The probe has arrived, and only its mapping has failed.
                self.populate_rest(run, errand);
            }
        }
    }

    /// Hands claimed pages to the retrier.
    fn retry(self: &Arc<Self>, run: PageRange, left: Left, errand: Errand, error: &PopulateError) {
        let now = Instant::now();
        let mut attempts = errand.tried.unwrap_or(Attempts { count: 0, since: now, wanted: None });
        attempts.count = attempts.count.saturating_add(1);
        if attempts.wanted.is_none() && (errand.path != Path::Fill || self.bitmap.is_wanted(run)) {
            attempts.wanted = Some(if attempts.count == 1 { attempts.since } else { now });
        }
        if run.count == 1 && matches!(left, Left::Populate) {
            self.set_aside.add(run.first);
        }
        let errand = Errand { tried: Some(attempts), role: Role::Whole, ..errand };
        let pager = self.clone();
        self.retrier.failed(error, run, self.image_offset_of(run.first), attempts, move || {
            if pager.bitmap.is_stopped() {
                return;
            }
            pager.stats.retried();
            match left {
                Left::Populate => pager.populate(run, errand),
                Left::Publish { bytes_read } => u64::from(pager.publish(run, errand, bytes_read)),
            };
        });
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

/// Returns the extent at `offset` (bytes) of the image; data without an end if only waiting for the
/// source could tell.
pub(crate) fn extent_now(source: &dyn PageSource, offset: u64) -> Result<Extent, SourceError> {
    panic::catch_unwind(AssertUnwindSafe(|| source.extent_now(offset)))
        .unwrap_or(Some(Err(SourceError::Panicked)))
        .unwrap_or(Ok(Extent::Data { end: u64::MAX }))
}

/// Returns how many of the `len` bytes at `offset` were data. They have been read, so the source
/// knows its holes by now.
pub(crate) fn data_bytes(source: &dyn PageSource, offset: u64, len: u64) -> u64 {
    let (mut at, mut data, end) = (offset, 0, offset + len);
    while at < end {
        let extent = extent_now(source, at).unwrap_or(Extent::Data { end });
        let until = extent.end().min(end).max(at + 1);
        data += if extent.is_hole() { 0 } else { until - at };
        at = until;
    }
    data
}

/// Returns how many of the `most` pages from `offset` (bytes in the image) lie in the extent found
/// there, and whether they are a hole. If the extent ends within the first page, that page is data,
/// to be read as a whole.
pub(crate) fn pages_of(extent: Extent, offset: u64, most: u64) -> (u64, bool) {
    let pages = extent.end().saturating_sub(offset) / PAGE_SIZE;
    (pages.clamp(1, most), extent.is_hole() && pages > 0)
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

/// Errors from populating or mapping claimed pages.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PopulateError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Backing(#[from] BackingError),
    #[error("cannot map populated pages for the guest: {0}; retrying")]
    Map(io::Error),
}
