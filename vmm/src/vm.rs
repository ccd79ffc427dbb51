// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A VM with a Linux guest, and the operations on it while it runs.
//!
//! `lifecycle` has the states of its life and says which thread makes which transition; `session`
//! follows it from its start to its end.

pub(crate) mod absence;
pub(crate) mod error;
pub(crate) mod event_loop;
pub(crate) mod events;
mod halt_watch;
pub(crate) mod host;
pub mod interrupt;
pub mod kept_probes;
pub(crate) mod lifecycle;
pub(crate) mod linux;
pub mod machine;
mod places;
pub(crate) mod record;
pub(crate) mod reset;
pub(crate) mod restore;
pub(crate) mod serve;
pub(crate) mod session;
pub mod source_watch;
pub(crate) mod sources;
pub mod supervise;
mod task;
pub(crate) mod timeouts;
#[cfg(feature = "remote")]
pub(crate) mod working_set;
#[cfg(not(feature = "remote"))]
#[path = "vm/working_set/none.rs"]
pub(crate) mod working_set;

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use demand_memory::{ImageProgress, PAGE_SIZE, Stats};
use demand_source::{ImageSummary, ImageWriter};

use crate::api::endpoint::Endpoint;
use crate::api::events::{EventKind, EventLog, PauseReason};
use crate::api::{
    Control, ControlError, DeviceStatus, Go, SnapshotProgress, SnapshotRequest, SnapshotSummary,
    State, Status,
};
use crate::arch::boot_files::BootSource;
use crate::arch::vcpu_state::{StateShape, VcpuState};
use crate::arch::vm_state::VmState;
use crate::config::MemoryConfig;
use crate::devices::chipset::Chipset;
use crate::error::Error;
use crate::report::micros;
use crate::snapshot::boot_files::SavedBoot;
use crate::snapshot::dir::PartialSnapshot;
use crate::snapshot::saved::{SavedMemory, SavedVm};
use crate::sync::LockExt;
use crate::vcpu::error::StillInside;
use crate::vcpu::set::Vcpus;
use crate::virtio::error::DeviceError;
use crate::virtio::state::DeviceState;
use crate::virtio::vhost_user::VhostUserDevice;
use crate::vm::error::VmError;
use crate::vm::events::{Event, EventSender};
use crate::vm::lifecycle::{Change, Lifecycle};
use crate::vm::machine::Machine;
use crate::vm::source_watch::LastError;
use crate::vm::sources::{SourceFigures, Sources};
use crate::vm::task::spawn;
use crate::vm::working_set::WorkingSetRun;

/// The parts of a VM.
pub(crate) struct VmParts {
    /// Memory, memslots, and the service that serves faults.
    pub machine: Arc<Machine>,
    /// The fixed devices, such as the serial port and the generation identifier.
    pub chipset: Chipset,
    /// The virtio devices, by position.
    pub devices: Vec<Arc<VhostUserDevice>>,
    /// The vCPUs, paused.
    pub vcpus: Vcpus,
    /// The number of vCPUs.
    pub cpus: u32,
    /// The parts of each vCPU's state.
    pub shape: Arc<StateShape>,
    /// The properties of the memory.
    pub memory: MemoryConfig,
    /// The files that the guest was booted from.
    pub boot: Option<BootSource>,
    /// The statistics of the run.
    pub stats: Arc<Stats>,
    /// The places that pages come from.
    pub sources: Arc<Sources>,
    /// The time at which the process began.
    pub started: Instant,
    /// The number of pages that are missing at the start.
    pub missing_at_start: u64,
    /// The last error that did not end the VM.
    pub last_error: LastError,
    /// The sender of events to the thread that follows the VM.
    pub events: EventSender,
    /// The log of events for clients of the API.
    pub log: Arc<EventLog>,
    /// Whether a reset that the guest requested is pending.
    pub reset_asked: Arc<AtomicBool>,
    /// The working set.
    pub working_set: Option<Arc<WorkingSetRun>>,
}

