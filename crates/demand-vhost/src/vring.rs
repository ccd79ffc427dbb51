// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Virtqueue set-up: `Vring`, and the operations of `BackEnd` on queues.

use vhost::{VhostBackend, VringConfigData, vhost_user::VhostUserFrontend};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::error::Operation;
use crate::regions::user_address;
use crate::{BackEnd, ErrorKind, Result};

/// A virtqueue as the driver has configured it.
#[derive(Debug)]
pub struct Vring<'a> {
    /// Number of descriptors.
    pub size: u16,
    /// Address of the descriptor table.
    pub descriptors: GuestAddress,
    /// Address of the available ring.
    pub available: GuestAddress,
    /// Address of the used ring.
    pub used: GuestAddress,
    /// Index in the available ring of the first request that the back-end has not taken.
    pub next_available: u16,
    /// Event descriptor through which the driver notifies the back-end of new requests.
    pub kick: &'a EventFd,
    /// Event descriptor through which the back-end notifies the driver of completed requests.
    pub call: &'a EventFd,
}

impl BackEnd {
    /// Sets up a queue and, if `enabled`, enables it.
    ///
    /// The back-end reads the rings before it answers, so this call waits for their pages, for as
    /// long as the source takes. Only [`HangUp`](crate::HangUp) ends that wait; a back-end that is
    /// not waiting for a page must answer in time. Never call this on a thread that serves faults.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::VringAddress`] if a ring lies outside the shared memory, [`ErrorKind::Order`] if
    /// no memory has been shared yet, and the back-end's errors.
    pub fn set_vring(&mut self, queue: usize, vring: &Vring<'_>, enabled: bool) -> Result<()> {
        let operation = Operation::SetUpVring;
        let regions = self.regions(operation)?;
        let find = |GuestAddress(address): GuestAddress| {
            user_address(regions, address)
                .ok_or_else(|| self.error(operation, ErrorKind::VringAddress { queue, address }))
        };
        let addresses = VringConfigData {
            queue_max_size: vring.size,
            queue_size: vring.size,
            flags: 0,
            desc_table_addr: find(vring.descriptors)?,
            used_ring_addr: find(vring.used)?,
            avail_ring_addr: find(vring.available)?,
            log_addr: None,
        };
        self.in_time(operation, |this| {
            this.tell(Operation::SetVringSize, |f| f.set_vring_num(queue, vring.size))?;
            this.tell(Operation::SetVringAddresses, |f| f.set_vring_addr(queue, &addresses))?;
            let next = vring.next_available;
            this.tell(Operation::SetVringBase, |f| f.set_vring_base(queue, next))?;
            this.tell(Operation::SetVringCall, |f| f.set_vring_call(queue, vring.call))?;
            this.tell(Operation::SetVringKick, |f| f.set_vring_kick(queue, vring.kick))
        })?;
        if enabled { self.enable_vring(queue, true) } else { Ok(()) }
    }

    /// Enables or disables a queue that is set up.
    ///
    /// # Errors
    ///
    /// The back-end's errors.
    pub fn enable_vring(&mut self, queue: usize, enabled: bool) -> Result<()> {
        self.tell_in_time(Operation::EnableVring, |f| f.set_vring_enable(queue, enabled))
    }

    /// Stops a queue and returns the index in the available ring of the first request that the
    /// back-end has not taken. The back-end may still complete requests in flight after this.
    ///
    /// # Errors
    ///
    /// The back-end's errors.
    pub fn stop_vring(&mut self, queue: usize) -> Result<u16> {
        let operation = Operation::StopVring;
        let base =
            self.in_time(operation, |this| this.ask(operation, |f| f.get_vring_base(queue)))?;
        // The upper bits are for packed rings, which this crate never negotiates.
        Ok((base & 0xffff) as u16)
    }
}
