// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The test guest's disk: a vhost-user back-end that shares memory with missing pages.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use demand_vhost::{BackEnd, Options, VhostUserProtocolFeatures, Vring};
use demand_vmm::config::VhostUserConfig;
use demand_vmm::config::device_kind::DeviceKind;
use demand_vmm::error::Error;
use demand_vmm::virtio::ioeventfd::Notify;
use demand_vmm::vm::machine::Machine;
use test_guest::guest_layout::BLK_QUEUE_NOTIFY;
use test_guest::plan::Plan;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Features that the test guest's driver accepts. Without event indices, because the guest kicks
/// for each request, and polls.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_BLK_F_MQ | 1 << VIRTIO_BLK_F_FLUSH;

/// Interval at which the connection is checked while the guest runs.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// A connected disk.
#[derive(Debug)]
pub(crate) struct Disk {
    back_end: BackEnd,
    notify: Arc<Notify>,
    /// Not read, because the guest polls.
    _calls: Vec<EventFd>,
    looked: Instant,
}

impl Disk {
    /// Connects to the back-end, shares the machine's memory with it, of which every page may be
    /// missing, and starts the queues of the plan.
    ///
    /// # Errors
    ///
    /// Returns a one-line error if no back-end listens, if the back-end cannot wait for missing
    /// pages or reports wrong addresses of its mappings, or if its disk or queues do not fit the
    /// plan.
    pub(crate) fn connect(
        option: &VhostUserConfig,
        machine: &Machine,
        plan: &Plan,
    ) -> Result<Self, Error> {
        if option.kind != DeviceKind::Blk {
            return Err(Error::usage(format!(
                "--vhost-user {}: the test guest supports a disk only; use blk",
                option.kind
            )));
        }
        let options = Options::default().needed(VhostUserProtocolFeatures::CONFIG);
        let mut back_end = BackEnd::connect(&option.socket, options).map_err(Error::failed)?;
        if back_end.queues() < u64::from(option.queues) {
            return Err(Error::failed(format!(
                "cannot use {} queues of the vhost-user back-end at {}: it has {}; start it with \
                 more queues, or lower queues=",
                option.queues,
                option.socket.display(),
                back_end.queues()
            )));
        }
        back_end.set_features(FEATURES).map_err(Error::failed)?;
        check_capacity(&mut back_end, option, plan)?;
        machine.lazy().expect_back_ends();
        back_end
            .share_missing_memory(machine.memory(), machine.service())
            .map_err(Error::failed)?;

        let notify = Notify::new(BLK_QUEUE_NOTIFY, option.queues).map_err(no_eventfd)?;
        notify.serve_in_kvm(machine.vm());
        let mut calls = Vec::new();
        let address = |offset| GuestAddress(plan.windows().guest_address(offset));
        let queues = plan.rings().map_or(&[][..], |rings| rings.queues());
        for (index, (queue, kick)) in queues.iter().zip(notify.kicks()).enumerate() {
            let call = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(no_eventfd)?;
            let vring = Vring {
                size: queue.size,
                descriptors: address(queue.descriptors),
                available: address(queue.avail),
                used: address(queue.used),
                next_available: 0,
                kick,
                call: &call,
            };
            back_end.set_vring(index, &vring, true).map_err(Error::failed)?;
            calls.push(call);
        }
        Ok(Disk { back_end, notify: Arc::new(notify), _calls: calls, looked: Instant::now() })
    }

    /// Returns the register through which the guest kicks the device.
    pub(crate) fn notify(&self) -> Arc<Notify> {
        self.notify.clone()
    }

    /// Checks that the back-end is still connected. It looks at most once every 200 ms, so that the
    /// caller may repeat it often.
    ///
    /// # Errors
    ///
    /// If the back-end is gone, in which case its pending requests will never be answered.
    pub(crate) fn check_alive(&mut self) -> Result<(), Error> {
        if self.looked.elapsed() < LOOK_EVERY {
            return Ok(());
        }
        self.looked = Instant::now();
        self.back_end.check().map_err(Error::failed)
    }

    /// Ends post-copy. All pages must be present, so that the back-end's accesses need no trap.
    ///
    /// # Errors
    ///
    /// If the back-end refuses.
    pub(crate) fn end_postcopy(&mut self) -> Result<(), Error> {
        self.back_end.end_postcopy().map_err(Error::failed)
    }

    /// Stops the queues.
    ///
    /// # Errors
    ///
    /// If the back-end refuses.
    pub(crate) fn stop(&mut self) -> Result<(), Error> {
        for queue in 0..self.notify.kicks().len() {
            self.back_end.stop_vring(queue).map_err(Error::failed)?;
        }
        Ok(())
    }
}

fn no_eventfd(error: io::Error) -> Error {
    Error::host(format!(
        "cannot create an eventfd: {error}; raise the limit of open files (ulimit -n)"
    ))
}

/// Checks that the disk has all sectors that the plan's requests name.
fn check_capacity(
    back_end: &mut BackEnd,
    option: &VhostUserConfig,
    plan: &Plan,
) -> Result<(), Error> {
    let Some(disk) = &plan.params().disk else { return Ok(()) };
    // The capacity is the first field of the config space (virtio 1.2, section 5.2.4).
    let mut capacity = [0; 8];
    back_end.read_config(0, &mut capacity).map_err(Error::failed)?;
    let sectors = u64::from_le_bytes(capacity);
    if sectors < disk.disk_sectors {
        return Err(Error::failed(format!(
            "cannot use the disk of the vhost-user back-end at {}: it has {sectors} sectors, the \
             pristine image has {}; start the back-end on a copy of the image",
            option.socket.display(),
            disk.disk_sectors
        )));
    }
    Ok(())
}