/// A VM. Any thread can operate it through [`Control`].
pub(crate) struct Vm {
    pub(crate) machine: Arc<Machine>,
    pub(crate) chipset: Chipset,
    pub(crate) devices: Vec<Arc<VhostUserDevice>>,
    vcpus: Mutex<Vcpus>,
    pub(crate) cpus: u32,
    pub(crate) shape: Arc<StateShape>,
    pub(crate) memory: MemoryConfig,
    pub(crate) boot: Option<BootSource>,
    pub(crate) stats: Arc<Stats>,
    sources: Arc<Sources>,
    started: Instant,
    pub(crate) missing_at_start: u64,
    last_error: LastError,
    pub(crate) events: EventSender,
    pub(crate) log: Arc<EventLog>,
    reset_asked: Arc<AtomicBool>,
    pub(crate) working_set: Option<Arc<WorkingSetRun>>,
    pub(crate) lifecycle: Lifecycle,
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut vm = f.debug_struct("Vm");
        vm.field("machine", &self.machine).field("state", &self.lifecycle.state());
        vm.field("devices", &self.devices.len()).field("cpus", &self.cpus);
        vm.finish_non_exhaustive()
    }
}

/// Combines all errors into one, if there are any.
fn all_of(results: impl Iterator<Item = Result<(), DeviceError>>) -> Option<Error> {
    let errors: Vec<DeviceError> = results.filter_map(Result::err).collect();
    match errors.len() {
        0 | 1 => errors.into_iter().next().map(Error::from),
        _ => Some(VmError::Devices(errors).into()),
    }
}

impl Vm {
    /// Creates a VM of these parts.
    pub(crate) fn new(parts: VmParts) -> Self {
        Vm {
            machine: parts.machine,
            chipset: parts.chipset,
            devices: parts.devices,
            vcpus: Mutex::new(parts.vcpus),
            cpus: parts.cpus,
            shape: parts.shape,
            memory: parts.memory,
            boot: parts.boot,
            stats: parts.stats,
            sources: parts.sources,
            started: parts.started,
            missing_at_start: parts.missing_at_start,
            last_error: parts.last_error,
            events: parts.events,
            log: parts.log,
            reset_asked: parts.reset_asked,
            working_set: parts.working_set,
            lifecycle: Lifecycle::default(),
        }
    }

