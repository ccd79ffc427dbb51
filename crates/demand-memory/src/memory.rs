// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! All memory of a guest: its regions together.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::bitmap::Bitmap;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollection,
    GuestRegionCollectionError, GuestUsize, MemoryRegionAddress,
};

use crate::{DemandRegion, Pager};

/// Up to this number of regions, checking each is quicker than a search. A guest has one or two,
/// unless memory was plugged in.
const FEW: usize = 4;

/// All memory of a guest, in the form that linux-loader, virtio-queue and every other user of
/// vm-memory takes.
///
/// It differs from a plain collection of regions in one point: checking a range does not fetch its
/// pages.
///
/// # Examples
///
/// ```
/// use demand_memory::{
///     BackingKind, DemandMemory, DemandRegion, MemfdBacking, PageRange, PagerConfig,
/// };
/// use demand_source::LocalFile;
/// use std::sync::Arc;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
///
/// let image = tempfile::NamedTempFile::new().unwrap();
/// std::os::unix::fs::FileExt::write_all_at(image.as_file(), b"hello", 0x5000).unwrap();
/// image.as_file().set_len(1 << 20).unwrap();
///
/// let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, 1 << 20).unwrap());
/// let config = PagerConfig::new(backing, Arc::new(LocalFile::open(image.path()).unwrap()));
/// let region = DemandRegion::new(GuestAddress(0), config, ()).unwrap();
/// let memory = DemandMemory::new(vec![region]).unwrap();
///
/// assert!(memory.check_range(GuestAddress(0), 1 << 20));
/// let mut word = [0; 5];
/// memory.read_slice(&mut word, GuestAddress(0x5000)).unwrap();
/// assert_eq!(&word, b"hello");
///
/// // Only the page that was read is present.
/// let pager = memory.pagers().next().unwrap();
/// assert_eq!(pager.bitmap().count_missing(PageRange::new(0, 256)), 255);
/// assert!(!pager.bitmap().is_missing(5));
/// ```
#[derive(Debug, Default)]
pub struct DemandMemory<B: Bitmap = ()> {
    regions: GuestRegionCollection<DemandRegion<B>>,
}

impl<B: Bitmap> DemandMemory<B> {
    /// Creates a memory of these regions.
    ///
    /// # Errors
    ///
    /// Those of [`GuestRegionCollection::from_regions`]: regions overlap or are not sorted, or the
    /// list is empty.
    pub fn new(regions: Vec<DemandRegion<B>>) -> Result<Self, GuestRegionCollectionError> {
        Ok(DemandMemory { regions: GuestRegionCollection::from_regions(regions)? })
    }

    /// Returns this memory with a further region, like
    /// [`GuestRegionCollection::insert_region`]: the others are shared. A VMM whose memory changes
    /// keeps it in a `GuestMemoryAtomic`, and replaces it there.
    ///
    /// demand-kvm's `FaultHandler::insert` gives the region to the guest first.
    ///
    /// # Errors
    ///
    /// [`GuestRegionCollectionError::MemoryRegionOverlap`].
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_memory::{BackingKind, DemandMemory, DemandRegion, MemfdBacking, Stats};
    /// use std::sync::Arc;
    /// use vm_memory::{GuestAddress, GuestMemoryBackend};
    ///
    /// let region = |start| {
    ///     let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, 1 << 20).unwrap());
    ///     let stats = Arc::new(Stats::new());
    ///     DemandRegion::new_present(GuestAddress(start), backing, stats, ()).unwrap()
    /// };
    /// let memory = DemandMemory::new(vec![region(0)]).unwrap();
    /// let larger = memory.insert_region(Arc::new(region(4 << 20))).unwrap();
    /// assert!(larger.check_range(GuestAddress(4 << 20), 1 << 20));
    /// let (smaller, removed) = larger.remove_region(GuestAddress(0), 1 << 20).unwrap();
    /// assert!(!smaller.check_range(GuestAddress(0), 1));
    /// assert!(larger.check_range(GuestAddress(0), 1), "a memory that is in use stays");
    /// assert!(!removed.pager().bitmap().is_stopped());
    /// ```
    pub fn insert_region(
        &self,
        region: Arc<DemandRegion<B>>,
    ) -> Result<Self, GuestRegionCollectionError> {
        Ok(DemandMemory { regions: self.regions.insert_region(region)? })
    }

