// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The QueueNotify register of a virtio-mmio device, with an ioeventfd for each queue.

use std::io;

use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The register to which the guest writes the number of a queue with new buffers (virtio 1.2,
/// section 4.2.2, `QueueNotify`). Each queue has an eventfd that the device waits on.
#[derive(Debug)]
pub struct Notify {
    address: u64,
    kicks: Vec<EventFd>,
}

impl Notify {
    /// Creates the register at guest physical address `address`, for a device with `queues` queues.
    ///
    /// # Errors
    ///
    /// The system's error, if it has no more eventfds.
    pub fn new(address: u64, queues: u16) -> io::Result<Self> {
        let kicks = (0..queues)
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<io::Result<_>>()?;
        Ok(Notify { address, kicks })
    }

    /// Returns the eventfds, one for each queue.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Registers an ioeventfd for each queue, so that a kick does not leave the kernel. If KVM
    /// refuses, [`write`](Self::write) serves the writes.
    pub fn serve_in_kvm(&self, vm: &VmFd) {
        self.serve_in_kvm_at(vm, self.address);
    }

    /// As [`serve_in_kvm`](Self::serve_in_kvm), for a device that addresses its registers by
    /// offset: `address` is the guest physical address of this register.
    pub fn serve_in_kvm_at(&self, vm: &VmFd, address: u64) {
        for (queue, kick) in (0u32..).zip(&self.kicks) {
            let address = IoEventAddress::Mmio(address);
            if let Err(error) = vm.register_ioevent(kick, &address, queue) {
                log::warn!(
                    "cannot register an ioeventfd for queue {queue}: {error}; falling back to \
                     MMIO exits"
                );
            }
        }
    }

    /// Serves a write by the guest. Returns false if the write is not to this register, or names no
    /// queue.
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

/// Signals an eventfd.
pub(crate) fn signal(eventfd: &EventFd) {
    // EAGAIN: the counter is at its maximum, so the reader wakes anyway.
    drop(eventfd.write(1));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_kicks_its_queue_and_others_are_refused() {
        let notify = Notify::new(0xd000_0050, 2).unwrap();
        assert!(notify.write(0xd000_0050, &1u32.to_le_bytes()));
        assert_eq!(notify.kicks()[1].read().unwrap(), 1);
        assert!(notify.kicks()[0].read().is_err());
        assert!(!notify.write(0xd000_0050, &2u32.to_le_bytes()), "there is no queue 2");
        assert!(!notify.write(0xd000_0050, &[1, 0]));
        assert!(!notify.write(0xd000_0054, &1u32.to_le_bytes()));
    }
}
