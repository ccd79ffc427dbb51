// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The missing bitmap of a region, with the claims on its pages and the waits for them.

use std::fmt;
use std::io;
use std::ops::Deref;

use smallvec::SmallVec;

use crate::gate::Gate;
use crate::sync::{Arc, AtomicU64, Ordering};
use crate::wait::WaitTable;
#[cfg(not(loom))]
use crate::words::BitmapWords;
use crate::words::Words;
use crate::{PageRange, Wait, Waiter};

/// Words per group. Each group has a counter of its words that are not yet zero.
#[cfg(not(loom))]
const GROUP: usize = 64;
#[cfg(loom)]
const GROUP: usize = 1;

/// The result of publishing pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// Pages that were not the last: others of the bitmap are still missing.
    Some,
    /// The last missing pages of the bitmap. Returned once, to one thread.
    Last,
}

/// The missing bitmap of a region, and the claims on its pages.
///
/// Bit i of the words is page i: 1 while the page is missing. The hypervisor reads these words
/// directly. Beside them lie two private bits for each page. The thread that sets the first claims
/// the page: it may populate it, and no other thread ever does. The second marks the page as
/// populated: its content is complete, and readers may reach it before the missing bit is cleared,
/// because an armed mapping shows the page first. A page moves from missing to claimed to populated
/// to present and never back.
///
/// # Examples
///
/// ```
/// use demand_memory::{MissingBitmap, PageRange, Published};
///
/// let bitmap = MissingBitmap::new(100).unwrap();
/// // Two callers claim page 7; one gets it.
/// assert_eq!(bitmap.claim(PageRange::page(7))[..], [PageRange::page(7)]);
/// assert!(bitmap.claim(PageRange::page(7)).is_empty());
/// // ... the content is written here ...
/// assert_eq!(bitmap.publish(PageRange::page(7)), Published::Some);
/// assert!(!bitmap.is_missing(7));
/// ```
pub struct MissingBitmap(BitmapReader);

/// A read-only view of a [`MissingBitmap`], for code that does not fetch pages. It can neither
/// claim nor publish: a page published without its content would read as zeros.
///
/// ```compile_fail,E0599
/// # use demand_memory::{BitmapReader, PageRange};
/// fn publish(bitmap: &BitmapReader) {
///     bitmap.publish(PageRange::page(0));
/// }
/// ```
pub struct BitmapReader {
    pages: u64,
    missing: Words,
    /// Two words of private bits for each word of `missing`, side by side in one cache line: see
    /// [`claimed`] and [`populated`].
    claims: Words,
    /// For each group of words, the number of its words that are not zero. Written once per word, so
    /// that threads on disjoint pages share no written cache line but the word's.
    groups: Box<[AtomicU64]>,
    /// Number of groups that have a word that is not zero.
    groups_left: AtomicU64,
    /// The gate that every claim passes.
    gate: Gate,
    waiting: WaitTable,
}

impl Deref for MissingBitmap {
    type Target = BitmapReader;

    #[inline]
    fn deref(&self) -> &BitmapReader {
        &self.0
    }
}

/// Returns the index of the bits that mark a word's claimed pages.
const fn claimed(word: usize) -> usize {
    word * 2
}

/// Returns the index of the bits that mark which of a word's claimed pages are populated.
const fn populated(word: usize) -> usize {
    word * 2 + 1
}

/// The runs of pages that a claim obtained.
pub type Claimed = SmallVec<[PageRange; 2]>;

impl MissingBitmap {
    /// Creates a bitmap of `pages` pages, all missing and unclaimed.
    ///
    /// # Errors
    ///
    /// The system's error if memory cannot be allocated; `InvalidInput` if `pages` is 0.
    pub fn new(pages: u64) -> io::Result<Self> {
        Self::with_missing(pages, pages)
    }

