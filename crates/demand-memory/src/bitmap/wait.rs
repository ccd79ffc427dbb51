// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Waits for pages that another thread populates.

use std::fmt;

use crossbeam_utils::CachePadded;
use demand_source::to_usize;
use smallvec::SmallVec;

use crate::PageRange;
use crate::sync::{Arc, AtomicBool, AtomicUsize, Condvar, Mutex, MutexGuard, Ordering, fence};

/// The result of a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Success: all pages are present.
    Present,
    /// A kick of the waiter: the pages may still be missing.
    Kicked,
    /// A stop of the memory: the pages will not arrive.
    Stopped,
}

#[derive(Default)]
struct State {
    kicked: bool,
    /// The waits in progress: more than one only if several threads share the waiter.
    waits: SmallVec<[Sleep; 1]>,
    next: u64,
}

/// A wait in progress.
struct Sleep {
    number: u64,
    woken: bool,
}

/// The handle of a thread that may wait for pages, through which other threads can kick it.
///
/// Each thread has a separate waiter; a kicking thread holds a clone of it. Threads that share a
/// waiter are kicked together: a kick that is cleared before all of them have
/// returned may be missed by some.
///
/// # Examples
///
/// ```
/// use demand_memory::{MissingBitmap, PageRange, Wait, Waiter};
///
/// let bitmap = MissingBitmap::new(64).unwrap();
/// let waiter = Waiter::new();
/// waiter.kick();
/// assert_eq!(bitmap.wait(PageRange::page(3), &waiter), Wait::Kicked);
/// waiter.clear_kick();
/// ```
#[derive(Clone)]
pub struct Waiter(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
    /// Whether the waiter belongs to background fill.
    background: bool,
}

impl Waiter {
    /// Creates a waiter that has not been kicked.
    pub fn new() -> Self {
        Self::with(false)
    }

    /// Creates a waiter for background fill, whose waits do not mark pages as wanted.
    pub(crate) fn background() -> Self {
        Self::with(true)
    }

    fn with(background: bool) -> Self {
        let state = Mutex::new(State::default());
        Waiter(Arc::new(Inner { state, changed: Condvar::new(), background }))
    }

    /// Ends the current wait, and every later one until [`clear_kick`](Self::clear_kick).
    pub fn kick(&self) {
        self.lock().kicked = true;
        self.0.changed.notify_all();
    }

    /// Clears a kick, so that the thread can wait again.
    pub fn clear_kick(&self) {
        self.lock().kicked = false;
    }

    /// Returns whether the waiter belongs to background fill.
    pub(crate) fn is_background(&self) -> bool {
        self.0.background
    }

    /// Returns whether the thread is waiting for a page at this moment.
    pub fn is_waiting(&self) -> bool {
        !self.lock().waits.is_empty()
    }

    /// Begins a wait and returns its number; `None` if the waiter is kicked.
    /// [`sleep`](Self::sleep) or [`end`](Self::end) ends the wait.
    fn begin(&self) -> Option<u64> {
        let mut state = self.lock();
        if state.kicked {
            return None;
        }
        let number = state.next;
        state.next += 1;
        state.waits.push(Sleep { number, woken: false });
        Some(number)
    }

    fn end(&self, number: u64) {
        self.lock().waits.retain(|wait| wait.number != number);
    }

    fn wake(&self, number: u64) {
        // A kick may have ended the wait.
        if let Some(wait) = self.lock().waits.iter_mut().find(|wait| wait.number == number) {
            wait.woken = true;
        }
        self.0.changed.notify_all();
    }

    /// Sleeps until woken or kicked.
    fn sleep(&self, number: u64) {
        let mut state = self.lock();
        let woken =
            |state: &State| state.waits.iter().all(|wait| wait.number != number || wait.woken);
        while !woken(&state) && !state.kicked {
            state = self.0.changed.wait(state).unwrap_or_else(|error| error.into_inner());
        }
        state.waits.retain(|wait| wait.number != number);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(|error| error.into_inner())
    }
}

impl Default for Waiter {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Waiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiter").finish_non_exhaustive()
    }
}

type Callback = Box<dyn FnOnce() + Send>;

/// The recipient of a wake.
pub(super) enum Recipient {
    /// A waiter, and the number of its wait.
    Thread(Waiter, u64),
    Callback(Callback),
    /// A callback of background fill.
    Background(Callback),
}

impl Recipient {
    pub(super) fn callback(callback: impl FnOnce() + Send + 'static) -> Self {
        Recipient::Callback(Box::new(callback))
    }

    pub(super) fn background_callback(callback: impl FnOnce() + Send + 'static) -> Self {
        Recipient::Background(Box::new(callback))
    }

