// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Resolves guest faults on the vCPU's own thread.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use demand_memory::{FaultPath, FetchError, PAGE_SIZE, PageRange, Pager, Waiter};
use vm_memory::GuestAddress;

use crate::DemandSlot;
use crate::changes::Changes;
use crate::slot_engine::{SlotEngine, Stop, Through};

/// Errors from resolving a guest's fault or completing an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError {
    /// The vCPU's thread was kicked while it waited. The page is still being fetched, and the vCPU
    /// can run again at any time: it then leaves with the same exit, or finds the page present.
    #[error(
        "the wait for the page at guest address {gpa:#x} was interrupted by a kick; run the vCPU \
         again"
    )]
    Kicked {
        /// Guest physical address of the fault.
        gpa: u64,
    },
    /// The memory was stopped while the vCPU waited for the page.
    #[error(
        "the wait for the page at guest address {gpa:#x} ended: the memory was stopped; stop the \
         vCPU"
    )]
    Stopped {
        /// Guest physical address of the fault.
        gpa: u64,
    },
    /// The page is present, but KVM refused to give the vCPU access to it (only with
    /// [`Engine::KvmAttributes`](crate::Engine::KvmAttributes)).
    #[error(
        "cannot make the present page at guest address {gpa:#x} accessible to the vCPU: {source}; \
         free memory and run the vCPU again"
    )]
    Attributes {
        /// Guest physical address of the fault.
        gpa: u64,
        /// Error from KVM.
        source: kvm_ioctls::Error,
    },
    /// The hardware has lost the content of a page that had arrived.
    #[error(
        "the host's memory at address {address:#x}{} has failed: the content there is lost; end \
         the guest, and see the kernel log",
        .gpa.map(|gpa| format!(", guest address {gpa:#x},")).unwrap_or_default()
    )]
    HostMemory {
        /// Guest physical address of the access; `None` if it is in no demand-paged region.
        gpa: Option<u64>,
        /// Address in this process.
        address: u64,
    },
    /// An access that KVM leaves to user space lies partly or wholly outside memory.
    #[error(
        "cannot access {len} bytes at guest address {gpa:#x}: not all of them are guest memory"
    )]
    NoMemory {
        /// Guest physical address of the access.
        gpa: u64,
        /// Its length, in bytes.
        len: usize,
    },
    /// KVM failed to set an MSR.
    #[error(
        "cannot set MSR {index:#x} to {data:#x} for the guest: {source}; the vCPU cannot continue"
    )]
    Msr {
        /// Number of the MSR.
        index: u32,
        /// Value that the guest wrote.
        data: u64,
        /// Error from KVM.
        source: kvm_ioctls::Error,
    },
    /// The exit does not belong to the region's engine, or lies in no demand-paged region.
    #[error(
        "cannot handle a memory fault exit of {size} bytes at guest address {gpa:#x}, flags \
         {flags:#x}: it is not at a missing page of a demand-paged region"
    )]
    Unexpected {
        /// Guest physical address, as reported by KVM.
        gpa: u64,
        /// Length in bytes, as reported by KVM.
        size: u64,
        /// The `KVM_MEMORY_EXIT_FLAG_` flags, as reported by KVM.
        flags: u64,
    },
}

/// Error for two demand-paged regions that cover the same guest addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "cannot handle faults of regions at guest addresses {first:#x} and {second:#x}: they overlap; \
     place them apart"
)]
pub struct RegionsOverlap {
    /// Guest physical address of the lower region.
    pub first: u64,
    /// Guest physical address of the other region.
    pub second: u64,
}

/// An exit at missing pages.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) gpa: u64,
    pub(crate) size: u64,
    pub(crate) stop: Stop,
    /// The time of the vCPU's first exit at these pages.
    pub(crate) begun: Instant,
}

/// A demand-paged region whose faults a [`FaultHandler`] resolves: that of a [`DemandSlot`], or one
/// that the caller has given to KVM itself.
#[derive(Clone)]
pub struct FaultRegion {
    pub(crate) start: u64,
    pager: Arc<Pager>,
    engine: SlotEngine,
}

impl FaultRegion {
    /// Declares a region at `start` in guest physical memory whose memslot is not a [`DemandSlot`].
    /// The caller has created it with KVM Userfault, over the pager's missing bitmap.
    pub fn userfault(start: GuestAddress, pager: Arc<Pager>) -> Self {
        FaultRegion { start: start.0, pager, engine: SlotEngine::Userfault }
    }

