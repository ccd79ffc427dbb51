// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The life of a Linux guest from its start to its end, whether it was booted or restored.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use demand_memory::{Fill, FillRate, Stats};
use vm_device::DeviceMmio;

use crate::api::server::ApiServer;
use crate::arch::layout::{MAX_DEVICES, device_address, device_gsi};
use crate::config::{OnPanic, VhostUserOption};
use crate::devices::chipset::Chipset;
use crate::devices::exits::BusExits;
use crate::devices::power::{OnPower, PowerRequest};
use crate::devices::serial::SerialOption;
use crate::devices::terminal::RawTerminal;
use crate::error::{Error, no_thread};
use crate::logger;
use crate::report::outputs::Outputs;
use crate::report::progress::Bar;
use crate::report::{Report, write_timeline};
use crate::vcpu::{VcpuContext, VcpuEvent};
use crate::virtio::vhost_user::VhostUserDevice;
use crate::vm::Vm;
use crate::vm::event_loop::{End, drive, spawn};
use crate::vm::events::{Event, Hear, Tell, events};
use crate::vm::interrupt::{Interrupt, on_signals};
use crate::vm::machine::Machine;
use crate::vm::reset::Pristine;
use crate::vm::source_watch::{Awaited, LastError};
use crate::vm::supervise::supervise;
use crate::vm::timeouts;

/// The options of every command that runs a Linux guest.
#[derive(Clone, Debug)]
pub struct GuestOptions {
    /// Name of the run in its report.
    pub stage: String,
    /// The devices' back-ends, by position.
    pub vhost_user: Vec<VhostUserOption>,
    /// The destination of the serial port.
    pub serial: SerialOption,
    /// The action when the guest's kernel panics.
    pub on_panic: OnPanic,
    /// The path of the API's socket; `None`: no API.
    pub api_socket: Option<PathBuf>,
    /// The file for the picture of the run.
    pub timeline: Option<PathBuf>,
    /// The file to which the caller will write the report; it is checked before the run.
    pub report: Option<PathBuf>,
    /// Whether the number of present pages is printed on standard error from time to time.
    pub progress: bool,
}

/// The shared parts of a run, which exist before the guest is prepared.
pub(crate) struct Session {
    pub(crate) started: Instant,
    pub(crate) guest: GuestOptions,
    pub(crate) stats: Arc<Stats>,
    pub(crate) tell: Tell,
    pub(crate) last_error: LastError,
    /// Whether a reset that the guest requested is pending. The guest may request it on more than
    /// one vCPU.
    pub(crate) reset_asked: Arc<AtomicBool>,
    /// The guest's memory, once it exists. The thread that ends the run uses it.
    pub(crate) awaited: Arc<OnceLock<Awaited>>,
}

/// The remaining work before the first instruction. It may wait for pages.
pub(crate) type Begin = Box<dyn FnOnce(&Vm) -> Result<(), Error>>;

/// A guest that is ready to begin.
pub(crate) struct Prepared {
    pub(crate) vm: Vm,
    pub(crate) begin: Begin,
    pub(crate) fill: Option<FillRate>,
}

impl Session {
    /// Returns the callback through which a vCPU's thread reports events.
    pub(crate) fn tell_vcpu(&self) -> impl Fn(VcpuEvent) + Send + 'static {
        let tell = self.tell.clone();
        move |event| tell.tell(Event::Vcpu(event))
    }

    /// Returns the context that the vCPUs share, with the machine's devices on its buses.
    pub(crate) fn context(
        &self,
        machine: &Machine,
        chipset: &Chipset,
        devices: &[Arc<VhostUserDevice>],
    ) -> Result<Arc<VcpuContext>, Error> {
        let tell = self.tell.clone();
        let asked = self.reset_asked.clone();
        let resets = self.guest.on_panic == OnPanic::Reset;
        let power: OnPower = Arc::new(move |request| {
            let mut request = request;
            if request == PowerRequest::Panicked {
                tell.tell(Event::Power(request));
                if !resets {
                    return;
                }
                // The guest's kernel may request the reset as well.
                request = PowerRequest::Reset;
            }
            if request != PowerRequest::Reset || !asked.swap(true, Ordering::AcqRel) {
                tell.tell(Event::Power(request));
            }
        });
        let virtio =
            devices.iter().map(|device| device.clone() as Arc<dyn DeviceMmio + Send + Sync>);
        let buses = chipset.buses(virtio, power.clone());
        Ok(Arc::new(VcpuContext {
            faults: machine.fault_handler()?,
            memory: machine.memory().clone(),
            exits: Arc::new(BusExits::new(buses, power)),
            first_run: OnceLock::new(),
        }))
    }
}

/// Refuses more devices than the machine has room for.
pub(crate) fn check_devices(devices: &[VhostUserOption]) -> Result<(), Error> {
    if devices.len() > MAX_DEVICES {
        return Err(Error::usage(format!(
            "--vhost-user: {} devices are too many; a VM has room for {MAX_DEVICES}",
            devices.len()
        )));
    }
    Ok(())
}

