// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The missing bitmap of a region, with the claims on its pages and the waits for them.

use std::fmt;
use std::io;
use std::ops::Deref;

use demand_source::to_usize;
use smallvec::SmallVec;

use crate::PageRange;
use crate::sync::{AtomicU64, Ordering};

mod gate;
mod reader;
#[cfg(all(test, not(loom)))] // They use words of memory.
mod tests;
mod wait;
#[cfg(not(loom))]
mod words;
#[cfg(loom)]
#[path = "bitmap/model.rs"]
mod words;

use gate::Gate;
use wait::WaitTable;
pub use wait::{Wait, Waiter};
#[cfg(not(loom))]
pub use words::BitmapWords;
pub(crate) use words::Words;

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
    pub fn all_present(pages: u64) -> io::Result<Self> {
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
        for first in (range.first..range.end()).step_by(to_usize(unit)) {
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
    pub(crate) fn is_untouched(&self, range: PageRange) -> bool {
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
        self.waiting.wake(range, &self.first_awaited());
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

    /// Tells background fill of populated pages that stay missing: it waits no longer for them.
    pub(crate) fn tell_populated(&self, range: PageRange) {
        self.waiting.wake(range, &self.first_awaited());
    }

    /// Ends all waits, current and future: the VM is shutting down.
    pub fn stop(&self) {
        self.waiting.stop();
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
