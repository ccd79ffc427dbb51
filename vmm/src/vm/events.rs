// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Events that the threads of a VM send to its main loop.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::devices::power::PowerRequest;
use crate::error::Error;
use crate::vcpu::VcpuEvent;

/// An event for the main loop.
#[derive(Debug)]
pub enum Event {
    /// A vCPU's thread has ended, or cannot continue.
    Vcpu(VcpuEvent),
    /// The guest has asked to end or to reset, or its kernel has panicked.
    Power(PowerRequest),
    /// The last page is present.
    Complete,
    /// Demand paging has been removed, or the removal has failed.
    Finished(Result<(), Error>),
    /// The machine has been reset, or the reset has failed.
    Reset(Result<(), Error>),
    /// The source has failed, or has not answered, for longer than the user's limit.
    GivenUp(String),
    /// A client has asked for the VM's end through the API.
    Shutdown,
    /// The process was asked to end.
    Interrupted,
}

/// The sending end of the event queue. Any thread may use it, and it never blocks.
#[derive(Clone, Debug)]
pub struct Tell {
    sender: Sender<Event>,
    wake: Arc<EventFd>,
}

impl Tell {
    /// Sends an event. It is lost if the VM is gone.
    pub fn tell(&self, event: Event) {
        let _ = self.sender.send(event);
        // This fails only if the counter is at its maximum, and then the receiver has been woken
        // already.
        let _ = self.wake.write(1);
    }
}

/// The receiving end of the event queue.
#[derive(Debug)]
pub struct Hear {
    receiver: Receiver<Event>,
    wake: Arc<EventFd>,
}

impl Hear {
    /// Returns an eventfd that becomes readable when an event arrives.
    pub fn wake(&self) -> &Arc<EventFd> {
        &self.wake
    }

    /// Returns the next event, if any.
    pub fn next(&self) -> Option<Event> {
        self.receiver.try_recv().ok()
    }
}

/// Creates the event queue.
///
/// # Errors
///
/// If the host cannot create an eventfd.
pub fn events() -> io::Result<(Tell, Hear)> {
    let (sender, receiver) = channel();
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    Ok((Tell { sender, wake: wake.clone() }, Hear { receiver, wake }))
}
