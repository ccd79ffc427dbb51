// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Accesses at the edges of a page, of a bitmap word, of a region and of memory.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::num::NonZeroUsize;
use std::sync::Arc;

use demand_memory::{
    AccessMappingError, BackingKind, DemandMemory, DemandRegion, MemfdBacking, PAGE_SIZE,
    PageRange, PagerConfig,
};
use demand_source::LocalFile;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    MemoryRegionAddress,
};

fn config(pages: u64) -> PagerConfig {
    let image = tempfile::NamedTempFile::new().unwrap();
    let content: Vec<u8> = (0..pages).flat_map(|page| [page as u8 + 1; 4096]).collect();
    std::fs::write(image.path(), content).unwrap();
    let backing = MemfdBacking::new(BackingKind::Shmem, pages * PAGE_SIZE).unwrap();
    let source = LocalFile::open(image.path()).unwrap();
    PagerConfig::new(Arc::new(backing), Arc::new(source))
}

fn region(start: u64, pages: u64) -> DemandRegion {
    DemandRegion::new(GuestAddress(start), config(pages), ()).unwrap()
}

fn missing(region: &DemandRegion) -> u64 {
    region.pager().bitmap().count_missing(PageRange::new(0, region.pager().pages()))
}

#[test]
fn slices_of_nothing_bring_nothing_in() {
    let region = region(0, 130);
    for offset in [0, 1, 4095, 4096, 64 * 4096, region.len()] {
        assert_eq!(region.get_slice(MemoryRegionAddress(offset), 0).unwrap().len(), 0);
    }
    for (offset, count) in [
        (region.len() + 1, 0),
        (region.len(), 1),
        (region.len() - 1, 2),
        (0, region.len() as usize + 1),
        (u64::MAX, 1),
        (u64::MAX, usize::MAX),
        (1, usize::MAX),
    ] {
        let refused = region.get_slice(MemoryRegionAddress(offset), count);
        assert!(
            matches!(refused, Err(GuestMemoryError::InvalidBackendAddress)),
            "{count} bytes at {offset}"
        );
    }
    assert_eq!(missing(&region), 130);
}

#[test]
fn slices_across_word_edges_hold_the_image() {
    for first in [0, 1, 62, 63, 64, 65, 127, 128] {
        for count in [1, 2, 63, 64, 65, 128, 130] {
            if first + count > 130 {
                continue;
            }
            let region = region(0, 130);
            // The first, middle and last page become present before the whole range is read.
            for absent in [first, first + count / 2, first + count - 1] {
                let fetched = region.get_slice(MemoryRegionAddress(absent * PAGE_SIZE), 1).unwrap();
                assert_eq!(
                    fetched.load::<u8>(0, std::sync::atomic::Ordering::Relaxed).unwrap(),
                    absent as u8 + 1
                );
            }
            let offset = first * PAGE_SIZE + 4095;
            // From the last byte of the first page to the first byte of the last page.
            let len = ((count - 1) * PAGE_SIZE).saturating_sub(4094).max(1) as usize;
            let mut bytes = vec![0; len];
            region.read_slice(&mut bytes, MemoryRegionAddress(offset)).unwrap();
            for (at, byte) in bytes.iter().enumerate() {
                assert_eq!(u64::from(*byte), (offset + at as u64) / PAGE_SIZE + 1);
            }
            assert_eq!(missing(&region), 130 - count, "{count} pages from {first}");
        }
    }
}

#[test]
fn addresses_are_found_in_few_or_many_regions() {
    for regions in [1, 2, 4, 5, 9] {
        // Every second region directly follows the one before it.
        let starts: Vec<_> =
            (0..regions).map(|at| 0x10000 + at * 0x3000 - at % 2 * 0x1000).collect();
        let memory =
            DemandMemory::new(starts.iter().map(|start| region(*start, 2)).collect()).unwrap();
        for address in (0..0x10000 + regions * 0x3000 + 0x3000).step_by(0x800) {
            for address in [address, address + 1, address + 0x7ff].map(GuestAddress) {
                let expected = starts.iter().find(|at| (**at..**at + 0x2000).contains(&address.0));
                let found = memory.to_region_addr(address);
                assert_eq!(
                    found.map(|(region, offset)| (region.start_addr().0, offset.0)),
                    expected.map(|start| (*start, address.0 - start)),
                    "{address:?} of {regions} regions"
                );
                assert_eq!(memory.find_region(address).is_some(), expected.is_some());
                let read = memory.read_obj::<u8>(address);
                assert_eq!(read.ok(), expected.map(|at| ((address.0 - at) / 4096) as u8 + 1));
            }
        }
        assert!(memory.to_region_addr(GuestAddress(u64::MAX)).is_none());
    }
}

/// Raw pointers into an untrapped mapping would show zeros for missing pages.
#[test]
fn untrapped_access_mapping_is_refused() {
    let incomplete = region(0, 4);
    let map = |region: &DemandRegion| Arc::new(region.pager().backing().map().unwrap());
    let set = |region: &DemandRegion| region.set_access_mapping(map(region));
    assert_eq!(set(&incomplete), Err(AccessMappingError::NotTrapped));
    assert!(incomplete.get_host_address(MemoryRegionAddress(0)).is_err());

    incomplete.read_slice(&mut [0; 4 * 4096], MemoryRegionAddress(0)).unwrap();
    let other = AccessMappingError::Length { mapping: 5 * PAGE_SIZE, region: 4 * PAGE_SIZE };
    assert_eq!(incomplete.set_access_mapping(map(&region(0, 5))), Err(other));
    set(&incomplete).unwrap();
    let address = incomplete.get_host_address(MemoryRegionAddress(3 * PAGE_SIZE)).unwrap();
    // SAFETY: the byte lies in the mapping, which the region keeps alive, and nothing writes it.
    assert_eq!(unsafe { address.read_volatile() }, 4);
    assert_eq!(set(&incomplete), Err(AccessMappingError::Twice));
}

#[test]
fn writes_mark_their_pages_dirty() {
    let tracked = AtomicBitmap::new(4 * PAGE_SIZE as usize, NonZeroUsize::new(4096).unwrap());
    let region = DemandRegion::new(GuestAddress(0), config(4), tracked).unwrap();
    let dirty =
        || -> Vec<usize> { (0..4).filter(|page| region.bitmap().dirty_at(page * 4096)).collect() };
    let mut all = vec![0; 4 * PAGE_SIZE as usize];
    region.read_slice(&mut all, MemoryRegionAddress(0)).unwrap();
    assert_eq!(dirty(), [0; 0], "neither a fetch nor a read is a write of the VMM");
    region.write_obj(7u8, MemoryRegionAddress(3 * PAGE_SIZE + 5)).unwrap();
    assert_eq!(dirty(), [3]);
    let slice = region.get_slice(MemoryRegionAddress(PAGE_SIZE - 1), 2).unwrap();
    slice.write_slice(&[8, 9], 0).unwrap();
    assert_eq!(dirty(), [0, 1, 3]);
}
