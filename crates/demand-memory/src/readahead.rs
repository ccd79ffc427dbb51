// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Readahead: detects sequential readers of a region, and chooses the pages to fetch ahead of them.

use std::sync::{Mutex, PoisonError};

use crate::PageRange;

/// Number of readers that are told apart: a vCPU each, for example.
const READERS: usize = 4;

/// Number of pages fetched ahead of a reader at first, for each page of its fault.
const FIRST: u64 = 4;

/// A reader that may be sequential.
#[derive(Clone, Copy, Default)]
struct Reader {
    /// The page after its last fault.
    next: u64,
    /// The page after those that were fetched ahead of it.
    end: u64,
    /// The number of pages to fetch ahead; 0 until a second fault has followed the first.
    window: u64,
    /// The time of its last fault.
    used: u64,
}

#[derive(Default)]
struct Readers {
    readers: [Reader; READERS],
    /// The number of faults so far.
    now: u64,
}

/// The readahead of one region.
pub(crate) struct Readahead {
    /// The most that is fetched ahead of a reader, in pages.
    most: u64,
    readers: Mutex<Readers>,
}

impl Readahead {
    pub(crate) fn new(most: u64) -> Self {
        Readahead { most, readers: Mutex::default() }
    }

    /// Notes a fault on `range` in a region of `pages` pages. If its reader is sequential, returns
    /// the pages to fetch ahead of it.
    pub(crate) fn fault(&self, range: PageRange, pages: u64) -> Option<PageRange> {
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        readers.now += 1;
        let now = readers.now;
        let follows = |reader: &&mut Reader| {
            reader.used > 0 && (reader.next..=reader.end).contains(&range.first)
        };
        let Some(reader) = readers.readers.iter_mut().find(follows) else {
            let end = range.end();
            let oldest = readers.readers.iter_mut().min_by_key(|reader| reader.used)?;
            *oldest = Reader { next: end, end, window: 0, used: now };
            return None;
        };
        (reader.next, reader.used) = (range.end(), now);
        let ahead = reader.end.saturating_sub(reader.next);
        if ahead > reader.window / 2 {
            return None;
        }
        reader.window = (reader.window * 2).max(FIRST * range.count).min(self.most);
        let first = reader.end.max(reader.next);
        reader.end = reader.next.saturating_add(reader.window).min(pages).max(first);
        let ahead = PageRange::new(first, reader.end - first);
        (!ahead.is_empty()).then_some(ahead)
    }

    /// Notes that the pages from `end` on were not fetched ahead after all.
    pub(crate) fn ended_at(&self, ahead: PageRange, end: u64) {
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        for reader in &mut readers.readers {
            if reader.end == ahead.end() {
                reader.end = end.max(reader.next);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 10_000;

    #[test]
    fn windows_grow_ahead_of_sequential_faults() {
        let readahead = Readahead::new(64);
        let fault = |page| readahead.fault(PageRange::page(page), PAGES);
        assert_eq!(fault(100), None);
        assert_eq!(fault(101), Some(PageRange::new(102, 4)));
        // Within what was fetched ahead, while more than half of it is left.
        assert_eq!(fault(102), None);
        assert_eq!(fault(103), Some(PageRange::new(106, 6)));
        assert_eq!(fault(112), Some(PageRange::new(113, 16)));
        for page in [129, 162, 227] {
            let ahead = fault(page).unwrap();
            assert_eq!(ahead.first, page + 1);
            assert!(ahead.count <= 64, "{ahead:?}");
        }
        assert_eq!(fault(292).map(|ahead| ahead.count), Some(64));
    }

    #[test]
    fn scattered_faults_cause_no_readahead() {
        let readahead = Readahead::new(64);
        for fault in 0..1000 {
            let page = PageRange::page(fault * 7919 % PAGES);
            assert_eq!(readahead.fault(page, PAGES), None, "{page:?}");
        }
    }

    #[test]
    fn several_readers_are_distinguished() {
        let readahead = Readahead::new(64);
        let starts = [0, 2000, 4000, 6000];
        for step in 0..2 {
            for start in starts {
                let ahead = readahead.fault(PageRange::page(start + step), PAGES);
                assert_eq!(ahead.is_some(), step == 1, "{start}");
            }
        }
    }

    #[test]
    fn readahead_ends_with_the_region() {
        let readahead = Readahead::new(64);
        assert_eq!(readahead.fault(PageRange::page(PAGES - 4), PAGES), None);
        let ahead = readahead.fault(PageRange::page(PAGES - 3), PAGES);
        assert_eq!(ahead, Some(PageRange::new(PAGES - 2, 2)));
        assert_eq!(readahead.fault(PageRange::page(PAGES - 2), PAGES), None);
        assert_eq!(readahead.fault(PageRange::page(PAGES - 1), PAGES), None);
    }
}
