// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The life of a Linux guest from its start to its end, whether it was booted or restored.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use demand_memory::{DemandMemory, FillOptions, Stats};
use demand_paging::LazyMemory;
use demand_vhost::HangUp;
use vm_device::DeviceMmio;

use crate::api::Control;
use crate::api::events::{EventKind, EventLog};
use crate::api::server::ApiServer;
use crate::arch::layout::{MAX_DEVICES, device_address, device_gsi};
use crate::config::{MemoryConfig, OnPanic, SerialConfig, VhostUserConfig};
use crate::devices::chipset::Chipset;
use crate::devices::exits::BusExits;
use crate::devices::power::{OnPower, PowerRequest};
use crate::devices::terminal::{self, Console};
use crate::error::{Error, no_thread};
use crate::report::progress::Progress;
use crate::vcpu::{VcpuContext, VcpuEvent};
use crate::virtio::vhost_user::VhostUserDevice;
use crate::vm::Vm;
use crate::vm::error::VmError;
use crate::vm::event_loop::{ExitReason, follow_events};
use crate::vm::events::{Event, EventReceiver, EventSender, event_queue};
use crate::vm::host::ServedHost;
use crate::vm::interrupt::{Interrupt, Registered, on_signals};
use crate::vm::machine::Machine;
use crate::vm::record::Record;
use crate::vm::reset::ResetState;
use crate::vm::source_watch::LastError;
use crate::vm::sources::Sources;
use crate::vm::supervise::supervise;
use crate::vm::task::spawn;
use crate::vm::timeouts;
use crate::vm::working_set::WorkingSetRun;

/// The options of every command that runs a Linux guest.
#[derive(Clone, Debug)]
pub(crate) struct GuestOptions {
    /// Name of the run in its report.
    pub stage: String,
    /// The devices' back-ends, by position.
    pub vhost_user: Vec<VhostUserConfig>,
    /// The destination of the serial port.
    pub serial: SerialConfig,
    /// The action when the guest's kernel panics.
    pub on_panic: OnPanic,
    /// Where the API is served.
    pub api: ApiPlace,
    /// Whether the arrival of pages is recorded, for the picture of the run.
    pub timeline: bool,
    /// Whether the number of present pages is printed on standard error from time to time.
    pub progress: bool,
}

impl Default for GuestOptions {
    fn default() -> Self {
        GuestOptions {
            stage: "run".into(),
            vhost_user: Vec::new(),
            serial: SerialConfig::default(),
            on_panic: OnPanic::default(),
            api: ApiPlace::Nowhere,
            timeline: false,
            progress: false,
        }
    }
}

/// Where the API of a VM is served.
#[derive(Clone, Debug)]
pub(crate) enum ApiPlace {
    /// Nowhere.
    Nowhere,
    /// On a socket that is created once the VM exists.
    Socket(PathBuf),
    /// On the socket of a process that began without a VM.
    Host(Arc<ServedHost>),
}

impl ApiPlace {
    /// Serves the API for this VM, until the outcome is dropped or [`close`](Self::close) is
    /// called.
    fn open(&self, vm: &Arc<Vm>) -> Result<Option<ApiServer>, Error> {
        match self {
            ApiPlace::Nowhere => Ok(None),
            ApiPlace::Socket(path) => Ok(Some(ApiServer::start(path, vm.clone())?)),
            ApiPlace::Host(served) => {
                served.host.attach(vm.clone());
                Ok(None)
            }
        }
    }

    /// Answers the request for the VM: its vCPUs run.
    fn say_running(&self) {
        if let ApiPlace::Host(served) = self {
            served.host.answer(Ok(()));
        }
    }

    /// Ends the API of a VM that has ended.
    fn close(&self, outcome: &Result<(), Error>) {
        if let ApiPlace::Host(served) = self {
            served.close(outcome.as_ref().copied());
        }
    }
}

