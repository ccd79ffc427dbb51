// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtio-mmio device that a vhost-user back-end serves.

mod queues;

use std::fmt;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use demand_memory::DemandMemory;
use demand_uffd::FaultService;
use demand_vhost::{
    BackEnd, Error as BackEndError, ErrorKind, HangUp, Options, VhostUserProtocolFeatures,
};
use kvm_ioctls::VmFd;
use log::Level;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_device::DeviceMmio;
use vm_device::bus::{MmioAddress, MmioAddressOffset};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::config::device::is_name;
use crate::config::device_kind::DeviceKind;
use crate::config::{Lazy, VhostUserConfig};
use crate::sync::LockExt;
use crate::virtio::error::{DeviceError, DeviceFault};
use crate::virtio::ioeventfd::{Notify, signal};
use crate::virtio::mmio::{Action, QUEUE_NOTIFY, Registers};
use crate::virtio::negotiate::{check_back_end, has_address, offered, read_config};
use crate::virtio::request::{Pending, Request, Waiting};
use crate::virtio::state::DeviceState;

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
/// use demand_vmm::config::VhostUserConfig;
/// use demand_vmm::config::device_kind::DeviceKind;
/// use demand_vmm::error::Error;
/// use demand_vmm::virtio::vhost_user::VhostUserDevice;
/// use demand_vmm::vm::machine::Machine;
/// use std::time::Duration;
///
/// fn run(machine: &Machine, address: u64, gsi: u32) -> Result<(), Error> {
///     let option = VhostUserConfig::new(DeviceKind::Blk, "blk.sock");
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
    option: VhostUserConfig,
    link: HangUp,
    notify: Notify,
    /// Interrupts: one for each queue, and the last for the config space.
    calls: Vec<Arc<EventFd>>,
    /// Whether the back-end has announced a config space that was not read yet.
    config_is_stale: Arc<AtomicBool>,
    /// The request that the back-end has not answered, for the thread that holds `inner`.
    pending: Pending,
    inner: Mutex<Inner>,
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
    pub fn connect(option: &VhostUserConfig, position: usize) -> Result<Self, DeviceError> {
        Self::connect_with(option, position, |_| {})
    }

    /// Does the same, and first passes `begun` the handle with which another thread can end the
    /// connection, and every wait for the back-end.
    ///
    /// # Errors
    ///
    /// As for [`connect`](Self::connect).
    pub fn connect_with(
        option: &VhostUserConfig,
        position: usize,
        begun: impl FnOnce(&HangUp),
    ) -> Result<Self, DeviceError> {
        let kind = option.kind;
        let name = option.id.clone().unwrap_or_else(|| format!("{kind}{position}"));
        let failed = |error: BackEndError| fail(&name, error);
        let mut options = Options::default();
        if kind.needs_config() {
            options = options.needed(VhostUserProtocolFeatures::CONFIG);
        }
        if !kind.counts_queues() {
            options = options.unused(VhostUserProtocolFeatures::MQ);
        }
        let log_target = format!("{}::{name}", module_path!());
        let wait = Request::Negotiate.wait(&log_target, &name, &option.socket);
        let connected = BackEnd::connect_with(&option.socket, options, begun);
        let mut back_end = connected.map_err(failed)?;
        check_back_end(&back_end, option).map_err(|error| fail(&name, error))?;
        let config =
            read_config(&mut back_end, option, position).map_err(|error| fail(&name, error))?;
        drop(wait);

        let config_is_stale = Arc::new(AtomicBool::new(false));
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new);
        let queues = usize::from(option.queues);
        let calls = (0..=queues).map(|_| eventfd()).collect::<Result<Vec<_>, _>>();
        let calls = calls.map_err(DeviceError::EventFd)?;
        let notify = Notify::new(QUEUE_NOTIFY, option.queues).map_err(DeviceError::EventFd)?;
        let (stale, call) = (config_is_stale.clone(), calls[queues].clone());
        let changed = move || {
            stale.store(true, Ordering::Release);
            signal(&call);
        };
        back_end.on_config_change(changed).map_err(failed)?;
        let features = offered(&back_end, option);
        let protocol: Vec<_> = back_end.protocol_features().iter_names().map(|(n, _)| n).collect();
        log::info!(
            target: &log_target,
            "device {name}: connected to {}; queues: {queues} of {}; features: {}; protocol \
             features: {}",
            option.socket.display(),
            option.queue_size,
            kind.name_features(features),
            protocol.join(", ")
        );
        let registers =
            Registers::new(kind.virtio_id(), features, queues, option.queue_size, config);
        let (link, running) = (back_end.hang_up(), vec![false; queues]);
        let inner = Inner { back_end, registers, memory: None, running, restored: false };
        Ok(VhostUserDevice {
            log_target,
            pending: Pending::default(),
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
        option: &VhostUserConfig,
        position: usize,
        state: &DeviceState,
    ) -> Result<Self, DeviceError> {
        Self::restore_with(option, position, state, |_| {})
    }

    /// Does the same, and first passes `begun` the handle, as
    /// [`connect_with`](Self::connect_with) does.
    ///
    /// # Errors
    ///
    /// As for [`restore`](Self::restore).
    pub fn restore_with(
        option: &VhostUserConfig,
        position: usize,
        state: &DeviceState,
        begun: impl FnOnce(&HangUp),
    ) -> Result<Self, DeviceError> {
        let name = match is_name(&state.name) {
            true => state.name.clone(),
            false => format!("{}{position}", state.kind),
        };
        if option.kind != state.kind {
            return Err(fail(&name, DeviceFault::Kind { saved: state.kind, wanted: option.kind }));
        }
        state.check().map_err(|error| fail(&name, error))?;
        let queues = u16::try_from(state.registers.queues().len())
            .expect("`check` has limited their number");
        let queue_size = state.registers.queue_size_max();
        let id = Some(option.id.clone().unwrap_or_else(|| state.name.clone()));
        let option = VhostUserConfig { queues, queue_size, id, ..option.clone() };
        let device = VhostUserDevice::connect_with(&option, position, begun)?;
        {
            let mut inner = device.lock();
            let features = offered(&inner.back_end, &option);
            let mut config = inner.registers.config().to_vec();
            let theirs = has_address(&inner.back_end);
            if option.kind == DeviceKind::Net && option.mac.is_none() && !theirs {
                // Neither the user nor the back-end sets the address, so the guest keeps it.
                config[..6].copy_from_slice(&state.registers.config()[..6]);
            }
            state.check_successor(features, &config).map_err(|error| fail(&name, error))?;
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
    ) -> Result<(), DeviceError> {
        let mut inner = self.lock();
        let missing = memory.pagers().any(|pager| !pager.bitmap().is_complete());
        let back_end = &mut inner.back_end;
        let _wait = self.wait(Request::TakeMemory);
        // No feature is used before the driver agrees, but some back-ends expect VERSION_1 here.
        back_end.set_features(1 << VIRTIO_F_VERSION_1).map_err(|error| self.failed(error))?;
        let shared = match self.option.lazy {
            Lazy::Auto | Lazy::Postcopy if missing => {
                back_end.share_missing_memory(memory, service)
            }
            Lazy::Refuse if missing => {
                return Err(self.failed(DeviceFault::PagesMissing));
            }
            _ => back_end.share_present_memory(memory),
        };
        shared.map_err(|error| match error.kind() {
            ErrorKind::NoPagefault
            | ErrorKind::Untrappable { .. }
            | ErrorKind::NoUserfaultfd(_)
            | ErrorKind::EchoedAddress { .. }
            | ErrorKind::Prefaulted(_)
            | ErrorKind::Arm(_) => self.failed(DeviceFault::Postcopy(error)),
            _ => self.failed(error),
        })?;
        inner.memory = Some(memory.clone());
        let how = if missing { "; its accesses to missing pages are trapped" } else { "" };
        self.log(Level::Info, format_args!("the back-end shares the guest's memory{how}"));
        Ok(())
    }

    /// Attaches the device to the VM: its registers to guest physical address `address` (a window
    /// of [`DEVICE_SIZE`](crate::arch::layout::DEVICE_SIZE) bytes), its interrupts to edges of
    /// `gsi`. From now on, kicks and interrupts pass between KVM and the back-end.
    ///
    /// # Errors
    ///
    /// KVM's error, if it has no interrupt controller, or no such interrupt.
    pub fn attach(&self, vm: &VmFd, address: u64, gsi: u32) -> Result<(), DeviceError> {
        self.notify.serve_in_kvm_at(vm, address + QUEUE_NOTIFY);
        for call in &self.calls {
            vm.register_irqfd(call, gsi).map_err(|source| DeviceError::Interrupt {
                name: self.name.clone(),
                gsi,
                source,
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
    pub fn can_snapshot(&self) -> Result<(), DeviceError> {
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
    pub fn quiesce(&self, within: Duration) -> Result<DeviceState, DeviceError> {
        self.can_snapshot()?;
        let mut inner = self.lock();
        let _wait = self.wait(Request::Quiesce);
        self.look_at_config(&mut inner);
        let begun = Instant::now();
        let failed = |error| self.failed(DeviceFault::Quiesce(error));
        if self.option.kind.answers_all() {
            // The guest may have been stopped between a request and its kick.
            self.kick_running(&inner);
            inner.await_answers(begun, within).map_err(failed)?;
        }
        if let Err(why) = self.drain(&mut inner, begun, within) {
            let error = failed(why);
            let _wait = self.wait(Request::Resume);
            if let Err(why) = self.resume_queues(&mut inner) {
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
    pub fn resume(&self) -> Result<(), DeviceError> {
        let mut inner = self.lock();
        let _wait = self.wait(Request::Resume);
        self.resume_queues(&mut inner).map_err(|error| self.failed(DeviceFault::Resume(error)))
    }

    /// Ends post-copy when all pages are present: the back-end's accesses need no trap any more.
    ///
    /// # Errors
    ///
    /// The back-end's refusals.
    pub fn end_postcopy(&self) -> Result<(), DeviceError> {
        let mut inner = self.lock();
        let _wait = self.wait(Request::EndPostcopy);
        inner.back_end.end_postcopy().map_err(|error| self.failed(error))
    }

    /// Checks whether the back-end is still connected, without blocking. To learn of its end, watch
    /// the [descriptor](AsRawFd), and call this when the descriptor becomes readable.
    ///
    /// # Errors
    ///
    /// One line, if the back-end is gone: its requests will never be answered.
    pub fn check_alive(&self) -> Result<(), DeviceError> {
        self.link.check().map_err(|error| self.failed(error))
    }

    /// Returns the request that the back-end has not answered yet, if any. Never blocks.
    pub fn waits_for(&self) -> Option<Request> {
        self.pending.get()
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

    /// Begins a wait for the back-end, which the log names if it becomes long. The caller holds the
    /// lock.
    fn wait(&self, request: Request) -> Waiting<'_> {
        self.pending.begin(request, request.wait(&self.log_target, &self.name, self.socket()))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock_always()
    }

    fn failed(&self, fault: impl Into<DeviceFault>) -> DeviceError {
        fail(&self.name, fault)
    }

    fn write_config(&self, inner: &mut Inner, offset: usize, bytes: &[u8]) {
        let Inner { back_end, registers, .. } = inner;
        let has_config = back_end.protocol_features().contains(VhostUserProtocolFeatures::CONFIG);
        let features = registers.driver_features();
        if !has_config || !self.option.kind.may_write(offset, bytes, features) {
            self.log(Level::Debug, format_args!("a write to its configuration is ignored"));
            return;
        }
        let at = u32::try_from(offset).expect("`may_write` has checked that it is small");
        if let Err(error) = back_end.write_config(at, bytes) {
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
        let _wait = self.wait(Request::ReadConfig);
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
        // A device that does not run is stopped without the back-end. A guest can do that in a loop.
        let runs = inner.running.contains(&true);
        let request = action.asks_back_end().filter(|request| runs || *request != Request::Stop);
        let _wait = request.map(|request| self.wait(request));
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

impl Drop for VhostUserDevice {
    fn drop(&mut self) {
        let socket = self.option.socket.display();
        self.log(Level::Info, format_args!("disconnected from {socket}"));
    }
}

fn fail(name: &str, fault: impl Into<DeviceFault>) -> DeviceError {
    DeviceError::Fault { name: name.into(), source: fault.into() }
}
