// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtio-mmio device that a vhost-user back-end serves.

use std::fmt;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use demand_memory::DemandMemory;
use demand_uffd::FaultService;
use demand_vhost::{
    BackEnd, Error as BackEndError, HangUp, Options, VhostUserProtocolFeatures, Vring,
};
use kvm_ioctls::VmFd;
use log::Level;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_device::DeviceMmio;
use vm_device::bus::{MmioAddress, MmioAddressOffset};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::config::device_kind::{BLK_WRITE_BACK, DeviceKind};
use crate::config::{Lazy, VhostUserOption, is_name};
use crate::error::Error;
use crate::virtio::ioeventfd::{Notify, no_eventfd, signal};
use crate::virtio::mmio::{Action, QUEUE_NOTIFY, Registers};
use crate::virtio::negotiate::{check_back_end, has_address, offered, read_config};
use crate::virtio::rings::{await_used, check_rings, ring_index};
use crate::virtio::state::DeviceState;
use crate::virtio::vsock;

/// A device: the registers that a driver sees, and the back-end behind them.
///
/// The order of calls is [`connect`](Self::connect) or [`restore`](Self::restore),
/// [`share_memory`](Self::share_memory), [`attach`](Self::attach), and for a restored device
/// [`resume`](Self::resume); then the guest runs. The registers are served on the thread that calls
/// the [`DeviceMmio`] methods, which is a vCPU's. A write that starts the device waits there for
/// the back-end, which may itself wait for the pages of the rings. Therefore a thread that serves
/// faults must not call these methods. [`hang_up`](Self::hang_up) ends the wait.
///
/// # Examples
///
/// ```no_run
/// use demand_vmm::config::device_kind::DeviceKind;
/// use demand_vmm::error::Error;
/// use demand_vmm::vm::machine::Machine;
/// use demand_vmm::config::VhostUserOption;
/// use demand_vmm::virtio::vhost_user::VhostUserDevice;
/// use std::time::Duration;
///
/// fn run(machine: &Machine, address: u64, gsi: u32) -> Result<(), Error> {
///     let option = VhostUserOption::new(DeviceKind::Blk, "blk.sock");
///     let device = VhostUserDevice::connect(&option, 0)?;
///     device.share_memory(machine.memory(), machine.service())?;
///     device.attach(machine.vm(), address, gsi)?;
///     // ... the guest runs, until its vCPUs are paused:
///     device.can_snapshot()?;
///     let state = device.quiesce(Duration::from_secs(5))?;
///     // ... its memory is saved, and then the guest continues:
///     device.resume()?;
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct VhostUserDevice {
    name: String,
    /// The target that the device logs under.
    log_target: String,
    option: VhostUserOption,
    link: HangUp,
    notify: Notify,
    /// Interrupts: one for each queue, and the last for the config space.
    calls: Vec<Arc<EventFd>>,
    /// Whether the back-end has announced a config space that was not read yet.
    config_is_stale: Arc<AtomicBool>,
    /// The reply that a register access of the guest waits for.
    waits: Mutex<Option<&'static str>>,
    inner: Mutex<Inner>,
}

/// Records, while it lives, that a register access waits for the back-end.
struct Waits<'a>(&'a Mutex<Option<&'static str>>);

