// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The first touches of a memory's pages, in order, and the pages that are held for them.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::bitmap::Words;
use crate::{BitmapReader, FaultPath, PAGE_SIZE, PageRange, to_usize};

/// The first access to a page that was missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// Number of the page in the source's image.
    pub page: u64,
    /// The path of the access.
    pub path: FaultPath,
    /// Time since the log was created, in microseconds.
    pub at_us: u64,
}

/// The pages of background fill that are held: populated, but missing until their first touch, so
/// that it is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// All of them: each first touch is seen.
    All,
    /// One of 64 of those that are [expected](crate::Pager::note_touches): a sample.
    Sample,
}

/// Numbers of first touches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TouchCounts {
    /// First touches of expected pages that were held.
    pub hits: u64,
    /// First touches of expected pages that had not arrived.
    pub late: u64,
    /// First touches of other pages that had not arrived.
    pub misses: u64,
    /// Expected pages that have arrived by background fill.
    pub arrived: u64,
    /// Those of them that were held.
    pub held: u64,
}

impl TouchCounts {
    /// Returns the number of expected pages that have arrived in vain, as far as is known: held and
    /// not touched. A sample is scaled up.
    pub fn waste(&self) -> u64 {
        let untouched = u128::from(self.held.saturating_sub(self.hits));
        let scaled = untouched * u128::from(self.arrived) / u128::from(self.held.max(1));
        u64::try_from(scaled).unwrap_or(u64::MAX)
    }
}

/// The first touches of a VM's memory, in order: one log for all regions, which
/// [`Pager::note_touches`](crate::Pager::note_touches) gives to each.
///
/// # Examples
///
/// ```
/// use demand_memory::{
///     BackingKind, FaultPath, Hold, MemfdBacking, PageRange, Pager, PagerConfig, TouchLog, Waiter,
/// };
/// use demand_source::LocalFile;
/// use std::sync::Arc;
///
/// let image = tempfile::NamedTempFile::new().unwrap();
/// image.as_file().set_len(1 << 20).unwrap();
/// let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, 1 << 20).unwrap());
/// let source = Arc::new(LocalFile::open(image.path()).unwrap());
/// let pager = Pager::new(PagerConfig::new(backing, source)).unwrap();
///
/// let log = Arc::new(TouchLog::new(Hold::All));
/// pager.note_touches(&log, &[]).unwrap();
/// // Background fill brings the page, which is held until its first touch.
/// pager.fetch(PageRange::page(7), FaultPath::Fill).unwrap();
/// while !pager.bitmap().is_populated(7) {
///     std::thread::yield_now();
/// }
/// assert!(pager.bitmap().is_missing(7));
/// pager.ensure(PageRange::page(7), FaultPath::Guest, &Waiter::new()).unwrap();
/// assert_eq!(log.touches()[0].page, 7);
/// ```
pub struct TouchLog {
    hold: Hold,
    begun: Instant,
    most: usize,
    touches: Mutex<Vec<Touch>>,
    /// Touches that found no room.
    left_out: AtomicU64,
    hits: AtomicU64,
    late: AtomicU64,
    misses: AtomicU64,
    arrived: AtomicU64,
    held: AtomicU64,
}

impl TouchLog {
    /// The default of the largest number of touches that are kept: those of 4 GiB, which take
    /// 24 MiB.
    pub const MOST: usize = 1 << 20;

    /// Creates an empty log.
    pub fn new(hold: Hold) -> Self {
        TouchLog::with_most(hold, TouchLog::MOST)
    }

    /// Creates an empty log that keeps at most this many touches: the first ones.
    pub fn with_most(hold: Hold, most: usize) -> Self {
        TouchLog {
            hold,
            begun: Instant::now(),
            most,
            touches: Mutex::default(),
            left_out: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            late: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            arrived: AtomicU64::new(0),
            held: AtomicU64::new(0),
        }
    }

    /// Returns the touches so far, in order.
    pub fn touches(&self) -> Vec<Touch> {
        self.lock().clone()
    }

    /// Returns the number of touches so far, also of those for which there was no room.
    pub fn len(&self) -> u64 {
        self.lock().len() as u64 + self.left_out()
    }

    /// Returns whether no page was touched so far.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the number of touches for which there was no room.
    pub fn left_out(&self) -> u64 {
        self.left_out.load(Ordering::Relaxed)
    }

