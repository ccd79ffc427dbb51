// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demand-vmm run` with the test guest: runs it on demand-paged memory, and then compares memory
//! and disk with their expected content.

pub mod disk;
pub mod exits;
pub(crate) mod watch;

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::AsRawFd;
use std::path::{Path as FilePath, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use demand_kvm::{EngineChoice, PlainSlot};
use demand_memory::{Fill, FillRate, PAGE_SIZE, PageRange, Path, Stats, Waiter};
use demand_source::LocalFile;
use test_guest::guest_layout::ControlMemory;
use test_guest::plan::{DiskParams, Plan, PlanParams, run_vmm_actor};
use vm_memory::{Bytes, GuestAddress};

use crate::arch::placement::LOW_MEMORY_END;
use crate::config::{FillOption, MemoryOption, TestGuestOption, VhostUserOption};
use crate::error::Error;
use crate::logger;
use crate::report::outputs::Outputs;
use crate::report::{Report, size, write_timeline};
use crate::test_guest::disk::Disk;
use crate::test_guest::exits::TestExits;
use crate::test_guest::watch::{Event, Watch};
use crate::vcpu::VcpuContext;
use crate::vcpu::set::Vcpus;
use crate::vm::interrupt::{Interrupt, on_signals};
use crate::vm::machine::{Machine, MachineConfig};
use crate::vm::source_watch::{Awaited, LastError, SourceWatch};
use crate::vm::supervise::supervise;
use crate::vm::timeouts;

/// The parameters of `run`.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Name of the run in its report.
    pub stage: String,
    /// The guest's memory.
    pub memory: MemoryOption,
    /// Number of vCPUs.
    pub cpus: u32,
    /// The engine that traps vCPU accesses to missing pages.
    pub engine: EngineChoice,
    /// The image that pages are fetched from.
    pub source: PathBuf,
    /// How long the source may fail, or not answer, before the run ends with an error; `None`:
    /// without limit.
    pub source_limit: Option<Duration>,
    /// The disk's back-end, if the guest has a disk.
    pub vhost_user: Option<VhostUserOption>,
    /// Background fill.
    pub fill: FillOption,
    /// The guest's workload.
    pub test_guest: TestGuestOption,
    /// Whether a separate process compares memory and disk at the end.
    pub verify: bool,
    /// Whether the number of present pages is printed on standard error from time to time.
    pub progress: bool,
    /// The file for the picture of the run.
    pub timeline: Option<PathBuf>,
    /// The file to which the caller will write the report; it is checked before the run.
    pub report: Option<PathBuf>,
}

/// Runs the test guest. `started` is the time at which the process began. SIGINT, SIGTERM and
/// SIGHUP end the run with an error; call this before the process starts other threads.
///
/// # Errors
///
/// One line, with its exit status. The process should exit after an error, because a thread may be
/// left that is blocked forever.
pub fn run(options: RunOptions, started: Instant) -> Result<Report, Error> {
    let interrupt = Interrupt::default();
    on_signals(interrupt.clone())
        .map_err(|error| Error::host(format!("cannot start a thread: {error}")))?;
    let awaited = Arc::new(OnceLock::new());
    let work = {
        let (interrupt, awaited) = (interrupt.clone(), awaited.clone());
        move || {
            let mut parts = Parts::default();
            let outcome = run_parts(&options, started, &interrupt, &awaited, &mut parts);
            parts.take_down();
            outcome
        }
    };
    supervise(&interrupt, &awaited, work)
}

/// The parts of a run, in the order in which they are taken down.
#[derive(Default)]
struct Parts {
    fill: Option<Fill>,
    threads: Option<Threads>,
    disk: Option<Disk>,
    control_slot: Option<PlainSlot>,
    machine: Option<Arc<Machine>>,
}

impl Parts {
    /// Takes everything down, in order. If a vCPU is stuck in the kernel, the rest is left for the
    /// kernel to take down with the process.
    fn take_down(mut self) {
        let Some(machine) = &self.machine else { return };
        let threads = &mut self.threads;
        let stop = |within| threads.as_mut().map_or(Ok(()), |threads| threads.vcpus.stop(within));
        match machine.end_guest(stop) {
            Ok(()) => self.threads.iter_mut().for_each(Threads::join_actor),
            Err(stuck) => {
                log::debug!("{stuck}");
                std::mem::forget(self);
            }
        }
    }
}