/// The shared parts of a run, which exist before the guest is prepared.
pub(crate) struct Session {
    pub(crate) started: Instant,
    pub(crate) guest: GuestOptions,
    pub(crate) stats: Arc<Stats>,
    pub(crate) events: EventSender,
    /// The log of events for clients of the API.
    pub(crate) log: Arc<EventLog>,
    pub(crate) last_error: LastError,
    /// Whether a reset that the guest requested is pending. The guest may request it on more than
    /// one vCPU.
    pub(crate) reset_asked: Arc<AtomicBool>,
    /// The guest's memory, once it exists. The thread that ends the run uses it.
    pub(crate) awaited: Arc<OnceLock<DemandMemory>>,
    record: Arc<Record>,
    interrupt: Interrupt,
    /// The ends of the connections to back-ends, for an end before there is a VM.
    hang_ups: RefCell<Vec<Registered>>,
}

/// A guest's run that has ended, in whatever way.
#[derive(Debug)]
pub(crate) struct Ended {
    /// The facts for the report.
    pub(crate) record: Arc<Record>,
    /// An end that the guest, the user or a signal requested is not an error.
    pub(crate) outcome: Result<(), Error>,
}

/// The remaining work before the first instruction. It may wait for pages.
pub(crate) type Begin = Box<dyn FnOnce(&Vm) -> Result<(), Error>>;

/// A guest that is ready to begin.
pub(crate) struct Prepared {
    pub(crate) vm: Vm,
    pub(crate) begin: Begin,
    pub(crate) fill: Option<FillOptions>,
}

impl Session {
    /// Announces the machine's memory, once it exists and before any thread waits for a page of it.
    pub(crate) fn set_machine(&self, machine: &LazyMemory, memory: &MemoryConfig, cpus: u32) {
        self.record.set_machine(machine, memory, cpus);
        let _ = self.awaited.set(machine.memory().clone());
    }

    /// Returns the places that pages come from, for those that open them and those that report.
    pub(crate) fn sources(&self) -> Arc<Sources> {
        self.record.sources.clone()
    }

    /// Stores the working set.
    pub(crate) fn set_working_set(&self, run: Arc<WorkingSetRun>) {
        let _ = self.record.working_set.set(run);
    }

    /// Returns whether the run was asked to end. The steps before the guest runs then stop.
    pub(crate) fn is_ending(&self) -> bool {
        self.interrupt.reason().is_some()
    }

    /// Calls `callback` when the run is asked to end, until the returned value is dropped.
    pub(crate) fn when_ending(&self, callback: impl FnOnce() + Send + 'static) -> Registered {
        self.interrupt.when_raised(callback)
    }

    /// Closes the connection to a back-end if the run is asked to end before there is a VM, whose
    /// own end closes it later.
    pub(crate) fn hang_up_at_end(&self, hang_up: &HangUp) {
        let hang_up = hang_up.clone();
        let registered = self.when_ending(move || hang_up.hang_up());
        self.hang_ups.borrow_mut().push(registered);
    }

    /// Returns the callback through which a vCPU's thread reports events.
    pub(crate) fn tell_vcpu(&self) -> impl Fn(VcpuEvent) + Send + 'static {
        let events = self.events.clone();
        move |event| events.send(Event::Vcpu(event))
    }

    /// Returns the context that the vCPUs share, with the machine's devices on its buses.
    pub(crate) fn context(
        &self,
        chipset: &Chipset,
        devices: &[Arc<VhostUserDevice>],
    ) -> Arc<VcpuContext> {
        let events = self.events.clone();
        let asked = self.reset_asked.clone();
        let resets = self.guest.on_panic == OnPanic::Reset;
        let power: OnPower = Arc::new(move |request| {
            let mut request = request;
            if request == PowerRequest::Panicked {
                events.send(Event::Power(request));
                if !resets {
                    return;
                }
                // The guest's kernel may request the reset as well.
                request = PowerRequest::Reset;
            }
            if request != PowerRequest::Reset || !asked.swap(true, Ordering::AcqRel) {
                events.send(Event::Power(request));
            }
        });
        let virtio =
            devices.iter().map(|device| device.clone() as Arc<dyn DeviceMmio + Send + Sync>);
        let buses = chipset.buses(virtio, power.clone());
        Arc::new(VcpuContext {
            exits: Arc::new(BusExits::new(buses, power)),
            first_run: self.record.first_run.clone(),
        })
    }
}

/// Refuses more devices than the machine has room for.
pub(crate) fn check_devices(devices: &[VhostUserConfig]) -> Result<(), Error> {
    if devices.len() > MAX_DEVICES {
        return Err(VmError::TooManyDevices { given: devices.len() }.into());
    }
    Ok(())
}

