// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The part of an export's map of holes that is known.

use std::collections::BTreeMap;
use std::ops::Range;

use demand_source::Extent;

/// Holes begin and end at multiples of it (bytes): a page that is partly zero is data.
const PAGE: u64 = 4096;
/// Number of holes (24 MiB of memory) from which short ones are forgotten, and count as data.
const MANY: usize = 1 << 20;
/// Length of a hole that is never forgotten, in bytes.
const LONG: u64 = 1 << 20;

/// Disjoint ranges that do not touch: their ends, by their starts.
#[derive(Debug, Default)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    fn insert(&mut self, mut start: u64, mut end: u64) {
        if let Some((&first, &last)) = self.0.range(..=start).next_back()
            && last >= start
        {
            (start, end) = (first, end.max(last));
        }
        while let Some((&first, &last)) = self.0.range(start..=end).next() {
            end = end.max(last);
            self.0.remove(&first);
        }
        self.0.insert(start, end);
    }

    /// Returns the end of the range that has the byte.
    fn end(&self, at: u64) -> Option<u64> {
        let (_, &end) = self.0.range(..=at).next_back()?;
        (at < end).then_some(end)
    }

    /// Returns the start of the first range after the byte.
    fn next(&self, at: u64) -> Option<u64> {
        self.0.range(at..).next().map(|(&start, _)| start)
    }
}

/// A run of an export that reads as zeros, or does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// First byte after the run.
    pub(crate) end: u64,
    pub(crate) zero: bool,
}

/// The known holes of an export.
#[derive(Debug)]
pub(crate) struct Holes {
    size: u64,
    /// Ranges whose holes are known.
    known: Ranges,
    holes: Ranges,
    /// Number of holes from which short ones are forgotten.
    many: usize,
}

impl Holes {
    pub(crate) fn new(size: u64) -> Self {
        Holes { size, known: Ranges::default(), holes: Ranges::default(), many: MANY }
    }

    /// Returns the extent at an offset, if it is known.
    pub(crate) fn extent(&self, offset: u64) -> Option<Extent> {
        let known = self.known.end(offset)?;
        if let Some(end) = self.holes.end(offset) {
            return Some(Extent::Hole { end });
        }
        Some(Extent::Data { end: self.holes.next(offset).unwrap_or(known).min(known) })
    }

    /// Returns the first byte from `offset` to `end` (bytes) whose extent is not known.
    pub(crate) fn first_unknown(&self, offset: u64, end: u64) -> Option<u64> {
        let end = end.min(self.size);
        let first = self.known.end(offset).unwrap_or(offset);
        (first < end).then_some(first)
    }

    /// Learns consecutive runs, the first of which begins at a multiple of 4096.
    pub(crate) fn learn(&mut self, range: Range<u64>, runs: &[Run]) {
        let end_of = |end: u64| end.min(range.end);
        let mut at = range.start;
        for run in runs {
            let end = end_of(run.end);
            if run.zero {
                let first = at.next_multiple_of(PAGE);
                let last = if end == self.size { end } else { end / PAGE * PAGE };
                if first < last && (self.holes.0.len() < self.many || last - first >= LONG) {
                    self.holes.insert(first, last);
                }
            }
            at = end;
        }
        // A page whose remainder was not reported is data.
        let end = at.next_multiple_of(PAGE).min(self.size);
        if range.start < end {
            self.known.insert(range.start, end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zero(end: u64) -> Run {
        Run { end, zero: true }
    }

    fn data(end: u64) -> Run {
        Run { end, zero: false }
    }

    #[test]
    fn known_extents_are_found() {
        let mut holes = Holes::new(100 * PAGE + 7);
        assert_eq!((holes.extent(0), holes.first_unknown(0, u64::MAX)), (None, Some(0)));
        let runs = [data(PAGE), zero(5 * PAGE), data(9 * PAGE)];
        holes.learn(0..8 * PAGE, &runs);
        assert_eq!(holes.extent(0), Some(Extent::Data { end: PAGE }));
        assert_eq!(holes.extent(2 * PAGE), Some(Extent::Hole { end: 5 * PAGE }));
        assert_eq!(holes.extent(5 * PAGE), Some(Extent::Data { end: 8 * PAGE }));
        assert_eq!(holes.extent(8 * PAGE), None);
        assert_eq!(holes.first_unknown(3, u64::MAX), Some(8 * PAGE));
        assert_eq!(holes.first_unknown(3, 8 * PAGE), None);
        // Apart from it, then the gap between.
        holes.learn(10 * PAGE..100 * PAGE + 7, &[zero(100 * PAGE + 7)]);
        assert_eq!(holes.extent(99 * PAGE), Some(Extent::Hole { end: 100 * PAGE + 7 }));
        assert_eq!(holes.extent(9 * PAGE), None);
        holes.learn(8 * PAGE..10 * PAGE, &[zero(10 * PAGE)]);
        assert_eq!(holes.extent(9 * PAGE), Some(Extent::Hole { end: 100 * PAGE + 7 }));
        assert_eq!(holes.first_unknown(0, u64::MAX), None);
        assert_eq!((holes.known.0.len(), holes.holes.0.len()), (1, 2));
    }

    #[test]
    fn partly_zero_pages_are_data() {
        let mut holes = Holes::new(10 * PAGE);
        let runs = [data(100), zero(PAGE + 100), data(PAGE + 200), zero(4 * PAGE - 1)];
        holes.learn(0..10 * PAGE, &runs);
        assert_eq!(holes.extent(0), Some(Extent::Data { end: 2 * PAGE }));
        assert_eq!(holes.extent(2 * PAGE), Some(Extent::Hole { end: 3 * PAGE }));
        assert_eq!(holes.extent(3 * PAGE), Some(Extent::Data { end: 4 * PAGE }));
        assert_eq!(holes.first_unknown(0, u64::MAX), Some(4 * PAGE));
    }

    #[test]
    fn short_holes_are_forgotten_beyond_the_limit() {
        let mut holes = Holes { many: 100, ..Holes::new(u64::MAX >> 1) };
        for page in 0..110 {
            let at = 2 * page * PAGE;
            holes.learn(at..at + 2 * PAGE, &[zero(at + PAGE), data(at + 2 * PAGE)]);
        }
        assert_eq!((holes.holes.0.len(), holes.known.0.len()), (100, 1));
        assert_eq!(holes.extent(210 * PAGE), Some(Extent::Data { end: 220 * PAGE }));
        let at = 1 << 40;
        holes.learn(at..at + LONG, &[zero(at + LONG)]);
        assert_eq!(holes.extent(at), Some(Extent::Hole { end: at + LONG }));
    }
}
