// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A region of guest memory, with vm-memory's traits on top of a pager.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use demand_source::to_usize;
use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{
    AtomicAccess, Bytes, GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestUsize,
    MemoryRegionAddress, ReadVolatile, VolatileSlice, WriteVolatile, guest_memory,
};

use crate::pager::Held;
use crate::{
    Backing, FaultPath, FetchError, Mapping, PAGE_SIZE, PageRange, Pager, PagerConfig, PagerError,
    Stats, Waiter,
};

thread_local! {
    // Never kicked: a wait through vm-memory ends when the page arrives or the memory is stopped.
    static WAITER: Waiter = Waiter::new();
}

/// Errors from setting a region's mapping for raw pointers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AccessMappingError {
    /// A mapping without a trap: missing pages would read as zeros.
    #[error(
        "cannot use a mapping for raw pointers: accesses to missing pages are not trapped there; \
         arm it first"
    )]
    NotTrapped,
    /// A region that has an access mapping already.
    #[error("cannot use a mapping for raw pointers: the region already has one")]
    Twice,
    /// A mapping that is not as long as the region.
    #[error(
        "cannot use a mapping for raw pointers: its {mapping} bytes differ from the region's \
         {region}; map the region's backing"
    )]
    Length {
        /// Length of the mapping, in bytes.
        mapping: u64,
        /// Length of the region, in bytes.
        region: u64,
    },
}

/// A region of guest memory whose pages arrive when they are first used.
///
/// Every access through vm-memory's traits asks the pager for exactly the pages that it touches, so
/// it neither faults nor sees a missing page. The access waits while the source is unavailable, and
/// fails only once the memory is stopped.
///
/// [`file_offset`](GuestMemoryRegion::file_offset) is `None`: code that mapped the file without a
/// trap would read zeros from missing pages. Code that has a trap finds the file through
/// [`Pager::backing`].
///
/// Dropping it [stops](Pager::stop) its pager, unless a [`GuestMapping`](crate::GuestMapping) of
/// the region exists: then the guest still gets its pages.
#[derive(Debug)]
pub struct DemandRegion<B = ()> {
    start: GuestAddress,
    /// Length, in bytes.
    len: u64,
    pager: Held,
    /// The pager's populate mapping, kept here because each access needs it.
    populate: Arc<Mapping>,
    access: OnceLock<Arc<Mapping>>,
    bitmap: B,
}

impl<B: Bitmap> DemandRegion<B> {
    /// Creates a region at guest physical address `start`. `bitmap` tracks the VMM's writes; `()`
    /// tracks nothing.
    ///
    /// # Errors
    ///
    /// The errors of [`Pager::new`], and [`PagerError::PastTheEnd`].
    pub fn new(start: GuestAddress, config: PagerConfig, bitmap: B) -> Result<Self, PagerError> {
        Self::with_pager(start, Pager::new(config)?, bitmap)
    }

    /// Creates a region whose pages are all present and initially zero: see [`Pager::new_present`].
    ///
    /// # Errors
    ///
    /// The errors of [`Pager::new_present`], and [`PagerError::PastTheEnd`].
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_memory::{BackingKind, DemandRegion, MemfdBacking, Stats};
    /// use std::sync::Arc;
    /// use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
    ///
    /// let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, 1 << 20).unwrap());
    /// let region =
    ///     DemandRegion::new_present(GuestAddress(0), backing, Arc::new(Stats::new()), ()).unwrap();
    /// assert!(region.pager().bitmap().is_complete());
    /// assert_eq!(region.read_obj::<u64>(MemoryRegionAddress(8)).unwrap(), 0);
    /// ```
    pub fn new_present(
        start: GuestAddress,
        backing: Arc<dyn Backing>,
        stats: Arc<Stats>,
        bitmap: B,
    ) -> Result<Self, PagerError> {
        Self::with_pager(start, Pager::new_present(backing, stats)?, bitmap)
    }

    fn with_pager(start: GuestAddress, pager: Arc<Pager>, bitmap: B) -> Result<Self, PagerError> {
        let populate = pager.populate_mapping().clone();
        // At least one page, because the bitmap has one.
        let len = pager.pages() * PAGE_SIZE;
        if start.0.checked_add(len - 1).is_none() {
            return Err(PagerError::PastTheEnd { start: start.0, size: len });
        }
        let pager = Held::of_region(&pager);
        Ok(DemandRegion { start, len, pager, populate, access: OnceLock::new(), bitmap })
    }