    fn is_background(&self) -> bool {
        match self {
            Recipient::Thread(waiter, _) => waiter.0.background,
            Recipient::Callback(_) => false,
            Recipient::Background(_) => true,
        }
    }
}

/// The state of its pages that a waiter waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Until {
    Present,
    /// Present, or populated and not present yet: enough for background fill to continue.
    Populated,
}

struct Entry {
    /// The page that the entry currently waits for: the first awaited page of `range`.
    page: u64,
    range: PageRange,
    recipient: Recipient,
}

impl Entry {
    fn until(&self) -> Until {
        match self.recipient {
            Recipient::Thread(..) | Recipient::Callback(_) => Until::Present,
            Recipient::Background(_) => Until::Populated,
        }
    }
}

#[derive(Default)]
struct Bucket {
    /// Number of entries that are in the list or about to be. Publishers read it and, while it is
    /// 0, touch nothing else here.
    waiting: AtomicUsize,
    entries: Mutex<Vec<Entry>>,
}

impl Bucket {
    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(|error| error.into_inner())
    }
}

#[cfg(not(loom))]
const BUCKETS: usize = 64;
#[cfg(loom)]
const BUCKETS: usize = 2;

/// The waiters for pages of one bitmap, in lists chosen by the page's word, so that waiters for
/// different words hardly ever contend.
pub(crate) struct WaitTable {
    buckets: [CachePadded<Bucket>; BUCKETS],
    stopped: AtomicBool,
}

impl WaitTable {
    pub(crate) fn new() -> Self {
        WaitTable {
            buckets: std::array::from_fn(|_| CachePadded::new(Bucket::default())),
            stopped: AtomicBool::new(false),
        }
    }

    fn bucket(&self, word: u64) -> &Bucket {
        &self.buckets[to_usize(word % BUCKETS as u64)]
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Wakes all waiters; all current and future waits for missing pages return [`Wait::Stopped`].
    /// Callbacks are dropped: their pages will not arrive.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        // Pairs with the fence in `enter`: a waiter that this finds in no list sees the flag.
        fence(Ordering::SeqCst);
        for bucket in &self.buckets {
            let entries = std::mem::take(&mut *bucket.lock());
            bucket.waiting.fetch_sub(entries.len(), Ordering::Relaxed);
            for entry in entries {
                if let Recipient::Thread(waiter, number) = entry.recipient {
                    waiter.wake(number);
                }
            }
        }
    }

    /// Adds the entry to the list of the first missing page of its range. Gives it back if no page
    /// is missing, or the table was stopped.
    fn enter(&self, mut entry: Entry, first_missing: &FirstMissing<'_>) -> Result<(), Entry> {
        loop {
            let until = entry.until();
            let Some(page) = first_missing(entry.range, until) else { return Err(entry) };
            let bucket = self.bucket(page / 64);
            bucket.waiting.fetch_add(1, Ordering::Relaxed);
            // Pairs with the fences in `wake` and `stop`: either they see this entry's count, and
            // then wait for the lock, or the check below sees their change.
            fence(Ordering::SeqCst);
            let mut entries = bucket.lock();
            if !self.is_stopped() && first_missing(PageRange::page(page), until).is_some() {
                entry.page = page;
                entries.push(entry);
                return Ok(());
            }
            drop(entries);
            bucket.waiting.fetch_sub(1, Ordering::Relaxed);
            if self.is_stopped() {
                return Err(entry);
            }
        }
    }

    /// Waits until no page of `range` is missing. Calls `listed` before it sleeps, when
    /// [`is_wanted`](Self::is_wanted) finds the wait.
    pub(crate) fn wait(
        &self,
        range: PageRange,
        waiter: &Waiter,
        listed: &dyn Fn(),
        first_missing: &FirstMissing<'_>,
    ) -> Wait {
        loop {
            if first_missing(range, Until::Present).is_none() {
                return Wait::Present;
            }
            let Some(number) = waiter.begin() else { return Wait::Kicked };
            let entry =
                Entry { page: 0, range, recipient: Recipient::Thread(waiter.clone(), number) };
            if self.enter(entry, first_missing).is_err() {
                waiter.end(number);
                return match first_missing(range, Until::Present) {
                    None => Wait::Present,
                    Some(_) => Wait::Stopped,
                };
            }
            listed();
            waiter.sleep(number);
            // After a kick the entry may still be listed.
            self.leave(range, waiter, number);
        }
    }