    /// Returns whether this is the region of the slot, and not another one at its address.
    pub(crate) fn is_of(&self, slot: &DemandSlot) -> bool {
        self.start == slot.start().0 && Arc::ptr_eq(&self.pager, slot.pager())
    }

    /// Returns the guest physical address of the last byte.
    pub(crate) fn last(&self) -> u64 {
        self.start + (self.pager.pages() * PAGE_SIZE - 1)
    }
}

impl From<&DemandSlot> for FaultRegion {
    fn from(slot: &DemandSlot) -> Self {
        FaultRegion {
            start: slot.start().0,
            pager: slot.pager().clone(),
            engine: slot.slot_engine().clone(),
        }
    }
}

impl fmt::Debug for FaultRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultRegion")
            .field("start", &self.start)
            .field("pages", &self.pager.pages())
            .finish_non_exhaustive()
    }
}

/// Resolves the faults of a VM's vCPUs, each on the thread of the vCPU that faulted.
///
/// vCPUs share it without a lock, even while regions are [inserted](Self::insert) and
/// [removed](Self::remove). A fault on a page that no other thread has claimed allocates nothing
/// and makes no system call except the source's read (and, with memory attributes, one that makes
/// the page accessible in KVM).
///
/// [`DemandVcpu`](crate::DemandVcpu) calls it. A VMM with its own run loop calls
/// [`handle`](Self::handle) for each [`VcpuExit::MemoryFault`](kvm_ioctls::VcpuExit::MemoryFault).
pub struct FaultHandler {
    /// Sorted by guest address.
    pub(crate) regions: ArcSwap<Vec<FaultRegion>>,
    pub(crate) changes: Changes,
    /// Whether a region's mapping has, or had, markers: other VMs' vCPUs look at no region for
    /// that.
    pub(crate) marked: AtomicBool,
}

impl FaultHandler {
    /// Creates a handler for the exits of these regions' engines. A [`DemandSlot`] is such a
    /// region.
    ///
    /// # Errors
    ///
    /// [`RegionsOverlap`]. Slots in the first address space of one VM never cause it, because KVM
    /// refuses overlapping ones.
    ///
    /// # Panics
    ///
    /// If a region does not begin on a page boundary, or extends past the end of the address space:
    /// no memslot could have such an address range.
    ///
    /// # Examples
    ///
    /// Without KVM, as in a test of a run loop:
    ///
    /// ```
    /// use demand_kvm::{FaultHandler, FaultRegion, KVM_MEMORY_EXIT_FLAG_USERFAULT};
    /// use demand_memory::{BackingKind, MemfdBacking, PAGE_SIZE, Pager, PagerConfig, Waiter};
    /// use demand_source::LocalFile;
    /// use std::sync::Arc;
    /// use vm_memory::GuestAddress;
    ///
    /// let image = tempfile::NamedTempFile::new().unwrap();
    /// image.as_file().set_len(PAGE_SIZE).unwrap();
    /// let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, PAGE_SIZE).unwrap());
    /// let source = Arc::new(LocalFile::open(image.path()).unwrap());
    /// let pager = Pager::new(PagerConfig::new(backing, source)).unwrap();
    /// let region = FaultRegion::userfault(GuestAddress(0x1000), pager.clone());
    /// let handler = FaultHandler::new([region]).unwrap();
    /// let flags = KVM_MEMORY_EXIT_FLAG_USERFAULT;
    /// handler.handle(0x1000, PAGE_SIZE, flags, &Waiter::new()).unwrap();
    /// assert!(pager.bitmap().is_complete());
    /// ```
    pub fn new<R: Into<FaultRegion>>(
        regions: impl IntoIterator<Item = R>,
    ) -> Result<Self, RegionsOverlap> {
        let mut regions: Vec<FaultRegion> = regions.into_iter().map(Into::into).collect();
        regions.sort_by_key(|region| region.start);
        for region in &regions {
            assert!(
                region.start.is_multiple_of(PAGE_SIZE),
                "a region must start at a page boundary"
            );
            let size = region.pager.pages() * PAGE_SIZE;
            assert!(
                region.start.checked_add(size - 1).is_some(),
                "a region must not overflow guest addresses"
            );
        }
        if let Some(pair) = regions.windows(2).find(|pair| pair[0].last() >= pair[1].start) {
            return Err(RegionsOverlap { first: pair[0].start, second: pair[1].start });
        }
        let marked = regions.iter().any(|region| region.engine.marked_base().is_some());
        Ok(FaultHandler {
            regions: ArcSwap::from_pointee(regions),
            changes: Changes::default(),
            marked: AtomicBool::new(marked),
        })
    }

