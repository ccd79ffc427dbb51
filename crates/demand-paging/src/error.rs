// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The errors of all steps, which chain those of the crates below.

use std::error::Error as StdError;
use std::io;

use demand_kvm::{
    EngineError, FaultError, InsertError, KickError, KvmError, MsrFilterError, RegionsOverlap,
    SlotError, StepError,
};
use demand_memory::{BackingError, GuestMappingError, PagerError};
use demand_uffd::{ArmGuestError, ServiceError};
use vm_memory::GuestRegionCollectionError;

/// Errors of demand-paged memory and of its VM: the step that failed, with the error of the crate
/// that makes it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host lacks the engine.
    #[error(transparent)]
    Engine(EngineError),
    /// KVM cannot be opened, or refuses the VM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host cannot provide the memory.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// A region cannot be paged.
    #[error(transparent)]
    Pager(PagerError),
    /// Memory without a source has no region either.
    #[error("cannot create guest memory: it has no region; give it one")]
    NoRegion,
    /// The image of a scratch guest cannot be created.
    #[error("cannot create the image of a scratch guest: {0}; free memory")]
    Image(#[source] io::Error),
    /// The image has no bytes.
    #[error("cannot create guest memory: the image is empty; name one that has content")]
    Empty,
    /// The regions do not form one memory.
    #[error(
        "cannot create guest memory: {0}; give the regions in ascending order, none over another"
    )]
    Regions(#[source] GuestRegionCollectionError),
    /// The service of faults cannot be started.
    #[error(transparent)]
    Service(ServiceError),
    /// The guest's mappings cannot be armed.
    #[error(transparent)]
    Arm(ArmGuestError),
    /// A guest's mapping cannot be created.
    #[error(transparent)]
    Map(GuestMappingError),
    /// KVM refuses a memslot, or a memslot of this engine in this VM.
    #[error(transparent)]
    Slot(SlotError),
    /// Two regions cover the same guest addresses.
    #[error(transparent)]
    Overlap(#[from] RegionsOverlap),
    /// A region cannot be inserted into the running VM.
    #[error(transparent)]
    Insert(#[from] InsertError),
    /// Another region has the memslot.
    #[error("cannot insert a region as memslot {number}: another region has it; use a free number")]
    SlotUsed {
        /// Number of the memslot.
        number: u32,
    },
    /// The region has missing pages, laziness is required, and demand paging was removed.
    #[error(
        "cannot insert a region with missing pages at guest address {start:#x}: demand paging was \
         removed with the last page, and Lazy::Require forbids to read the region first; insert it \
         earlier, or choose Lazy::Auto"
    )]
    Removed {
        /// Guest physical address of the region.
        start: u64,
    },
    /// No region begins at the address.
    #[error(
        "cannot remove a region: none begins at guest address {start:#x}; use the address at which \
         it was inserted"
    )]
    NoRegionAt {
        /// The guest physical address.
        start: u64,
    },
    /// The caller holds the region's memslot.
    #[error(
        "cannot remove the region at guest address {start:#x}: its memslot is held outside the VM's \
         handle; drop what LazyVm::slots has returned"
    )]
    SlotHeld {
        /// Guest physical address of the region.
        start: u64,
    },
    /// KVM refuses a vCPU.
    #[error("cannot create vCPU {number}: {source}; {}", hint(*source))]
    CreateVcpu {
        /// Number of the vCPU.
        number: u64,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// A vCPU cannot be made kickable.
    #[error(transparent)]
    Kick(#[from] KickError),
    /// A page that KVM reads on its own cannot be fetched.
    #[error(transparent)]
    OwnPages(FaultError),
    /// KVM refuses a vCPU's state.
    #[error("cannot set the {what} of a vCPU: {source}; check their values")]
    Set {
        /// The part of the state.
        what: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// A vCPU cannot continue.
    #[error(transparent)]
    Step(StepError),
    /// A thread cannot be started.
    #[error("cannot start a thread to {duty}: {source}; raise the limit of threads (ulimit -u)")]
    Thread {
        /// The thread's duty, as a verb phrase.
        duty: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// Pages are missing.
    #[error(
        "cannot remove demand paging: {missing} pages are still missing; wait until all are present"
    )]
    Missing {
        /// Number of missing pages.
        missing: u64,
    },
    /// A step before the removal of demand paging has failed.
    #[error("cannot remove demand paging: {0}")]
    BeforeFinish(#[source] Box<dyn StdError + Send + Sync>),
    /// The mappings' traps cannot be removed.
    #[error(transparent)]
    FinishService(ServiceError),
    /// The trap of a memslot cannot be removed.
    #[error(transparent)]
    FinishSlot(SlotError),
    /// The filter of MSRs cannot be removed.
    #[error(transparent)]
    FinishMsrFilter(MsrFilterError),
    /// Memory cannot be shared with a back-end.
    #[cfg(feature = "vhost")]
    #[error(transparent)]
    Share(#[from] demand_vhost::Error),
    /// The handle was dropped, or its end was requested.
    #[error("cannot use the VM's memory: the VM has ended")]
    Ended,
}

/// Returns the remedy if KVM refuses a vCPU.
fn hint(refused: kvm_ioctls::Error) -> &'static str {
    match io::Error::from_raw_os_error(refused.errno()).kind() {
        io::ErrorKind::AlreadyExists => "use a number that no vCPU of this VM has",
        io::ErrorKind::InvalidInput => {
            "use a number below KVM's maximum, which KVM_CAP_MAX_VCPU_ID returns"
        }
        _ => "check the limits on memory and open files",
    }
}

impl From<EngineError> for Error {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Kvm(error) => Error::Kvm(error),
            other => Error::Engine(other),
        }
    }
}

impl From<PagerError> for Error {
    fn from(error: PagerError) -> Self {
        match error {
            PagerError::Backing(error) => Error::Backing(error),
            other => Error::Pager(other),
        }
    }
}

impl From<ArmGuestError> for Error {
    fn from(error: ArmGuestError) -> Self {
        match error {
            ArmGuestError::Mapping(error) => error.into(),
            other => Error::Arm(other),
        }
    }
}

impl From<GuestMappingError> for Error {
    fn from(error: GuestMappingError) -> Self {
        match error {
            GuestMappingError::Map(error) => Error::Backing(error),
            other => Error::Map(other),
        }
    }
}