/// Shares memory with a device's back-end, and attaches the device's registers and interrupt.
pub(crate) fn attach(
    device: &VhostUserDevice,
    position: usize,
    machine: &Machine,
) -> Result<(), Error> {
    machine.lazy().expect_back_ends();
    device.share_memory(machine.memory(), machine.service())?;
    Ok(device.attach(machine.vm(), device_address(position), device_gsi(position))?)
}

/// Runs the guest that `prepare` makes, until it ends. SIGINT, SIGTERM and SIGHUP end the guest in
/// order, which is not an error; call this before the process starts other threads.
///
/// # Errors
///
/// One line, with its exit status, if the run cannot begin. The process should exit after an error
/// in the outcome, because a thread may be left that is blocked forever.
pub(crate) fn run_guest(
    guest: GuestOptions,
    started: Instant,
    prepare: impl FnOnce(&Session) -> Result<Prepared, Error> + Send + 'static,
) -> Result<Ended, Error> {
    check_devices(&guest.vhost_user)?;
    let (interrupt, log) = match &guest.api {
        ApiPlace::Host(served) => (served.host.interrupt().clone(), served.host.events()),
        ApiPlace::Nowhere | ApiPlace::Socket(_) => (listen_for_signals()?, Arc::default()),
    };
    let console = guest.serial == SerialConfig::Terminal;
    // Kept on this thread, which restores the terminal even if another thread hangs.
    let _terminal = console.then(Console::new);
    let awaited = Arc::new(OnceLock::new());
    let record = Record::new(guest.stage.clone(), started, log.clone());
    if guest.timeline {
        record.stats.keep_timeline();
    }
    let work = {
        let (interrupt, awaited, record) = (interrupt.clone(), awaited.clone(), record.clone());
        move || {
            let (events, receiver) =
                event_queue().map_err(|source| VmError::EventQueue { source })?;
            let stats = record.stats.clone();
            let last_error = LastError::new(log.clone());
            let reset_asked = Arc::default();
            let session = Session {
                started,
                guest,
                stats,
                events,
                log,
                last_error,
                reset_asked,
                awaited,
                record,
                interrupt,
                hang_ups: RefCell::default(),
            };
            match prepare(&session) {
                Ok(prepared) => follow(&session, prepared, &receiver, console),
                // The interrupt is the cause of the error.
                Err(_) if session.is_ending() => Ok(()),
                Err(error) => Err(error),
            }
        }
    };
    let outcome = supervise(&interrupt, &awaited, work);
    if let (Some(reason), Ok(())) = (interrupt.reason(), &outcome) {
        log::info!("{reason}");
    }
    Ok(Ended { record, outcome })
}

/// Returns the interrupt that SIGINT, SIGTERM and SIGHUP raise.
pub(crate) fn listen_for_signals() -> Result<Interrupt, Error> {
    let interrupt = Interrupt::default();
    on_signals(interrupt.clone()).map_err(|error| no_thread("listen for signals", error))?;
    Ok(interrupt)
}