    /// Returns the region's pager.
    pub fn pager(&self) -> &Arc<Pager> {
        self.pager.pager()
    }

    /// Sets the mapping for raw pointers. It must be armed unless all pages are present: an access
    /// to a missing page in it must wait until the page is present.
    ///
    /// # Errors
    ///
    /// [`AccessMappingError`]; nothing has changed then.
    pub fn set_access_mapping(&self, mapping: Arc<Mapping>) -> Result<(), AccessMappingError> {
        if mapping.len() != self.len {
            return Err(AccessMappingError::Length { mapping: mapping.len(), region: self.len });
        }
        if !mapping.traps_all() && !self.pager().bitmap().is_complete() {
            return Err(AccessMappingError::NotTrapped);
        }
        self.access.set(mapping).map_err(|_| AccessMappingError::Twice)
    }

    /// Returns the host address of the `len` bytes at `offset` if they lie in the region and one
    /// bitmap word shows them present. `None` means "take the slow path,
    /// [`bring_in`](Self::bring_in)", not "out of range".
    // Not inlined on purpose, like the search for the region: vm-memory's iterator over slices then
    // stays small enough to be optimised away in its callers, which saves more than the calls cost.
    #[inline(never)]
    fn if_present(&self, offset: u64, len: u64) -> Option<NonNull<u8>> {
        // An empty range lies in no page: `None`.
        let last = offset.checked_add(len.checked_sub(1)?)?;
        let present = last < self.len
            && self.pager().bitmap().present_in_word(offset / PAGE_SIZE, last / PAGE_SIZE);
        present.then(|| self.address(offset))
    }

    /// Makes the pages of the `len` bytes at `offset` present and returns the bytes' host address.
    #[cold]
    #[inline(never)]
    fn bring_in(&self, offset: u64, len: u64) -> guest_memory::Result<NonNull<u8>> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        bring_in(self.pager(), PageRange::of_bytes(offset, len))?;
        Ok(self.address(offset))
    }

    /// Returns the host address of the byte at `offset`, which lies in the region or at its end.
    #[inline]
    fn address(&self, offset: u64) -> NonNull<u8> {
        debug_assert!(offset <= self.len);
        // SAFETY: the callers keep `offset` within the region or at its end, and the pager has
        // checked that the mapping is not shorter than the region.
        unsafe { self.populate.address().add(to_usize(offset)) }
    }

    /// Returns the address in the region that corresponds to `address`, if it lies there.
    #[inline]
    pub(crate) fn offset_of(&self, address: GuestAddress) -> Option<MemoryRegionAddress> {
        // An address below the region wraps around, to more than any region's length.
        let offset = address.0.wrapping_sub(self.start.0);
        (offset < self.len).then_some(MemoryRegionAddress(offset))
    }

    /// Returns the slice of at most `len` bytes at `address`, cut at the region's end.
    fn slice_up_to(
        &self,
        address: MemoryRegionAddress,
        len: usize,
    ) -> guest_memory::Result<VolatileSlice<'_, BS<'_, B>>> {
        let left = self
            .len()
            .checked_sub(address.0)
            .filter(|left| *left > 0)
            .ok_or(GuestMemoryError::InvalidBackendAddress)?;
        self.get_slice(address, usize::try_from(left).map_or(len, |left| len.min(left)))
    }
}

impl<B: Bitmap> GuestMemoryRegion for DemandRegion<B> {
    type B = B;

    #[inline]
    fn len(&self) -> GuestUsize {
        self.len
    }

    #[inline]
    fn start_addr(&self) -> GuestAddress {
        self.start
    }