fn run_parts(
    options: &RunOptions,
    started: Instant,
    interrupt: &Interrupt,
    awaited: &OnceLock<Awaited>,
    parts: &mut Parts,
) -> Result<Report, Error> {
    // Errors in the command line are reported before those of the host.
    let plan = Arc::new(plan(options)?);
    let mut outputs = Outputs::default();
    for (option, path) in [("--report", &options.report), ("--timeline", &options.timeline)] {
        path.iter().try_for_each(|path| outputs.add(option, path, &[&options.source]))?;
    }
    let (sender, events) = channel();
    let stats = Arc::new(Stats::new());
    if options.timeline.is_some() {
        stats.keep_timeline();
    }
    let ended = interrupt.clone();
    let source = SourceWatch::new(
        options.source.clone(),
        options.source_limit,
        LastError::default(),
        move |reason| ended.raise(reason),
    );
    let machine = Arc::new(Machine::new(MachineConfig {
        memory: &options.memory,
        engine: options.engine,
        source: Arc::new(LocalFile::open(&options.source).map_err(Error::failed)?),
        stats: stats.clone(),
        retrier: source.retrier(),
    })?);
    parts.machine = Some(machine.clone());
    let memory = machine.memory().clone();
    let _ = awaited.set(Awaited { memory, source: Some(source) });
    let interrupted = sender.clone();
    interrupt.when_raised(move || drop(interrupted.send(Event::Interrupted)));
    let completed = Arc::new(OnceLock::new());
    {
        let (completed, sender) = (completed.clone(), sender.clone());
        machine.on_complete(move || {
            let _ = completed.set(Instant::now());
            // This fails only after the run's end.
            let _ = sender.send(Event::Complete);
        });
    }

    let control = Arc::new(ControlMemory::new(&plan).map_err(Error::host)?);
    let control_slot = PlainSlot::new(
        machine.vm().clone(),
        // The first number after memory's slots.
        machine.slots().len() as u32,
        GuestAddress(control.layout().address()),
        control.mapping().clone(),
        false,
    )
    .map_err(Error::host)?;
    parts.control_slot = Some(control_slot);
    lay_out_rings(&machine, &plan)?;
    if let Some(option) = &options.vhost_user {
        parts.disk = Some(Disk::connect(option, &machine, &plan)?);
    }

    let ports = sender.clone();
    let context = Arc::new(VcpuContext {
        faults: machine.fault_handler()?,
        memory: machine.memory().clone(),
        exits: Arc::new(TestExits::new(parts.disk.as_ref().map(Disk::notify), move |write| {
            // This fails only after the run's end.
            let _ = ports.send(Event::Port(write));
        })),
        first_run: OnceLock::new(),
    });
    if let FillOption::On(rate) = options.fill {
        parts.fill = Some(start_fill(&machine, rate)?);
    }
    let threads = parts.threads.insert(Threads::new(context.clone()));
    threads.start(options, &machine, &control, &plan, &sender)?;

    let mut watch = Watch {
        progress: options.progress,
        machine: &machine,
        control: &control,
        disk: parts.disk.as_mut(),
        events,
        finished: false,
    };
    watch.until_done(options.cpus)?;
    // The vCPUs have halted, so no thread waits for a page.
    if let Some(threads) = &mut parts.threads {
        threads.vcpus.stop(timeouts::VCPUS).map_err(Error::failed)?;
    }
    parts.fill = None;
    // Memory that the guest does not use arrives only by background fill.
    let untouched = options.fill == FillOption::Off && plan.windows().gaps().next().is_some();
    if options.verify && !watch.finished {
        if untouched {
            fetch_windows(&machine, &plan)?;
        } else {
            parts.fill = Some(start_fill(&machine, FillRate::Unlimited)?);
            watch.until_complete()?;
        }
    }
    let finished = watch.finished;
    if let Some(disk) = &mut parts.disk {
        disk.stop()?;
    }
    parts.disk = None;
    let verified = options.verify && verify(options, &machine, &plan, untouched, interrupt)?;

    let since_start = |instant: &Instant| instant.duration_since(started).as_micros() as u64;
    let mut report = Report {
        stage: options.stage.clone(),
        engine: machine.engine_name().into(),
        backing: options.memory.backing.to_string(),
        memory_bytes: options.memory.size,
        cpus: options.cpus,
        verified,
        time_to_first_instruction_us: context.first_run.get().map_or(0, since_start),
        time_to_complete_us: completed.get().filter(|_| finished).map_or(0, since_start),
        ..Report::default()
    };
    report.set_paths(&stats);
    if let Some(path) = &options.timeline {
        write_timeline(path, &report, &stats, machine.pages())?;
    }
    outputs.keep();
    Ok(report)
}

