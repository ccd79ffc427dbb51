// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Property tests of address translation and of the checks of a back-end's addresses.

use demand_memory::{
    BackingKind, DemandRegion, MemfdBacking, PagerConfig, Retrier, RetryPolicy, Stats,
};
use proptest::prelude::*;
use test_support::image::Near;
use vm_memory::GuestAddress;

use super::*;

/// Builds regions from pairs of (gap, pages), both in pages, the first one starting at `high`.
fn regions(layout: &[(u64, u64)], high: u64) -> DemandMemory {
    let mut start = 0;
    let regions = layout.iter().map(|(gap, pages)| {
        start += gap * PAGE_SIZE;
        let size = pages * PAGE_SIZE;
        let config = PagerConfig {
            backing: Arc::new(MemfdBacking::new(BackingKind::Shmem, size).unwrap()),
            source: Arc::new(Near(size)),
            image_offset: 0,
            stats: Arc::new(Stats::new()),
            retrier: Retrier::new(RetryPolicy::default(), |_| {}),
        };
        let address = GuestAddress(high + start);
        start += size;
        DemandRegion::new(address, config, ()).unwrap()
    });
    DemandMemory::new(regions.collect()).unwrap()
}

fn layout() -> impl Strategy<Value = (Vec<(u64, u64)>, u64)> {
    let high = prop_oneof![Just(0u64), Just(1 << 32), Just(1 << 51)];
    (prop::collection::vec((0..5u64, 1..9u64), 1..=MAX_REGIONS), high)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn each_guest_address_has_one_user_address(
        (layout, high) in layout(),
        addresses in prop::collection::vec(prop_oneof![any::<u64>(), 0..120 * PAGE_SIZE], 50),
    ) {
        let memory = regions(&layout, high);
        let shared = Shared::all(&memory).unwrap();
        for offset in addresses {
            for address in [offset, high.wrapping_add(offset)] {
                let there = memory.find_region(GuestAddress(address)).is_some();
                let user = user_address(&shared, address);
                prop_assert_eq!(user, there.then(|| USER_ADDRESSES + address));
            }
        }
        // Messages describe the regions by the same addresses.
        for (region, info) in memory.iter().zip(shared.iter().map(|region| region.info().unwrap())) {
            let first = user_address(&shared, region.start_addr().0);
            prop_assert_eq!(first, Some(info.userspace_addr));
            prop_assert_eq!((info.memory_size, info.mmap_offset), (region.len(), 0));
        }
    }

    /// Bases are accepted exactly if they are page-aligned, do not overlap, and none is our own
    /// address.
    #[test]
    fn exactly_the_valid_bases_are_accepted(
        (layout, high) in layout(),
        bases in prop::collection::vec(
            prop_oneof![
                4 => (1..200u64).prop_map(|page| page * PAGE_SIZE),
                4 => (1..1u64 << 35).prop_map(|page| page * PAGE_SIZE),
                1 => any::<u64>(),
                1 => (1..10u64).prop_map(|page| u64::MAX - page * PAGE_SIZE + 1),
                1 => Just(USER_ADDRESSES),
            ],
            MAX_REGIONS,
        ),
    ) {
        let memory = regions(&layout, high);
        let shared = Shared::all(&memory).unwrap();
        let bases = &bases[..shared.len()];
        let ends: Vec<u128> = shared
            .iter()
            .zip(bases)
            .map(|(region, base)| u128::from(*base) + u128::from(region.len()))
            .collect();
        let fine = |index: usize| {
            let (base, end) = (u128::from(bases[index]), ends[index]);
            let apart = |other: usize| {
                other == index || end <= u128::from(bases[other]) || ends[other] <= base
            };
            base != 0
                && bases[index].is_multiple_of(PAGE_SIZE)
                && end <= u128::from(u64::MAX)
                && bases[index] != shared[index].user_address()
                && (0..bases.len()).all(apart)
        };
        let right = (0..bases.len()).all(fine);
        let checked = check_bases(&shared, bases);
        prop_assert_eq!(checked.is_ok(), right, "{:?}: {:?}", bases, checked);
    }
}

#[test]
fn nine_regions_are_too_many() {
    let memory = regions(&[(0, 1); MAX_REGIONS + 1], 0);
    assert!(matches!(Shared::all(&memory), Err(ErrorKind::TooManyRegions { regions: 9, most: 8 })));
}

#[test]
fn memory_beyond_guest_addresses_is_refused() {
    for high in [USER_ADDRESSES - PAGE_SIZE, u64::MAX - 2 * PAGE_SIZE + 1] {
        let memory = regions(&[(0, 2)], high);
        let error = Shared::all(&memory).unwrap_err();
        assert!(matches!(error, ErrorKind::TooHigh { address } if address == high), "{high:#x}");
    }
    assert!(Shared::all(&regions(&[(0, 2)], USER_ADDRESSES - 2 * PAGE_SIZE)).is_ok());
}
