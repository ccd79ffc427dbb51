// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The generation identifier: 16 random bytes in guest memory that change at each restore and
//! reset, and an interrupt that announces the change. A Linux guest then reseeds its random
//! numbers, so that two VMs of one snapshot do not draw the same ones.
//!
//! Source: Microsoft's "Virtual Machine Generation ID"; `drivers/virt/vmgenid.c` in Linux.

use demand_memory::DemandMemory;
use kvm_ioctls::VmFd;
use vm_memory::Bytes;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::arch::layout::{GENERATION_GSI, GENERATION_ID};
use crate::error::Error;

/// The identifier's interrupt.
#[derive(Debug)]
pub struct Generation(EventFd);

impl Generation {
    /// Connects the interrupt. The VM must have its interrupt controllers.
    ///
    /// # Errors
    ///
    /// If KVM refuses, or the host cannot create an eventfd.
    pub fn new(vm: &VmFd) -> Result<Self, Error> {
        let failed = |error: &dyn std::fmt::Display| {
            Error::host(format!(
                "cannot connect the interrupt of the generation identifier: {error}; raise the \
                 limit of open files (ulimit -n)"
            ))
        };
        let event = EventFd::new(EFD_NONBLOCK).map_err(|error| failed(&error))?;
        vm.register_irqfd(&event, GENERATION_GSI).map_err(|error| failed(&error))?;
        Ok(Generation(event))
    }

    /// Writes a new random identifier. If its page is missing, the call blocks until the page is
    /// present, so a thread that serves faults must never make it.
    ///
    /// # Errors
    ///
    /// If the memory cannot be written.
    pub fn renew(&self, memory: &DemandMemory) -> Result<(), Error> {
        let identifier: [u8; 16] = rand::random();
        memory.write_slice(&identifier, GENERATION_ID).map_err(|error| {
            Error::failed(format!("cannot write a generation identifier: {error}"))
        })
    }

    /// Notifies the guest of the new identifier.
    ///
    /// # Errors
    ///
    /// If the write to the eventfd fails.
    pub fn tell(&self) -> Result<(), Error> {
        self.0.write(1).map_err(|error| {
            Error::host(format!(
                "cannot notify the guest of its new generation identifier: {error}"
            ))
        })
    }
}
