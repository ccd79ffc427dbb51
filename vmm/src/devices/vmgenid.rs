// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The generation identifier: 16 random bytes in guest memory that change at each restore and
//! reset, and an interrupt that announces the change. A Linux guest then reseeds its random
//! numbers, so that two VMs of one snapshot do not draw the same ones.
//!
//! Source: Microsoft's "Virtual Machine Generation ID"; `drivers/virt/vmgenid.c` in Linux.

use demand_memory::DemandMemory;
use kvm_ioctls::VmFd;
use vm_memory::Bytes;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::arch::layout::{GENERATION_GSI, GENERATION_ID};
use crate::devices::error::ChipsetError;

/// The identifier's interrupt.
#[derive(Debug)]
pub(crate) struct Generation(EventFd);

impl Generation {
    /// Connects the interrupt. The VM must have its interrupt controllers.
    ///
    /// # Errors
    ///
    /// If KVM refuses, or the host cannot create an eventfd.
    pub(crate) fn new(vm: &VmFd) -> Result<Self, ChipsetError> {
        let interrupt = "the interrupt of the generation identifier";
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|source| ChipsetError::EventFd { interrupt, source })?;
        vm.register_irqfd(&event, GENERATION_GSI)
            .map_err(|source| ChipsetError::Interrupt { interrupt, source })?;
        Ok(Generation(event))
    }

    /// Writes a new random identifier. If its page is missing, the call blocks until the page is
    /// present, so a thread that serves faults must never make it.
    ///
    /// # Errors
    ///
    /// If the memory cannot be written.
    pub(crate) fn renew(&self, memory: &DemandMemory) -> Result<(), ChipsetError> {
        let identifier: [u8; 16] = rand::random();
        memory.write_slice(&identifier, GENERATION_ID).map_err(ChipsetError::WriteGeneration)
    }

    /// Notifies the guest of the new identifier.
    ///
    /// # Errors
    ///
    /// If the write to the eventfd fails.
    pub(crate) fn tell(&self) -> Result<(), ChipsetError> {
        self.0.write(1).map_err(ChipsetError::NotifyGeneration)
    }
}