    /// Returns the numbers of touches so far.
    pub fn counts(&self) -> TouchCounts {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        TouchCounts {
            hits: get(&self.hits),
            late: get(&self.late),
            misses: get(&self.misses),
            arrived: get(&self.arrived),
            held: get(&self.held),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Touch>> {
        self.touches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends the pages of these bits, the first of which is `first`.
    fn append(&self, first: u64, mut bits: u64, path: FaultPath) {
        let mut touches = self.lock();
        // With the lock held, so that times rise with the order.
        let at_us = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        while bits != 0 {
            if touches.len() >= self.most {
                self.left_out.fetch_add(u64::from(bits.count_ones()), Ordering::Relaxed);
                return;
            }
            let page = first + u64::from(bits.trailing_zeros());
            touches.push(Touch { page, path, at_us });
            bits &= bits - 1;
        }
    }
}

impl fmt::Debug for TouchLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TouchLog").field("hold", &self.hold).finish_non_exhaustive()
    }
}

/// The first touches of one region, and its held pages.
///
/// A held page is claimed and populated, and its missing bit is set. The thread that clears its bit
/// in `held` publishes it, so it is published once. Three kinds of threads do: one that touches the
/// page, one that populates it for fill and then finds a waiter, or that the notes have ended, and
/// the one that ends them.
pub(crate) struct FirstTouches {
    log: Arc<TouchLog>,
    /// The image's page that is the region's first.
    first: u64,
    ended: AtomicBool,
    touched: Words,
    held: Words,
    expected: Words,
}

impl FirstTouches {
    pub(crate) fn new(
        log: &Arc<TouchLog>,
        pages: u64,
        image_offset: u64,
        expected: &[PageRange],
    ) -> io::Result<Self> {
        let words = to_usize(pages.div_ceil(64));
        let all = PageRange::new(0, pages);
        let bits = Words::new(c"expected-pages", words, 0)?;
        for (word, mask) in expected.iter().flat_map(|range| range.intersect(all).words()) {
            bits[word].fetch_or(mask, Ordering::Relaxed);
        }
        Ok(FirstTouches {
            log: log.clone(),
            first: image_offset / PAGE_SIZE,
            ended: AtomicBool::new(false),
            touched: Words::new(c"touched-pages", words, 0)?,
            held: Words::new(c"held-pages", words, 0)?,
            expected: bits,
        })
    }

    /// Notes an access to these pages. Returns the held ones, which the caller must publish.
    pub(crate) fn touch(
        &self,
        bitmap: &BitmapReader,
        range: PageRange,
        path: FaultPath,
    ) -> Vec<PageRange> {
        let mut taken = Vec::new();
        for (word, mask) in range.words() {
            let missing = bitmap.missing_in(word) & mask;
            if missing == 0 {
                continue;
            }
            let new = missing & !self.touched[word].fetch_or(missing, Ordering::AcqRel);
            let held = self.take_in(word, missing);
            push_runs(&mut taken, word, held);
            if new == 0 || self.ended.load(Ordering::Relaxed) {
                continue;
            }
            let expected = self.expected[word].load(Ordering::Relaxed);
            let count = |counter: &AtomicU64, bits: u64| {
                counter.fetch_add(u64::from(bits.count_ones()), Ordering::Relaxed);
            };
            count(&self.log.hits, new & held & expected);
            count(&self.log.late, new & !held & expected);
            count(&self.log.misses, new & !held & !expected);
            self.log.append(self.first + word as u64 * 64, new, path);
        }
        taken
    }

    /// Holds those of these pages, which fill has populated, whose first touch is to be seen.
    /// Returns the others, which the caller must publish.
    ///
    /// The caller must then check, after a fence, whether a thread waits for a held page, and
    /// whether the notes [have ended](Self::has_ended).
    pub(crate) fn hold(&self, range: PageRange) -> Vec<PageRange> {
        let mut others = Vec::new();
        for (word, mask) in range.words() {
            let expected = self.expected[word].load(Ordering::Relaxed) & mask;
            let arrived = u64::from(expected.count_ones());
            let wanted = match self.log.hold {
                Hold::All => mask,
                Hold::Sample => sample_of(word, expected),
            };
            let wanted = wanted & !self.touched[word].load(Ordering::Acquire);
            if self.has_ended() {
                push_runs(&mut others, word, mask);
                continue;
            }
            self.log.arrived.fetch_add(arrived, Ordering::Relaxed);
            let held = u64::from((wanted & expected).count_ones());
            self.log.held.fetch_add(held, Ordering::Relaxed);
            // Release: the content, written before, is visible to the thread that takes the bit.
            self.held[word].fetch_or(wanted, Ordering::Release);
            push_runs(&mut others, word, mask & !wanted);
        }
        others
    }

