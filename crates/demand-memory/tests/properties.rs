// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Property tests of ranges, bitmaps and memory against models too simple to be wrong.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]
#![cfg(not(loom))]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, FaultPath, FetchError, MemfdBacking, MissingBitmap,
    PAGE_SIZE, PageRange, PagerConfig, Published, Retrier, RetryPolicy, Stats, Wait, Waiter,
};
use demand_source::{Completion, Destination, Extent, PageSource, Request, SourceError};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

fn range_in(pages: u64) -> impl Strategy<Value = PageRange> {
    (0..pages)
        .prop_flat_map(move |first| (Just(first), 0..=pages - first))
        .prop_map(|(first, count)| PageRange::new(first, count))
}

/// A model of a bitmap: two sets.
struct Model {
    missing: BTreeSet<u64>,
    claimed: BTreeSet<u64>,
}

fn runs(pages: impl IntoIterator<Item = u64>) -> Vec<PageRange> {
    let mut runs: Vec<PageRange> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(last) if last.end() == page => last.count += 1,
            _ => runs.push(PageRange::page(page)),
        }
    }
    runs
}

#[derive(Clone, Debug)]
enum Step {
    Claim(PageRange),
    /// Publication of a claimed run: all of it, or its first half.
    Publish(prop::sample::Index, bool),
    Look(PageRange),
}

