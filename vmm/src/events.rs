// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the threads of a VM tell the one that looks after it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::Error;
use crate::power::PowerRequest;
use crate::vcpu::VcpuEvent;

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// A vCPU's thread has ended, or cannot go on.
    Vcpu(VcpuEvent),
    /// The guest asks for its end.
    Power(PowerRequest),
    /// The last page is present.
    Complete,
    /// Demand paging has been taken away, or could not be.
    Finished(Result<(), Error>),
    /// The machine is back at its beginning, or could not be brought there.
    Reset(Result<(), Error>),
    /// The source has failed for as long as the user lets it.
    GivenUp(String),
    /// Somebody asks for the VM's end through the API.
    Shutdown,
    /// The process was asked to end.
    Interrupted,
}

/// Tells events, from any thread; never waits.
#[derive(Clone, Debug)]
pub struct Tell {
    sender: Sender<Event>,
    wake: Arc<EventFd>,
}

impl Tell {
    /// Tells an event. Nobody hears it once the VM is gone.
    pub fn tell(&self, event: Event) {
        let _ = self.sender.send(event);
        // A counter at its end has woken whoever listens.
        let _ = self.wake.write(1);
    }
}

/// Hears events.
#[derive(Debug)]
pub struct Hear {
    receiver: Receiver<Event>,
    wake: Arc<EventFd>,
}

impl Hear {
    /// Becomes readable when there is an event.
    pub fn wake(&self) -> &Arc<EventFd> {
        &self.wake
    }

    /// The next event, if there is one.
    pub fn next(&self) -> Option<Event> {
        self.receiver.try_recv().ok()
    }
}

/// Both ends.
///
/// # Errors
///
/// The host's, if there is no eventfd to be had.
pub fn events() -> io::Result<(Tell, Hear)> {
    let (sender, receiver) = channel();
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    Ok((Tell { sender, wake: wake.clone() }, Hear { receiver, wake }))
}
