// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memslots over memory that is always present.

use std::sync::Arc;

use demand_memory::Mapping;
use kvm_bindings::KVM_MEM_READONLY;
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

use crate::SlotError;
use crate::memslot::{Memslot, SlotMemory};

/// A memslot over ordinary memory, none of which is ever missing: firmware, for example, or a
/// control page.
///
/// Dropping it deletes the slot. Until then it keeps its mapping and its VM.
///
/// # Examples
///
/// ```
/// use demand_kvm::{PlainSlot, open_kvm};
/// use demand_memory::Mapping;
/// use std::sync::Arc;
/// use vm_memory::GuestAddress;
///
/// let Ok(kvm) = open_kvm() else { return };
/// let vm = Arc::new(kvm.create_vm().unwrap());
/// let file = tempfile::tempfile().unwrap();
/// file.set_len(8192).unwrap();
/// let mapping = Arc::new(Mapping::shared(&file, 8192).unwrap());
/// let _slot = PlainSlot::new(vm, 0, GuestAddress(0x10_0000), mapping).unwrap();
/// ```
#[derive(Debug)]
#[must_use = "the memslot is deleted when this is dropped"]
pub struct PlainSlot {
    memslot: Memslot,
}

impl PlainSlot {
    /// Creates memslot `number`, whose first byte is at guest physical address `start`, over
    /// `mapping`. The number must be unused.
    ///
    /// # Errors
    ///
    /// [`SlotError::Unaligned`] and [`SlotError::Create`].
    pub fn new(
        vm: Arc<VmFd>,
        number: u32,
        start: GuestAddress,
        mapping: Arc<Mapping>,
    ) -> Result<Self, SlotError> {
        Ok(PlainSlot { memslot: Memslot::new(vm, number, start, SlotMemory::present(mapping), 0)? })
    }

    /// Creates a memslot like [`new`](Self::new) whose memory the guest can only read: its writes
    /// are MMIO exits.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn read_only(
        vm: Arc<VmFd>,
        number: u32,
        start: GuestAddress,
        mapping: Arc<Mapping>,
    ) -> Result<Self, SlotError> {
        let memory = SlotMemory::present(mapping);
        let memslot = Memslot::new(vm, number, start, memory, KVM_MEM_READONLY)?;
        Ok(PlainSlot { memslot })
    }

    /// Returns the guest physical address of the slot's first byte.
    pub fn start(&self) -> GuestAddress {
        self.memslot.start()
    }

    /// Returns the slot's mapping in this process.
    pub fn mapping(&self) -> &Arc<Mapping> {
        self.memslot.mapping()
    }
}