fn bitmap_steps() -> impl Strategy<Value = (u64, Vec<Step>)> {
    // Sizes around the ends of words, and of the groups of words that share a counter.
    let pages = prop_oneof![1..200u64, 4090..4200u64, Just(64), Just(4096)];
    pages.prop_flat_map(|pages| {
        let step = prop_oneof![
            range_in(pages).prop_map(Step::Claim),
            (any::<prop::sample::Index>(), any::<bool>())
                .prop_map(|(i, all)| Step::Publish(i, all)),
            range_in(pages).prop_map(Step::Look),
        ];
        (Just(pages), prop::collection::vec(step, 0..40))
    })
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn bytes_lie_in_their_pages(offset: u64, len in prop_oneof![any::<u64>(), 0..20_000u64]) {
        let last = u128::from(offset) + u128::from(len).saturating_sub(1);
        prop_assume!(last <= u128::from(u64::MAX));
        let pages = PageRange::of_bytes(offset, len);
        prop_assert_eq!(pages.first, offset / PAGE_SIZE);
        if len == 0 {
            prop_assert!(pages.is_empty());
        } else {
            prop_assert!(pages.contains(offset / PAGE_SIZE));
            prop_assert_eq!(u128::from(pages.end() - 1), last / u128::from(PAGE_SIZE));
            prop_assert!(!pages.contains(pages.end()));
        }
    }

    #[test]
    fn intersection_of_two_runs_lies_in_both(a in range_in(300), b in range_in(300)) {
        let set = |range: PageRange| (range.first..range.end()).collect::<BTreeSet<_>>();
        prop_assert_eq!(set(a.intersect(b)), &set(a) & &set(b));
        prop_assert_eq!(a.intersect(b).is_empty(), b.intersect(a).is_empty());
    }

    #[test]
    fn runs_grow_to_the_fewest_whole_units(
        (limit, range) in (1..3000u64).prop_flat_map(|limit| (Just(limit), range_in(limit))),
        unit in prop_oneof![Just(1u64), Just(2), Just(64), Just(512)],
    ) {
        let grown = range.grow_to_units(unit, limit);
        prop_assert!(grown.first <= range.first && range.end() <= grown.end());
        prop_assert!(grown.first.is_multiple_of(unit));
        // Cut at the region's end, which need not be a multiple.
        prop_assert!(grown.end() <= limit);
        prop_assert!(grown.end() == limit || grown.end().is_multiple_of(unit));
        prop_assert!(range.first - grown.first < unit && grown.end() - range.end() < unit);
        prop_assert_eq!(grown.grow_to_units(unit, limit), grown);
    }

    /// A region can have at most this many pages: its bytes fit in 64 bits.
    #[test]
    fn nothing_overflows_in_the_largest_region(page in 0..1u64 << 52, unit in 0..=18u32) {
        let (unit, limit) = (1 << unit, 1 << 52);
        let grown = PageRange::page(page).grow_to_units(unit, limit);
        prop_assert_eq!(grown.count, unit);
        prop_assert_eq!(grown.offset() / PAGE_SIZE, grown.first);
        prop_assert_eq!(grown.bytes() / PAGE_SIZE, unit);
    }
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn a_bitmap_is_two_sets((pages, steps) in bitmap_steps()) {
        let bitmap = MissingBitmap::new(pages).unwrap();
        let all = PageRange::new(0, pages);
        let mut model = Model { missing: (0..pages).collect(), claimed: BTreeSet::new() };
        // Runs that are claimed and not yet published.
        let mut held: Vec<PageRange> = Vec::new();
        let mut last = 0;
        for step in steps {
            match step {
                Step::Claim(range) => {
                    let pages: Vec<_> = (range.first..range.end())
                        .filter(|page| model.missing.contains(page) && model.claimed.insert(*page))
                        .collect();
                    let claimed = bitmap.claim(range);
                    prop_assert_eq!(&claimed[..], &runs(pages)[..]);
                    held.extend(claimed);
                }
                Step::Publish(index, whole) if !held.is_empty() => {
                    let range = held.swap_remove(index.index(held.len()));
                    let part = if whole { range.count } else { range.count.div_ceil(2) };
                    let part = PageRange::new(range.first, part);
                    if part != range {
                        held.push(PageRange::new(part.end(), range.count - part.count));
                    }
                    model.missing.retain(|page| !part.contains(*page));
                    if bitmap.publish(part) == Published::Last {
                        last += 1;
                    }
                }
                Step::Publish(..) => {}
                Step::Look(range) => {
                    let mut missing = model.missing.range(range.first..range.end());
                    let first = missing.next().copied();
                    let count = u64::from(first.is_some()) + missing.count() as u64;
                    prop_assert_eq!(bitmap.first_missing(range), first);
                    prop_assert_eq!(bitmap.count_missing(range), count);
                    // A wait for present pages returns at once; one for missing pages can be
                    // kicked.
                    let waiter = Waiter::new();
                    waiter.kick();
                    let wait = if first.is_some() { Wait::Kicked } else { Wait::Present };
                    prop_assert_eq!(bitmap.wait(range, &waiter), wait);
                }
            }
            prop_assert_eq!(bitmap.is_complete(), model.missing.is_empty());
        }
        held.extend(bitmap.claim(all));
        let left: u64 = held.iter().map(|range| range.count).sum();
        prop_assert_eq!(left, bitmap.count_missing(all), "each missing page has one claimant");
        for range in held {
            last += u32::from(bitmap.publish(range) == Published::Last);
        }
        prop_assert_eq!(last, 1, "the last page is told once");
        prop_assert!(bitmap.is_complete());
        bitmap.stop();
        prop_assert_eq!(bitmap.wait(all, &Waiter::new()), Wait::Present);
    }

    #[test]
    fn stopped_bitmap_keeps_no_waiter_or_callback(pages in 1..500u64, first: prop::sample::Index) {
        let bitmap = MissingBitmap::new(pages).unwrap();
        let range = PageRange::page(first.index(pages as usize) as u64);
        bitmap.stop();
        prop_assert_eq!(bitmap.wait(range, &Waiter::new()), Wait::Stopped);
        let kept = Arc::new(());
        let callback = kept.clone();
        bitmap.when_present(range, move || panic!("{callback:?}"));
        prop_assert_eq!(Arc::strong_count(&kept), 1, "it was dropped uncalled");
    }
}

/// An image in memory that counts how often each page is read.
struct Image {
    bytes: Vec<u8>,
    /// The end of each extent, and whether it is a hole.
    extents: Vec<(u64, bool)>,
    reads: Vec<AtomicU32>,
}

