// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The QueueNotify register of a virtio-mmio device.

use std::io;

use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::Error;

/// The register to which the guest writes the number of a queue that has something new (virtio
/// 1.2, section 4.2.2, `QueueNotify`). Each queue has an eventfd that the device waits on.
#[derive(Debug)]
pub struct Notify {
    address: u64,
    kicks: Vec<EventFd>,
}

impl Notify {
    /// The register at guest physical address `address` of a device with `queues` queues.
    ///
    /// # Errors
    ///
    /// The system's, if there are no eventfds to be had.
    pub fn new(address: u64, queues: u16) -> io::Result<Self> {
        let kicks = (0..queues).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<_>>()?;
        Ok(Notify { address, kicks })
    }

    /// The eventfds, one for each queue.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Lets KVM serve the register, so that a kick does not leave the kernel. A KVM that cannot
    /// leaves the writes to [`write`](Self::write).
    pub fn serve_in_kvm(&self, vm: &VmFd) {
        self.serve_in_kvm_at(vm, self.address);
    }

    /// The same for a device that knows its registers by their offsets, which is placed so that
    /// this one is at guest physical address `address`.
    pub fn serve_in_kvm_at(&self, vm: &VmFd, address: u64) {
        for (queue, kick) in self.kicks.iter().enumerate() {
            let address = IoEventAddress::Mmio(address);
            if let Err(error) = vm.register_ioevent(kick, &address, queue as u32) {
                log::warn!("let KVM serve kicks of queue {queue}: {error}; the VMM serves them");
            }
        }
    }

    /// Serves a write of the guest's; false if it is not to this register, or not to a queue.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Ok(queue) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return false };
        let Some(kick) = self.kicks.get(queue as usize) else { return false };
        if address != self.address {
            return false;
        }
        signal(kick);
        true
    }
}

/// Wakes up whoever waits on an eventfd.
pub(crate) fn signal(eventfd: &EventFd) {
    // EAGAIN: the counter is at its end, so there is enough to wake up for.
    drop(eventfd.write(1));
}

/// The error of a host that has no more eventfds.
pub(crate) fn no_eventfd(error: io::Error) -> Error {
    Error::host(format!("make an eventfd: {error}; raise the limit of open files (ulimit -n)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_kicks_its_queue_and_others_are_refused() {
        let notify = Notify::new(0xd000_0050, 2).unwrap();
        assert!(notify.write(0xd000_0050, &1u32.to_le_bytes()));
        assert_eq!(notify.kicks()[1].read().unwrap(), 1);
        assert!(notify.kicks()[0].read().is_err());
        assert!(!notify.write(0xd000_0050, &2u32.to_le_bytes()), "there is no queue 2");
        assert!(!notify.write(0xd000_0050, &[1, 0]));
        assert!(!notify.write(0xd000_0054, &1u32.to_le_bytes()));
    }
}
