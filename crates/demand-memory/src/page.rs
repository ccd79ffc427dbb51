// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pages, and runs of pages.

use demand_source::to_usize;

/// Size of a page, in bytes: the granularity of the missing bitmap on every backing.
pub const PAGE_SIZE: u64 = 4096;

/// A run of pages of one region, by their index in the region.
///
/// # Examples
///
/// ```
/// use demand_memory::PageRange;
///
/// // The pages that contain bytes 4095 and 4096 of a region.
/// let pages = PageRange::of_bytes(4095, 2);
/// assert_eq!(pages, PageRange::new(0, 2));
/// assert_eq!(pages.bytes(), 8192);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// Index of the first page.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
}

impl PageRange {
    /// Creates a run of `count` pages from page `first` on.
    pub const fn new(first: u64, count: u64) -> Self {
        PageRange { first, count }
    }

    /// Creates a run of one page.
    pub const fn page(index: u64) -> Self {
        PageRange { first: index, count: 1 }
    }

    /// Returns the pages that contain the `len` bytes at `offset` (bytes in the region). The caller
    /// has checked that the bytes lie in a region, so nothing overflows.
    pub const fn of_bytes(offset: u64, len: u64) -> Self {
        let first = offset / PAGE_SIZE;
        if len == 0 {
            return PageRange { first, count: 0 };
        }
        PageRange { first, count: (offset + (len - 1)) / PAGE_SIZE - first + 1 }
    }

    /// Returns the index of the first page after the run.
    pub const fn end(&self) -> u64 {
        self.first + self.count
    }

    /// Returns whether the run has no pages.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Returns the offset of the first page in its region, in bytes.
    pub const fn offset(&self) -> u64 {
        self.first * PAGE_SIZE
    }

    /// Returns the length of the run, in bytes.
    pub const fn bytes(&self) -> u64 {
        self.count * PAGE_SIZE
    }

    /// Returns whether `page` lies in the run.
    pub const fn contains(&self, page: u64) -> bool {
        self.first <= page && page < self.end()
    }

    /// Returns the pages that lie in both runs.
    pub fn intersect(&self, other: PageRange) -> PageRange {
        let first = self.first.max(other.first);
        let end = self.end().min(other.end());
        PageRange { first, count: end.saturating_sub(first) }
    }

    /// Returns the smallest run of whole units of `unit` pages that contains this one, cut at
    /// `limit`, the number of pages of the region.
    pub fn grow_to_units(&self, unit: u64, limit: u64) -> PageRange {
        let first = self.first - self.first % unit;
        let end = self.end().next_multiple_of(unit).min(limit);
        PageRange { first, count: end - first }
    }

    /// Returns the bitmap words that contain the run, each with the mask of the run's bits.
    pub(crate) fn words(self) -> impl Iterator<Item = (usize, u64)> {
        // An empty list would count as present, so a run that overflows panics.
        let end = self.first.checked_add(self.count).expect("a run of pages must not overflow");
        let first = self.first;
        let words = if self.is_empty() { 0..0 } else { first / 64..end.div_ceil(64) };
        words.map(move |word| {
            let low = first.saturating_sub(word * 64);
            let high = (end - word * 64).min(64);
            (to_usize(word), (u64::MAX << low) & (u64::MAX >> (64 - high)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_cover_exactly_the_run() {
        for first in [0, 1, 63, 64, 65, 130] {
            for count in [0, 1, 2, 63, 64, 65, 200] {
                let range = PageRange::new(first, count);
                let mut pages = Vec::new();
                for (word, mask) in range.words() {
                    assert_ne!(mask, 0);
                    pages.extend(
                        (0..64)
                            .filter(|bit| mask >> bit & 1 == 1)
                            .map(|bit| word as u64 * 64 + bit),
                    );
                }
                assert_eq!(pages, (first..first + count).collect::<Vec<_>>(), "{range:?}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "a run of pages must not overflow")]
    fn a_run_past_all_numbers_has_no_words() {
        // An empty list of words would contain no missing page.
        PageRange::new(u64::MAX, 2).words().for_each(drop);
    }

    #[test]
    fn bytes_of_nothing_lie_in_no_page() {
        assert!(PageRange::of_bytes(4096, 0).is_empty());
        assert_eq!(PageRange::of_bytes(4096, 1), PageRange::page(1));
        assert_eq!(PageRange::of_bytes(4095, 4098), PageRange::new(0, 3));
    }

    #[test]
    fn units_are_cut_at_the_end() {
        assert_eq!(PageRange::page(513).grow_to_units(512, 1024), PageRange::new(512, 512));
        assert_eq!(PageRange::page(513).grow_to_units(512, 600), PageRange::new(512, 88));
    }
}
