// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Starts and stops the queues of a device, and waits for its requests in flight.

use std::time::{Duration, Instant};

use demand_vhost::Vring;
use log::Level;
use vm_memory::GuestAddress;

use crate::config::device_kind::{BLK_WRITE_BACK, DeviceKind};
use crate::virtio::error::QueueError;
use crate::virtio::ioeventfd::signal;
use crate::virtio::rings::{await_used, check_rings, ring_index};
use crate::virtio::vhost_user::{Inner, VhostUserDevice};
use crate::virtio::vsock;

impl VhostUserDevice {
    /// Starts the back-end with the queues that the driver has set up, each at its next request.
    fn start(&self, inner: &mut Inner) -> Result<(), QueueError> {
        let Inner { back_end, registers, memory, running, restored } = inner;
        let memory = memory.as_ref().ok_or(QueueError::NoMemory)?;
        if !registers.has_agreed() {
            return Err(QueueError::NoFeatures);
        }
        for (index, queue) in registers.queues().iter().enumerate().filter(|(_, q)| q.ready) {
            // (The driver's mistake is logged; a snapshot's ends the restore.)
            check_rings(memory, queue).map_err(|source| match restored {
                true => QueueError::SavedRings { index, source },
                false => QueueError::Rings { index, source },
            })?;
        }
        let features = registers.driver_features();
        back_end.set_features(features)?;
        let write_back = registers.config().get(BLK_WRITE_BACK);
        if *restored && let Some(write_back) = write_back {
            // The guest's choice, which a new back-end does not know.
            let bytes = [*write_back];
            if self.option.kind.may_write(BLK_WRITE_BACK, &bytes, features) {
                let offset = u32::try_from(BLK_WRITE_BACK).expect("a config space is small");
                back_end.write_config(offset, &bytes)?;
            }
        }
        let served = self.option.kind.served_queues(registers.queues().len());
        let calls = self.calls.iter().zip(self.notify.kicks());
        let queues = registers.queues().iter().zip(calls).enumerate().take(served);
        for (index, (queue, (call, kick))) in queues.filter(|(_, (queue, _))| queue.ready) {
            // After a stop that failed half-way, some queues still run.
            if std::mem::replace(&mut running[index], true) {
                continue;
            }
            let vring = Vring {
                size: queue.size,
                descriptors: GuestAddress(queue.descriptors),
                available: GuestAddress(queue.available),
                used: GuestAddress(queue.used),
                next_available: queue.next_available,
                kick,
                call,
            };
            back_end.set_vring(index, &vring, true)?;
        }
        Ok(())
    }

    /// Starts the stopped device, if the guest wants it to run, and repeats signals that may be
    /// lost.
    pub(super) fn resume_queues(&self, inner: &mut Inner) -> Result<(), QueueError> {
        if inner.registers.is_live() {
            self.start(inner).inspect_err(|_| self.stop(inner))?;
            self.kick_running(inner);
            if inner.restored && self.option.kind == DeviceKind::Vsock {
                self.tell_of_move(inner);
            }
            self.calls.iter().for_each(|call| signal(call));
        }
        inner.restored = false;
        Ok(())
    }

    pub(super) fn kick_running(&self, inner: &Inner) {
        let running = self.notify.kicks().iter().zip(&inner.running);
        running.filter(|(_, running)| **running).for_each(|(kick, _)| signal(kick));
    }

    /// Stops all queues, and waits until each request that was taken is answered.
    pub(super) fn drain(
        &self,
        inner: &mut Inner,
        begun: Instant,
        within: Duration,
    ) -> Result<(), QueueError> {
        let Inner { back_end, registers, memory, running, .. } = inner;
        // Without shared memory, no queue runs.
        let Some(memory) = memory else { return Ok(()) };
        let were_running = running.clone();
        for (index, running) in running.iter_mut().enumerate().filter(|(_, running)| **running) {
            let base = back_end.stop_vring(index)?;
            *running = false;
            registers.queue_mut(index).next_available = base;
        }
        let stopped = registers.queues().iter().zip(were_running).enumerate();
        for (index, (queue, _)) in stopped.filter(|(_, (_, was_running))| *was_running) {
            await_used(memory, (index, queue), queue.next_available, begun, within)?;
        }
        Ok(())
    }

    /// Stops all queues. Their positions do not matter any more.
    pub(super) fn stop(&self, inner: &mut Inner) {
        for queue in 0..inner.running.len() {
            self.stop_queue(inner, queue);
        }
    }

    pub(super) fn stop_queue(&self, inner: &mut Inner, queue: usize) {
        if std::mem::take(&mut inner.running[queue])
            && let Err(error) = inner.back_end.stop_vring(queue)
        {
            self.log(Level::Error, format_args!("{error}"));
        }
    }

    /// Starts the device for the driver. A mistake of the driver is reported to the driver.
    pub(super) fn start_for_driver(&self, inner: &mut Inner) {
        if let Err(why) = self.start(inner) {
            self.log(Level::Error, format_args!("cannot start it for the guest's driver: {why}"));
            self.stop(inner);
            if inner.registers.need_reset() {
                signal(self.config_call());
            }
        }
    }

    fn tell_of_move(&self, inner: &mut Inner) {
        let Inner { registers, memory: Some(memory), .. } = inner else { return };
        let queue = registers.queue_mut(vsock::EVENT_QUEUE);
        let told = if queue.ready { vsock::tell_of_move(memory, queue) } else { Ok(false) };
        match told {
            Ok(true) => {}
            Ok(false) => self.log(
                Level::Warn,
                format_args!(
                    "cannot notify the guest that its connections are gone: its event queue has \
                     no buffer"
                ),
            ),
            Err(error) => {
                self.log(Level::Error, format_args!("cannot write to its event queue: {error}"))
            }
        }
    }
}

impl Inner {
    /// Waits until every request that the guest has made is answered. No queue is stopped before,
    /// because a disk's back-end may then drop its requests in flight.
    pub(super) fn await_answers(&self, begun: Instant, within: Duration) -> Result<(), QueueError> {
        let Some(memory) = &self.memory else { return Ok(()) };
        let queues = self.registers.queues().iter().zip(&self.running).enumerate();
        for (index, (queue, _)) in queues.filter(|(_, (_, running))| **running) {
            let made = ring_index(memory, queue.available, begun, within)?;
            await_used(memory, (index, queue), made, begun, within)?;
        }
        Ok(())
    }
}
