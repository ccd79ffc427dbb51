// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The generation identifier: 16 random bytes in the guest's memory that change when it is
//! restored, and an interrupt that says so. A Linux guest then takes new randomness, lest two VMs
//! of one snapshot draw the same numbers.
//!
//! Source: Microsoft's "Virtual Machine Generation ID"; `drivers/virt/vmgenid.c` in Linux.

use demand_memory::DemandMemory;
use kvm_ioctls::VmFd;
use vm_memory::Bytes;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::Error;
use crate::layout::{GENERATION_GSI, GENERATION_ID};

/// The identifier's interrupt.
#[derive(Debug)]
pub struct Generation(EventFd);

impl Generation {
    /// Connects the interrupt. The VM must have its interrupt controllers.
    ///
    /// # Errors
    ///
    /// KVM's, and the host's if it has no eventfd.
    pub fn new(vm: &VmFd) -> Result<Self, Error> {
        let failed = |error: &dyn std::fmt::Display| {
            Error::host(format!(
                "connect the generation identifier's interrupt: {error}; raise the limit of open \
                 files (ulimit -n)"
            ))
        };
        let event = EventFd::new(EFD_NONBLOCK).map_err(|error| failed(&error))?;
        vm.register_irqfd(&event, GENERATION_GSI).map_err(|error| failed(&error))?;
        Ok(Generation(event))
    }

    /// Gives the guest an identifier that no other has. Its page arrives first if it is missing,
    /// so never call this on a thread that serves faults.
    ///
    /// # Errors
    ///
    /// Those of the memory.
    pub fn renew(&self, memory: &DemandMemory) -> Result<(), Error> {
        let identifier: [u8; 16] = rand::random();
        memory
            .write_slice(&identifier, GENERATION_ID)
            .map_err(|error| Error::failed(format!("write a generation identifier: {error}")))
    }

    /// Tells the guest that its identifier has changed.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn tell(&self) -> Result<(), Error> {
        self.0.write(1).map_err(|error| {
            Error::host(format!("tell the guest of its new generation identifier: {error}"))
        })
    }
}
