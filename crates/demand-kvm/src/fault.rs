// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Resolves guest faults on the vCPU's own thread.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use demand_memory::{FetchError, PAGE_SIZE, PageRange, Pager, Path, Waiter};
use vm_memory::GuestAddress;

use crate::DemandSlot;
use crate::trap::SlotTrap;

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
        "cannot make the present page at guest address {gpa:#x} accessible to the vCPU: {error}; \
         free memory and run the vCPU again"
    )]
    Attributes {
        /// Guest physical address of the fault.
        gpa: u64,
        /// Error from KVM.
        error: kvm_ioctls::Error,
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
        "cannot set MSR {index:#x} to {data:#x} for the guest: {error}; the vCPU cannot continue"
    )]
    Msr {
        /// Number of the MSR.
        index: u32,
        /// Value that the guest wrote.
        data: u64,
        /// Error from KVM.
        error: kvm_ioctls::Error,
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
    pub(crate) flags: u64,
    /// The time of the vCPU's first exit at these pages.
    pub(crate) begun: Instant,
}

struct Region {
    start: u64,
    pager: Arc<Pager>,
    trap: SlotTrap,
}

impl Region {
    /// Returns the guest physical address of the last byte.
    fn last(&self) -> u64 {
        self.start + (self.pager.pages() * PAGE_SIZE - 1)
    }
}

/// Resolves the faults of a VM's vCPUs, each on the thread of the vCPU that faulted.
///
/// The handler never changes after it is created, so vCPUs share it without a lock. A fault on a
/// page that no other thread has claimed allocates nothing and makes no system call except the
/// source's read (and, with memory attributes, one that makes the page accessible in KVM).
///
/// [`DemandVcpu`](crate::DemandVcpu) calls it. A VMM with its own run loop calls
/// [`handle`](Self::handle) for each [`VcpuExit::MemoryFault`](kvm_ioctls::VcpuExit::MemoryFault).
pub struct FaultHandler {
    /// Sorted by guest address.
    regions: Box<[Region]>,
}

impl FaultHandler {
    /// Creates a handler for KVM Userfault exits in these regions. Each region is given by its
    /// start in guest physical memory and its pager. For other engines see
    /// [`for_slots`](Self::for_slots).
    ///
    /// # Errors
    ///
    /// [`RegionsOverlap`].
    ///
    /// # Panics
    ///
    /// If a region does not begin on a page boundary, or extends past the end of the address space:
    /// no memslot could have such an address range.
    pub fn new(
        regions: impl IntoIterator<Item = (GuestAddress, Arc<Pager>)>,
    ) -> Result<Self, RegionsOverlap> {
        let trap = SlotTrap::Userfault;
        FaultHandler::of(
            regions
                .into_iter()
                .map(|(start, pager)| Region { start: start.0, pager, trap: trap.clone() })
                .collect(),
        )
    }

    fn of(mut regions: Box<[Region]>) -> Result<Self, RegionsOverlap> {
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
        match regions.windows(2).find(|pair| pair[0].last() >= pair[1].start) {
            Some(pair) => Err(RegionsOverlap { first: pair[0].start, second: pair[1].start }),
            None => Ok(FaultHandler { regions }),
        }
    }