/// Shares memory with a device's back-end, and attaches the device's registers and interrupt.
pub(crate) fn attach(
    device: &VhostUserDevice,
    position: usize,
    machine: &Machine,
) -> Result<(), Error> {
    device.share_memory(machine.memory(), machine.service())?;
    device.attach(machine.vm(), device_address(position), device_gsi(position))
}

impl GuestOptions {
    fn try_outputs(&self, inputs: &[&Path]) -> Result<Outputs, Error> {
        let mut outputs = Outputs::default();
        let files = [("--report", &self.report), ("--timeline", &self.timeline)];
        for (option, path) in files {
            path.iter().try_for_each(|path| outputs.add(option, path, inputs))?;
        }
        if let SerialOption::File(path) = &self.serial {
            outputs.add("--serial", path, inputs)?;
        }
        Ok(outputs)
    }
}

/// Runs the guest that `prepare` makes, until it ends. `inputs` are files that the run must not
/// write to. SIGINT, SIGTERM and SIGHUP end the guest; call this before the process starts other
/// threads.
///
/// # Errors
///
/// One line, with its exit status. The process should exit after an error, because a thread may be
/// left that is blocked forever.
pub(crate) fn run_guest(
    guest: GuestOptions,
    inputs: &[&Path],
    started: Instant,
    prepare: impl FnOnce(&Session) -> Result<Prepared, Error> + Send + 'static,
) -> Result<Report, Error> {
    check_devices(&guest.vhost_user)?;
    let outputs = guest.try_outputs(inputs)?;
    let interrupt = Interrupt::default();
    on_signals(interrupt.clone()).map_err(|error| no_thread("listen for signals", error))?;
    let console = guest.serial == SerialOption::Terminal;
    // Kept on this thread, which restores the terminal even if another thread hangs.
    let _terminal = console.then(RawTerminal::new).transpose().map_err(|error| {
        Error::failed(format!("cannot use the terminal as the guest's console: {error}"))
    })?;
    let awaited = Arc::new(OnceLock::new());
    let work = {
        let (interrupt, awaited) = (interrupt.clone(), awaited.clone());
        move || {
            let (tell, hear) = events().map_err(|error| {
                Error::host(format!(
                    "cannot create an eventfd: {error}; raise the limit of open files (ulimit -n)"
                ))
            })?;
            let interrupted = tell.clone();
            interrupt.when_raised(move || interrupted.tell(Event::Interrupted));
            let stats = Arc::new(Stats::new());
            if guest.timeline.is_some() {
                stats.keep_timeline();
            }
            let last_error = LastError::default();
            let reset_asked = Arc::default();
            let session = Session { started, guest, stats, tell, last_error, reset_asked, awaited };
            let prepared = prepare(&session)?;
            follow(session, prepared, &hear, console)
        }
    };
    let report = supervise(&interrupt, &awaited, work)?;
    outputs.keep();
    Ok(report)
}

/// Follows the guest from its first instruction to its last.
fn follow(
    session: Session,
    prepared: Prepared,
    hear: &Hear,
    console: bool,
) -> Result<Report, Error> {
    let Prepared { vm, begin, fill } = prepared;
    let vm = Arc::new(vm);
    let api = match &session.guest.api_socket {
        Some(path) => Some(ApiServer::start(path, vm.clone())?),
        None => None,
    };
    let mut completed = None;
    let mut filling = None;
    let outcome = Pristine::of(&vm).and_then(|pristine| {
        begin(&vm)?;
        if let Some(rate) = fill {
            let pagers = vm.machine.pagers().cloned().collect();
            let started = Fill::start(pagers, rate);
            filling = Some(started.map_err(|error| no_thread("fill memory", error))?);
        }
        if vm.machine.engine().is_some() {
            let tell = session.tell.clone();
            vm.machine.on_complete(move || tell.tell(Event::Complete));
        }
        vm.go();
        let bar = (fill.is_some() && !console && vm.missing_at_start > 0)
            .then(|| Bar::new("memory", "pages present", vm.missing_at_start));
        let mut said = Said { progress: session.guest.progress, last: u64::MAX };
        let mut look = |happened: Option<Instant>| {
            completed = completed.or(happened);
            let arrived = vm.stats.pages_arrived();
            if let Some(bar) = &bar {
                bar.set(arrived);
            }
            said.say(arrived, vm.missing_at_start);
        };
        let mut quick = QuickResets::default();
        loop {
            match drive(&vm, hear, console, &mut look)? {
                End::Reset => {
                    let loops = quick.count(Instant::now())?;
                    log::warn!("the guest reset itself, or crashed into a reset; restarting it");
                    if loops {
                        log::warn!("{}", QuickResets::LOOKS_LIKE);
                    }
                    let (vm, pristine) = (vm.clone(), pristine.clone());
                    let (asked, tell) = (session.reset_asked.clone(), session.tell.clone());
                    // On a separate thread, because a reset may wait for pages and other events
                    // must be handled meanwhile.
                    spawn("reset", move || {
                        tell.tell(Event::Reset(pristine.reset(&vm, vm.boot.as_ref(), &asked)));
                    })?;
                }
                End::Panicked => on_panic(&vm, session.guest.on_panic)?,
                End::Off | End::Asked => return Ok(()),
            }
        }
    });
    // A requested end is not an error, even before the guest has begun or during a reset.
    let outcome = if vm.lifecycle.was_asked() { Ok(()) } else { outcome };
    // This also ends a snapshot in progress, and prevents another one.
    vm.end();
    drop(filling);
    let stopped = vm.machine.end_guest(|within| vm.stop_vcpus(within));
    vm.chipset.serial.drain(timeouts::CONSOLE);
    drop(api);
    match (outcome, stopped) {
        (Ok(()), Ok(())) => {}
        (outcome, stopped) => {
            // A thread may still use the machine. The kernel takes everything down with the
            // process.
            std::mem::forget(vm.clone());
            let stuck = stopped.err().map(|stuck| vm.explain(&stuck));
            return Err(outcome
                .err()
                .or(stuck)
                .unwrap_or_else(|| Error::failed("the VM did not end cleanly")));
        }
    }
    report(&session, &vm, completed)
}