    /// Resolves the exit `VcpuExit::MemoryFault { flags, gpa, size }`: when this returns `Ok`, the
    /// `size` bytes at guest physical address `gpa` are present, and the vCPU can run again. Call
    /// it on the vCPU's thread, with the waiter through which the vCPU is kicked
    /// ([`VcpuKick::waiter`](crate::VcpuKick::waiter)). It waits as long as the source does.
    ///
    /// Each resolved exit counts as a fault of [`FaultPath::Guest`], even if another vCPU had
    /// already made the page present. Its latency is the time in this call; a
    /// [`DemandVcpu`](crate::DemandVcpu) that was kicked counts from its first exit at the page.
    ///
    /// # Errors
    ///
    /// [`FaultError`]: the thread was kicked, the memory was stopped, or the exit is not a fault on
    /// missing pages. The region's engine sets exactly one flag
    /// ([`KVM_MEMORY_EXIT_FLAG_USERFAULT`](crate::KVM_MEMORY_EXIT_FLAG_USERFAULT) or
    /// `KVM_MEMORY_EXIT_FLAG_PRIVATE`); an exit with other flags has another cause as well.
    pub fn handle(
        &self,
        gpa: u64,
        size: u64,
        flags: u64,
        waiter: &Waiter,
    ) -> Result<(), FaultError> {
        let stop = Stop::Exit { flags };
        self.resolve(&Fault { gpa, size, stop, begun: Instant::now() }, waiter).map(drop)
    }

    /// Like [`handle`](Self::handle), but returns the time since the fault began, and whether that
    /// let the vCPU through.
    pub(crate) fn resolve(
        &self,
        &Fault { gpa, size, stop, begun }: &Fault,
        waiter: &Waiter,
    ) -> Result<(Duration, Through), FaultError> {
        let flags = if let Stop::Exit { flags } = stop { flags } else { 0 };
        let unexpected = FaultError::Unexpected { gpa, size, flags };
        let regions = self.regions.load();
        let (FaultRegion { pager, engine, .. }, pages) = find(&regions, gpa, size)
            .filter(|(region, pages)| region.engine.stops_at(stop, *pages))
            .ok_or(unexpected)?;
        let pages = engine.needed(pager, pages);
        let arrived = engine.has_markers() && pager.bitmap().first_missing(pages).is_some();
        ensure(pager, pages, FaultPath::Guest, gpa, waiter)?;
        let through = engine
            .let_through(pager, pages, arrived)
            .map_err(|source| FaultError::Attributes { gpa, source })?;
        let waited = begun.elapsed();
        pager.stats().fault(FaultPath::Guest, pages.bytes(), waited);
        Ok((waited, through))
    }

    /// Returns whether any region's mapping may have markers.
    #[inline]
    pub(crate) fn has_markers(&self) -> bool {
        self.marked.load(Ordering::Relaxed)
            && self.regions.load().iter().any(|region| region.engine.has_markers())
    }

    /// Returns the guest physical address whose marker a vCPU has met at an address of this process:
    /// also when all markers have gone since.
    pub(crate) fn marker_at(&self, address: u64) -> Option<u64> {
        self.regions.load().iter().find_map(|region| {
            let offset = address.checked_sub(region.engine.marked_base()?)?;
            (offset < region.pager.pages() * PAGE_SIZE).then_some(region.start + offset)
        })
    }

    /// Returns whether all pages of a fault are present.
    pub(crate) fn has_pages_of(&self, fault: &Fault) -> bool {
        let missing =
            |(region, pages): (&FaultRegion, _)| region.pager.bitmap().first_missing(pages);
        find(&self.regions.load(), fault.gpa, fault.size).and_then(missing).is_none()
    }

    /// Returns the pager of the demand-paged region at guest physical address `gpa`, and the number
    /// of the page in it; `None` if no such region is there.
    pub fn page_at(&self, gpa: u64) -> Option<(Arc<Pager>, u64)> {
        let regions = self.regions.load();
        let (FaultRegion { pager, .. }, page) = find(&regions, gpa, 1)?;
        Some((pager.clone(), page.first))
    }