    /// Creates a handler for the regions behind these slots, and for the exits of their engines.
    ///
    /// # Errors
    ///
    /// [`RegionsOverlap`]. Slots in the first address space of one VM never cause it, because KVM
    /// refuses overlapping ones.
    pub fn for_slots<'a>(
        slots: impl IntoIterator<Item = &'a DemandSlot>,
    ) -> Result<Self, RegionsOverlap> {
        FaultHandler::of(
            slots
                .into_iter()
                .map(|slot| Region {
                    start: slot.start().0,
                    pager: slot.pager().clone(),
                    trap: slot.trap().clone(),
                })
                .collect(),
        )
    }

    /// Resolves the exit `VcpuExit::MemoryFault { flags, gpa, size }`: when this returns `Ok`, the
    /// `size` bytes at guest physical address `gpa` are present, and the vCPU can run again. Call
    /// it on the vCPU's thread, with the waiter through which the vCPU is kicked
    /// ([`VcpuKick::waiter`](crate::VcpuKick::waiter)). It waits as long as the source does.
    ///
    /// Each resolved exit counts as a fault of [`Path::Guest`], even if another vCPU had already
    /// made the page present. Its latency is the time in this call; a
    /// [`DemandVcpu`](crate::DemandVcpu) that was kicked counts from its first exit at the page.
    ///
    /// # Errors
    ///
    /// [`FaultError`]: the thread was kicked, the memory was stopped, or the exit is not a fault on
    /// missing pages. The region's engine sets exactly one flag
    /// ([`KVM_MEMORY_EXIT_FLAG_USERFAULT`](crate::KVM_MEMORY_EXIT_FLAG_USERFAULT) or
    /// [`KVM_MEMORY_EXIT_FLAG_PRIVATE`](crate::KVM_MEMORY_EXIT_FLAG_PRIVATE)); an exit with other
    /// flags has another cause as well.
    pub fn handle(
        &self,
        gpa: u64,
        size: u64,
        flags: u64,
        waiter: &Arc<Waiter>,
    ) -> Result<(), FaultError> {
        self.resolve(&Fault { gpa, size, flags, begun: Instant::now() }, waiter).map(drop)
    }

    /// Like [`handle`](Self::handle), but returns the time since the fault began.
    pub(crate) fn resolve(
        &self,
        &Fault { gpa, size, flags, begun }: &Fault,
        waiter: &Arc<Waiter>,
    ) -> Result<Duration, FaultError> {
        let unexpected = FaultError::Unexpected { gpa, size, flags };
        let (Region { pager, trap, .. }, pages) = self
            .find(gpa, size)
            .filter(|(region, _)| region.trap.exit_flags() == Some(flags))
            .ok_or(unexpected)?;
        ensure(pager, pages, Path::Guest, gpa, waiter)?;
        trap.let_through(pager, pages).map_err(|error| FaultError::Attributes { gpa, error })?;
        let waited = begun.elapsed();
        pager.stats().fault(Path::Guest, pages.bytes(), waited);
        Ok(waited)
    }

    /// Returns whether all pages of a fault are present.
    pub(crate) fn has_pages_of(&self, fault: &Fault) -> bool {
        let missing = |(region, pages): (&Region, _)| region.pager.bitmap().first_missing(pages);
        self.find(fault.gpa, fault.size).and_then(missing).is_none()
    }

    /// Returns whether any of the `len` bytes at guest physical address `gpa` lies in a
    /// demand-paged region.
    pub fn covers(&self, gpa: u64, len: u64) -> bool {
        self.parts(gpa, len).next().is_some()
    }

    /// Fetches the pages of the `len` bytes at guest physical address `gpa` that lie in
    /// demand-paged regions, before KVM or the VMM itself accesses them. Counts as a fault of
    /// [`Path::KvmInternal`] if any page is missing. It waits as long as the source does, so never
    /// call it on a thread that serves faults.
    ///
    /// # Errors
    ///
    /// [`FaultError::Kicked`] and [`FaultError::Stopped`].
    pub fn fetch(&self, gpa: u64, len: u64, waiter: &Arc<Waiter>) -> Result<(), FaultError> {
        for (Region { pager, .. }, pages) in self.parts(gpa, len) {
            let missing = pager.bitmap().count_missing(pages);
            if missing > 0 {
                let begun = Instant::now();
                ensure(pager, pages, Path::KvmInternal, gpa, waiter)?;
                let bytes = missing * PAGE_SIZE;
                pager.stats().fault(Path::KvmInternal, bytes, begun.elapsed());
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
    pub fn fetch_pages(
        &self,
        pages: &[GuestAddress],
        waiter: &Arc<Waiter>,
    ) -> Result<(), FaultError> {
        pages.iter().try_for_each(|page| self.fetch(page.0, PAGE_SIZE, waiter))
    }

    /// Returns the region that contains all `size` bytes at `gpa`, and their pages in it.
    fn find(&self, gpa: u64, size: u64) -> Option<(&Region, PageRange)> {
        let (region, pages) = self.parts(gpa, size).next()?;
        let last = gpa.checked_add(size - 1)?;
        (region.start <= gpa && last <= region.last()).then_some((region, pages))
    }

    /// Returns the regions that the `len` bytes at `gpa` overlap, and their pages in each.
    fn parts(&self, gpa: u64, len: u64) -> impl Iterator<Item = (&Region, PageRange)> {
        let last = gpa.saturating_add(len.saturating_sub(1));
        let first = self.regions.partition_point(|region| region.last() < gpa);
        let inside = move |region: &&Region| len > 0 && region.start <= last;
        self.regions[first..].iter().take_while(inside).map(move |region| {
            let (from, to) = (gpa.max(region.start), last.min(region.last()));
            (region, PageRange::of_bytes(from - region.start, to - from + 1))
        })
    }
}

fn ensure(
    pager: &Arc<Pager>,
    pages: PageRange,
    path: Path,
    gpa: u64,
    waiter: &Arc<Waiter>,
) -> Result<(), FaultError> {
    pager.ensure(pages, path, waiter).map_err(|error| match error {
        FetchError::Kicked => FaultError::Kicked { gpa },
        FetchError::Stopped => FaultError::Stopped { gpa },
        FetchError::OutOfRange { .. } => unreachable!("the pages were cut to the region"),
    })
}

impl fmt::Debug for FaultHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultHandler").field("regions", &self.regions.len()).finish_non_exhaustive()
    }
}
