// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The merge of a run's touches with those of earlier runs, and their ageing.

use std::collections::HashMap;

/// Number of the latest runs that count.
const RUNS: u32 = 8;

/// A page of a working set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Number of the page in the image.
    pub page: u64,
    /// The runs that have touched the page: bit 0 is the latest run, bit 7 the eighth last. Never 0.
    pub seen: u8,
    /// The mean position of the page among the touches of these runs.
    pub rank: u32,
}

/// Merges the pages that a run has touched, in order, with the entries of `runs` earlier runs.
/// Returns the entries in the order of their replay: pages that at least two of the last eight runs
/// have touched come first, or all if there were fewer than three runs; each group by rank. A page
/// that none of the last eight runs has touched is left out.
pub(crate) fn merge(before: &[Entry], runs: u32, touched: &[u64]) -> Vec<Entry> {
    let mut entries: HashMap<u64, Entry> = HashMap::with_capacity(before.len() + touched.len());
    for entry in before {
        entries.insert(entry.page, Entry { seen: entry.seen << 1, ..*entry });
    }
    for (rank, page) in (0..).zip(touched) {
        let entry = entries.entry(*page).or_insert(Entry { page: *page, seen: 0, rank: 0 });
        if entry.seen & 1 == 1 {
            continue; // A second touch of the run.
        }
        let (mean, count) = (u64::from(entry.rank), u64::from(entry.seen.count_ones()));
        entry.rank = u32::try_from((mean * count + rank) / (count + 1)).unwrap_or(u32::MAX);
        entry.seen |= 1;
    }
    let mut entries: Vec<_> = entries.into_values().filter(|entry| entry.seen != 0).collect();
    let all = runs.saturating_add(1) < 3;
    let is_rare = |entry: &Entry| !all && entry.seen.count_ones() < 2;
    entries.sort_unstable_by_key(|entry| (is_rare(entry), entry.rank, entry.page));
    entries
}

const _: () = assert!(RUNS == u8::BITS, "a bit of `seen` for each run");

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(entries: &[Entry]) -> Vec<u64> {
        entries.iter().map(|entry| entry.page).collect()
    }

    #[test]
    fn first_run_keeps_its_order() {
        let entries = merge(&[], 0, &[9, 4, 7, 4]);
        assert_eq!(pages(&entries), [9, 4, 7]);
        assert!(entries.iter().all(|entry| entry.seen == 1));
    }

    #[test]
    fn repeated_pages_come_first_after_three_runs() {
        let one = merge(&[], 0, &[1, 2, 3]);
        let two = merge(&one, 1, &[4, 2, 3]);
        assert_eq!(pages(&two), [1, 4, 2, 3], "all count alike while there are two runs");
        let three = merge(&two, 2, &[5, 3, 2]);
        assert_eq!(pages(&three), [2, 3, 1, 4, 5]);
        assert_eq!(three[0], Entry { page: 2, seen: 0b111, rank: 1 });
    }

    #[test]
    fn pages_are_dropped_after_eight_runs() {
        let mut entries = merge(&[], 0, &[1, 2]);
        for run in 1..8 {
            entries = merge(&entries, run, &[2]);
            assert_eq!(entries.len(), 2, "{run}");
        }
        entries = merge(&entries, 8, &[2]);
        assert_eq!(pages(&entries), [2]);
        assert_eq!(entries[0].seen, 0xff);
    }
}
