// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine around the test guest: a port through which the guest reports its outcome, and the
//! notify register of its disk.

use std::fmt;
use std::sync::Arc;
use std::thread;

use demand_vmm::vcpu::{ServeExit, Served, unserved};
use demand_vmm::virtio::ioeventfd::Notify;
use kvm_ioctls::VcpuExit;
use test_guest::guest_code::PORT_WAIT;

/// A byte that the guest wrote to an I/O port, to report that it is done or has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortWrite {
    /// The vCPU.
    pub cpu: u32,
    /// The port.
    pub port: u16,
    /// The byte.
    pub value: u8,
}

/// Serves the exits of the test guest.
pub struct TestExits {
    /// The disk's notify register, for kicks that KVM does not serve.
    notify: Option<Arc<Notify>>,
    tell: Box<dyn Fn(PortWrite) + Send + Sync>,
}

impl TestExits {
    /// Creates the handler. The guest's writes to ports are passed to `tell`, on the vCPU's thread.
    pub fn new(
        notify: Option<Arc<Notify>>,
        tell: impl Fn(PortWrite) + Send + Sync + 'static,
    ) -> Self {
        TestExits { notify, tell: Box::new(tell) }
    }
}

impl fmt::Debug for TestExits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestExits").field("notify", &self.notify).finish_non_exhaustive()
    }
}

impl ServeExit for TestExits {
    fn serve(&self, cpu: u32, exit: VcpuExit<'_>) -> Served {
        match exit {
            VcpuExit::IoOut(PORT_WAIT, _) => thread::yield_now(),
            VcpuExit::IoOut(port, data) => {
                let value = data.first().copied().unwrap_or_default();
                (self.tell)(PortWrite { cpu, port, value });
            }
            VcpuExit::MmioWrite(address, data)
                if self.notify.as_ref().is_some_and(|notify| notify.write(address, data)) => {}
            // The test guest has finished, and gets no interrupts.
            VcpuExit::Hlt => return Served::End,
            exit => return unserved(cpu, &exit),
        }
        Served::Continue
    }
}