/// Makes the plan that the options describe.
fn plan(options: &RunOptions) -> Result<Plan, Error> {
    let guest = &options.test_guest;
    let mut pristine = None;
    let mut disk = None;
    if let Some(device) = &options.vhost_user {
        let path = guest.pristine.as_deref().ok_or_else(|| {
            Error::usage(
                "--vhost-user with --test-guest: the disk's content is unknown; name it, as in \
                 pristine=PATH",
            )
        })?;
        if options.verify && guest.disk.is_none() {
            return Err(Error::usage(
                "--verify with --vhost-user: the disk to compare is unknown; name it, as in \
                 disk=PATH",
            ));
        }
        let file = open(path)?;
        let len = file.metadata().map_err(|error| failed_on(path, error))?.len();
        let write_area = guest.write_area.min(len);
        disk = Some(DiskParams {
            queues: device.queues,
            queue_size: guest.queue_size,
            requests: guest.requests,
            read_sectors: (len - write_area) / 512,
            disk_sectors: len / 512,
        });
        pristine = Some(file);
    }
    let vm_bytes = options.memory.size;
    if guest.window.is_none() && vm_bytes > LOW_MEMORY_END {
        return Err(Error::usage(format!(
            "--test-guest: memory of {} is more than the {} that the guest can use; use a part of \
             it, as in window=64M",
            size(vm_bytes),
            size(LOW_MEMORY_END)
        )));
    }
    let params = PlanParams {
        seed: guest.seed,
        memory_bytes: guest.window.unwrap_or(vm_bytes),
        vm_bytes,
        cpus: options.cpus,
        order: guest.order,
        arrivals: guest.arrivals,
        touches_per_unit: guest.touches,
        vmm_touches_per_unit: guest.vmm_touches,
        disk,
    };
    Plan::new(params, pristine.as_ref()).map_err(Error::usage)
}

fn open(path: &FilePath) -> Result<File, Error> {
    File::open(path).map_err(|error| failed_on(path, error))
}

fn failed_on(path: &FilePath, error: std::io::Error) -> Error {
    Error::failed(format!("cannot open {}: {error}; name a readable file", path.display()))
}

/// Lays out the queues as a driver would, with writes through vm-memory to missing pages.
fn lay_out_rings(machine: &Machine, plan: &Plan) -> Result<(), Error> {
    let Some(rings) = plan.rings() else { return Ok(()) };
    for (address, bytes) in rings.writes() {
        machine.memory().write_slice(&bytes, GuestAddress(address)).map_err(|error| {
            Error::failed(format!(
                "cannot write {} bytes of guest memory at {address:#x}: {error}",
                bytes.len()
            ))
        })?;
    }
    Ok(())
}

fn start_fill(machine: &Machine, rate: FillRate) -> Result<Fill, Error> {
    Fill::start(machine.pagers().cloned().collect(), rate)
        .map_err(|error| Error::host(format!("cannot start a thread for background fill: {error}")))
}

/// Fetches the missing pages of the memory under test.
fn fetch_windows(machine: &Machine, plan: &Plan) -> Result<(), Error> {
    let waiter = Waiter::new();
    for window in plan.windows().list() {
        let mut start = 0;
        for pager in machine.pagers() {
            let end = start + pager.pages() * PAGE_SIZE;
            let from = window.packed.max(start);
            let to = (window.packed + window.bytes).min(end);
            if from < to {
                let pages = PageRange::of_bytes(from - start, to - from);
                pager.ensure(pages, Path::Fill, &waiter).map_err(Error::failed)?;
            }
            start = end;
        }
    }
    Ok(())
}

/// The threads of a run.
struct Threads {
    vcpus: Vcpus,
    actor: Option<thread::JoinHandle<()>>,
    stop_actor: Arc<AtomicBool>,
}

impl Threads {
    fn new(context: Arc<VcpuContext>) -> Self {
        Threads { vcpus: Vcpus::new(context), actor: None, stop_actor: Arc::default() }
    }