    /// Creates a bitmap of `pages` pages, all present. It touches no memory of the bitmap.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn present(pages: u64) -> io::Result<Self> {
        Self::with_missing(pages, 0)
    }

    /// Creates a bitmap of `pages` pages, of which the first `missing` are missing: all or none.
    fn with_missing(pages: u64, missing: u64) -> io::Result<Self> {
        let words = usize::try_from(pages.div_ceil(64)).ok().filter(|words| *words > 0);
        let words = words.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "a bitmap needs at least one page")
        })?;
        // Before the counters: without enough memory this returns an error, and they would abort.
        let bits = Words::new(c"missing-bitmap", words, missing)?;
        let claims = Words::new(c"claimed-bitmap", words * 2, 0)?;
        let used = |group| if missing == 0 { 0 } else { GROUP.min(words - group * GROUP) as u64 };
        let groups: Box<[_]> =
            (0..words.div_ceil(GROUP)).map(|group| AtomicU64::new(used(group))).collect();
        Ok(MissingBitmap(BitmapReader {
            pages,
            missing: bits,
            claims,
            groups_left: AtomicU64::new(if missing == 0 { 0 } else { groups.len() as u64 }),
            groups,
            gate: Gate::new(),
            waiting: WaitTable::new(),
        }))
    }

    /// Claims all pages of the range that are missing and unclaimed, and returns them as runs in
    /// ascending order. The caller must populate and [`publish`](Self::publish) each of them.
    pub fn claim(&self, range: PageRange) -> Claimed {
        let mut runs = Claimed::new();
        for (word, mask) in range.words() {
            let mut ours = self.claim_in(word, mask);
            while ours != 0 {
                let low = ours.trailing_zeros();
                let count = (ours >> low).trailing_ones();
                let first = word as u64 * 64 + u64::from(low);
                match runs.last_mut() {
                    Some(last) if last.end() == first => last.count += u64::from(count),
                    _ => runs.push(PageRange::new(first, u64::from(count))),
                }
                ours &= u64::MAX.checked_shl(low + count).unwrap_or(0);
            }
        }
        runs
    }

    /// Claims one page like [`claim`](Self::claim), without the runs, as most faults need it.
    /// Returns whether the caller obtained the claim, and so must populate and
    /// [`publish`](Self::publish) the page.
    ///
    /// # Panics
    ///
    /// If the page does not exist.
    #[inline]
    pub fn claim_page(&self, page: u64) -> bool {
        self.claim_in((page / 64) as usize, 1 << (page % 64)) != 0
    }

    /// Claims those pages of `mask` in a word that are missing and unclaimed, and returns their
    /// bits.
    #[inline]
    fn claim_in(&self, word: usize, mask: u64) -> u64 {
        // A page that is missing here and claimed below cannot have become present in between: only
        // its claimant publishes it, and claims are never cleared.
        let wanted = self.missing[word].load(Ordering::Acquire) & mask;
        if wanted == 0 {
            return 0;
        }
        let ours = wanted & !self.claims[claimed(word)].fetch_or(wanted, Ordering::AcqRel);
        if ours != 0 {
            self.gate.pass();
        }
        ours
    }

    /// Calls `remove` with runs of those units of `range` (whole units of `unit` pages) that have
    /// no present and no claimed page. No thread obtains a claim on one before `remove` has
    /// returned. Returns the other units that have missing pages.
    ///
    /// # Errors
    ///
    /// The first error that `remove` returns.
    pub fn sweep<E>(
        &self,
        range: PageRange,
        unit: u64,
        remove: impl FnMut(PageRange) -> Result<(), E>,
    ) -> Result<Vec<PageRange>, E> {
        let _closed = self.gate.close();
        let (mut untouched, mut others) = (Vec::new(), Vec::new());
        for first in (range.first..range.end()).step_by(unit as usize) {
            let unit = PageRange::new(first, unit);
            if self.is_untouched(unit) {
                push(&mut untouched, unit);
            } else if self.first_missing(unit).is_some() {
                push(&mut others, unit);
            }
        }
        untouched.into_iter().try_for_each(remove)?;
        Ok(others)
    }

    /// Returns whether all pages of the range are missing and unclaimed.
    fn is_untouched(&self, range: PageRange) -> bool {
        range.words().all(|(word, mask)| {
            self.missing[word].load(Ordering::Acquire) & mask == mask
                && self.claims[claimed(word)].load(Ordering::Acquire) & mask == 0
        })
    }

    /// Marks claimed pages as populated: their content is complete. This must precede every step
    /// that lets a reader reach a page before [`publish`](Self::publish) has cleared its bit, such
    /// as mapping it in an armed mapping. Without such a step, it may be omitted.
    pub fn mark_populated(&self, range: PageRange) {
        for (word, mask) in range.words() {
            debug_assert_eq!(self.claims[claimed(word)].load(Ordering::Relaxed) & mask, mask);
            // Release: the content, written before, is visible to the thread that sees the bit.
            self.claims[populated(word)].fetch_or(mask, Ordering::Release);
        }
    }

    /// Makes claimed pages present and wakes the threads that wait for them. Their content must be
    /// complete and, if the guest's mapping is armed, mapped there.
    ///
    /// # Panics
    ///
    /// In builds with debug assertions, if one of the pages is unclaimed or already present.
    pub fn publish(&self, range: PageRange) -> Published {
        let last = if range.count == 1 {
            self.publish_in((range.first / 64) as usize, 1 << (range.first % 64))
        } else {
            range.words().fold(false, |last, (word, mask)| last | self.publish_in(word, mask))
        };
        self.waiting.wake(range, &|range| self.first_missing(range));
        if last { Published::Last } else { Published::Some }
    }

    /// Makes claimed pages of a word present. Returns whether they were the bitmap's last.
    #[inline]
    fn publish_in(&self, word: usize, mask: u64) -> bool {
        debug_assert_eq!(self.claims[claimed(word)].load(Ordering::Relaxed) & mask, mask);
        // Release: the content, written before, is visible to a thread that sees the bit cleared.
        // Acquire: the thread that clears the last bit has seen everything that others published.
        let before = self.missing[word].fetch_and(!mask, Ordering::AcqRel);
        debug_assert_eq!(before & mask, mask, "a page was published twice");
        before & !mask == 0
            && self.groups[word / GROUP].fetch_sub(1, Ordering::AcqRel) == 1
            && self.groups_left.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Ends all waits, current and future: the VM is shutting down.
    pub fn stop(&self) {
        self.waiting.stop();
    }
}

