// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Brings a region's pages in: claim, populate, map, publish.

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

/// Why a pager could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The memory could not be had.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The missing bitmap could not be had.
    #[error("make a missing bitmap for {pages} pages: {error}; free memory, or ask for less")]
    Bitmap {
        /// Pages of the region.
        pages: u64,
        /// What the system said.
        error: io::Error,
    },
    /// The image ends before the region does.
    #[error(
        "fill {size} bytes of memory from byte {image_offset} of the image: the image has only \
         {image_size} bytes; use an image of at least {} bytes, or less memory",
        image_offset.saturating_add(*size)
    )]
    ImageShort {
        /// Size of the region, in bytes.
        size: u64,
        /// Where the region begins in the image, in bytes.
        image_offset: u64,
        /// Size of the image, in bytes.
        image_size: u64,
    },
    /// The backing's mapping is shorter than the backing says it is.
    #[error(
        "cannot use a backing of {size} bytes: it maps only {mapped}; that is a mistake in the \
         backing's implementation"
    )]
    MappingShort {
        /// Size of the backing, in bytes.
        size: u64,
        /// Length of its mapping, in bytes.
        mapped: u64,
    },
    /// The region's last byte would lie past the end of all guest addresses.
    #[error(
        "cannot place {size} bytes of memory at {start:#x}: addresses end before; move it down"
    )]
    PastTheEnd {
        /// Where the region begins in guest physical memory.
        start: u64,
        /// Size of the region, in bytes.
        size: u64,
    },
    /// The region's first page does not begin at a multiple of a page in the image.
    #[error("fill memory from byte {0} of the image: that is no multiple of 4096 bytes")]
    Unaligned(u64),
}

/// Why pages did not become present.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// The waiting thread was called away; it may ask again.
    #[error("the wait for a page was interrupted; ask again to go on")]
    Kicked,
    /// The VM is going away, and the pages with it.
    #[error("the memory was stopped while pages were missing; they will not arrive")]
    Stopped,
    /// There are no such pages.
    #[error("page {first} and the {count} from there on do not lie in a region of {pages} pages")]
    OutOfRange {
        /// First page asked for.
        first: u64,
        /// Pages asked for.
        count: u64,
        /// Pages of the region.
        pages: u64,
    },
}

/// Why the guest's mapping of a region cannot be armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GuestTrapError {
    /// It has one already.
    #[error("cannot arm the guest's mapping: the region has an armed one; arm each region once")]
    Twice,
    /// A memslot was made before: its mapping may have shown zeros.
    #[error(
        "cannot arm the guest's mapping: a memslot of this region exists; arm the mapping first, \
         and make the memslot over that one"
    )]
    AfterSlot,
    /// A page was asked for before.
    #[error("cannot arm the guest's mapping: pages were fetched already; arm it before the first")]
    AfterFetch,
}

type Callback = Box<dyn FnOnce() + Send>;

/// The pager of one region.
///
/// All paths ask it for pages: vCPUs, the VMM, back-ends and background fill. Whoever claims a
/// page brings it in; others wait on the page. A failed fetch is tried again and is never
/// answered with zeros.
pub struct Pager {
    bitmap: MissingBitmap,
    backing: Arc<dyn Backing>,
    /// Where content is written, unless it comes with its page. Nothing traps here, so no address
    /// of it leaves the crate but for present pages.
    populate: Arc<Mapping>,
    source: Arc<dyn PageSource>,
    image_offset: u64,
    /// One bit for each unit that is known to exist; only for units larger than a page.
    allocated: Option<Box<[AtomicU64]>>,
    guest_trap: OnceLock<Arc<dyn Trap>>,
    /// The mappings that memslots were made over, which the slots keep.
    guest_mappings: Mutex<Vec<Weak<Mapping>>>,
    unit_loader: OnceLock<Arc<dyn LoadUnit>>,
    /// Read-locked while a unit is created: the hypervisor may write to it as soon as it exists,
    /// and its pages are marked as populated only after that.
    loading: RwLock<()>,
    /// Whether a page was ever asked for.
    begun: AtomicBool,
    on_complete: Mutex<Vec<Callback>>,
    stats: Arc<Stats>,
    retrier: Arc<Retrier>,
    set_aside: SetAside,
}

impl Pager {
    /// A pager that fills `backing` from `source`, whose byte `image_offset` is the region's
    /// first.
    ///
    /// # Errors
    ///
    /// [`PagerError`] tells which part could not be had.
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