    /// Locks the vCPUs.
    pub(crate) fn vcpus(&self) -> MutexGuard<'_, Vcpus> {
        self.vcpus.lock_always()
    }

    /// Locks the vCPUs, unless another thread holds the lock.
    pub(crate) fn try_vcpus(&self) -> Option<MutexGuard<'_, Vcpus>> {
        self.vcpus.try_lock().ok()
    }

    /// Starts the vCPUs. They run before the state says so, so that a pause always finds them
    /// running; and the event comes before those that the guest causes, such as a failing source.
    pub(crate) fn go(&self) {
        let _change = self.lifecycle.change.lock_always();
        self.log.add(EventKind::Running);
        self.vcpus().resume();
        self.lifecycle.set(State::Running);
        // A report before this found no running VM to pause.
        self.machine.retry_source();
    }

    /// Stops a snapshot in progress, and waits until no transition is in progress: for a short time
    /// while pages arrive, and then without waiting for pages or back-ends.
    pub(crate) fn end(&self) {
        self.lifecycle.end(timeouts::END, || self.unblock());
    }

    /// Ends every wait for a page or a back-end. Stopping the memory would not be enough: while its
    /// state is set or reset, a vCPU's thread may wait for a page inside KVM, where only revoking
    /// the memory ends the wait.
    fn unblock(&self) {
        self.machine.memory().revoke();
        self.devices.iter().for_each(|device| device.hang_up().hang_up());
    }

    /// Runs `work`, which resets the devices and the vCPUs, with every vCPU paused and the
    /// lifecycle lock held. Afterwards the VM runs, or stays paused, as before.
    pub(crate) fn outside_guest(
        &self,
        within: Duration,
        work: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut change = self.lifecycle.change.lock_always();
        let paused = self.vcpus().pause(within);
        paused.map_err(|inside| self.explain(inside))?;
        work()?;
        change.quiesced = false;
        self.vcpus().release();
        if self.lifecycle.state() == State::Running {
            self.vcpus().resume();
        }
        Ok(())
    }

    /// Returns the error for vCPUs that did not leave the guest. It names the device if one of them
    /// waits for a back-end.
    pub(crate) fn explain(&self, inside: StillInside) -> VmError {
        let waits = |device: &Arc<VhostUserDevice>| Some((device.clone(), device.waits_for()?));
        let Some((device, request)) = self.devices.iter().find_map(waits) else {
            return VmError::StillInside(inside);
        };
        let (name, socket) = (device.name().into(), device.socket().into());
        VmError::BackEndSilent { source: inside, device: name, request, socket }
    }

    /// Stops the vCPUs for good. Call it while pages still arrive.
    ///
    /// # Errors
    ///
    /// Those of [`Vcpus::stop`].
    pub(crate) fn stop_vcpus(&self, within: Duration) -> Result<(), StillInside> {
        self.vcpus().stop(within)
    }

    /// Removes demand paging when the last page is present, the back-ends' part first. Waits for
    /// the back-ends.
    ///
    /// # Errors
    ///
    /// The back-ends' refusals, and KVM's.
    pub(crate) fn finish_paging(&self) -> Result<(), Error> {
        self.devices.iter().try_for_each(|device| device.end_postcopy())?;
        Ok(self.machine.finish()?)
    }

    /// Resumes the vCPUs. If a snapshot has quiesced the devices, all of them are started first, as
    /// far as they can.
    fn resume_all(&self, change: &mut Change) -> Result<(), Error> {
        if change.quiesced {
            let resumed = self.devices.iter().map(|device| device.resume());
            if let Some(error) = all_of(resumed) {
                return Err(error);
            }
            change.quiesced = false;
        }
        self.vcpus().resume();
        self.lifecycle.set(State::Running);
        self.log.add(EventKind::Resumed);
        // The user may have mended the source. Pages that still fail are reported, which pauses the
        // VM again.
        self.machine.retry_source();
        Ok(())
    }

    /// Pauses the VM for this reason.
    fn pause_for(&self, reason: PauseReason, error: Option<String>) -> Result<(), ControlError> {
        let _change = self.lifecycle.change()?;
        match self.lifecycle.state() {
            State::Running => {}
            State::Paused => {
                let error = "cannot pause: the VM is paused already; resume it first";
                return Err(ControlError::wrong_state(error));
            }
            other => return Err(not_while(Endpoint::Pause, other)),
        }
        let vcpus = self.vcpus();
        if let Err(inside) = vcpus.pause(timeouts::PAUSE) {
            vcpus.resume();
            return Err(self.explain(inside).into());
        }
        self.lifecycle.set(State::Paused);
        self.log.add(EventKind::Paused { reason, error });
        Ok(())
    }

    /// Returns the current error of the source: one line.
    fn last_error(&self) -> Option<String> {
        self.last_error.get(self.machine.is_source_failing())
    }

    /// Adds an event to the log if the source answers again. Must be called regularly.
    pub(crate) fn look_at_source(&self) {
        self.last_error.look(self.machine.is_source_failing());
    }

    /// Pauses the VM on a separate thread, because the source has failed for too long. Does nothing
    /// if the VM has been paused since then, or the source is back.
    ///
    /// # Errors
    ///
    /// If the host has no more threads.
    pub(crate) fn give_up(self: &Arc<Self>, reason: String) -> Result<(), Error> {
        if self.lifecycle.state() != State::Running
            || self.last_error().is_none()
            || self.lifecycle.giving_up.swap(true, Ordering::AcqRel)
        {
            return Ok(());
        }
        let vm = self.clone();
        spawn("pause", move || {
            match vm.pause_for(PauseReason::Source, Some(reason.clone())) {
                Ok(()) => {
                    log::error!("{reason}; the VM is paused; resume it when the source is back");
                }
                Err(error) => log::warn!("{reason}; the VM is not paused: {error}"),
            }
            vm.lifecycle.giving_up.store(false, Ordering::Release);
        })
    }

    /// Pauses the VM on a separate thread, because the guest's kernel has panicked.
    ///
    /// # Errors
    ///
    /// If the host has no more threads.
    pub(crate) fn pause_panicked(self: &Arc<Self>) -> Result<(), Error> {
        let vm = self.clone();
        spawn("pause", move || match vm.pause_for(PauseReason::Panic, None) {
            Ok(()) => log::warn!("the VM is paused, as its on-panic says"),
            Err(error) => log::warn!("the VM is not paused: {error}"),
        })
    }

    /// Reads the state of everything but the memory. The vCPUs must be paused and the devices
    /// quiesced.
    fn save(
        &self,
        generation: &[u8],
        devices: Vec<DeviceState>,
        boot: Option<SavedBoot>,
    ) -> Result<SavedVm, Error> {
        let shape = self.shape.clone();
        let states = self
            .vcpus()
            .on_parked(timeouts::SAVE, move |cpu, vcpu| VcpuState::save(cpu, vcpu.fd(), &shape))?;
        Ok(SavedVm {
            memory: SavedMemory {
                size: self.memory.size,
                backing: self.memory.backing.to_string(),
                reserve: self.memory.reserve,
                thp: self.memory.thp,
                generation: generation.to_vec(),
            },
            vcpus: states.into_iter().collect::<Result<_, _>>()?,
            vm: VmState::save(self.machine.vm())?,
            serial: self.chipset.serial.save(),
            registers: self.chipset.registers(),
            devices,
            boot,
        })
    }

    /// Quiesces the devices. If one refuses, those before it are started again when the VM resumes.
    fn quiesce(&self, change: &mut Change) -> Result<Vec<DeviceState>, Error> {
        change.quiesced = true;
        self.devices.iter().map(|device| Ok(device.quiesce(timeouts::DRAIN)?)).collect()
    }

    /// Copies the boot files into a snapshot. Returns a warning if the snapshot cannot have them.
    fn keep_boot(
        &self,
        partial: &PartialSnapshot,
        destination: &Path,
    ) -> Result<(Option<SavedBoot>, Option<String>), Error> {
        let (saved, why) = match &self.boot {
            Some(boot) => {
                let (saved, why) = boot.keep_in(partial, &|| self.lifecycle.is_ending())?;
                (saved, why.map(Error::from))
            }
            None => (None, Some(VmError::NoBootFiles.into())),
        };
        let warning = why.map(|why| {
            format!(
                "snapshot {} has no kernel, so a guest restored from it cannot reset: {why}",
                destination.display()
            )
        });
        if let Some(warning) = &warning {
            log::warn!("{warning}");
        }
        Ok((saved, warning))
    }

    /// Takes the snapshot of a VM whose vCPUs are paused.
    fn take_snapshot(
        &self,
        partial: PartialSnapshot,
        boot: Option<SavedBoot>,
        change: &mut Change,
    ) -> Result<ImageSummary, Error> {
        let states = self.quiesce(change)?;
        let generation: [u8; 16] = rand::random();
        let saved = self.save(&generation, states, boot)?;
        let mut writer = ImageWriter::create(
            &partial.memory(),
            &partial.hashes(),
            self.memory.size,
            generation,
        )?;
        let mut progress = |progress: ImageProgress| {
            self.lifecycle.copied.store(progress.bytes / PAGE_SIZE, Ordering::Relaxed);
            !self.lifecycle.is_ending()
        };
        self.machine.memory().write_image(&mut writer, &mut progress)?;
        let mut image = writer.finish()?;
        // Includes the files other than the image.
        image.bytes_written += partial.publish(&saved)?;
        Ok(image)
    }
}

