// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a vCPU's thread does when the guest has touched a missing page.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use demand_memory::{FetchError, PAGE_SIZE, PageRange, Pager, Path, Waiter};
use vm_memory::GuestAddress;

use crate::DemandSlot;
use crate::abi::KVM_MEMORY_EXIT_FLAG_USERFAULT;

/// Why a guest's fault was not resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError {
    /// The vCPU's thread was called away from waiting. The page still arrives; the vCPU may be
    /// run again whenever that suits: it then leaves with the same exit, or finds the page.
    #[error("the wait for the page at guest address {gpa:#x} was interrupted; run the vCPU again")]
    Kicked {
        /// Guest physical address of the fault.
        gpa: u64,
    },
    /// The VM is going away, and the page with it.
    #[error("the memory was stopped while a vCPU waited for guest address {gpa:#x}; end the vCPU")]
    Stopped {
        /// Guest physical address of the fault.
        gpa: u64,
    },
    /// The exit is none of KVM Userfault's, or lies in no demand-paged region.
    #[error(
        "unexpected memory fault exit: {size} bytes at guest address {gpa:#x}, flags {flags:#x}; \
         only missing pages of demand-paged regions are handled here"
    )]
    Unexpected {
        /// Guest physical address, as KVM gave it.
        gpa: u64,
        /// Length in bytes, as KVM gave it.
        size: u64,
        /// The `KVM_MEMORY_EXIT_FLAG_` flags, as KVM gave them.
        flags: u64,
    },
}

/// Two demand-paged regions claim the same guest addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "handle faults of regions at guest addresses {first:#x} and {second:#x}: they overlap; give \
     each its own addresses"
)]
pub struct RegionsOverlap {
    /// Guest physical address of the lower region.
    pub first: u64,
    /// Guest physical address of the other.
    pub second: u64,
}

struct Region {
    start: u64,
    pager: Arc<Pager>,
}

impl Region {
    /// Guest physical address of the last byte.
    fn last(&self) -> u64 {
        self.start + (self.pager.pages() * PAGE_SIZE - 1)
    }
}

/// Resolves the faults of a VM's vCPUs, each on the thread of the vCPU that has it.
///
/// The handler never changes once it is made, so vCPUs share it without a lock. A fault on a page
/// that nobody else works on allocates nothing and makes no system call but the source's read.
///
/// # Examples
///
/// The loop of a vCPU's thread:
///
/// ```
/// use demand_kvm::{FaultError, FaultHandler, VcpuKick};
/// use kvm_ioctls::{VcpuExit, VcpuFd};
///
/// /// Runs the vCPU until it halts or is called away.
/// fn run(vcpu: &mut VcpuFd, kick: &VcpuKick, handler: &FaultHandler) -> Result<(), FaultError> {
///     kick.attach();
///     loop {
///         match vcpu.run() {
///             Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
///                 match handler.handle(gpa, size, flags, kick.waiter()) {
///                     Ok(()) => continue,
///                     Err(FaultError::Kicked { .. }) => return Ok(()),
///                     Err(error) => return Err(error),
///                 }
///             }
///             Ok(VcpuExit::Hlt) => return Ok(()),
///             Err(error) if error.errno() == libc::EINTR => return Ok(()),
///             other => panic!("{other:?}"),
///         }
///     }
/// }
/// ```
pub struct FaultHandler {
    /// By guest address.
    regions: Box<[Region]>,
}

impl FaultHandler {
    /// A handler for these regions: where each begins in guest physical memory, and its pager.
    ///
    /// # Errors
    ///
    /// [`RegionsOverlap`].
    ///
    /// # Panics
    ///
    /// If a region does not begin at a page, or reaches past the end of the address space: no
    /// memslot could.
    pub fn new(
        regions: impl IntoIterator<Item = (GuestAddress, Arc<Pager>)>,
    ) -> Result<Self, RegionsOverlap> {
        let mut regions: Box<[Region]> =
            regions.into_iter().map(|(start, pager)| Region { start: start.0, pager }).collect();
        regions.sort_by_key(|region| region.start);
        for region in &regions {
            assert!(region.start.is_multiple_of(PAGE_SIZE), "a region begins at a page");
            let size = region.pager.pages() * PAGE_SIZE;
            assert!(region.start.checked_add(size - 1).is_some(), "a region ends somewhere");
        }
        match regions.windows(2).find(|pair| pair[0].last() >= pair[1].start) {
            Some(pair) => Err(RegionsOverlap { first: pair[0].start, second: pair[1].start }),
            None => Ok(FaultHandler { regions }),
        }
    }

    /// A handler for the regions behind these slots.
    ///
    /// # Errors
    ///
    /// [`RegionsOverlap`]; not for slots of one VM's first address space, as KVM refuses these.
    pub fn for_slots<'a>(
        slots: impl IntoIterator<Item = &'a DemandSlot>,
    ) -> Result<Self, RegionsOverlap> {
        FaultHandler::new(slots.into_iter().map(|slot| (slot.start(), slot.pager().clone())))
    }

    /// Resolves the exit `VcpuExit::MemoryFault { flags, gpa, size }`: when this returns `Ok`,
    /// the `size` bytes at guest physical address `gpa` are present, and the vCPU can be run
    /// again. Called on the vCPU's thread, with the waiter through which it can be called away
    /// ([`VcpuKick::waiter`](crate::VcpuKick::waiter)). It waits as long as the source does.
    ///
    /// Each exit that is resolved counts as a fault of [`Path::Guest`], also where another vCPU
    /// was faster and nothing was left to do.
    ///
    /// # Errors
    ///
    /// [`FaultError`]: called away, the memory was stopped, or the exit is not one of missing
    /// pages. KVM Userfault sets [`KVM_MEMORY_EXIT_FLAG_USERFAULT`] alone; an exit with other
    /// flags wants something else as well.
    pub fn handle(
        &self,
        gpa: u64,
        size: u64,
        flags: u64,
        waiter: &Arc<Waiter>,
    ) -> Result<(), FaultError> {
        let begun = Instant::now();
        let unexpected = FaultError::Unexpected { gpa, size, flags };
        if flags != KVM_MEMORY_EXIT_FLAG_USERFAULT {
            return Err(unexpected);
        }
        let (pager, pages) = self.find(gpa, size).ok_or(unexpected)?;
        match pager.ensure(pages, Path::Guest, waiter) {
            Ok(()) => {
                pager.stats().fault(Path::Guest, pages.bytes(), begun.elapsed());
                Ok(())
            }
            Err(FetchError::Kicked) => Err(FaultError::Kicked { gpa }),
            Err(FetchError::Stopped) => Err(FaultError::Stopped { gpa }),
            Err(FetchError::OutOfRange { .. }) => Err(unexpected),
        }
    }

    /// The pager and the pages of `size` bytes at `gpa`, if they lie in one region.
    fn find(&self, gpa: u64, size: u64) -> Option<(&Arc<Pager>, PageRange)> {
        let after = self.regions.partition_point(|region| region.start <= gpa);
        let region = &self.regions[after.checked_sub(1)?];
        let last = gpa.checked_add(size.checked_sub(1)?)?;
        (last <= region.last())
            .then(|| (&region.pager, PageRange::of_bytes(gpa - region.start, size)))
    }
}

impl fmt::Debug for FaultHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultHandler").field("regions", &self.regions.len()).finish_non_exhaustive()
    }
}