    /// A pager of memory that is present from the start, zeros at first, as of a VM that boots.
    /// Nothing is ever fetched, and none of the memory is allocated here: it comes into being as it
    /// is touched. So huge pages that were not set aside must be there by then (see
    /// [`MemfdBacking::new`](crate::MemfdBacking::new)), as for every other VMM.
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
        // Before the bitmap, which takes memory: a size that cannot be mapped is refused for nothing.
        let populate = Arc::new(backing.map()?);
        // Content is written there: a length that the backing has wrong would be memory of others.
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

    /// The missing bitmap.
    #[inline]
    pub fn bitmap(&self) -> &BitmapReader {
        &self.bitmap
    }

    /// The memory object.
    pub fn backing(&self) -> &Arc<dyn Backing> {
        &self.backing
    }

    /// The statistics that this pager counts in.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Number of pages of the region.
    pub fn pages(&self) -> u64 {
        self.bitmap.pages()
    }

    /// Pages of one unit of the backing.
    pub fn unit_pages(&self) -> u64 {
        self.backing.kind().unit() / PAGE_SIZE
    }

    /// Says that the guest's mapping is armed: pages are mapped there before their bits are
    /// cleared. To be called once, before the memslot is made and the first page is fetched.
    ///
    /// # Errors
    ///
    /// [`GuestTrapError`]. Nothing is changed then.
    pub fn set_guest_trap(&self, trap: Arc<dyn Trap>) -> Result<(), GuestTrapError> {
        self.can_set_guest_trap()?;
        self.guest_trap.set(trap).map_err(|_| GuestTrapError::Twice)
    }

