// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What engines do differently: everything that depends on a slot's engine is here.

use std::sync::Arc;

use demand_memory::{PAGE_SIZE, PageRange, Pager};
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

use crate::abi::{KVM_MEM_USERFAULT, KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_MEMORY_EXIT_FLAG_USERFAULT};
use crate::attributes::{Attributes, Reserved};
use crate::memslot::Bitmap;
use crate::{Engine, SlotError};

/// How vCPUs are stopped at a slot's missing pages.
#[derive(Clone)]
pub(crate) enum SlotTrap {
    /// KVM reads the missing bitmap.
    Userfault,
    /// To KVM the pages are private.
    Attributes(Arc<Attributes>),
    /// KVM knows nothing: the mapping under the slot is armed.
    Mapping,
}

impl SlotTrap {
    /// The `KVM_MEM_` flags that the slot has as long as the trap is set.
    pub(crate) fn slot_flags(&self) -> u32 {
        match self {
            SlotTrap::Userfault => KVM_MEM_USERFAULT,
            SlotTrap::Attributes(_) | SlotTrap::Mapping => 0,
        }
    }

    /// The bitmap that KVM reads.
    pub(crate) fn bitmap(&self, pager: &Arc<Pager>) -> Option<Bitmap> {
        match self {
            SlotTrap::Userfault => Some(Bitmap::of_pager(pager)),
            SlotTrap::Attributes(_) | SlotTrap::Mapping => None,
        }
    }

    /// The flags of the exit `KVM_EXIT_MEMORY_FAULT` at a missing page; `None` if there is no
    /// such exit.
    pub(crate) fn exit_flags(&self) -> Option<u64> {
        match self {
            SlotTrap::Userfault => Some(KVM_MEMORY_EXIT_FLAG_USERFAULT),
            SlotTrap::Attributes(_) => Some(KVM_MEMORY_EXIT_FLAG_PRIVATE),
            SlotTrap::Mapping => None,
        }
    }

    /// Lets a vCPU that has left `KVM_RUN` at `pages` get at them, now that they are present.
    pub(crate) fn let_through(
        &self,
        pager: &Pager,
        pages: PageRange,
    ) -> Result<(), kvm_ioctls::Error> {
        match self {
            // The pager has cleared the bits, and KVM looks anew.
            SlotTrap::Userfault | SlotTrap::Mapping => Ok(()),
            SlotTrap::Attributes(attributes) => attributes.clear(pager.bitmap(), pages),
        }
    }

    /// Takes away what KVM does not forget with the slot's flags. No page may be missing, or
    /// the slot must be gone.
    pub(crate) fn remove(&self) -> Result<(), SlotError> {
        match self {
            SlotTrap::Userfault | SlotTrap::Mapping => Ok(()),
            SlotTrap::Attributes(attributes) => attributes.clear_all(),
        }
    }
}

/// A trap that goes when this is dropped: to be dropped after the slot. What is reserved for it is
/// given back after it.
pub(crate) struct SetTrap(
    pub(crate) SlotTrap,
    #[allow(dead_code, reason = "kept for its drop, which gives the addresses back")]
    Option<Reserved>,
);

impl SetTrap {
    /// Sets the trap for memslot `number`, before the slot is made: so there is no moment at
    /// which the guest could get past it.
    pub(crate) fn set(
        engine: Engine,
        vm: &Arc<VmFd>,
        number: u32,
        start: GuestAddress,
        pager: &Pager,
    ) -> Result<Self, SlotError> {
        Ok(match engine {
            Engine::KvmUserfault => SetTrap(SlotTrap::Userfault, None),
            Engine::KvmAttributes => {
                let pages = pager.pages();
                let reserved = Reserved::take(vm, start, pages).ok_or(SlotError::Create {
                    number,
                    start: start.0,
                    size: pages * PAGE_SIZE,
                    flags: 0,
                    error: kvm_ioctls::Error::new(libc::EEXIST),
                })?;
                let attributes = Attributes::set(vm, number, start, pages)?;
                SetTrap(SlotTrap::Attributes(attributes), Some(reserved))
            }
            Engine::Uffd => SetTrap(SlotTrap::Mapping, None),
        })
    }
}

impl Drop for SetTrap {
    fn drop(&mut self) {
        if let Err(error) = self.0.remove() {
            log::error!("{error}; another slot at this place finds its pages private");
        }
    }
}
