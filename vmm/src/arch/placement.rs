// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The placement of memory in a guest's address space.

use vm_memory::GuestAddress;

use crate::arch::error::PlacementError;
use crate::arch::layout::MEMSLOT_MAX;

/// Upper limit of memory below 4 GiB. Devices lie between this address and [`HIGH_MEMORY`], as in
/// the machines of QEMU, Firecracker and Cloud Hypervisor.
pub const LOW_MEMORY_END: u64 = 3 << 30;
/// Start of the memory that does not fit below the devices.
pub const HIGH_MEMORY: u64 = 4 << 30;

/// A piece of memory with its own region and memslot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Guest physical address of its first byte.
    pub start: GuestAddress,
    /// Length, in bytes.
    pub size: u64,
    /// Offset of its first byte in an image of the memory, in bytes. An image holds the pieces
    /// without the gap between them.
    pub image_offset: u64,
}

/// Places `size` bytes of memory: below the devices as far as they fit, the rest above 4 GiB.
///
/// # Examples
///
/// ```
/// use demand_vmm::arch::placement::place;
///
/// const GIB: u64 = 1 << 30;
/// let regions = place(5 * GIB);
/// assert_eq!((regions[0].start.0, regions[0].size), (0, 3 * GIB));
/// assert_eq!((regions[1].start.0, regions[1].size), (4 * GIB, 2 * GIB));
/// assert_eq!(regions[1].image_offset, 3 * GIB);
/// ```
pub fn place(size: u64) -> Vec<Placement> {
    let low = size.min(LOW_MEMORY_END);
    let pieces = [(0, 0, low), (HIGH_MEMORY, low, size - low)];
    let placed = pieces.into_iter().filter(|&(_, _, size)| size > 0);
    placed
        .map(|(start, image_offset, size)| Placement {
            start: GuestAddress(start),
            size,
            image_offset,
        })
        .collect()
}

/// Refuses memory that no machine on this host can have. Call it before any work on the memory's
/// size: the bitmaps of memory that is too large take gigabytes.
pub(crate) fn check_places(regions: &[Placement]) -> Result<(), PlacementError> {
    check_reach(regions)?;
    check_memslots(regions)
}

/// Refuses regions that are too large for a memslot.
fn check_memslots(regions: &[Placement]) -> Result<(), PlacementError> {
    let Some(region) = regions.iter().find(|region| region.size > MEMSLOT_MAX) else {
        return Ok(());
    };
    let total = regions.iter().map(|region| region.size).sum();
    Err(PlacementError::Memslot { total, bytes: region.size, start: region.start.0 })
}

/// Refuses memory beyond this processor's physical addresses.
fn check_reach(regions: &[Placement]) -> Result<(), PlacementError> {
    let bits = physical_bits();
    // Compares the last byte, because sizes near 2^64 must not wrap.
    let last = |region: &Placement| region.start.0.saturating_add(region.size - 1);
    let last = regions.iter().map(last).max().unwrap_or(0);
    if last.checked_shr(bits).unwrap_or(0) == 0 {
        return Ok(());
    }
    let total = regions.iter().map(|region| region.size).sum();
    Err(PlacementError::Reach { total, last, bits })
}

/// Returns the number of bits in a physical address here (AMD64 manual, volume 3, Fn8000_0008).
fn physical_bits() -> u32 {
    // Leaf 0x80000000 returns the number of the highest extended leaf.
    if std::arch::x86_64::__cpuid(0x8000_0000).eax < 0x8000_0008 {
        return 36;
    }
    std::arch::x86_64::__cpuid(0x8000_0008).eax & 0xff
}

#[cfg(test)]
mod tests {
    use demand_memory::PAGE_SIZE;

    use super::*;

    const M: u64 = 1 << 20;
    const G: u64 = 1 << 30;

    #[test]
    fn memory_leaves_the_hole_out() {
        let placed = |size| {
            let regions = place(size).into_iter();
            regions.map(|region| (region.start.0, region.size, region.image_offset)).collect()
        };
        let expect = |size, regions: &[(u64, u64, u64)]| {
            let placed: Vec<_> = placed(size);
            assert_eq!(placed, regions, "{size:#x}");
        };
        expect(4096, &[(0, 4096, 0)]);
        expect(3 * G - 2 * M, &[(0, 3 * G - 2 * M, 0)]);
        expect(3 * G, &[(0, 3 * G, 0)]);
        expect(3 * G + 2 * M, &[(0, 3 * G, 0), (4 * G, 2 * M, 3 * G)]);
        expect(5 * G, &[(0, 3 * G, 0), (4 * G, 2 * G, 3 * G)]);
        expect(500 * G, &[(0, 3 * G, 0), (4 * G, 497 * G, 3 * G)]);
    }

    #[test]
    fn memory_out_of_reach_is_refused() {
        assert!(check_reach(&place(8 * G)).is_ok());
        for size in [1 << 53, u64::MAX - 4095] {
            let error = check_reach(&place(size)).unwrap_err().to_string();
            assert!(error.contains("bits of physical address"), "{error}");
        }
    }

    #[test]
    fn memory_beyond_a_memslot_is_refused() {
        const T: u64 = 1 << 40;
        // The size that the error advises is among them.
        for size in [8 * G, 8 * T, LOW_MEMORY_END + 8 * T - PAGE_SIZE] {
            assert!(check_memslots(&place(size)).is_ok(), "{size:#x}");
        }
        let error = check_memslots(&place(LOW_MEMORY_END + 8 * T)).unwrap_err().to_string();
        let words = ["8796093022208 bytes at guest address 0x100000000", "ask for at most 8T"];
        assert!(words.iter().all(|words| error.contains(words)), "{error}");
    }
}
