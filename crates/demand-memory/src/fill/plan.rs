// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The order of background fill: which missing pages are requested next.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::{FillOptions, FillOrder, PAGE_SIZE, PageRange, Pager};

/// The direction of the search for the next pages.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Ascending,
    Descending,
    NearLastFault,
}

/// The pages that are still to be requested. A page that any thread has claimed is passed over.
pub(super) struct Plan {
    pagers: Vec<Arc<Pager>>,
    /// Pages per request.
    chunk: u64,
    /// Ranges to request before all else, by the index of their region.
    first: VecDeque<(usize, PageRange)>,
    /// Whether the fill ends after these.
    is_partial: bool,
    direction: Direction,
    /// The region in which the search continues.
    region: usize,
    /// The first page to look at or, in descending order, the page after that.
    page: u64,
}

impl Plan {
    pub(super) fn new(pagers: Vec<Arc<Pager>>, options: &FillOptions) -> Self {
        let (mut direction, mut first) = (Direction::Ascending, VecDeque::new());
        let (mut region, mut page) = (0, 0);
        match &options.order {
            FillOrder::Ascending => {}
            FillOrder::Descending => {
                direction = Direction::Descending;
                region = pagers.len().saturating_sub(1);
                page = pagers.last().map_or(0, |pager| pager.pages());
            }
            FillOrder::RangesFirst(ranges) | FillOrder::RangesOnly(ranges) => {
                first = ranges
                    .iter()
                    .filter_map(|range| {
                        let left = pagers.get(range.region)?.pages().checked_sub(range.pages.first);
                        let count = range.pages.count.min(left?);
                        Some((range.region, PageRange::new(range.pages.first, count)))
                    })
                    .collect();
            }
            FillOrder::NearLastFault => {
                direction = Direction::NearLastFault;
                pagers.iter().for_each(|pager| pager.note_faults());
            }
        }
        let chunk = (options.chunk / PAGE_SIZE).max(1);
        let is_partial = matches!(options.order, FillOrder::RangesOnly(_));
        Plan { pagers, chunk, first, is_partial, direction, region, page }
    }

    /// Returns the largest size of a request, in bytes.
    pub(super) fn chunk_bytes(&self) -> u64 {
        self.chunk * PAGE_SIZE
    }

    /// Returns whether pages are left out.
    pub(super) fn is_partial(&self) -> bool {
        self.is_partial
    }

    pub(super) fn pagers(&self) -> &[Arc<Pager>] {
        &self.pagers
    }

    /// Returns the pages to request next, of which the first is missing and was unclaimed a moment
    /// ago. `None` if no such page is left.
    pub(super) fn next(&mut self) -> Option<(Arc<Pager>, PageRange)> {
        while let Some((region, range)) = self.first.front_mut() {
            let pager = &self.pagers[*region];
            if let Some(pages) = chunk_in(pager, *range, self.chunk) {
                *range = PageRange::new(pages.end(), range.end() - pages.end());
                return Some((pager.clone(), pages));
            }
            self.first.pop_front();
        }
        if self.is_partial {
            return None;
        }
        if self.direction == Direction::NearLastFault {
            let mut regions = self.pagers.iter().enumerate();
            let fault = regions.find_map(|(region, pager)| Some((region, pager.take_fault()?)));
            if let Some((region, page)) = fault {
                (self.region, self.page) = (region, page);
            }
        }
        // Once more than regions exist: a search that began within one also looks at its beginning.
        for _ in 0..=self.pagers.len() {
            let pager = self.pagers.get(self.region)?;
            let found = if self.direction == Direction::Descending {
                let pages = last_chunk_in(pager, self.page, self.chunk);
                self.page = pages.map_or(0, |pages| pages.first);
                pages
            } else {
                let pages = PageRange::new(self.page, pager.pages() - self.page);
                let pages = chunk_in(pager, pages, self.chunk);
                self.page = pages.map_or(0, |pages| pages.end());
                pages
            };
            if let Some(pages) = found {
                return Some((pager.clone(), pages));
            }
            match self.direction {
                Direction::Ascending => self.region += 1,
                Direction::Descending => {
                    self.region = self.region.checked_sub(1)?;
                    self.page = self.pagers[self.region].pages();
                }
                Direction::NearLastFault => self.region = (self.region + 1) % self.pagers.len(),
            }
        }
        None
    }
}

/// Returns the pages from the first unclaimed one of the range on, up to the next multiple of
/// `chunk` pages. `None` for a region that was stopped.
fn chunk_in(pager: &Pager, range: PageRange, chunk: u64) -> Option<PageRange> {
    if pager.bitmap().is_stopped() {
        return None;
    }
    let first = pager.bitmap().first_unclaimed(range)?;
    let end = (first / chunk + 1).saturating_mul(chunk).min(range.end());
    Some(PageRange::new(first, end - first))
}

/// Like [`chunk_in`], but returns the last such pages before page `end`.
fn last_chunk_in(pager: &Pager, mut end: u64, chunk: u64) -> Option<PageRange> {
    while end > 0 && !pager.bitmap().is_stopped() {
        let start = (end - 1) / chunk * chunk;
        let range = PageRange::new(start, end - start);
        if let Some(first) = pager.bitmap().first_unclaimed(range) {
            return Some(PageRange::new(first, end - first));
        }
        end = start;
    }
    None
}