    /// Returns this memory without the region of `size` bytes at `base`, and the region, like
    /// [`GuestRegionCollection::remove_region`]. The region is still in use where the present
    /// memory is held; demand-kvm's `FaultHandler::remove` ends that.
    ///
    /// # Errors
    ///
    /// [`GuestRegionCollectionError::NoMemoryRegion`].
    pub fn remove_region(
        &self,
        base: GuestAddress,
        size: GuestUsize,
    ) -> Result<(Self, Arc<DemandRegion<B>>), GuestRegionCollectionError> {
        let (regions, region) = self.regions.remove_region(base, size)?;
        Ok((DemandMemory { regions }, region))
    }

    /// Returns the regions' pagers, in order of guest address.
    pub fn pagers(&self) -> impl Iterator<Item = &Arc<Pager>> {
        self.regions.iter().map(DemandRegion::pager)
    }

    /// Calls `callback` when the last page of all regions is present: at once if it already is,
    /// else on the thread that publishes it. The callback must not block. The steps that follow
    /// (ending post-copy, removing the traps, turning the memslots into
    /// ordinary ones) block, and belong on a thread that serves no faults.
    ///
    /// It concerns the regions that this memory has: after a change call it for the new memory.
    pub fn on_complete(&self, callback: impl FnOnce() + Send + 'static) {
        let left = AtomicUsize::new(self.num_regions());
        let shared = Arc::new((left, Mutex::new(Some(callback))));
        for pager in self.pagers() {
            let shared = shared.clone();
            pager.on_complete(move || {
                let (left, callback) = &*shared;
                if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    let callback = callback.lock().unwrap_or_else(PoisonError::into_inner).take();
                    callback.into_iter().for_each(|callback| callback());
                }
            });
        }
    }

    /// Ends all waits for pages: the VM is shutting down.
    pub fn stop(&self) {
        self.pagers().for_each(|pager| pager.stop());
    }

    /// Takes the memory away from the guest for good, at any moment and without waiting for a page:
    /// [stops](Self::stop) it, then makes the trapped mappings under its memslots inaccessible and
    /// wakes every thread blocked on a fault there. A vCPU that still runs, and the hypervisor's
    /// own threads, get errors. Nothing reads zeros.
    ///
    /// This is the first step of every shutdown of a VM, once its vCPUs were asked to stop: a VM
    /// whose hypervisor waits for a page can be neither closed nor killed. Deleting a memslot
    /// does the same for its mapping.
    pub fn revoke(&self) {
        for pager in self.pagers() {
            if let Err(error) = pager.revoke() {
                log::error!(
                    "cannot make guest memory inaccessible: {error}; the guest ends once its \
                     memslots are deleted"
                );
            }
        }
    }

    /// Returns whether the memory was stopped.
    pub fn is_stopped(&self) -> bool {
        self.pagers().any(|pager| pager.bitmap().is_stopped())
    }
}

impl<B: Bitmap> Clone for DemandMemory<B> {
    fn clone(&self) -> Self {
        DemandMemory { regions: self.regions.clone() }
    }
}

impl<B: Bitmap> GuestMemoryBackend for DemandMemory<B> {
    type R = DemandRegion<B>;

    fn num_regions(&self) -> usize {
        self.regions.num_regions()
    }

    #[inline]
    fn find_region(&self, addr: GuestAddress) -> Option<&Self::R> {
        self.regions.find_region(addr)
    }

    // Written by hand: vm-memory's own method searches, and then checks the address once more.
    #[inline(never)] // As with `DemandRegion::if_present`.
    fn to_region_addr(&self, addr: GuestAddress) -> Option<(&Self::R, MemoryRegionAddress)> {
        if self.num_regions() <= FEW {
            return self.iter().find_map(|region| Some((region, region.offset_of(addr)?)));
        }
        let region = self.find_region(addr)?;
        Some((region, region.offset_of(addr)?))
    }

    fn iter(&self) -> impl Iterator<Item = &Self::R> {
        self.regions.iter()
    }

    fn check_range(&self, base: GuestAddress, len: usize) -> bool {
        let mut address = base;
        let mut left = len as u64;
        while left > 0 {
            let Some(region) = self.find_region(address) else { return false };
            // `find_region` has checked that the region contains the address.
            let here = region.last_addr().0 - address.0 + 1;
            left = left.saturating_sub(here);
            if left > 0 {
                let Some(next) = address.0.checked_add(here) else { return false };
                address = GuestAddress(next);
            }
        }
        true
    }
}