/// Logs that the guest's kernel has panicked, and takes the configured action.
fn on_panic(vm: &Arc<Vm>, wanted: OnPanic) -> Result<(), Error> {
    const PANICKED: &str = "the guest's kernel has panicked; its console may say why";
    if wanted == OnPanic::Shutdown {
        return Err(Error::failed(format!("{PANICKED}; the VM has ended, as --on-panic says")));
    }
    log::warn!("{PANICKED}");
    match wanted {
        OnPanic::Pause => vm.pause_panicked(),
        // The reset is on its way.
        OnPanic::Ignore | OnPanic::Reset | OnPanic::Shutdown => Ok(()),
    }
}

/// A count of the resets in quick succession, which detects a guest that makes no progress.
#[derive(Default)]
struct QuickResets {
    last: Option<Instant>,
    /// Resets in a row that each came within `WITHIN`, and within `SOON`.
    quick: u32,
    soon: u32,
}

impl QuickResets {
    /// Number of resets in a row that ends the run.
    const MOST: u32 = 10;
    /// The interval within which a reset counts for that: no kernel does useful work in less time.
    const WITHIN: Duration = Duration::from_millis(500);
    /// Number of resets in a row that is logged with a likely cause.
    const TOLD: u32 = 3;
    /// The interval within which a reset counts for that: few systems are up in less time.
    const SOON: Duration = Duration::from_secs(10);
    const LOOKS_LIKE: &str = "the guest reset itself three times, each within 10 s of its start: \
                              the kernel may panic or crash as it boots; its console may say why; \
                              if it is silent, give the guest more --memory, and check that the \
                              initramfs is complete and fits the kernel";

    /// Counts a reset at `now`. Returns whether to log the likely cause.
    fn count(&mut self, now: Instant) -> Result<bool, Error> {
        let last = self.last.replace(now);
        let within = |most| last.is_some_and(|last| now.duration_since(last) < most);
        self.quick = if within(Self::WITHIN) { self.quick + 1 } else { 0 };
        self.soon = if within(Self::SOON) { self.soon + 1 } else { 1 };
        if self.quick < Self::MOST {
            return Ok(self.soon == Self::TOLD);
        }
        Err(Error::failed(format!(
            "the guest reset itself {} times, each within {} ms of its start; check that the \
             kernel fits its memory, command line and initramfs",
            Self::MOST,
            Self::WITHIN.as_millis()
        )))
    }
}

/// Prints the number of present pages when it has changed.
struct Said {
    progress: bool,
    last: u64,
}

impl Said {
    fn say(&mut self, arrived: u64, total: u64) {
        if self.progress && arrived != self.last {
            self.last = arrived;
            logger::say(format_args!("progress {arrived} {total}"));
        }
    }
}

fn report(session: &Session, vm: &Vm, completed: Option<Instant>) -> Result<Report, Error> {
    let since_start = |instant: Instant| instant.duration_since(session.started).as_micros() as u64;
    let mut report = Report {
        stage: session.guest.stage.clone(),
        engine: vm.machine.engine_name().into(),
        backing: vm.memory.backing.to_string(),
        memory_bytes: vm.memory.size,
        cpus: vm.cpus,
        time_to_first_instruction_us: vm.first_run().map_or(0, since_start),
        time_to_complete_us: completed.map_or(0, since_start),
        ..Report::default()
    };
    report.set_paths(&session.stats);
    if let Some(path) = &session.guest.timeline {
        write_timeline(path, &report, &session.stats, vm.machine.pages())?;
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_third_reset_in_a_row_is_told() {
        let (mut resets, mut now) = (QuickResets::default(), Instant::now());
        let mut after = |seconds| {
            now += Duration::from_secs(seconds);
            resets.count(now).unwrap()
        };
        let told = [0, 11, 5, 5, 5, 20, 5, 9].map(&mut after);
        assert_eq!(told, [false, false, false, true, false, false, false, true]);
        now += Duration::from_secs(1);
        let ended = (0..11).map(|_| resets.count(now)).find_map(Result::err).unwrap();
        assert!(ended.to_string().contains("reset itself 10 times"), "{ended}");
    }
}