    fn bitmap(&self) -> BS<'_, B> {
        self.bitmap.slice_at(0)
    }

    fn get_host_address(&self, addr: MemoryRegionAddress) -> guest_memory::Result<*mut u8> {
        let mapping = self.access.get().ok_or(GuestMemoryError::HostAddressNotAvailable)?;
        let addr = self.check_address(addr).ok_or(GuestMemoryError::InvalidBackendAddress)?;
        Ok(mapping.at(addr.0).as_ptr())
    }

    #[inline]
    fn to_region_addr(&self, addr: GuestAddress) -> Option<MemoryRegionAddress> {
        self.offset_of(addr)
    }

    #[inline]
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> guest_memory::Result<VolatileSlice<'_, BS<'_, B>>> {
        let address = match self.if_present(offset.0, count as u64) {
            Some(address) => address,
            None => self.bring_in(offset.0, count as u64)?,
        };
        // SAFETY: `if_present` and `bring_in` both check that the range lies in the region, and so
        // in the populate mapping, which `self` keeps mapped for longer than the slice lives. Its
        // pages are present, and present is final: the pager never writes them again. Only other
        // processes, the guest and slices like this one access the bytes otherwise, and they do so
        // volatilely.
        Ok(unsafe {
            VolatileSlice::with_bitmap(
                address.as_ptr(),
                count,
                self.bitmap.slice_at(to_usize(offset.0)),
                None,
            )
        })
    }

    fn is_hugetlbfs(&self) -> Option<bool> {
        Some(self.pager().unit_pages() > 1)
    }
}

// Written by hand: vm-memory's own implementation requests a slice of the whole region for 8 bytes.
impl<B: Bitmap> Bytes<MemoryRegionAddress> for DemandRegion<B> {
    type E = GuestMemoryError;

    fn write(&self, buf: &[u8], addr: MemoryRegionAddress) -> guest_memory::Result<usize> {
        Ok(self.slice_up_to(addr, buf.len())?.write(buf, 0)?)
    }

    fn read(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> guest_memory::Result<usize> {
        Ok(self.slice_up_to(addr, buf.len())?.read(buf, 0)?)
    }

    fn write_slice(&self, buf: &[u8], addr: MemoryRegionAddress) -> guest_memory::Result<()> {
        Ok(self.get_slice(addr, buf.len())?.write_slice(buf, 0)?)
    }

    fn read_slice(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> guest_memory::Result<()> {
        Ok(self.get_slice(addr, buf.len())?.read_slice(buf, 0)?)
    }

    fn read_volatile_from<F: ReadVolatile>(
        &self,
        addr: MemoryRegionAddress,
        src: &mut F,
        count: usize,
    ) -> guest_memory::Result<usize> {
        Ok(self.slice_up_to(addr, count)?.read_volatile_from(0, src, count)?)
    }

    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        addr: MemoryRegionAddress,
        src: &mut F,
        count: usize,
    ) -> guest_memory::Result<()> {
        Ok(self.get_slice(addr, count)?.read_exact_volatile_from(0, src, count)?)
    }

    fn write_volatile_to<F: WriteVolatile>(
        &self,
        addr: MemoryRegionAddress,
        dst: &mut F,
        count: usize,
    ) -> guest_memory::Result<usize> {
        Ok(self.slice_up_to(addr, count)?.write_volatile_to(0, dst, count)?)
    }

    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        addr: MemoryRegionAddress,
        dst: &mut F,
        count: usize,
    ) -> guest_memory::Result<()> {
        Ok(self.get_slice(addr, count)?.write_all_volatile_to(0, dst, count)?)
    }

    fn store<T: AtomicAccess>(
        &self,
        val: T,
        addr: MemoryRegionAddress,
        order: Ordering,
    ) -> guest_memory::Result<()> {
        Ok(self.get_slice(addr, size_of::<T>())?.store(val, 0, order)?)
    }

    fn load<T: AtomicAccess>(
        &self,
        addr: MemoryRegionAddress,
        order: Ordering,
    ) -> guest_memory::Result<T> {
        Ok(self.get_slice(addr, size_of::<T>())?.load(0, order)?)
    }
}

/// Makes pages present. Not generic, so that it is compiled once.
fn bring_in(pager: &Arc<Pager>, pages: PageRange) -> Result<(), GuestMemoryError> {
    let missing = pager.bitmap().count_missing(pages);
    if missing == 0 {
        return Ok(());
    }
    let begun = Instant::now();
    WAITER
        .with(|waiter| pager.ensure(pages, FaultPath::Vmm, waiter))
        .map_err(|error| GuestMemoryError::IOError(io::Error::other(error)))?;
    pager.stats().fault(FaultPath::Vmm, missing * PAGE_SIZE, begun.elapsed());
    Ok(())
}

impl From<FetchError> for io::Error {
    fn from(error: FetchError) -> Self {
        io::Error::other(error)
    }
}