impl<'a> Waits<'a> {
    fn for_back_end(waits: &'a Mutex<Option<&'static str>>, what: &'static str) -> Self {
        *waits.lock().unwrap_or_else(PoisonError::into_inner) = Some(what);
        Waits(waits)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[derive(Debug)]
struct Inner {
    back_end: BackEnd,
    registers: Registers,
    memory: Option<DemandMemory>,
    /// Whether each queue runs: the back-end was given it, and was not asked to stop it.
    running: Vec<bool>,
    /// Whether the device was another back-end's, and this back-end was not started yet.
    restored: bool,
}

impl VhostUserDevice {
    /// Connects to the back-end, and negotiates with it. `position` is the device's index among the
    /// VM's devices, from 0. The device's name derives from it, and so does a network card's
    /// address, unless they are given.
    ///
    /// # Errors
    ///
    /// One line: no back-end listens, or the back-end lacks a feature that the device needs.
    pub fn connect(option: &VhostUserOption, position: usize) -> Result<Self, Error> {
        let kind = option.kind;
        let name = option.id.clone().unwrap_or_else(|| format!("{kind}{position}"));
        let failed = |error: BackEndError| fail(&name, error);
        let none = VhostUserProtocolFeatures::empty();
        let options = Options {
            needed: if kind.needs_config() { VhostUserProtocolFeatures::CONFIG } else { none },
            unused: if kind.counts_queues() { none } else { VhostUserProtocolFeatures::MQ },
            ..Options::default()
        };
        let mut back_end = BackEnd::connect(&option.socket, options).map_err(failed)?;
        check_back_end(&back_end, option).map_err(|why| fail(&name, why))?;
        let config =
            read_config(&mut back_end, option, position).map_err(|why| fail(&name, why))?;

        let config_is_stale = Arc::new(AtomicBool::new(false));
        let eventfd = || EventFd::new(EFD_NONBLOCK).map(Arc::new);
        let queues = usize::from(option.queues);
        let calls = (0..=queues).map(|_| eventfd()).collect::<Result<Vec<_>, _>>();
        let calls = calls.map_err(no_eventfd)?;
        let notify = Notify::new(QUEUE_NOTIFY, option.queues).map_err(no_eventfd)?;
        let (stale, call) = (config_is_stale.clone(), calls[queues].clone());
        let changed = move || {
            stale.store(true, Ordering::Release);
            signal(&call);
        };
        back_end.on_config_change(changed).map_err(failed)?;
        let registers = Registers::new(
            kind.virtio_id(),
            offered(&back_end, option),
            queues,
            option.queue_size,
            config,
        );
        let (link, running) = (back_end.hang_up(), vec![false; queues]);
        let inner = Inner { back_end, registers, memory: None, running, restored: false };
        Ok(VhostUserDevice {
            log_target: format!("{}::{name}", module_path!()),
            waits: Mutex::default(),
            name,
            option: option.clone(),
            link,
            notify,
            calls,
            config_is_stale,
            inner: Mutex::new(inner),
        })
    }

    /// Connects to a back-end that continues where another one was stopped. `state` determines the
    /// number and the size of the queues. [`resume`](Self::resume) starts the device.
    ///
    /// # Errors
    ///
    /// Those of [`connect`](Self::connect), and one line if the back-end cannot replace the other
    /// one: it is another kind of device, it has fewer queues, it lacks features that the guest
    /// uses, or its config space does not fit the one that the guest has read.
    pub fn restore(
        option: &VhostUserOption,
        position: usize,
        state: &DeviceState,
    ) -> Result<Self, Error> {
        let name = match is_name(&state.name) {
            true => state.name.clone(),
            false => format!("{}{position}", state.kind),
        };
        let failed = |why: String| fail(&name, why);
        if option.kind != state.kind {
            return Err(failed(format!(
                "it was of kind {}, and the option names {}; give the devices in their original \
                 order",
                state.kind, option.kind
            )));
        }
        state.check().map_err(failed)?;
        // `check` has limited their number.
        let queues = state.registers.queues().len() as u16;
        let queue_size = state.registers.queue_size_max();
        let id = Some(option.id.clone().unwrap_or_else(|| state.name.clone()));
        let option = VhostUserOption { queues, queue_size, id, ..option.clone() };
        let device = VhostUserDevice::connect(&option, position)?;
        {
            let mut inner = device.lock();
            let features = offered(&inner.back_end, &option);
            let mut config = inner.registers.config().to_vec();
            let theirs = has_address(&inner.back_end);
            if option.kind == DeviceKind::Net && option.mac.is_none() && !theirs {
                // Neither the user nor the back-end sets the address, so the guest keeps it.
                config[..6].copy_from_slice(&state.registers.config()[..6]);
            }
            state.check_successor(features, &config).map_err(failed)?;
            inner.registers = state.registers.clone();
            inner.registers.offer(features);
            if option.kind == DeviceKind::Vsock {
                // The guest reads it again.
                inner.registers.set_config(config);
            }
            inner.restored = true;
        }
        Ok(device)
    }

    /// Returns the device's name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the device's kind.
    pub fn kind(&self) -> DeviceKind {
        self.option.kind
    }

    /// Returns the path of the back-end's socket.
    pub fn socket(&self) -> &Path {
        &self.option.socket
    }

    /// Whether the user wants all memory filled before the back-end sees it.
    pub fn wants_full_memory(&self) -> bool {
        self.option.lazy == Lazy::Fill
    }

    /// Shares the guest's memory with the back-end. If pages are missing, this uses post-copy, and
    /// `service` serves the back-end's faults from now on.
    ///
    /// # Errors
    ///
    /// One line, if pages are missing and the back-end must not or cannot wait for them, and the
    /// back-end's refusals.
    pub fn share_memory(
        &self,
        memory: &DemandMemory,
        service: &Arc<FaultService>,
    ) -> Result<(), Error> {
        let mut inner = self.lock();
        let missing = memory.pagers().any(|pager| !pager.bitmap().is_complete());
        let back_end = &mut inner.back_end;
        // No feature is used before the driver agrees, but some back-ends expect VERSION_1 here.
        back_end.set_features(1 << VIRTIO_F_VERSION_1).map_err(|error| self.failed(error))?;
        let shared = match self.option.lazy {
            Lazy::Auto | Lazy::Postcopy if missing => {
                back_end.share_missing_memory(memory, service)
            }
            Lazy::Refuse if missing => {
                return Err(self.failed(
                    "cannot start it: pages are missing, and lazy=refuse forbids its back-end to \
                     wait for them; use lazy=auto or lazy=fill",
                ));
            }
            _ => back_end.share_present_memory(memory),
        };
        shared.map_err(|error| match error {
            BackEndError::NoPagefault { .. }
            | BackEndError::NoUserfaultfd { .. }
            | BackEndError::EchoedAddress { .. }
            | BackEndError::Prefaulted { .. }
            | BackEndError::Arm { .. } => {
                self.failed(format!("{error}; lazy=fill fills memory before the back-end sees it"))
            }
            error => self.failed(error),
        })?;
        inner.memory = Some(memory.clone());
        Ok(())
    }

    /// Attaches the device to the VM: its registers to guest physical address `address` (a
    /// [window](crate::virtio::mmio::WINDOW)), its interrupts to edges of `gsi`. From now on, kicks
    /// and interrupts pass between KVM and the back-end.
    ///
    /// # Errors
    ///
    /// KVM's error, if it has no interrupt controller, or no such interrupt.
    pub fn attach(&self, vm: &VmFd, address: u64, gsi: u32) -> Result<(), Error> {
        self.notify.serve_in_kvm_at(vm, address + QUEUE_NOTIFY);
        for call in &self.calls {
            vm.register_irqfd(call, gsi).map_err(|error| {
                Error::host(format!(
                    "cannot connect device {} to interrupt {gsi} of the guest: {error}; KVM must \
                     have an interrupt controller (KVM_CREATE_IRQCHIP)",
                    self.name
                ))
            })?;
        }
        Ok(())
    }

    /// Returns the eventfds for its interrupts: one for each queue, and the last for the config
    /// space. A VMM without an interrupt controller in KVM uses them in place of
    /// [`attach`](Self::attach).
    pub fn interrupts(&self) -> impl Iterator<Item = &EventFd> {
        self.calls.iter().map(|call| &**call)
    }

    /// Checks whether a snapshot of the device can be taken.
    ///
    /// Only kinds of devices whose back-ends keep no state that the guest relies on are supported
    /// at all. Two of them need an argument. A console has one port, so its back-end holds only
    /// input that it has not passed on yet. The connections of a vsock end with its back-end, and a
    /// restored guest is told so.
    ///
    /// # Errors
    ///
    /// One line, if the back-end is gone: its requests in flight are lost.
    pub fn can_snapshot(&self) -> Result<(), Error> {
        self.check_alive()
    }

    /// Quiesces the device while the vCPUs are paused, and returns its state. Waits for requests in
    /// flight at most for `within`, apart from the time that the back-end takes to reply. A disk
    /// answers all requests before anything is stopped; other back-ends hold buffers for later
    /// input, and are asked for their position in the queues.
    ///
    /// # Errors
    ///
    /// One line; the device then still runs, if its back-end does. Requests may be in flight for
    /// too long, for example if the pages that they need do not arrive.
    pub fn quiesce(&self, within: Duration) -> Result<DeviceState, Error> {
        self.can_snapshot()?;
        let mut inner = self.lock();
        self.look_at_config(&mut inner);
        let begun = Instant::now();
        let failed = |why: String| self.failed(format!("cannot snapshot it: {why}"));
        if self.option.kind.answers_all() {
            // The guest may have been stopped between a request and its kick.
            self.kick_running(&inner);
            await_answers(&inner, begun, within).map_err(failed)?;
        }
        if let Err(why) = self.drain(&mut inner, begun, within) {
            let error = failed(why);
            if let Err(why) = self.go_on(&mut inner) {
                self.log(
                    Level::Error,
                    format_args!("cannot resume it after a failed snapshot: {why}"),
                );
            }
            return Err(error);
        }
        let registers = inner.registers.clone();
        Ok(DeviceState { kind: self.option.kind, name: self.name.clone(), registers })
    }

    /// Starts the device again: after [`quiesce`](Self::quiesce), in a VM that continues, or after
    /// [`restore`](Self::restore). Each queue is kicked, and each interrupt raised, once, because
    /// one may have been lost; an extra one does no harm.
    ///
    /// # Errors
    ///
    /// One line, if no memory was shared, a ring lies outside of it, or the back-end refuses.
    pub fn resume(&self) -> Result<(), Error> {
        let mut inner = self.lock();
        self.go_on(&mut inner).map_err(|why| self.failed(format!("cannot resume it: {why}")))
    }

    /// Ends post-copy when all pages are present: the back-end's accesses need no trap any more.
    ///
    /// # Errors
    ///
    /// The back-end's refusals.
    pub fn end_postcopy(&self) -> Result<(), Error> {
        self.lock().back_end.end_postcopy().map_err(|error| self.failed(error))
    }

    /// Checks whether the back-end is still connected, without blocking. To learn of its end, watch
    /// the [descriptor](AsRawFd), and call this when the descriptor becomes readable.
    ///
    /// # Errors
    ///
    /// One line, if the back-end is gone: its requests will never be answered.
    pub fn check_alive(&self) -> Result<(), Error> {
        if !self.link.is_closed() {
            return Ok(());
        }
        let (socket, asked) = (self.option.socket.clone(), "use");
        Err(self.failed(BackEndError::Disconnected { socket, asked }))
    }

    /// Returns the reply that the guest's access to a register waits for, if any. Never blocks.
    pub fn waits_for(&self) -> Option<&'static str> {
        *self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a handle that ends the connection, and every wait for the back-end, from another
    /// thread.
    pub fn hang_up(&self) -> HangUp {
        self.link.clone()
    }

    /// Logs an event that the guest can cause, under this device's target, so that the log limits
    /// each device separately.
    fn log(&self, level: Level, what: fmt::Arguments<'_>) {
        log::log!(target: &self.log_target, level, "device {}: {what}", self.name);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, why: impl fmt::Display) -> Error {
        fail(&self.name, why)
    }

    /// Starts the back-end with the queues that the driver has set up, each at its next request.
    fn start(&self, inner: &mut Inner) -> Result<(), String> {
        let Inner { back_end, registers, memory, running, restored } = inner;
        let memory = memory.as_ref().ok_or("no memory was shared with its back-end")?;
        if !registers.has_agreed() {
            return Err("the driver has not agreed on features (status bit FEATURES_OK)".into());
        }
        for (index, queue) in registers.queues().iter().enumerate().filter(|(_, q)| q.ready) {
            // (The driver's mistake is logged; a snapshot's ends the restore.)
            let remedy = if *restored { "; the snapshot is damaged, use another" } else { "" };
            check_rings(memory, queue).map_err(|why| format!("queue {index}: {why}{remedy}"))?;
        }
        let features = registers.driver_features();
        back_end.set_features(features).map_err(|error| error.to_string())?;
        let write_back = registers.config().get(BLK_WRITE_BACK);
        if *restored && let Some(write_back) = write_back {
            // The guest's choice, which a new back-end does not know.
            let bytes = [*write_back];
            if self.option.kind.may_write(BLK_WRITE_BACK, &bytes, features) {
                let offset = BLK_WRITE_BACK as u32;
                back_end.write_config(offset, &bytes).map_err(|error| error.to_string())?;
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
            back_end.set_vring(index, &vring, true).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Starts the stopped device, if the guest wants it to run, and repeats signals that may be
    /// lost.
    fn go_on(&self, inner: &mut Inner) -> Result<(), String> {
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

    fn kick_running(&self, inner: &Inner) {
        let running = self.notify.kicks().iter().zip(&inner.running);
        running.filter(|(_, running)| **running).for_each(|(kick, _)| signal(kick));
    }

    /// Stops all queues, and waits until each request that was taken is answered.
    fn drain(&self, inner: &mut Inner, begun: Instant, within: Duration) -> Result<(), String> {
        let Inner { back_end, registers, memory, running, .. } = inner;
        // Without shared memory, no queue runs.
        let Some(memory) = memory else { return Ok(()) };
        let were_running = running.clone();
        for (index, running) in running.iter_mut().enumerate().filter(|(_, running)| **running) {
            let base = back_end.stop_vring(index).map_err(|error| error.to_string())?;
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
    fn stop(&self, inner: &mut Inner) {
        for queue in 0..inner.running.len() {
            self.stop_queue(inner, queue);
        }
    }

    fn stop_queue(&self, inner: &mut Inner, queue: usize) {
        if std::mem::take(&mut inner.running[queue])
            && let Err(error) = inner.back_end.stop_vring(queue)
        {
            self.log(Level::Error, format_args!("{error}"));
        }
    }

    /// Starts the device for the driver. A mistake of the driver is reported to the driver.
    fn start_for_driver(&self, inner: &mut Inner) {
        if let Err(why) = self.start(inner) {
            self.log(Level::Error, format_args!("cannot start it for the guest's driver: {why}"));
            self.stop(inner);
            if inner.registers.need_reset() {
                signal(self.config_call());
            }
        }
    }

    fn write_config(&self, inner: &mut Inner, offset: usize, bytes: &[u8]) {
        let Inner { back_end, registers, .. } = inner;
        let has_config = back_end.protocol_features().contains(VhostUserProtocolFeatures::CONFIG);
        let features = registers.driver_features();
        if !has_config || !self.option.kind.may_write(offset, bytes, features) {
            self.log(Level::Debug, format_args!("a write to its configuration is ignored"));
            return;
        }
        // `may_write` has checked that the offset is small.
        if let Err(error) = back_end.write_config(offset as u32, bytes) {
            self.log(Level::Error, format_args!("{error}"));
            return;
        }
        let mut config = registers.config().to_vec();
        if let Some(field) = config.get_mut(offset..offset + bytes.len()) {
            field.copy_from_slice(bytes);
        }
        registers.set_config(config);
    }

    /// Reads the back-end's config space, if it has changed.
    fn look_at_config(&self, inner: &mut Inner) {
        if !self.config_is_stale.swap(false, Ordering::AcqRel) {
            return;
        }
        let _waits = Waits::for_back_end(&self.waits, "its configuration to be read");
        // Only the fields of the back-end can change, so the position does not matter.
        match read_config(&mut inner.back_end, &self.option, 0) {
            Ok(mut config) => {
                if self.option.kind == DeviceKind::Net {
                    config[..6].copy_from_slice(&inner.registers.config()[..6]);
                }
                inner.registers.change_config(config);
            }
            Err(why) => self.log(Level::Error, format_args!("{why}")),
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

    fn config_call(&self) -> &EventFd {
        // The calls are one more than the queues.
        &self.calls[usize::from(self.option.queues)]
    }
}

impl DeviceMmio for VhostUserDevice {
    fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        let mut inner = self.lock();
        self.look_at_config(&mut inner);
        inner.registers.read(offset, data);
    }

    fn mmio_write(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        // A kick, if KVM does not serve it.
        if self.notify.write(offset, data) {
            return;
        }
        let mut inner = self.lock();
        let action = inner.registers.write(offset, data);
        let _waits = action.asks_back_end().map(|what| Waits::for_back_end(&self.waits, what));
        match action {
            Action::None | Action::Notify => {}
            Action::Start => self.start_for_driver(&mut inner),
            Action::Reset => {
                self.stop(&mut inner);
                inner.restored = false;
            }
            Action::Fail => {
                self.log(
                    Level::Error,
                    format_args!("the guest's driver has set the status bit FAILED"),
                );
                self.stop(&mut inner);
            }
            Action::StopQueue(queue) => self.stop_queue(&mut inner, queue),
            Action::WriteConfig(offset, bytes) => self.write_config(&mut inner, offset, &bytes),
        }
    }
}

impl AsRawFd for VhostUserDevice {
    fn as_raw_fd(&self) -> RawFd {
        self.link.as_raw_fd()
    }
}

/// Waits until every request that the guest has made is answered. No queue is stopped before,
/// because a disk's back-end may then drop its requests in flight.
fn await_answers(inner: &Inner, begun: Instant, within: Duration) -> Result<(), String> {
    let Some(memory) = &inner.memory else { return Ok(()) };
    let queues = inner.registers.queues().iter().zip(&inner.running).enumerate();
    for (index, (queue, _)) in queues.filter(|(_, (_, running))| **running) {
        let made = ring_index(memory, queue.available, begun, within)?;
        await_used(memory, (index, queue), made, begun, within)?;
    }
    Ok(())
}

fn fail(name: &str, why: impl fmt::Display) -> Error {
    Error::failed(format!("device {name}: {why}"))
}