    /// Returns whether a waiter other than background fill waits for a page of the range.
    pub(crate) fn is_wanted(&self, range: PageRange) -> bool {
        let wants = |entry: &Entry| {
            !entry.range.intersect(range).is_empty() && !entry.recipient.is_background()
        };
        // A wait that begins now may be missed.
        let used = |bucket: &&CachePadded<Bucket>| bucket.waiting.load(Ordering::Relaxed) != 0;
        self.buckets.iter().filter(used).any(|bucket| bucket.lock().iter().any(wants))
    }

    /// Returns the pages that waiters other than background fill currently wait for.
    pub(crate) fn waited_for(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        // A later call finds a wait that begins now.
        let used = |bucket: &&CachePadded<Bucket>| bucket.waiting.load(Ordering::Relaxed) != 0;
        for bucket in self.buckets.iter().filter(used) {
            let entries = bucket.lock();
            let wanted = entries.iter().filter(|entry| !entry.recipient.is_background());
            pages.extend(wanted.map(|entry| entry.page));
        }
        pages
    }

    /// Removes a wait's entry, wherever in its range it waits.
    fn leave(&self, range: PageRange, waiter: &Waiter, number: u64) {
        let others = |entry: &Entry| match &entry.recipient {
            Recipient::Thread(other, its) => *its != number || !Arc::ptr_eq(&other.0, &waiter.0),
            Recipient::Callback(_) | Recipient::Background(_) => true,
        };
        for bucket in self.buckets_of(range) {
            let mut entries = bucket.lock();
            let before = entries.len();
            entries.retain(others);
            bucket.waiting.fetch_sub(before - entries.len(), Ordering::Relaxed);
        }
    }

    /// Calls `callback` when no page of `range` is missing: now on this thread, or later on the
    /// thread that publishes the last of them. If the table is stopped, the callback is dropped
    /// without a call.
    pub(crate) fn when_present(
        &self,
        range: PageRange,
        callback: Recipient,
        first_missing: &FirstMissing<'_>,
    ) {
        self.enter_or_tell(Entry { page: 0, range, recipient: callback }, first_missing);
    }

    fn enter_or_tell(&self, entry: Entry, first_missing: &FirstMissing<'_>) {
        let Err(entry) = self.enter(entry, first_missing) else { return };
        let is_over = first_missing(entry.range, entry.until()).is_none();
        match entry.recipient {
            Recipient::Callback(callback) | Recipient::Background(callback) => {
                if is_over {
                    call(callback);
                }
            }
            Recipient::Thread(waiter, number) => waiter.wake(number),
        }
    }

    /// Wakes the waiters for these pages. Must be called after the pages' bits are cleared.
    #[inline]
    pub(crate) fn wake(&self, range: PageRange, first_missing: &FirstMissing<'_>) {
        // Pairs with the fence in `enter`.
        fence(Ordering::SeqCst);
        if range.count == 1 {
            return self.wake_bucket(self.bucket(range.first / 64), first_missing);
        }
        for bucket in self.buckets_of(range) {
            self.wake_bucket(bucket, first_missing);
        }
    }

    #[inline]
    fn wake_bucket(&self, bucket: &Bucket, first_missing: &FirstMissing<'_>) {
        // Nearly always 0: publishing then costs no more than this load.
        if bucket.waiting.load(Ordering::Relaxed) != 0 {
            self.tell_arrived(bucket, first_missing);
        }
    }

    #[cold]
    fn tell_arrived(&self, bucket: &Bucket, first_missing: &FirstMissing<'_>) {
        let mut arrived = SmallVec::<[Entry; 4]>::new();
        {
            let mut entries = bucket.lock();
            let mut index = 0;
            while index < entries.len() {
                let (page, until) = (PageRange::page(entries[index].page), entries[index].until());
                if first_missing(page, until).is_none() {
                    arrived.push(entries.swap_remove(index));
                } else {
                    index += 1;
                }
            }
            bucket.waiting.fetch_sub(arrived.len(), Ordering::Relaxed);
        }
        // Outside the lock: an entry may move to another list, and a callback may do anything but
        // block.
        for entry in arrived {
            self.enter_or_tell(entry, first_missing);
        }
    }

    fn buckets_of(&self, range: PageRange) -> impl Iterator<Item = &Bucket> {
        let words = range.first / 64..range.end().div_ceil(64);
        let words = words.start..words.end.min(words.start + BUCKETS as u64);
        words.map(|word| self.bucket(word))
    }
}

/// Calls a callback. A panic in it, already reported, must not keep the other waiters from waking.
fn call(callback: Callback) {
    #[cfg(not(loom))]
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(callback));
    // The model checker's assertions are panics, and must pass.
    #[cfg(loom)]
    callback();
}

/// A function that returns the first page of a range that is awaited.
pub(crate) type FirstMissing<'a> = dyn Fn(PageRange, Until) -> Option<u64> + 'a;