    /// Returns whether any of the `len` bytes at guest physical address `gpa` lies in a
    /// demand-paged region.
    pub(crate) fn covers(&self, gpa: u64, len: u64) -> bool {
        parts(&self.regions.load(), gpa, len).next().is_some()
    }

    /// Requests the pages of the `len` bytes at guest physical address `gpa` that lie in
    /// demand-paged regions, and waits for none of them.
    pub(crate) fn request(&self, gpa: u64, len: u64) {
        for (FaultRegion { pager, .. }, pages) in parts(&self.regions.load(), gpa, len) {
            if pager.bitmap().first_missing(pages).is_some()
                && let Err(error) = pager.fetch(pages, FaultPath::HypervisorInternal)
            {
                log::debug!("cannot request pages: {error}");
            }
        }
    }

    /// Fetches the pages of the `len` bytes at guest physical address `gpa` that lie in
    /// demand-paged regions, before KVM or the VMM itself accesses them. Counts as a fault of
    /// [`FaultPath::HypervisorInternal`] if any page is missing. It waits as long as the source
    /// does, so never call it on a thread that serves faults.
    ///
    /// # Errors
    ///
    /// [`FaultError::Kicked`] and [`FaultError::Stopped`].
    pub fn fetch(&self, gpa: u64, len: u64, waiter: &Waiter) -> Result<(), FaultError> {
        for (FaultRegion { pager, .. }, pages) in parts(&self.regions.load(), gpa, len) {
            let missing = pager.bitmap().count_missing(pages);
            if missing > 0 {
                let begun = Instant::now();
                ensure(pager, pages, FaultPath::HypervisorInternal, gpa, waiter)?;
                let bytes = missing * PAGE_SIZE;
                pager.stats().fault(FaultPath::HypervisorInternal, bytes, begun.elapsed());
            }
        }
        Ok(())
    }

    /// Fetches those of these pages that lie in demand-paged regions, like [`fetch`](Self::fetch),
    /// and skips the others. Meant for the pages from [`own_pages`](crate::own_pages).
    ///
    /// # Errors
    ///
    /// [`FaultError::Kicked`] and [`FaultError::Stopped`].
    pub fn fetch_pages(&self, pages: &[GuestAddress], waiter: &Waiter) -> Result<(), FaultError> {
        pages.iter().try_for_each(|page| self.fetch(page.0, PAGE_SIZE, waiter))
    }
}

/// Returns the region that contains all `size` bytes at `gpa`, and their pages in it.
#[inline]
fn find(regions: &[FaultRegion], gpa: u64, size: u64) -> Option<(&FaultRegion, PageRange)> {
    let after = regions.partition_point(|region| region.start <= gpa);
    let region = &regions[after.checked_sub(1)?];
    let last = gpa.checked_add(size.checked_sub(1)?)?;
    (last <= region.last()).then(|| (region, PageRange::of_bytes(gpa - region.start, size)))
}

/// Returns the regions that the `len` bytes at `gpa` overlap, and their pages in each.
fn parts(
    regions: &[FaultRegion],
    gpa: u64,
    len: u64,
) -> impl Iterator<Item = (&FaultRegion, PageRange)> {
    let last = gpa.saturating_add(len.saturating_sub(1));
    let first = regions.partition_point(|region| region.last() < gpa);
    let inside = move |region: &&FaultRegion| len > 0 && region.start <= last;
    regions[first..].iter().take_while(inside).map(move |region| {
        let (from, to) = (gpa.max(region.start), last.min(region.last()));
        (region, PageRange::of_bytes(from - region.start, to - from + 1))
    })
}

fn ensure(
    pager: &Arc<Pager>,
    pages: PageRange,
    path: FaultPath,
    gpa: u64,
    waiter: &Waiter,
) -> Result<(), FaultError> {
    pager.ensure(pages, path, waiter).map_err(|error| match error {
        FetchError::Kicked => FaultError::Kicked { gpa },
        FetchError::Stopped => FaultError::Stopped { gpa },
        error => unreachable!("the pages were cut to the region: {error}"),
    })
}

impl fmt::Debug for FaultHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultHandler")
            .field("regions", &self.regions.load().len())
            .finish_non_exhaustive()
    }
}
