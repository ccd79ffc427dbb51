// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The differences between the engines: all code that depends on a slot's engine.

use std::sync::Arc;

use demand_memory::{PAGE_SIZE, PageRange, Pager};
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

use crate::abi::{KVM_MEM_USERFAULT, KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_MEMORY_EXIT_FLAG_USERFAULT};
use crate::attributes::{Attributes, Reserved};
use crate::memslot::Bitmap;
use crate::{Engine, SlotError};

/// The mechanism that stops vCPUs at a slot's missing pages.
#[derive(Clone)]
pub(crate) enum SlotTrap {
    /// KVM reads the missing bitmap.
    Userfault,
    /// The pages are private to KVM.
    Attributes(Arc<Attributes>),
    /// The slot's mapping is armed, and KVM is not involved.
    Mapping,
}

impl SlotTrap {
    /// Returns the `KVM_MEM_` flags of the slot while the trap is set.
    pub(crate) fn slot_flags(&self) -> u32 {
        match self {
            SlotTrap::Userfault => KVM_MEM_USERFAULT,
            SlotTrap::Attributes(_) | SlotTrap::Mapping => 0,
        }
    }

    /// Returns the bitmap that KVM reads, if it reads one.
    pub(crate) fn bitmap(&self, pager: &Arc<Pager>) -> Option<Bitmap> {
        match self {
            SlotTrap::Userfault => Some(Bitmap::of_pager(pager)),
            SlotTrap::Attributes(_) | SlotTrap::Mapping => None,
        }
    }

    /// Returns the flags of the exit `KVM_EXIT_MEMORY_FAULT` at a missing page; `None` if there is
    /// no such exit.
    pub(crate) fn exit_flags(&self) -> Option<u64> {
        match self {
            SlotTrap::Userfault => Some(KVM_MEMORY_EXIT_FLAG_USERFAULT),
            SlotTrap::Attributes(_) => Some(KVM_MEMORY_EXIT_FLAG_PRIVATE),
            SlotTrap::Mapping => None,
        }
    }

    /// Gives a vCPU that has left `KVM_RUN` at `pages` access to them, now that they are present.
    pub(crate) fn let_through(
        &self,
        pager: &Pager,
        pages: PageRange,
    ) -> Result<(), kvm_ioctls::Error> {
        match self {
            // The pager has cleared the bits, and KVM reads them again.
            SlotTrap::Userfault | SlotTrap::Mapping => Ok(()),
            SlotTrap::Attributes(attributes) => attributes.clear(pager.bitmap(), pages),
        }
    }

    /// Removes the part of the trap that outlives the slot's flags. No page may be missing, unless
    /// the slot is deleted.
    pub(crate) fn remove(&self) -> Result<(), SlotError> {
        match self {
            SlotTrap::Userfault | SlotTrap::Mapping => Ok(()),
            SlotTrap::Attributes(attributes) => attributes.clear_all(),
        }
    }
}

/// A trap that is removed when this is dropped, which must be after the slot. Its reserved
/// addresses are released last.
pub(crate) struct SetTrap(
    pub(crate) SlotTrap,
    #[allow(dead_code, reason = "kept for its drop, which gives the addresses back")]
    Option<Reserved>,
);

impl SetTrap {
    /// Sets the trap for memslot `number`, before the slot is created, so that the guest never runs
    /// without it.
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
            log::error!("{error}; pages at this address stay private for the next memslot");
        }
    }
}