/// Returns the error for a request that this state does not allow.
fn not_while(request: Endpoint, state: State) -> ControlError {
    let hint = match state {
        State::Starting => "retry when it runs",
        State::Snapshotting => "retry when its snapshot is complete",
        State::Stopped => "start another",
        State::Empty | State::Created | State::Running | State::Paused => "ask for its status",
    };
    let action = request.action();
    ControlError::wrong_state(format_args!("cannot {action}: the VM is {state}; {hint}"))
}

impl Control for Vm {
    fn status(&self) -> Status {
        let pages_total = self.machine.pages();
        let missing = self.missing_at_start.saturating_sub(self.stats.pages_arrived());
        let state = self.lifecycle.state();
        let snapshot = (state == State::Snapshotting).then(|| SnapshotProgress {
            destination: self.lifecycle.destination.lock_always().clone(),
            pages_done: self.lifecycle.copied.load(Ordering::Relaxed),
            pages_total,
        });
        Status {
            state,
            engine: self.machine.engine_name().into(),
            backing: self.memory.backing.to_string(),
            memory_bytes: self.memory.size,
            cpus: self.cpus,
            pages_total,
            pages_present: pages_total - missing,
            devices: self
                .devices
                .iter()
                .map(|device| DeviceStatus {
                    kind: device.kind().to_string(),
                    socket: Some(device.socket().display().to_string()),
                    state: if device.check_alive().is_ok() { "alive" } else { "gone" }.into(),
                })
                .collect(),
            uptime_us: micros(self.started.elapsed()),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            guest: self.chipset.health.condition(),
            snapshot,
            last_error: self.last_error(),
            sources: self.sources.status(),
            limits: self.memory.limits().iter().map(ToString::to_string).collect(),
            working_set: self.working_set.as_ref().map(|run| run.report()),
        }
    }

    fn stats(&self) -> Option<Arc<Stats>> {
        Some(self.stats.clone())
    }

    fn source_figures(&self) -> SourceFigures {
        self.sources.figures()
    }