impl BitmapReader {
    /// Returns the number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Returns the words of the missing bitmap, as the hypervisor reads them.
    #[cfg(not(loom))] // The readers of the words are not modelled.
    pub fn words(&self) -> BitmapWords<'_> {
        BitmapWords::new(&self.missing)
    }

    /// Returns whether the page is missing.
    ///
    /// # Panics
    ///
    /// If the page does not exist.
    pub fn is_missing(&self, page: u64) -> bool {
        // Acquire: a thread that sees the bit cleared sees the content.
        self.missing[(page / 64) as usize].load(Ordering::Acquire) >> (page % 64) & 1 == 1
    }

    /// Returns true if the pages from `first` to `last` lie in one word and are all present: the
    /// fast check of an access to a few bytes. `false` means that the slow path must decide.
    #[inline]
    #[cfg(not(loom))] // The only caller, the region, is not modelled.
    pub(crate) fn present_in_word(&self, first: u64, last: u64) -> bool {
        first / 64 == last / 64
            && self.missing.get((first / 64) as usize).is_some_and(|word| {
                let mask = (2u64 << (last - first)).wrapping_sub(1) << (first % 64);
                word.load(Ordering::Acquire) & mask == 0
            })
    }

    /// Returns the first missing page of the range.
    pub fn first_missing(&self, range: PageRange) -> Option<u64> {
        range.words().find_map(|(word, mask)| {
            let bits = self.missing[word].load(Ordering::Acquire) & mask;
            (bits != 0).then(|| word as u64 * 64 + u64::from(bits.trailing_zeros()))
        })
    }

    /// Returns whether the page's content is in memory: the page is present or about to be, and
    /// readers may already have reached it and written to it. Otherwise its content is that of the
    /// source, whether a thread has claimed the page or not.
    ///
    /// # Panics
    ///
    /// If the page does not exist.
    pub fn is_populated(&self, page: u64) -> bool {
        // Acquire: the content is visible to the thread that sees the bit.
        let populated = &self.claims[populated((page / 64) as usize)];
        !self.is_missing(page) || populated.load(Ordering::Acquire) >> (page % 64) & 1 == 1
    }

    /// Returns the number of missing pages in the range.
    pub fn count_missing(&self, range: PageRange) -> u64 {
        let count = |(word, mask): (usize, u64)| {
            u64::from((self.missing[word].load(Ordering::Acquire) & mask).count_ones())
        };
        range.words().map(count).sum()
    }

    /// Returns whether no page is missing any more.
    pub fn is_complete(&self) -> bool {
        self.groups_left.load(Ordering::Acquire) == 0
    }

    /// Waits until no page of the range is missing. The missing ones must be claimed: a wait
    /// fetches nothing.
    pub fn wait(&self, range: PageRange, waiter: &Arc<Waiter>) -> Wait {
        if self.first_missing(range).is_none() {
            return Wait::Present;
        }
        self.waiting.wait(range, waiter, &|range| self.first_missing(range))
    }

    /// Like [`wait`](Self::wait), but waits for about `limit` at most. Returns `None` after that
    /// time, or earlier.
    #[cfg(not(loom))] // The only caller, background fill, is not modelled.
    pub(crate) fn wait_within(
        &self,
        range: PageRange,
        waiter: &Arc<Waiter>,
        limit: std::time::Duration,
    ) -> Option<Wait> {
        self.waiting.wait_within(range, waiter, Some(limit), &|range| self.first_missing(range))
    }

    /// Returns whether a thread or a callback, background fill excepted, waits for a page of the
    /// range.
    #[cfg(not(loom))]
    pub(crate) fn is_wanted(&self, range: PageRange) -> bool {
        self.waiting.is_wanted(range)
    }

    /// Returns the missing pages that waiters other than background fill currently wait for.
    #[cfg(not(loom))]
    pub(crate) fn waited_for(&self) -> Vec<u64> {
        self.waiting.waited_for()
    }

    /// Calls `callback` when no page of the range is missing: at once on this thread, or later on
    /// the thread that publishes the last of them. The callback must not block. If the bitmap is
    /// [stopped](MissingBitmap::stop) first, the callback is dropped without a call.
    pub fn when_present(&self, range: PageRange, callback: impl FnOnce() + Send + 'static) {
        self.waiting.when_present(range, Box::new(callback), &|range| self.first_missing(range));
    }

    /// Returns whether [`stop`](MissingBitmap::stop) was called.
    pub fn is_stopped(&self) -> bool {
        self.waiting.is_stopped()
    }
}

