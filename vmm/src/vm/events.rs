// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Events that the threads of a VM send to its main loop.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::devices::power::PowerRequest;
use crate::error::Error;
use crate::vcpu::VcpuEvent;

/// An event for the main loop.
#[derive(Debug)]
pub(crate) enum Event {
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
}

/// The sending end of the event queue. Any thread may use it, and it never blocks.
#[derive(Clone, Debug)]
pub(crate) struct EventSender {
    sender: Sender<Event>,
    wake: Arc<EventFd>,
}

impl EventSender {
    /// Sends an event. It is lost if the VM is gone.
    pub(crate) fn send(&self, event: Event) {
        let _ = self.sender.send(event);
        // This fails only if the counter is at its maximum, and then the receiver has been woken
        // already.
        let _ = self.wake.write(1);
    }
}

/// The receiving end of the event queue.
#[derive(Debug)]
pub(crate) struct EventReceiver {
    receiver: Receiver<Event>,
    wake: Arc<EventFd>,
}

impl EventReceiver {
    /// Returns an eventfd that becomes readable when an event arrives.
    pub(crate) fn wake(&self) -> &Arc<EventFd> {
        &self.wake
    }

    /// Returns the next event, if any.
    pub(crate) fn next(&self) -> Option<Event> {
        self.receiver.try_recv().ok()
    }
}

/// Creates the event queue.
///
/// # Errors
///
/// If the host cannot create an eventfd.
pub(crate) fn event_queue() -> io::Result<(EventSender, EventReceiver)> {
    let (sender, receiver) = channel();
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    Ok((EventSender { sender, wake: wake.clone() }, EventReceiver { receiver, wake }))
}
