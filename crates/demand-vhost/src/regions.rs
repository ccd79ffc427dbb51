// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory regions as vhost-user messages describe them.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use demand_memory::{DemandMemory, PAGE_SIZE, PageRange, Pager};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::{Error, Result};

/// Maximum number of regions in one message, by the vhost-user protocol.
pub const MAX_REGIONS: usize = 8;

/// Offset from a guest address to the "user address" that the protocol requires.
///
/// Back-ends use user addresses only to translate ring addresses. An address that no process can
/// have reveals nothing of our layout, and a back-end that returns it as its own is recognised
/// beyond doubt.
const USER_ADDRESSES: u64 = 1 << 56;

/// A region shared with a back-end.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    guest_address: u64,
    pub(crate) pager: Arc<Pager>,
}

impl Shared {
    /// Returns all regions of a guest's memory, if one message can describe them.
    pub(crate) fn all<B: Bitmap>(memory: &DemandMemory<B>) -> Result<Vec<Shared>> {
        let regions: Vec<_> = memory
            .iter()
            .map(|region| Shared {
                guest_address: region.start_addr().0,
                pager: region.pager().clone(),
            })
            .collect();
        if regions.len() > MAX_REGIONS {
            return Err(Error::Regions(regions.len()));
        }
        // Guest addresses have at most 52 bits; the user addresses of much higher ones would
        // overflow.
        let too_high =
            |shared: &&Shared| shared.guest_address.saturating_add(shared.len()) > USER_ADDRESSES;
        if let Some(shared) = regions.iter().find(too_high) {
            return Err(Error::TooHigh(shared.guest_address));
        }
        Ok(regions)
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

    /// Returns the region as a message describes it. The file descriptor in it is the backing's;
    /// `self` keeps it open.
    pub(crate) fn info(&self) -> Result<VhostUserMemoryRegionInfo> {
        let file = self.pager.backing().file().ok_or(Error::NoFile(self.guest_address))?;
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
pub(crate) fn check_bases(socket: &Path, regions: &[Shared], bases: &[u64]) -> Result<()> {
    for (index, (region, &base)) in regions.iter().zip(bases).enumerate() {
        if base == region.user_address() {
            return Err(Error::EchoedAddress { socket: socket.into(), address: base });
        }
        let bad = |why| {
            let (socket, len) = (socket.into(), region.len());
            Err(Error::BadBase { socket, address: base, len, why })
        };
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