/// Appends a run to ascending runs, and merges it with the last if they are adjacent.
fn push(runs: &mut Vec<PageRange>, run: PageRange) {
    match runs.last_mut() {
        Some(last) if last.end() == run.first => last.count += run.count,
        _ => runs.push(run),
    }
}

impl fmt::Debug for MissingBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for BitmapReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MissingBitmap").field("pages", &self.pages).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn exactly_all_pages_are_missing_at_first() {
        let bitmap = MissingBitmap::new(130).unwrap();
        assert_eq!(bitmap.count_missing(PageRange::new(0, 130)), 130);
        assert_eq!(bitmap.words().load(2), 3);
        for pages in [1, 7, 8, 9, 64, 1 << 17, (1 << 20) + 13] {
            let bitmap = MissingBitmap::new(pages).unwrap();
            assert_eq!(bitmap.count_missing(PageRange::new(0, pages)), pages);
            let beyond: u32 =
                (0..bitmap.words().len()).map(|word| bitmap.words().load(word).count_ones()).sum();
            assert_eq!(u64::from(beyond), pages, "no bit behind the last page");
        }
        assert!(MissingBitmap::new(0).is_err());
        assert!(MissingBitmap::present(u64::MAX).is_err());
    }

    #[test]
    fn initially_present_bitmap_is_complete_and_costs_nothing() {
        use std::os::unix::fs::MetadataExt;
        // The bitmap of 1 TiB of memory.
        let bitmap = MissingBitmap::present(1 << 28).unwrap();
        assert!(bitmap.is_complete() && !bitmap.is_missing((1 << 28) - 1));
        assert!(bitmap.claim(PageRange::new(1 << 20, 5000)).is_empty());
        let metadata = bitmap.words().file().metadata().unwrap();
        assert_eq!(metadata.len(), 1 << 25);
        assert!(metadata.blocks() * 512 < 1 << 16, "{} blocks", metadata.blocks());
        assert!(MissingBitmap::present(0).is_err());
    }

    #[test]
    fn holders_of_the_file_can_only_read() {
        use std::os::fd::AsRawFd;
        use std::os::unix::fs::FileExt;
        // Large enough that the bitmap's own mapping has not yet touched all of its pages.
        let bitmap = MissingBitmap::new(1 << 20).unwrap();
        let file = bitmap.words().file().clone();
        let refused = |error: io::Error| {
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
        };
        refused(file.write_all_at(&[0; 8], 0).unwrap_err());
        refused(file.set_len(0).unwrap_err());
        refused(file.set_len(1 << 20).unwrap_err());
        refused(crate::Mapping::shared(&file, 1 << 17, false).unwrap_err());
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the call takes no pointer, and all accesses to the file's content are atomic.
        let punched = unsafe { libc::fallocate(file.as_raw_fd(), punch, 0, 4096) };
        assert_eq!(punched, -1, "a hole would make pages present");
        refused(io::Error::last_os_error());
        // The bitmap itself can still write.
        for page in [0, (1 << 20) - 1] {
            assert!(bitmap.claim_page(page));
            bitmap.mark_populated(PageRange::page(page));
            bitmap.publish(PageRange::page(page));
        }
        let mut word = [0; 8];
        file.read_exact_at(&mut word, (1 << 17) - 8).unwrap();
        assert_eq!(u64::from_le_bytes(word), u64::MAX >> 1);
    }

    #[test]
    fn claim_spans_words_and_skips_claimed_pages() {
        let bitmap = MissingBitmap::new(512).unwrap();
        assert_eq!(bitmap.claim(PageRange::new(100, 2))[..], [PageRange::new(100, 2)]);
        let runs = bitmap.claim(PageRange::new(0, 512));
        assert_eq!(runs[..], [PageRange::new(0, 100), PageRange::new(102, 410)]);
        assert!(bitmap.claim(PageRange::new(0, 512)).is_empty());
    }

    #[test]
    fn a_single_page_is_claimed_like_a_run() {
        let bitmap = MissingBitmap::new(70).unwrap();
        assert!(bitmap.claim_page(64));
        assert!(!bitmap.claim_page(64), "it is claimed");
        let runs = bitmap.claim(PageRange::new(63, 3));
        assert_eq!(runs[..], [PageRange::page(63), PageRange::page(65)]);
        assert!(!bitmap.claim_page(63), "it was claimed with a run");
        bitmap.publish(PageRange::page(64));
        assert!(!bitmap.claim_page(64), "it is present");
        assert!(bitmap.is_missing(63) && !bitmap.is_missing(64) && bitmap.is_missing(65));
    }

    #[test]
    fn sweep_leaves_claimed_units_alone() {
        let bitmap = MissingBitmap::new(512).unwrap();
        bitmap.claim(PageRange::page(70));
        bitmap.claim(PageRange::new(128, 64));
        bitmap.publish(PageRange::new(128, 64));
        let mut removed = Vec::new();
        let others = bitmap.sweep(PageRange::new(0, 512), 64, |run| {
            removed.push(run);
            Ok::<_, ()>(())
        });
        assert_eq!(others, Ok(vec![PageRange::new(64, 64)]));
        assert_eq!(removed, [PageRange::new(0, 64), PageRange::new(192, 320)]);
        assert_eq!(bitmap.sweep(PageRange::new(192, 64), 64, |_| Err("full")), Err("full"));
        // In units of one page.
        removed.clear();
        let others = bitmap.sweep(PageRange::new(64, 65), 1, |run| {
            removed.push(run);
            Ok::<_, ()>(())
        });
        assert_eq!(others, Ok(vec![PageRange::page(70)]));
        assert_eq!(removed, [PageRange::new(64, 6), PageRange::new(71, 57)]);
    }

    #[test]
    fn present_pages_are_not_claimed_again() {
        let bitmap = MissingBitmap::new(64).unwrap();
        bitmap.claim(PageRange::page(63));
        bitmap.publish(PageRange::page(63));
        assert_eq!(bitmap.claim(PageRange::new(0, 64))[..], [PageRange::new(0, 63)]);
    }

    #[test]
    fn the_last_page_is_told_once() {
        let bitmap = MissingBitmap::new(5000).unwrap();
        let last = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for page in 0..5000 {
                        for run in bitmap.claim(PageRange::page(page)) {
                            if bitmap.publish(run) == Published::Last {
                                last.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                    }
                });
            }
        });
        assert!(bitmap.is_complete());
        assert_eq!(last.into_inner(), 1);
        assert_eq!(bitmap.first_missing(PageRange::new(0, 5000)), None);
    }

    #[test]
    fn waiter_resumes_once_its_range_is_present() {
        let bitmap = MissingBitmap::new(512).unwrap();
        let waiter = Waiter::new();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| bitmap.wait(PageRange::new(0, 512), &waiter));
            for run in bitmap.claim(PageRange::new(0, 512)) {
                for page in (run.first..run.end()).rev() {
                    bitmap.publish(PageRange::page(page));
                }
            }
            assert_eq!(waiting.join().unwrap(), Wait::Present);
        });
    }

    #[test]
    fn a_waiter_can_be_kicked_and_waits_again() {
        let bitmap = MissingBitmap::new(64).unwrap();
        bitmap.claim(PageRange::page(1));
        let waiter = Waiter::new();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| bitmap.wait(PageRange::page(1), &waiter));
            thread::sleep(Duration::from_millis(20));
            waiter.kick();
            assert_eq!(waiting.join().unwrap(), Wait::Kicked);
            waiter.clear_kick();
            let waiting = scope.spawn(|| bitmap.wait(PageRange::page(1), &waiter));
            bitmap.publish(PageRange::page(1));
            assert_eq!(waiting.join().unwrap(), Wait::Present);
        });
    }

    #[test]
    fn shared_waiter_wakes_each_thread() {
        let bitmap = std::sync::Arc::new(MissingBitmap::new(64).unwrap());
        bitmap.claim(PageRange::new(3, 2));
        let waiter = Waiter::new();
        let waits = [3, 4].map(|page| {
            let (sender, receiver) = std::sync::mpsc::channel();
            let (bitmap, waiter) = (bitmap.clone(), waiter.clone());
            thread::spawn(move || sender.send(bitmap.wait(PageRange::page(page), &waiter)));
            (page, receiver)
        });
        for (page, _) in &waits {
            while !bitmap.is_wanted(PageRange::page(*page)) {
                thread::yield_now();
            }
        }
        for (page, receiver) in waits {
            bitmap.publish(PageRange::page(page));
            let outcome = receiver.recv_timeout(Duration::from_secs(20));
            assert_eq!(outcome, Ok(Wait::Present), "the wait for page {page}");
        }
    }

    #[test]
    fn stopping_ends_all_waits_and_drops_callbacks() {
        let bitmap = MissingBitmap::new(64).unwrap();
        let waiter = Waiter::new();
        let kept = std::sync::Arc::new(());
        let in_callback = kept.clone();
        bitmap.when_present(PageRange::page(0), move || panic!("{in_callback:?} never came"));
        thread::scope(|scope| {
            let waiting = scope.spawn(|| bitmap.wait(PageRange::page(1), &waiter));
            thread::sleep(Duration::from_millis(20));
            bitmap.stop();
            assert_eq!(waiting.join().unwrap(), Wait::Stopped);
        });
        assert_eq!(bitmap.wait(PageRange::page(1), &waiter), Wait::Stopped);
        assert_eq!(std::sync::Arc::strong_count(&kept), 1);
    }

    #[test]
    fn a_callback_runs_when_its_unit_is_whole() {
        let bitmap = MissingBitmap::new(1024).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        bitmap.when_present(PageRange::new(512, 512), move || sender.send(()).unwrap());
        bitmap.claim(PageRange::new(0, 1024));
        for page in (512..1024).rev() {
            assert!(receiver.try_recv().is_err());
            bitmap.publish(PageRange::page(page));
        }
        receiver.try_recv().unwrap();
    }
}
