// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtio-mmio device whose work a vhost-user back-end does.

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

use crate::device_kind::{BLK_WRITE_BACK, DeviceKind};
use crate::device_state::DeviceState;
use crate::error::Error;
use crate::notify::{Notify, no_eventfd, signal};
use crate::offer::{check_back_end, has_address, offered, read_config};
use crate::options::{Lazy, VhostUserOption, is_name};
use crate::rings::{await_used, check_rings, ring_index};
use crate::virtio_mmio::{Action, QUEUE_NOTIFY, Registers};
use crate::vsock;

/// A device: the registers that a driver sees, and the back-end behind them.
///
/// The order of things: [`connect`](Self::connect) or [`restore`](Self::restore),
/// [`share_memory`](Self::share_memory), [`attach`](Self::attach), and for a restored device
/// [`resume`](Self::resume); then the guest runs. The registers are served on the thread that calls
/// the [`DeviceMmio`] methods, a vCPU's. A write that starts the device waits there for the
/// back-end, which may itself wait for the pages of the rings; so these methods are not for a
/// thread that serves faults. [`hang_up`](Self::hang_up) ends the wait.
///
/// # Examples
///
/// ```no_run
/// use demand_vmm::device_kind::DeviceKind;
/// use demand_vmm::error::Error;
/// use demand_vmm::machine::Machine;
/// use demand_vmm::options::VhostUserOption;
/// use demand_vmm::vhost_user::VhostUserDevice;
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
///     // ... its memory is saved, and then it goes on:
///     device.resume()?;
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct VhostUserDevice {
    name: String,
    /// The target that it logs under.
    log_target: String,
    option: VhostUserOption,
    link: HangUp,
    notify: Notify,
    /// Interrupts: one for each queue, and the last for the configuration.
    calls: Vec<Arc<EventFd>>,
    /// Whether the back-end has said that its configuration is another, and nobody has looked.
    config_is_stale: Arc<AtomicBool>,
    /// The reply that a register access of the guest waits for.
    waits: Mutex<Option<&'static str>>,
    inner: Mutex<Inner>,
}

/// Says, as long as it lives, that a register access waits for the back-end.
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
    /// The queues that the back-end has been given and not been asked to stop.
    running: Vec<bool>,
    /// Whether the device was another back-end's, and this one has not begun.
    restored: bool,
}

impl VhostUserDevice {
    /// Connects to the back-end and finds out what it is. `position`: among the VM's devices,
    /// from 0 on; the device's name comes from it, and a network card's address, unless they are
    /// given.
    ///
    /// # Errors
    ///
    /// One line: nobody listens, or the back-end lacks what the device needs.
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