    /// Whether [`set_guest_trap`](Self::set_guest_trap) would succeed.
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
        // Not the bitmap's count: this is part of each start, of memory of any size.
        if self.begun.load(Ordering::Relaxed) {
            return Err(GuestTrapError::AfterFetch);
        }
        Ok(())
    }

    /// Notes that a memslot is about to be made over `mapping`.
    pub fn note_memslot(&self, mapping: &Arc<Mapping>) {
        let mut mappings = self.guest_mappings();
        mappings.retain(|known| known.strong_count() > 0);
        mappings.push(Arc::downgrade(mapping));
    }

    fn guest_mappings(&self) -> MutexGuard<'_, Vec<Weak<Mapping>>> {
        self.guest_mappings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the pager what creates huge pages together with their content. If it has one already,
    /// or all pages are present, the new one is told at once that it is not needed.
    pub fn set_unit_loader(&self, loader: Arc<dyn LoadUnit>) {
        let refused = self.unit_loader.set(loader).err();
        // Whoever publishes the last page looks for a loader after that, so one of the two sees it.
        let complete = self.bitmap.is_complete().then(|| self.unit_loader.get()).flatten();
        refused.iter().chain(complete).for_each(|loader| loader.finish());
    }

    /// Calls `callback` when the last page is present: at once if it is, else on the thread that
    /// publishes it. The callback must not wait.
    pub fn on_complete(&self, callback: impl FnOnce() + Send + 'static) {
        let mut callbacks = self.on_complete.lock().unwrap_or_else(PoisonError::into_inner);
        if self.bitmap.is_complete() {
            drop(callbacks);
            callback();
        } else {
            callbacks.push(Box::new(callback));
        }
    }

    /// Ends all waiting: the VM is going away. Nothing is asked of the source after this.
    pub fn stop(&self) {
        self.bitmap.stop();
    }

    /// [Stops](Self::stop) the region and takes it away from the guest: see
    /// [`DemandMemory::revoke`](crate::DemandMemory::revoke).
    ///
    /// # Errors
    ///
    /// The system's. The other mappings are revoked all the same.
    pub fn revoke(&self) -> io::Result<()> {
        self.stop();
        let mappings: Vec<_> = self.guest_mappings().iter().filter_map(Weak::upgrade).collect();
        let mut outcome = Ok(());
        for mapping in mappings {
            outcome = outcome.and(mapping.revoke());
        }
        outcome
    }

    /// Starts bringing in the pages of `range` that are missing and that nobody has claimed. With
    /// a source that answers at once they are present when this returns; with others they arrive
    /// later, on the source's threads. Returns the number of pages that became present through
    /// this very call.
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
        // Looked at first: threads on disjoint pages share no line that is written again and again.
        if !self.begun.load(Ordering::Relaxed) {
            self.begun.store(true, Ordering::Relaxed);
        }
        if range.count == 1 {
            let claimed = self.bitmap.claim_page(range.first);
            return Ok(if claimed { self.populate(range, Errand::new(path)) } else { 0 });
        }
        // Claims of the whole range are taken before the first byte is read, so that nobody
        // else's page can be touched by what is written for this range.
        let claimed = self.bitmap.claim(range);
        Ok(claimed.iter().map(|run| self.populate(*run, Errand::new(path))).sum())
    }

    /// Makes all pages of `range` present: fetches those that nobody has claimed, and waits for
    /// the others. The wait lasts as long as the source is away.
    ///
    /// # Errors
    ///
    /// [`FetchError::Kicked`] if `waiter` was kicked meanwhile (pages that were asked for still
    /// arrive), and the errors of [`fetch`](Self::fetch).
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

    /// Brings in claimed pages; returns how many became present before it returned. The rest is
    /// with the source, or will be tried again.
    fn populate(self: &Arc<Self>, run: PageRange, errand: Errand) -> u64 {
        let mut left = run;
        let mut present = 0;
        while !left.is_empty() {
            // The claims are this thread's: a panic of the source's code must not lose them.
            let populate = AssertUnwindSafe(|| self.populate_extent(left, errand));
            let outcome = panic::catch_unwind(populate)
                .unwrap_or(Err(PopulateError::Source(SourceError::Panicked)));
            match outcome {
                Ok((done, bytes_read)) => {
                    // Not where panics are caught: pages that are present must not be tried again.
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

    /// Brings in the pages at the beginning of `run` that lie in one extent of the image; returns
    /// their number and, if their content is complete already, how many bytes of it were read.
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
            // New memory is zero, which is what the image says.
            self.allocate(run, true)?;
            return Ok((pages, Some(0)));
        }
        if let Some(unit) = self.load_unit(run) {
            return Ok((unit.count, Some(unit.bytes())));
        }
        self.allocate(run, false)?;
        let (address, len) = (self.populate.at(run.offset()), run.bytes() as usize);
        // SAFETY: `at` and the range check in `fetch` keep the loan within the populate mapping,
        // which `self` keeps mapped writable during this call. No Rust reference to guest memory
        // is ever made, and the pages are claimed by this call, so nobody else writes them.
        let mut destination = unsafe { Destination::new(address, len, None) };
        if let Some(read) = self.source.read_now(offset, &mut destination) {
            read.and_then(|()| destination.check_filled())?;
            return Ok((pages, Some(run.bytes())));
        }
        // A page that cannot be allocated must fail here, not as a signal in a source's thread.
        self.allocate(run, true)?;
        let arrival = Arc::new(Arrival::new(self.clone(), run, errand));
        // SAFETY: as above; `arrival` keeps the mapping, and the pages stay claimed until it is
        // dropped, which is after the loan has ended.
        let destination = unsafe { Destination::new(address, len, Some(arrival.clone())) };
        let priority = if errand.is_wanted() { Priority::Demand } else { Priority::Fill };
        let request = Request { priority, chunks: vec![Chunk { offset, destination }] };
        let told = move |outcome| arrival.tell(outcome);
        // After a panic the request and `told` are gone, and with them the arrival: it has failed.
        let submit = AssertUnwindSafe(|| self.source.submit(request).then(told));
        let _ = panic::catch_unwind(submit);
        Ok((pages, None))
    }

    /// Pages from here to the next unit, which may be created whole; `None` at the beginning of
    /// one, and where that is not done.
    fn to_unit_border(&self, first: u64) -> Option<u64> {
        self.unit_loader.get()?;
        match first % self.unit_pages() {
            0 => None,
            within => Some(self.unit_pages() - within),
        }
    }

    /// Creates the unit that `run` begins with, together with its content. `None` if the run, which
    /// is data throughout, does not begin with a whole unit, or it cannot be created so: for one,
    /// because it exists.
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
        // More of it would reach into pages that others have claimed.
        if content.len() as u64 != unit.bytes() {
            return None;
        }
        let _loading = self.loading.read().unwrap_or_else(PoisonError::into_inner);
        loader.load(unit.offset(), content).ok()?;
        word.fetch_or(bit, Ordering::Relaxed);
        // Looked at after the last byte was read. If not, the bits stay set, and reading it in the
        // ordinary way tells what is wrong.
        self.source.is_intact().then(|| {
            self.bitmap.mark_populated(unit);
            unit
        })
    }

    /// Makes sure that memory for `run` exists. Pages of shared memory come into being when they
    /// are written, unless `always`.
    fn allocate(&self, run: PageRange, always: bool) -> Result<(), BackingError> {
        let Some(allocated) = &self.allocated else {
            return if always { self.backing.allocate(run) } else { Ok(()) };
        };
        let unit = self.unit_pages();
        for index in run.first / unit..run.end().div_ceil(unit) {
            let (word, bit) = (&allocated[(index / 64) as usize], 1 << (index % 64));
            if word.load(Ordering::Relaxed) & bit == 0 {
                // Two threads may both get here: allocating what exists changes nothing.
                self.backing.allocate(PageRange::new(index * unit, unit))?;
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Whether no unit is being created just now. All writes to units that were created before
    /// are then found by [`BitmapReader::is_populated`].
    pub(crate) fn is_no_unit_loading(&self) -> bool {
        !matches!(self.loading.try_write(), Err(TryLockError::WouldBlock))
    }

    /// Makes pages present whose content is complete; false if they could not be mapped, and will
    /// be later. The order is what keeps readers from seeing anything else, and what readers write
    /// from being lost: content; the mark that it is complete; the guest's armed mapping; the bit;
    /// waiters.
    pub(crate) fn publish(
        self: &Arc<Self>,
        run: PageRange,
        errand: Errand,
        bytes_read: u64,
    ) -> bool {
        if let Some(trap) = self.guest_trap.get() {
            self.bitmap.mark_populated(run);
            if let Err(error) = trap.map_present(run) {
                // Some of the pages may be mapped, and the guest may have written to them already:
                // their content is never brought in again.
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
                // The others are to be told all the same, and the thread serves more than this.
                let _ = panic::catch_unwind(AssertUnwindSafe(callback));
            }
        }
        self.populate_rest(run, errand);
        true
    }

    /// Brings in the rest of a run that has failed, once one page of it has arrived: the source is
    /// there, and it is some of the pages that it does not have.
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

    /// Deals with claimed pages that could not be populated or mapped. They stay missing and
    /// claimed, and faults on them stay open.
    ///
    /// A run that the source does not deliver is tried by halves, down to the pages that are to
    /// blame, so that no other waits for them. Whether the source delivers anything is found out
    /// by one page first: while it is away, that is all that is asked of it beside the run.
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
                // It has arrived, and only its mapping has failed.
                self.populate_rest(run, errand);
            }
        }
    }

    /// Leaves claimed pages to the retrier.
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
        self.retrier.failed(error, run, self.image_offset + run.offset(), attempts, move || {
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

    /// The bitmap through which pages are claimed.
    pub(crate) fn claims(&self) -> &MissingBitmap {
        &self.bitmap
    }

    /// Whether each missing page of the range was tried by itself and has failed: who need not
    /// have it goes on, as it is tried again.
    pub(crate) fn is_set_aside(&self, range: PageRange) -> bool {
        self.set_aside.has_all(range, |page| self.bitmap.is_missing(page))
    }

    /// Where missing pages come from, and where the region begins there, in bytes.
    pub(crate) fn source(&self) -> (&Arc<dyn PageSource>, u64) {
        (&self.source, self.image_offset)
    }

    /// The address of a byte in the populate mapping. The caller must look only at present pages.
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

/// The extent at `offset` (bytes) of the image; data without an end where only waiting for the
/// source could tell.
pub(crate) fn extent_now(source: &dyn PageSource, offset: u64) -> Result<Extent, SourceError> {
    panic::catch_unwind(AssertUnwindSafe(|| source.extent_now(offset)))
        .unwrap_or(Some(Err(SourceError::Panicked)))
        .unwrap_or(Ok(Extent::Data { end: u64::MAX }))
}

/// How many of `len` bytes at `offset`, which have been read, were data. The source knows by now
/// what were holes.
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

/// How many of the `most` pages from `offset` (bytes in the image) on lie in the extent that was
/// found there, and whether they are a hole. Where it ends within a page, the page is data, read as
/// a whole.
pub(crate) fn pages_of(extent: Extent, offset: u64, most: u64) -> (u64, bool) {
    let pages = extent.end().saturating_sub(offset) / PAGE_SIZE;
    (pages.clamp(1, most), extent.is_hole() && pages > 0)
}

/// The source of memory that was present from the start: nobody asks it.
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

/// Why claimed pages could not be populated.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PopulateError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Backing(#[from] BackingError),
    #[error("map pages that have arrived where the guest looks: {0}; it is tried again")]
    Map(io::Error),
}