/// Follows the guest from its first instruction to its last.
fn follow(
    session: &Session,
    prepared: Prepared,
    receiver: &EventReceiver,
    console: bool,
) -> Result<(), Error> {
    let Prepared { vm, begin, fill } = prepared;
    let vm = Arc::new(vm);
    let interrupted = Arc::downgrade(&vm);
    let _told = session.interrupt.when_raised(move || {
        if let Some(vm) = interrupted.upgrade() {
            let _ = vm.shutdown();
        }
    });
    // From now on, the VM's end closes the connections when no request is in flight.
    session.hang_ups.take();
    let api = session.guest.api.open(&vm)?;
    let outcome = ResetState::of(&vm).and_then(|reset_state| {
        let fills = fill.is_some();
        let start = |fill: Option<FillOptions>| {
            fill.map_or(Ok(()), |options| vm.machine.start_fill(options))
        };
        // A replayed working set has a lead on the guest.
        let (before, after) = match vm.working_set {
            Some(_) => (fill, None),
            None => (None, fill),
        };
        start(before)?;
        begin(&vm)?;
        start(after)?;
        if vm.machine.engine().is_some() {
            let events = session.events.clone();
            vm.machine.on_complete(move || events.send(Event::Complete));
        }
        if console {
            // Until now, keys such as Ctrl-C have ended the start.
            terminal::make_raw().map_err(|source| VmError::Terminal { source })?;
        }
        vm.go();
        session.record.set_running();
        vm.working_set.iter().try_for_each(|run| run.begin())?;
        session.guest.api.say_running();
        let missing = vm.missing_at_start;
        let mut progress = (missing > 0).then(|| {
            let progress = Progress::new("memory", "pages present", missing);
            let progress = progress.with_lines(session.guest.progress);
            if fills && !console { progress } else { progress.without_bar() }
        });
        let mut look = |happened: Option<Instant>| {
            if let Some(happened) = happened {
                let _ = session.record.completed.set(happened);
            }
            let arrived = vm.stats.pages_arrived();
            if let Some(progress) = &mut progress {
                progress.set(arrived);
            }
        };
        let mut quick = QuickResets::default();
        loop {
            match follow_events(&vm, receiver, console, &mut look)? {
                ExitReason::Reset => {
                    let loops = quick.count(Instant::now())?;
                    log::warn!("the guest reset itself, or crashed into a reset; restarting it");
                    vm.log.add(EventKind::GuestReset);
                    if loops {
                        log::warn!("{}", QuickResets::LOOKS_LIKE);
                    }
                    let (vm, reset_state) = (vm.clone(), reset_state.clone());
                    let (asked, events) = (session.reset_asked.clone(), session.events.clone());
                    // On a separate thread, because a reset may wait for pages and other events
                    // must be handled meanwhile.
                    spawn("reset", move || {
                        events.send(Event::Reset(reset_state.reset(&vm, vm.boot.as_ref(), &asked)));
                    })?;
                }
                ExitReason::Panicked => on_panic(&vm, session.guest.on_panic)?,
                ExitReason::Off | ExitReason::Asked => return Ok(()),
            }
        }
    });
    // The end may take seconds, in which keys have their usual effect again.
    terminal::restore();
    // A requested end is not an error, even before the guest has begun or during a reset.
    let outcome = if vm.lifecycle.was_asked() { Ok(()) } else { outcome };
    // This also ends a snapshot in progress, and prevents another one.
    vm.end();
    if let Some(bytes) = vm.machine.lazy().fill_in_flight_limit() {
        let _ = session.record.fill_in_flight_bytes.set(bytes);
    }
    vm.machine.lazy().stop_fill();
    let stopped = vm.machine.end_guest(|within| vm.stop_vcpus(within));
    vm.chipset.serial.drain(timeouts::CONSOLE);
    vm.working_set.iter().for_each(|run| run.end());
    let outcome = match (outcome, stopped) {
        (Ok(()), Ok(())) => Ok(()),
        (outcome, stopped) => {
            // A thread may still use the machine. The kernel takes everything down with the
            // process.
            std::mem::forget(vm.clone());
            let stuck = stopped.err().map(|stuck| vm.explain(stuck));
            Err(outcome.err().unwrap_or_else(|| stuck.unwrap_or(VmError::Unclean).into()))
        }
    };
    match &outcome {
        Ok(()) => vm.log.end(0, None),
        Err(error) => vm.log.end(error.exit_status(), Some(error.to_string())),
    }
    session.guest.api.close(&outcome);
    drop(api);
    outcome
}

/// Logs that the guest's kernel has panicked, and takes the configured action.
fn on_panic(vm: &Arc<Vm>, wanted: OnPanic) -> Result<(), Error> {
    vm.log.add(EventKind::GuestPanicked);
    if wanted == OnPanic::Shutdown {
        return Err(VmError::Panicked.into());
    }
    log::warn!("the guest's kernel has panicked; its console may say why");
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
    fn count(&mut self, now: Instant) -> Result<bool, VmError> {
        let last = self.last.replace(now);
        let within = |most| last.is_some_and(|last| now.duration_since(last) < most);
        self.quick = if within(Self::WITHIN) { self.quick + 1 } else { 0 };
        self.soon = if within(Self::SOON) { self.soon + 1 } else { 1 };
        if self.quick < Self::MOST {
            return Ok(self.soon == Self::TOLD);
        }
        Err(VmError::ResetLoop { resets: Self::MOST, within: Self::WITHIN })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn third_reset_in_a_row_is_reported() {
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