impl Image {
    fn new(parts: Vec<(u64, bool)>) -> Self {
        let mut bytes = Vec::new();
        let mut extents = Vec::new();
        for (len, hole) in parts {
            let start = bytes.len() as u64;
            let byte = |at: u64| ((at.wrapping_mul(0x9e37_79b9) >> 7) as u8) | 1;
            bytes.extend((start..start + len).map(|at| if hole { 0 } else { byte(at) }));
            extents.push((start + len, hole));
        }
        let reads = (0..bytes.len() as u64 / PAGE_SIZE + 1).map(|_| AtomicU32::new(0)).collect();
        Image { bytes, extents, reads }
    }
}

impl PageSource for Image {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }
    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        let &(end, hole) = self.extents.iter().find(|(end, _)| offset < *end).unwrap();
        Ok(if hole { Extent::Hole { end } } else { Extent::Data { end } })
    }
    fn submit(&self, request: Request) -> Completion {
        for mut chunk in request.chunks {
            self.read_now(chunk.offset, &mut chunk.destination);
        }
        Completion::ready(Ok(()))
    }
    fn read_now(
        &self,
        offset: u64,
        destination: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        let end = offset as usize + destination.len();
        destination.write_at(0, &self.bytes[offset as usize..end]);
        for page in offset / PAGE_SIZE..(end as u64).div_ceil(PAGE_SIZE) {
            self.reads[page as usize].fetch_add(1, Ordering::Relaxed);
        }
        Some(Ok(()))
    }
}

fn region(start: u64, pages: u64, source: Arc<dyn PageSource>, first: u64) -> DemandRegion {
    let config = PagerConfig {
        backing: Arc::new(MemfdBacking::new(BackingKind::Shmem, pages * PAGE_SIZE).unwrap()),
        source,
        image_offset: first * PAGE_SIZE,
        stats: Arc::new(Stats::new()),
        retrier: Retrier::new(RetryPolicy::default(), |_| {}),
    };
    DemandRegion::new(GuestAddress(start), config, ()).unwrap()
}

/// Generates the start and length of an access, often up to the end of a page, or a byte more or
/// less.
fn access() -> impl Strategy<Value = (u64, u64)> {
    let near = (0..40u64, 0..6u64, 0..3u64).prop_flat_map(|(page, pages, off)| {
        let (start, end) = (page * PAGE_SIZE, (page + pages + 1) * PAGE_SIZE + off - 1);
        (start..=end).prop_map(move |at| (at, end - at))
    });
    prop_oneof![near, (0..40 * PAGE_SIZE, 0..6 * PAGE_SIZE)]
}

/// Generates the gaps and lengths of regions, in pages.
fn layout() -> impl Strategy<Value = Vec<(u64, u64)>> {
    prop::collection::vec((prop_oneof![Just(0u64), 1..4u64], 1..6u64), 1..5)
}

