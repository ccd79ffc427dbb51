// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reading a bitmap and waiting for its pages.

#[cfg(not(loom))]
use super::BitmapWords;
use super::wait::{Recipient, Until};
use super::{BitmapReader, Wait, Waiter, claimed, populated};
use crate::PageRange;
use crate::sync::Ordering;

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

    /// Returns the first page of the range that is missing, and that no thread had claimed a moment
    /// ago.
    pub(crate) fn first_unclaimed(&self, range: PageRange) -> Option<u64> {
        range.words().find_map(|(word, mask)| {
            let bits = self.missing[word].load(Ordering::Acquire) & mask;
            let bits = bits & !self.claims[claimed(word)].load(Ordering::Relaxed);
            (bits != 0).then(|| word as u64 * 64 + u64::from(bits.trailing_zeros()))
        })
    }

    /// Returns the function that finds the first page of a range that a waiter still waits for.
    pub(super) fn first_awaited(&self) -> impl Fn(PageRange, Until) -> Option<u64> + '_ {
        |range, until| {
            range.words().find_map(|(word, mask)| {
                let mut bits = self.missing_in(word) & mask;
                if bits != 0 && until == Until::Populated {
                    bits &= !self.claims[populated(word)].load(Ordering::Acquire);
                }
                (bits != 0).then(|| word as u64 * 64 + u64::from(bits.trailing_zeros()))
            })
        }
    }

    /// Returns the bits of the missing pages in a word.
    pub(crate) fn missing_in(&self, word: usize) -> u64 {
        self.missing[word].load(Ordering::Acquire)
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
    pub fn wait(&self, range: PageRange, waiter: &Waiter) -> Wait {
        self.wait_listed(range, waiter, || {})
    }

    /// Like [`wait`](Self::wait), but calls `listed` before the thread sleeps, when
    /// [`is_wanted`](Self::is_wanted) finds the wait.
    pub(crate) fn wait_listed(&self, range: PageRange, waiter: &Waiter, listed: impl Fn()) -> Wait {
        if self.first_missing(range).is_none() {
            return Wait::Present;
        }
        self.waiting.wait(range, waiter, &listed, &self.first_awaited())
    }

    /// Returns whether a thread or a callback, background fill excepted, waits for a page of the
    /// range.
    pub(crate) fn is_wanted(&self, range: PageRange) -> bool {
        self.waiting.is_wanted(range)
    }

    /// Returns the missing pages that waiters other than background fill currently wait for.
    pub(crate) fn waited_for(&self) -> Vec<u64> {
        self.waiting.waited_for()
    }

    /// Calls `callback` when no page of the range is missing: at once on this thread, or later on
    /// the thread that publishes the last of them. The callback must not block. If the bitmap is
    /// [stopped](crate::MissingBitmap::stop) first, the callback is dropped without a call. The
    /// pages must be claimed; where they were fetched for a fault, see
    /// [`Pager::when_present`](crate::Pager::when_present).
    pub fn when_present(&self, range: PageRange, callback: impl FnOnce() + Send + 'static) {
        let callback = Recipient::callback(callback);
        self.waiting.when_present(range, callback, &self.first_awaited());
    }

    /// Like [`when_present`](Self::when_present), for background fill: the callback does not mark
    /// the pages as wanted, and is called once all of them are populated.
    pub(crate) fn when_filled(&self, range: PageRange, callback: impl FnOnce() + Send + 'static) {
        let callback = Recipient::background_callback(callback);
        self.waiting.when_present(range, callback, &self.first_awaited());
    }

    /// Returns whether [`stop`](crate::MissingBitmap::stop) was called.
    pub fn is_stopped(&self) -> bool {
        self.waiting.is_stopped()
    }
}
