// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Queues.

use vhost::{VhostBackend, VringConfigData, vhost_user::VhostUserFrontend};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::regions::user_address;
use crate::{BackEnd, Error, Result};

/// A queue, as the driver has set it up.
#[derive(Debug)]
pub struct Vring<'a> {
    /// Number of descriptors.
    pub size: u16,
    /// Where the descriptor table lies.
    pub descriptors: GuestAddress,
    /// Where the available ring lies.
    pub available: GuestAddress,
    /// Where the used ring lies.
    pub used: GuestAddress,
    /// Index in the available ring of the first request that is not taken yet.
    pub next_available: u16,
    /// Through which the driver tells of new requests.
    pub kick: &'a EventFd,
    /// Through which the back-end tells of requests that are done.
    pub call: &'a EventFd,
}

impl BackEnd {
    /// Sets a queue up and, if `enabled`, has the back-end serve it.
    ///
    /// The back-end reads the rings before it answers, so this waits for their pages: for as
    /// long as the source is away. Only [`HangUp`](crate::HangUp) ends that wait; a back-end that
    /// waits for no page has to answer in time. Never call it on a thread that serves faults.
    ///
    /// # Errors
    ///
    /// [`Error::VringAddress`] if a ring lies outside the memory that was shared,
    /// [`Error::Order`] before memory was shared, and the back-end's refusals.
    pub fn set_vring(&mut self, queue: usize, vring: &Vring<'_>, enabled: bool) -> Result<()> {
        let regions = self.regions("set up a queue")?;
        let find = |address: GuestAddress| {
            user_address(regions, address.0)
                .ok_or(Error::VringAddress { queue, address: address.0 })
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
        self.in_time("set up a queue", |this| {
            this.tell("set the size of a queue", |f| f.set_vring_num(queue, vring.size))?;
            this.tell("place a queue", |f| f.set_vring_addr(queue, &addresses))?;
            let goes_on = vring.next_available;
            this.tell("say where a queue goes on", |f| f.set_vring_base(queue, goes_on))?;
            this.tell("connect a queue's interrupt", |f| f.set_vring_call(queue, vring.call))?;
            this.tell("connect a queue's doorbell", |f| f.set_vring_kick(queue, vring.kick))
        })?;
        if enabled { self.enable_vring(queue, true) } else { Ok(()) }
    }

    /// Has the back-end serve a queue that is set up, or not.
    ///
    /// # Errors
    ///
    /// The back-end's refusals.
    pub fn enable_vring(&mut self, queue: usize, enabled: bool) -> Result<()> {
        const ASKED: &str = "enable or disable a queue";
        self.in_time(ASKED, |this| this.tell(ASKED, |f| f.set_vring_enable(queue, enabled)))
    }

    /// Stops a queue; returns the index in the available ring of the first request that the
    /// back-end has not taken. Requests in flight may still be completed after this.
    ///
    /// # Errors
    ///
    /// The back-end's refusals.
    pub fn stop_vring(&mut self, queue: usize) -> Result<u16> {
        // The upper bits belong to packed rings, which are never agreed on here.
        const ASKED: &str = "stop a queue";
        let base = self.in_time(ASKED, |this| this.ask(ASKED, |f| f.get_vring_base(queue)))?;
        Ok(base as u16)
    }
}