proptest! {
    #![proptest_config(cases(200))]

    /// Uses extents of any length, so that a page can begin in one and end in another, and reads of
    /// any range in any order.
    #[test]
    fn memory_reads_as_its_image(
        parts in prop::collection::vec(
            (prop_oneof![1..9000u64, Just(PAGE_SIZE), Just(3 * PAGE_SIZE)], any::<bool>()), 1..12),
        skip in 0..4u64,
        reads in prop::collection::vec((any::<prop::sample::Index>(), 0..12_000u64), 0..30),
    ) {
        let image = Arc::new(Image::new(parts));
        let pages = (image.size() / PAGE_SIZE).saturating_sub(skip);
        prop_assume!(pages > 0);
        let size = pages * PAGE_SIZE;
        let memory = DemandMemory::new(vec![region(0, pages, image.clone(), skip)]).unwrap();
        let from = (skip * PAGE_SIZE) as usize;
        let whole = [(0, size)];
        let reads = reads.iter().map(|(at, len)| {
            let at = at.index(size as usize) as u64;
            (at, (*len).min(size - at))
        });
        for (at, len) in reads.chain(whole) {
            let mut bytes = vec![0xee; len as usize];
            memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            let expected = &image.bytes[from + at as usize..][..len as usize];
            prop_assert!(bytes == expected, "{} bytes at {}", len, at);
            let touched = PageRange::of_bytes(at, len);
            let pager = memory.pagers().next().unwrap();
            prop_assert_eq!(pager.bitmap().first_missing(touched), None);
        }
        for (page, reads) in image.reads.iter().enumerate() {
            prop_assert!(reads.load(Ordering::Relaxed) <= 1, "page {} is read once", page);
        }
    }

    #[test]
    fn no_range_outside_is_fetched(first: u64, count: u64, pages in 1..40u64) {
        let image = Arc::new(Image::new(vec![(pages * PAGE_SIZE, true)]));
        let region = region(0, pages, image, 0);
        let inside = u128::from(first) + u128::from(count) <= u128::from(pages);
        let fetched = region.pager().fetch(PageRange::new(first, count), FaultPath::Vmm);
        match fetched {
            Ok(_) => prop_assert!(inside),
            Err(error) => {
                prop_assert!(!inside);
                prop_assert_eq!(error, FetchError::OutOfRange { first, count, pages });
            }
        }
    }

    /// Uses regions with and without gaps between them. A check fetches nothing.
    #[test]
    fn ranges_and_accesses_match_a_byte_map(
        layout in layout(),
        accesses in prop::collection::vec(access(), 1..30),
        wild in prop::collection::vec((any::<u64>(), any::<usize>()), 4),
    ) {
        let total: u64 = layout.iter().map(|(_, pages)| pages).sum();
        let image = Arc::new(Image::new(vec![(total * PAGE_SIZE, false)]));
        // The page of the image for each page of guest memory.
        let mut map: Vec<Option<u64>> = Vec::new();
        let mut regions = Vec::new();
        let mut first = 0;
        for (gap, pages) in layout {
            map.extend((0..gap).map(|_| None));
            regions.push(region(map.len() as u64 * PAGE_SIZE, pages, image.clone(), first));
            map.extend((first..first + pages).map(Some));
            first += pages;
        }
        let memory = DemandMemory::new(regions).unwrap();
        let page = |at: u64| map.get((at / PAGE_SIZE) as usize).copied().flatten();
        let there = |at: u64, len: u64| {
            let last = u128::from(at) + u128::from(len);
            (len == 0) || (last <= u128::from(map.len() as u64 * PAGE_SIZE)
                && (at / PAGE_SIZE..(last as u64).div_ceil(PAGE_SIZE))
                    .all(|index| map[index as usize].is_some()))
        };
        let missing = || -> u64 {
            memory.pagers().map(|p| p.bitmap().count_missing(PageRange::new(0, p.pages()))).sum()
        };
        for (at, len) in &accesses {
            prop_assert_eq!(memory.check_range(GuestAddress(*at), *len as usize), there(*at, *len));
        }
        for (at, len) in wild {
            prop_assert_eq!(memory.check_range(GuestAddress(at), len), there(at, len as u64));
        }
        prop_assert_eq!(missing(), total, "checking brings nothing in");
        let mut touched = BTreeSet::new();
        for (at, len) in accesses {
            let mut bytes = vec![0xee; len as usize];
            let read = memory.read_slice(&mut bytes, GuestAddress(at));
            prop_assert_eq!(read.is_ok(), there(at, len), "{} bytes at {}: {:?}", len, at, read);
            if read.is_ok() {
                for (index, byte) in bytes.iter().enumerate() {
                    let at = at + index as u64;
                    let from = page(at).unwrap() * PAGE_SIZE + at % PAGE_SIZE;
                    prop_assert_eq!(*byte, image.bytes[from as usize]);
                }
            }
            // A read that fails may have fetched the pages up to the end of memory.
            let pages = PageRange::of_bytes(at, len);
            touched.extend((pages.first..pages.end()).filter_map(|index| page(index * PAGE_SIZE)));
        }
        prop_assert!(total - missing() <= touched.len() as u64, "only what is touched comes in");
    }
}