    /// Connects to a back-end that is to go on where another one was stopped. The number and the
    /// size of the queues are the state's. [`resume`](Self::resume) is what lets it go on.
    ///
    /// # Errors
    ///
    /// Those of [`connect`](Self::connect), and one line if the back-end is not as good: another
    /// kind of device, fewer queues, features that the guest uses and the back-end lacks, or a
    /// configuration that does not fit what the guest has read.
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
                "it was a device {}, and is to go on as {}; give the devices in the order in which \
                 they were",
                state.kind, option.kind
            )));
        }
        state.check().map_err(failed)?;
        // `check` has seen that there are few.
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
                // Nobody but the guest has a word in it.
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

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is.
    pub fn kind(&self) -> DeviceKind {
        self.option.kind
    }

    /// Where its back-end listens.
    pub fn socket(&self) -> &Path {
        &self.option.socket
    }

    /// Whether the user wants all memory filled before the back-end sees it.
    pub fn wants_full_memory(&self) -> bool {
        self.option.lazy == Lazy::Fill
    }

    /// Shares the guest's memory with the back-end: if pages are missing, by post-copy, and
    /// `service` answers its faults from now on.
    ///
    /// # Errors
    ///
    /// One line, if pages are missing and the back-end must not or cannot see that, and the
    /// back-end's refusals.
    pub fn share_memory(
        &self,
        memory: &DemandMemory,
        service: &Arc<FaultService>,
    ) -> Result<(), Error> {
        let mut inner = self.lock();
        let missing = memory.pagers().any(|pager| !pager.bitmap().is_complete());
        let back_end = &mut inner.back_end;
        // Nothing is used before the driver agrees; some back-ends want to hear of version 1.
        back_end.set_features(1 << VIRTIO_F_VERSION_1).map_err(|error| self.failed(error))?;
        let shared = match self.option.lazy {
            Lazy::Auto | Lazy::Postcopy if missing => {
                back_end.share_missing_memory(memory, service)
            }
            Lazy::Refuse if missing => {
                return Err(self.failed(
                    "memory is missing, and lazy=refuse says that its back-end must not wait for \
                     it; say lazy=auto or lazy=fill",
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

    /// Puts the device where the guest finds it: its registers at guest physical address `address`
    /// (a [window](crate::virtio_mmio::WINDOW)), its interrupts edges of `gsi`. Kicks and
    /// interrupts go between KVM and the back-end from now on.
    ///
    /// # Errors
    ///
    /// KVM's: there is no interrupt controller, or no such interrupt.
    pub fn attach(&self, vm: &VmFd, address: u64, gsi: u32) -> Result<(), Error> {
        self.notify.serve_in_kvm_at(vm, address + QUEUE_NOTIFY);
        for call in &self.calls {
            vm.register_irqfd(call, gsi).map_err(|error| {
                Error::host(format!(
                    "device {}: connect it with interrupt {gsi} of the guest: {error}; the KVM \
                     must have an interrupt controller (KVM_CREATE_IRQCHIP)",
                    self.name
                ))
            })?;
        }
        Ok(())
    }

    /// The eventfds that stand for its interrupts: one for each queue, and the last for its
    /// configuration. For a VMM that has no interrupt controller in KVM, in place of
    /// [`attach`](Self::attach).
    pub fn interrupts(&self) -> impl Iterator<Item = &EventFd> {
        self.calls.iter().map(|call| &**call)
    }

    /// Whether a snapshot can be taken of it.
    ///
    /// Only devices whose back-ends keep nothing that the guest relies on are taken on at all. Two
    /// need a word: a console has one port, so what its back-end has is input that it has not
    /// handed over yet; and the connections of a vsock end with its back-end, which a restored
    /// guest is told.
    ///
    /// # Errors
    ///
    /// One line, if the back-end is gone: what it had in flight is lost.
    pub fn can_snapshot(&self) -> Result<(), Error> {
        self.check_alive()
    }

    /// Stops the device, when the vCPUs are paused, and says what it has come to. Waits `within`
    /// at most for requests in flight, beside what the back-end takes for its answers. A disk
    /// answers all requests before anything is stopped; other back-ends hold buffers for what may
    /// come, and are asked how far they have got.
    ///
    /// # Errors
    ///
    /// One line; the device runs on then, if its back-end does. Requests may be in flight for too
    /// long, as when the pages that they are about do not arrive.
    pub fn quiesce(&self, within: Duration) -> Result<DeviceState, Error> {
        self.can_snapshot()?;
        let mut inner = self.lock();
        self.look_at_config(&mut inner);
        let begun = Instant::now();
        let failed = |why: String| self.failed(format!("take a snapshot of it: {why}"));
        if self.option.kind.answers_all() {
            // The guest may have been stopped between a request and its kick.
            self.kick_running(&inner);
            await_answers(&inner, begun, within).map_err(failed)?;
        }
        if let Err(why) = self.drain(&mut inner, begun, within) {
            let error = failed(why);
            if let Err(why) = self.go_on(&mut inner) {
                self.log(Level::Error, format_args!("go on after a snapshot that failed: {why}"));
            }
            return Err(error);
        }
        let registers = inner.registers.clone();
        Ok(DeviceState { kind: self.option.kind, name: self.name.clone(), registers })
    }

    /// Lets the device go on: after [`quiesce`](Self::quiesce), in a VM that goes on, or after
    /// [`restore`](Self::restore). Each queue is kicked, and each interrupt raised, once: one may
    /// have been lost on the way, and one too many does no harm.
    ///
    /// # Errors
    ///
    /// One line: no memory was shared, a ring lies outside of it, or the back-end refuses.
    pub fn resume(&self) -> Result<(), Error> {
        let mut inner = self.lock();
        self.go_on(&mut inner).map_err(|why| self.failed(format!("let it go on: {why}")))
    }

    /// All pages are present: the back-end's accesses need no trap any more.
    ///
    /// # Errors
    ///
    /// The back-end's refusals.
    pub fn end_postcopy(&self) -> Result<(), Error> {
        self.lock().back_end.end_postcopy().map_err(|error| self.failed(error))
    }

    /// Whether the back-end is still there. To be told when it goes, watch the
    /// [descriptor](AsRawFd): when it becomes readable, ask. It never waits.
    ///
    /// # Errors
    ///
    /// One line, if it is gone: requests that it had will never be answered.
    pub fn check_alive(&self) -> Result<(), Error> {
        if !self.link.is_closed() {
            return Ok(());
        }
        let (socket, asked) = (self.option.socket.clone(), "look after the device");
        Err(self.failed(BackEndError::Disconnected { socket, asked }))
    }

    /// The reply that the guest's access to a register waits for, if one does. This never waits.
    pub fn waits_for(&self) -> Option<&'static str> {
        *self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What ends the connection, and every wait for the back-end, from another thread.
    pub fn hang_up(&self) -> HangUp {
        self.link.clone()
    }

    /// Logs something that the guest can bring about: under a target of this device, which is how the
    /// process's log limits each device for itself.
    fn log(&self, level: Level, what: fmt::Arguments<'_>) {
        log::log!(target: &self.log_target, level, "device {}: {what}", self.name);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, why: impl fmt::Display) -> Error {
        fail(&self.name, why)
    }

    /// Gives the back-end what the driver has set up, from where each queue is to go on.
    fn start(&self, inner: &mut Inner) -> Result<(), String> {
        let Inner { back_end, registers, memory, running, restored } = inner;
        let memory = memory.as_ref().ok_or("no memory was shared with its back-end")?;
        if !registers.has_agreed() {
            return Err("it has not agreed on features (status bit FEATURES_OK)".into());
        }
        for (index, queue) in registers.queues().iter().enumerate().filter(|(_, q)| q.ready) {
            // (A driver's mistake is logged, and a snapshot's ends the restore.)
            let remedy = if *restored { "; the snapshot is damaged, take another" } else { "" };
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
            // After a stop that failed half-way some still run.
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

    /// Starts what was stopped, if the guest wants it to run, and makes up for what was lost.
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
        // There is none only if nothing runs.
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

    /// Stops all queues; where they were does not matter any more.
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

    /// Starts the device for the driver. What the driver has done wrong is for the driver.
    fn start_for_driver(&self, inner: &mut Inner) {
        if let Err(why) = self.start(inner) {
            self.log(Level::Error, format_args!("the guest's driver starts it: {why}"));
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
        // It was checked that the offset is a small one.
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

    /// If the back-end has another configuration, reads it.
    fn look_at_config(&self, inner: &mut Inner) {
        if !self.config_is_stale.swap(false, Ordering::AcqRel) {
            return;
        }
        let _waits = Waits::for_back_end(&self.waits, "its configuration to be read");
        // Only what comes from the back-end can be another.
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
                    "the guest cannot be told that its connections are gone: it has left no \
                 buffer for events"
                ),
            ),
            Err(error) => self.log(Level::Error, format_args!("write to its event queue: {error}")),
        }
    }

    fn config_call(&self) -> &EventFd {
        // There is one more than there are queues.
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
        // Where KVM does not serve it.
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
                self.log(Level::Error, format_args!("the guest's driver has given it up"));
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

/// Waits until every request that the guest has made is answered. Nothing is stopped yet: a disk's
/// back-end may drop what it has in flight when it is.
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