    /// Returns how many pages of the range are expected.
    pub(crate) fn expected_in(&self, range: PageRange) -> u64 {
        let bits = |(word, mask): (usize, u64)| self.expected[word].load(Ordering::Relaxed) & mask;
        range.words().map(|part| u64::from(bits(part).count_ones())).sum()
    }

    /// Takes the held pages of the range, which the caller must publish.
    pub(crate) fn take(&self, range: PageRange) -> Vec<PageRange> {
        let mut taken = Vec::new();
        for (word, mask) in range.words() {
            let held = self.take_in(word, mask);
            push_runs(&mut taken, word, held);
        }
        taken
    }

    fn take_in(&self, word: usize, mask: u64) -> u64 {
        // Nearly all words of a large range have none, and stay unwritten.
        if self.held[word].load(Ordering::Relaxed) & mask == 0 {
            return 0;
        }
        self.held[word].fetch_and(!mask, Ordering::AcqRel) & mask
    }

    /// Ends the notes: no page is held from now on. The caller must then, after a fence, publish
    /// the pages that are.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

/// Returns one of 64 of the pages of a word, on average: by a hash of their number, so that no
/// pattern of addresses is left out.
fn sample_of(word: usize, mut pages: u64) -> u64 {
    let mut sample = 0;
    while pages != 0 {
        let bit = pages.trailing_zeros();
        let page = word as u64 * 64 + u64::from(bit);
        let hash = page.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        sample |= u64::from(hash >> 58 == 0) << bit;
        pages &= pages - 1;
    }
    sample
}

/// Appends the pages of a word to ascending runs.
fn push_runs(runs: &mut Vec<PageRange>, word: usize, mut bits: u64) {
    while bits != 0 {
        let low = bits.trailing_zeros();
        let count = (bits >> low).trailing_ones();
        let first = word as u64 * 64 + u64::from(low);
        match runs.last_mut() {
            Some(last) if last.end() == first => last.count += u64::from(count),
            _ => runs.push(PageRange::new(first, u64::from(count))),
        }
        bits &= u64::MAX.checked_shl(low + count).unwrap_or(0);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn sample_is_one_in_64() {
        let sampled: u32 = (0..4096).map(|word| sample_of(word, u64::MAX).count_ones()).sum();
        assert!((3800..4400).contains(&sampled), "{sampled}");
        assert_eq!(sample_of(7, 0), 0);
        // Every 512th page, as of the beginnings of huge pages.
        let aligned: u32 = (0..32768).map(|page| sample_of(page * 8, 1).count_ones()).sum();
        assert!((400..620).contains(&aligned), "{aligned}");
    }

    #[test]
    fn runs_cross_words() {
        let mut runs = Vec::new();
        push_runs(&mut runs, 0, 1 << 63 | 0b101);
        push_runs(&mut runs, 1, 1);
        push_runs(&mut runs, 3, u64::MAX);
        let expected = [(0, 1), (2, 1), (63, 2), (192, 64)];
        assert_eq!(runs, expected.map(|(first, count)| PageRange::new(first, count)));
    }

    #[test]
    fn full_log_counts_what_it_leaves_out() {
        let log = TouchLog::with_most(Hold::All, 3);
        log.append(64, 0b11, FaultPath::Guest);
        log.append(128, 0b111, FaultPath::Vmm);
        let pages: Vec<_> = log.touches().iter().map(|touch| touch.page).collect();
        assert_eq!((pages, log.left_out(), log.len()), (vec![64, 65, 128], 2, 5));
    }

    #[test]
    fn waste_of_a_sample_is_scaled() {
        let counts = TouchCounts { hits: 9, held: 10, arrived: 640, ..TouchCounts::default() };
        assert_eq!((counts.waste(), TouchCounts::default().waste()), (64, 0));
    }
}