    fn start(
        &mut self,
        options: &RunOptions,
        machine: &Machine,
        control: &Arc<ControlMemory>,
        plan: &Arc<Plan>,
        events: &Sender<Event>,
    ) -> Result<(), Error> {
        let mut vcpus = Vec::new();
        for cpu in 0..options.cpus {
            let vcpu = machine.create_vcpu(cpu)?;
            control.layout().setup_vcpu(machine.kvm(), &vcpu, cpu as usize).map_err(Error::host)?;
            vcpus.push(vcpu);
        }
        if !plan.vmm_steps().is_empty() {
            let (plan, control) = (plan.clone(), control.clone());
            let (memory, stop) = (machine.memory().clone(), self.stop_actor.clone());
            let events = events.clone();
            let actor = thread::Builder::new().name("vmm-actor".into()).spawn(move || {
                let outcome = run_vmm_actor(&plan, control.flags(), &memory, &stop);
                let _ = events.send(Event::Actor(outcome));
            });
            self.actor = Some(
                actor.map_err(|error| Error::host(format!("cannot start a thread: {error}")))?,
            );
        } else {
            let _ = events.send(Event::Actor(Ok(())));
        }
        for (cpu, vcpu) in vcpus.into_iter().enumerate() {
            let events = events.clone();
            let tell = move |event| drop(events.send(Event::Vcpu(event)));
            self.vcpus.start(cpu as u32, vcpu, tell).map_err(Error::host)?;
        }
        Ok(())
    }

    /// Ends the VMM's actor thread, which waits for no page any more.
    fn join_actor(&mut self) {
        self.stop_actor.store(true, Ordering::Release);
        if let Some(actor) = self.actor.take() {
            // A thread that panicked has printed its message.
            let _ = actor.join();
        }
    }
}

/// Runs a separate process that compares memory and disk with their expected content. With
/// `untouched`, the process also checks that memory outside the test was left alone.
fn verify(
    options: &RunOptions,
    machine: &Machine,
    plan: &Plan,
    untouched: bool,
    interrupt: &Interrupt,
) -> Result<bool, Error> {
    let refused = |error: std::io::Error| {
        Error::failed(format!("cannot run demand-verify: {error}; build it beside this program"))
    };
    let mut params = tempfile::NamedTempFile::new().map_err(refused)?;
    serde_json::to_writer(&mut params, plan.params())
        .map_err(|error| Error::failed(format!("cannot write the plan's parameters: {error}")))?;
    let program = std::env::current_exe().map_err(refused)?.with_file_name("demand-verify");
    let mut command = Command::new(program);
    command.arg("--params").arg(params.path());
    for pager in machine.pagers() {
        let Some(file) = pager.backing().file() else {
            let why = "cannot verify: this memory has no file that another process could read";
            return Err(Error::failed(why));
        };
        // The memory object itself, by the path at which other processes can open it.
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        command.arg("--memory").arg(path);
    }
    if untouched {
        command.arg("--untouched");
    }
    if options.vhost_user.is_some()
        && let (Some(disk), Some(pristine)) =
            (&options.test_guest.disk, &options.test_guest.pristine)
    {
        command.arg("--disk").arg(disk).arg("--pristine").arg(pristine);
    }
    // A file, because this thread does not read while it waits, and a full pipe would block the
    // process.
    let mut said = tempfile::tempfile().map_err(refused)?;
    let (out, err) = (said.try_clone().map_err(refused)?, said.try_clone().map_err(refused)?);
    let mut child =
        command.stdin(Stdio::null()).stdout(out).stderr(err).spawn().map_err(refused)?;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(refused)? {
            break status;
        }
        if let Some(reason) = interrupt.reason() {
            // The process has nothing to clean up. Both calls fail if it has just exited.
            let _ = child.kill();
            let _ = child.wait();
            return Err(Error::failed(reason));
        }
        thread::sleep(Duration::from_millis(5));
    };
    if status.success() {
        return Ok(true);
    }
    let mut text = String::new();
    said.rewind().and_then(|()| said.read_to_string(&mut text)).map_err(refused)?;
    logger::say(text.trim_end());
    Err(Error::failed(format!(
        "cannot verify memory and disk: demand-verify ended with {}; see its message above",
        status
    )))
}
