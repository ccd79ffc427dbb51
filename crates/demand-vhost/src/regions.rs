// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory regions as vhost-user messages describe them.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use demand_memory::{DemandMemory, DemandRegion, PAGE_SIZE, PageRange, Pager};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::ErrorKind;

/// A result whose error the connection completes with its socket and operation.
type Result<T> = std::result::Result<T, ErrorKind>;

/// Maximum number of regions in one message, by the vhost-user protocol.
pub(crate) const MAX_REGIONS: usize = 8;

/// Offset from a guest address to the "user address" that the protocol requires.
///
/// Back-ends use user addresses only to translate ring addresses. An address that no process can
/// have reveals nothing of our layout, and a back-end that returns it as its own is recognised
/// beyond doubt.
const USER_ADDRESSES: u64 = 1 << 56;

/// A region shared with a back-end.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    pub(crate) guest_address: u64,
    pub(crate) pager: Arc<Pager>,
}

impl Shared {
    /// Returns all regions of a guest's memory, if one message can describe them.
    pub(crate) fn all<B: Bitmap>(memory: &DemandMemory<B>) -> Result<Vec<Shared>> {
        let regions = memory.num_regions();
        if regions > MAX_REGIONS {
            return Err(ErrorKind::TooManyRegions { regions, most: MAX_REGIONS });
        }
        memory.iter().map(Shared::new).collect()
    }

    /// Returns a region, if a message can describe it.
    pub(crate) fn new<B: Bitmap>(region: &DemandRegion<B>) -> Result<Shared> {
        let guest_address = region.start_addr().0;
        let shared = Shared { guest_address, pager: region.pager().clone() };
        // Guest addresses have at most 52 bits; the user addresses of much higher ones would
        // overflow.
        if guest_address.saturating_add(shared.len()) > USER_ADDRESSES {
            return Err(ErrorKind::TooHigh { address: guest_address });
        }
        Ok(shared)
    }

    /// Returns whether both contain some guest address.
    pub(crate) fn overlaps(&self, other: &Shared) -> bool {
        self.guest_address < other.guest_address + other.len()
            && other.guest_address < self.guest_address + self.len()
    }

    fn len(&self) -> u64 {
        self.pager.pages() * PAGE_SIZE
    }

    fn user_address(&self) -> u64 {
        USER_ADDRESSES + self.guest_address
    }

    pub(crate) fn count_missing(&self) -> u64 {
        self.pager.bitmap().count_missing(PageRange::new(0, self.pager.pages()))
    }

    /// Checks that a back-end's accesses to the region can be trapped, or need not be.
    pub(crate) fn expect_trappable(&self) -> Result<()> {
        let (address, kind) = (self.guest_address, self.pager.backing().kind());
        if kind.traps_in_mappings() || self.pager.bitmap().is_complete() {
            return Ok(());
        }
        Err(ErrorKind::Untrappable { address, kind, missing: self.count_missing() })
    }

    /// Returns the region as a message describes it. The file descriptor in it is the backing's;
    /// `self` keeps it open.
    pub(crate) fn info(&self) -> Result<VhostUserMemoryRegionInfo> {
        let address = self.guest_address;
        let file = self.pager.backing().file().ok_or(ErrorKind::NoFile { address })?;
        Ok(VhostUserMemoryRegionInfo {
            guest_phys_addr: self.guest_address,
            memory_size: self.len(),
            userspace_addr: self.user_address(),
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        })
    }
}

/// Returns the user address of a guest address, or `None` if the guest address is not shared.
pub(crate) fn user_address(regions: &[Shared], address: u64) -> Option<u64> {
    regions.iter().find_map(|region| {
        let offset = address.checked_sub(region.guest_address)?;
        (offset < region.len()).then(|| region.user_address() + offset)
    })
}

/// Checks that the addresses that a back-end returned for its mappings are plausible.
pub(crate) fn check_bases(regions: &[Shared], bases: &[u64]) -> Result<()> {
    for (index, (region, &base)) in regions.iter().zip(bases).enumerate() {
        if base == region.user_address() {
            return Err(ErrorKind::EchoedAddress { address: base });
        }
        let bad = |why| Err(ErrorKind::BadBase { address: base, len: region.len(), why });
        let Some(end) = base.checked_add(region.len()) else {
            return bad("lies past the end of the address space");
        };
        if !base.is_multiple_of(region.pager.backing().kind().unit()) {
            return bad("is not a multiple of the memory's page size");
        }
        if base == 0 {
            return bad("is not an address of a mapping");
        }
        let mut before = regions.iter().zip(bases).take(index);
        if before.any(|(other, &start)| start < end && base < start + other.len()) {
            return bad("overlaps another region");
        }
    }
    Ok(())
}

#[cfg(test)]
mod properties;