    fn events(&self) -> Arc<EventLog> {
        self.log.clone()
    }

    fn pause(&self) -> Result<(), ControlError> {
        self.pause_for(PauseReason::Request, None)
    }

    fn resume(&self) -> Result<(), ControlError> {
        let mut change = self.lifecycle.change()?;
        match self.lifecycle.state() {
            State::Paused => self.resume_all(&mut change).map_err(ControlError::failed),
            State::Running => Err(ControlError::wrong_state(
                "cannot resume: the VM is running already; pause it first",
            )),
            other => Err(not_while(Endpoint::Resume, other)),
        }
    }

    fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotSummary, ControlError> {
        let begun = Instant::now();
        let mut change = self.lifecycle.change()?;
        let before = self.lifecycle.state();
        if !matches!(before, State::Running | State::Paused) {
            return Err(not_while(Endpoint::Snapshot, before));
        }
        // Checks for refusals before anything stops.
        self.devices.iter().try_for_each(|device| device.can_snapshot())?;
        let partial =
            PartialSnapshot::create(&request.destination).map_err(ControlError::invalid)?;
        // The boot files do not change while the guest runs, so they are copied before the pause.
        let (boot, warning) = self.keep_boot(&partial, &request.destination)?;
        if before == State::Running {
            let vcpus = self.vcpus();
            if let Err(inside) = vcpus.pause(timeouts::PAUSE) {
                vcpus.resume();
                return Err(self.explain(inside).into());
            }
        }
        // The guest could not continue from this state, because the request for the reset is not
        // saved.
        if self.vcpus().is_held() || self.reset_asked.load(Ordering::Acquire) {
            if before == State::Running {
                self.vcpus().resume();
            }
            return Err(ControlError::wrong_state(
                "cannot take a snapshot: the guest is resetting itself; retry when it is done",
            ));
        }
        *self.lifecycle.destination.lock_always() = request.destination.display().to_string();
        self.lifecycle.copied.store(0, Ordering::Relaxed);
        self.lifecycle.set(State::Snapshotting);
        self.log.add(EventKind::SnapshotBegun { destination: request.destination.clone() });
        let taken = self.take_snapshot(partial, boot, &mut change);
        self.log.add(match &taken {
            Ok(image) => EventKind::SnapshotWritten {
                destination: request.destination.clone(),
                bytes: image.bytes_written,
            },
            Err(error) => EventKind::SnapshotFailed {
                destination: request.destination.clone(),
                error: error.to_string(),
            },
        });
        let then = match (&taken, request.then) {
            // After a failure the VM continues as before.
            (Err(_), _) | (Ok(_), None) if before == State::Running => Go::Resume,
            (Err(_), _) | (Ok(_), None) => Go::Pause,
            (Ok(_), Some(then)) => then,
        };
        self.lifecycle.set(State::Paused);
        let resumed = match then {
            Go::Resume => self.resume_all(&mut change),
            Go::Pause => Ok(()),
            Go::Shutdown => {
                self.events.send(Event::Shutdown);
                Ok(())
            }
        };
        if self.lifecycle.state() == State::Paused && before == State::Running {
            let error = resumed.as_ref().err().map(ToString::to_string);
            self.log.add(EventKind::Paused { reason: PauseReason::Snapshot, error });
        }
        let image = match (taken, resumed) {
            (Ok(image), Ok(())) => image,
            (Err(error), Ok(())) => return Err(error.into()),
            (Err(error), Err(why)) => {
                return Err(ControlError::failed(format!(
                    "{error}; and the VM stays paused: {why}"
                )));
            }
            (Ok(_), Err(why)) => {
                return Err(ControlError::failed(format!(
                    "snapshot {} is complete, but the VM stays paused: {why}",
                    request.destination.display()
                )));
            }
        };
        Ok(SnapshotSummary {
            destination: request.destination.clone(),
            data_pages: image.pages.data,
            hole_pages: image.pages.holes,
            bytes: image.bytes_written,
            took_us: micros(begun.elapsed()),
            warning,
        })
    }

    fn shutdown(&self) -> Result<(), ControlError> {
        self.lifecycle.asked.store(true, Ordering::Release);
        self.events.send(Event::Shutdown);
        if self.lifecycle.state() == State::Starting {
            // No thread handles events before the guest runs, and the steps before that may wait
            // for pages that do not arrive.
            self.lifecycle.ending.store(true, Ordering::Release);
            self.unblock();
        }
        Ok(())
    }
}
