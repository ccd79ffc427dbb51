// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demand-vmm run`: the test guest on demand-paged memory, from its first instruction until
//! memory and disk have been compared with what they must hold.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path as FilePath, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use demand_kvm::{EngineChoice, PlainSlot};
use demand_memory::{Fill, FillRate, PathReport, Retrier, RetryPolicy, Stats};
use test_guest::guest_layout::{CONTROL_ADDRESS, ControlMemory};
use test_guest::plan::{DiskParams, Plan, PlanParams, run_vmm_actor};
use vm_memory::{Bytes, GuestAddress};

use crate::disk::Disk;
use crate::error::Error;
use crate::machine::{Machine, MachineConfig};
use crate::options::{FillOption, MemoryOption, TestGuestOption, VhostUserOption};
use crate::report::Report;
use crate::vcpu::{VcpuContext, VcpuThread};
use crate::watch::{Event, Watch};

/// What `run` was asked for.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Name of the run in its report.
    pub stage: String,
    /// Memory.
    pub memory: MemoryOption,
    /// Number of vCPUs.
    pub cpus: u32,
    /// How vCPU accesses to missing pages are trapped.
    pub engine: EngineChoice,
    /// The image that memory is filled from.
    pub source: PathBuf,
    /// How long the source may fail before the run ends with an error; `None`: for ever.
    pub source_limit: Option<Duration>,
    /// The disk's back-end, if there is one.
    pub vhost_user: Option<VhostUserOption>,
    /// Background fill.
    pub fill: FillOption,
    /// What the guest does.
    pub test_guest: TestGuestOption,
    /// Whether a separate process compares memory and disk in the end.
    pub verify: bool,
    /// Whether to say on standard error, now and then, how many pages are present.
    pub progress: bool,
    /// Where the picture of the run goes.
    pub timeline: Option<PathBuf>,
    /// Where the caller is going to write the report: tried before the run.
    pub report: Option<PathBuf>,
}

/// Memslot of the test guest's control region.
const CONTROL_SLOT: u32 = 1;

/// Runs the test guest. `started` is when the process began.
///
/// # Errors
///
/// One line, with the exit status that belongs to it. After an error the process should end: a
/// thread of the run may wait in the kernel for a page that never comes, and what would free it
/// would show it zeros.
pub fn run(options: RunOptions, started: Instant) -> Result<Report, Error> {
    // This thread only listens, so that nothing that waits for a page keeps the end from it.
    let (ended, end) = channel();
    let given_up = ended.clone();
    let retrier = retrier(options.source_limit, move |message| {
        let _ = given_up.send(Err(Error::failed(message)));
    });
    let body = move || {
        let mut parts = Parts::default();
        let outcome = run_parts(&options, started, retrier, &mut parts);
        if outcome.is_err() {
            // No destructors: a vCPU that waits for a missing page cannot be joined.
            std::mem::forget(parts);
        } else {
            drop(parts);
        }
        let _ = ended.send(outcome);
    };
    thread::Builder::new()
        .name("run".into())
        .spawn(body)
        .map_err(|error| Error::host(format!("start a thread: {error}")))?;
    end.recv().unwrap_or_else(|_| Err(Error::failed("the run ended without a word")))
}

/// What a run is made of, in the order in which it is taken down.
#[derive(Default)]
struct Parts {
    fill: Option<Fill>,
    threads: Option<Threads>,
    disk: Option<Disk>,
    control_slot: Option<PlainSlot>,
    machine: Option<Arc<Machine>>,
}

fn run_parts(
    options: &RunOptions,
    started: Instant,
    retrier: Arc<Retrier>,
    parts: &mut Parts,
) -> Result<Report, Error> {
    // What is wrong with the command line comes before what is wrong with the host.
    let plan = Arc::new(plan(options)?);
    for path in options.timeline.iter().chain(&options.report) {
        File::create(path).map_err(|error| {
            Error::failed(format!(
                "write {}: {error}; name a file that can be written",
                path.display()
            ))
        })?;
    }
    let (sender, events) = channel();
    let stats = Arc::new(Stats::new());
    if options.timeline.is_some() {
        stats.keep_timeline();
    }
    let machine = Arc::new(Machine::new(MachineConfig {
        memory: &options.memory,
        engine: options.engine,
        source: &options.source,
        stats: stats.clone(),
        retrier,
    })?);
    parts.machine = Some(machine.clone());
    let completed = Arc::new(OnceLock::new());
    {
        let (completed, sender) = (completed.clone(), sender.clone());
        machine.pager().on_complete(move || {
            let _ = completed.set(Instant::now());
            // The receiver goes away with the run only.
            let _ = sender.send(Event::Complete);
        });
    }

    let control = Arc::new(ControlMemory::new(&plan).map_err(Error::host)?);
    let control_slot = PlainSlot::new(
        machine.vm().clone(),
        CONTROL_SLOT,
        GuestAddress(CONTROL_ADDRESS),
        control.mapping().clone(),
        false,
    )
    .map_err(Error::host)?;
    parts.control_slot = Some(control_slot);
    lay_out_rings(&machine, &plan)?;
    if let Some(option) = &options.vhost_user {
        parts.disk = Some(Disk::connect(option, &machine, &plan)?);
    }

    let context = Arc::new(VcpuContext {
        faults: machine.fault_handler()?,
        notify: parts.disk.as_ref().map(Disk::notify),
        first_run: OnceLock::new(),
        stop: AtomicBool::new(false),
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
    // Nobody waits for anything any more: the vCPUs have halted.
    parts.threads = None;
    parts.fill = None;
    if options.verify && !watch.finished {
        parts.fill = Some(start_fill(&machine, FillRate::Unlimited)?);
        watch.until_complete()?;
    }
    let finished = watch.finished;
    if let Some(disk) = &mut parts.disk {
        disk.stop()?;
    }
    parts.disk = None;
    let verified = options.verify && verify(options, &machine, &plan)?;

    let since_start = |instant: &Instant| instant.duration_since(started).as_micros() as u64;
    let mut report = Report {
        stage: options.stage.clone(),
        engine: machine.engine().to_string(),
        backing: options.memory.backing.to_string(),
        memory_bytes: options.memory.size,
        cpus: options.cpus,
        verified,
        guest: PathReport::default(),
        kvm_internal: PathReport::default(),
        vmm: PathReport::default(),
        back_end: PathReport::default(),
        fill: PathReport::default(),
        source: stats.source(),
        time_to_first_instruction_us: context.first_run.get().map_or(0, since_start),
        time_to_complete_us: completed.get().filter(|_| finished).map_or(0, since_start),
    };
    report.set_paths(&stats);
    if let Some(path) = &options.timeline {
        let title = format!(
            "{}: {}, engine {}, {} vCPUs",
            report.stage, report.backing, report.engine, report.cpus
        );
        let picture = crate::timeline::svg(&title, &stats.timeline(), machine.pager().pages());
        std::fs::write(path, picture)
            .map_err(|error| Error::failed(format!("write {}: {error}", path.display())))?;
    }
    Ok(report)
}

fn retrier(
    limit: Option<Duration>,
    given_up: impl Fn(String) + Send + Sync + 'static,
) -> Arc<Retrier> {
    let policy = RetryPolicy { limit, ..RetryPolicy::default() };
    Retrier::new(policy, move |failure| {
        if failure.given_up {
            given_up(format!("{} ({} attempts)", failure.error, failure.attempts));
        } else if failure.attempts.is_power_of_two() {
            // Each failure of a page, but not each attempt: the pauses are short at first.
            log::warn!("{} (attempt {})", failure.error, failure.attempts);
        }
    })
}

/// The plan that the options describe.
fn plan(options: &RunOptions) -> Result<Plan, Error> {
    let guest = &options.test_guest;
    let mut pristine = None;
    let mut disk = None;
    if let Some(device) = &options.vhost_user {
        let path = guest.pristine.as_deref().ok_or_else(|| {
            Error::usage(
                "--vhost-user with --test-guest: say what the disk holds, as in pristine=PATH",
            )
        })?;
        if options.verify && guest.disk.is_none() {
            return Err(Error::usage(
                "--verify with --vhost-user: say what disk to compare, as in disk=PATH",
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
    let params = PlanParams {
        seed: guest.seed,
        memory_bytes: options.memory.size,
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
    Error::failed(format!("open {}: {error}; name a file that can be read", path.display()))
}

/// The queues as a driver would have set them up, written through vm-memory into memory whose
/// pages have not arrived.
fn lay_out_rings(machine: &Machine, plan: &Plan) -> Result<(), Error> {
    let Some(rings) = plan.rings() else { return Ok(()) };
    for (address, bytes) in rings.writes() {
        machine.memory().write_slice(&bytes, GuestAddress(address)).map_err(|error| {
            Error::failed(format!(
                "write {} bytes of guest memory at {address:#x}: {error}",
                bytes.len()
            ))
        })?;
    }
    Ok(())
}

fn start_fill(machine: &Machine, rate: FillRate) -> Result<Fill, Error> {
    Fill::start(vec![machine.pager().clone()], rate)
        .map_err(|error| Error::host(format!("start a thread for background fill: {error}")))
}

/// The threads of a run; they end when this is dropped, which waits for the pages that they wait
/// for.
struct Threads {
    vcpus: Vec<VcpuThread>,
    actor: Option<thread::JoinHandle<()>>,
    context: Arc<VcpuContext>,
    stop_actor: Arc<AtomicBool>,
}

impl Threads {
    fn new(context: Arc<VcpuContext>) -> Self {
        Threads { vcpus: Vec::new(), actor: None, context, stop_actor: Arc::default() }
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
            let vcpu = machine.vm().create_vcpu(cpu.into()).map_err(|error| {
                Error::host(format!("make vCPU {cpu}: {error}; ask for fewer with --cpus"))
            })?;
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
            self.actor =
                Some(actor.map_err(|error| Error::host(format!("start a thread: {error}")))?);
        } else {
            let _ = events.send(Event::Actor(Ok(())));
        }
        for (cpu, vcpu) in vcpus.into_iter().enumerate() {
            let events = events.clone();
            let tell = move |event| drop(events.send(Event::Vcpu(event)));
            let thread = VcpuThread::start(cpu as u32, vcpu, self.context.clone(), tell)
                .map_err(Error::host)?;
            self.vcpus.push(thread);
        }
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.context.stop.store(true, Ordering::Release);
        self.stop_actor.store(true, Ordering::Release);
        self.vcpus.drain(..).for_each(VcpuThread::join);
        if let Some(actor) = self.actor.take() {
            // A panic there has printed what it has to say.
            let _ = actor.join();
        }
    }
}

/// Has a separate process compare memory and disk with what they must hold.
fn verify(options: &RunOptions, machine: &Machine, plan: &Plan) -> Result<bool, Error> {
    let refused = |error: std::io::Error| {
        Error::failed(format!("run demand-verify: {error}; build it beside this program"))
    };
    let mut params = tempfile::NamedTempFile::new().map_err(refused)?;
    serde_json::to_writer(&mut params, plan.params())
        .map_err(|error| Error::failed(format!("write the plan's parameters: {error}")))?;
    let program = std::env::current_exe().map_err(refused)?.with_file_name("demand-verify");
    let Some(file) = machine.pager().backing().file() else {
        return Err(Error::failed("verify: this memory has no file that a process could look at"));
    };
    let mut command = Command::new(program);
    command.arg("--params").arg(params.path());
    // The memory object itself, under the name that other processes reach it by.
    command.arg("--memory").arg(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()));
    if options.vhost_user.is_some()
        && let (Some(disk), Some(pristine)) =
            (&options.test_guest.disk, &options.test_guest.pristine)
    {
        command.arg("--disk").arg(disk).arg("--pristine").arg(pristine);
    }
    let output = command.output().map_err(refused)?;
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    if output.status.success() {
        return Ok(true);
    }
    eprint!("{}", String::from_utf8_lossy(&output.stdout));
    Err(Error::failed(format!(
        "compare memory and disk with what they must hold: demand-verify ended with {}",
        output.status
    )))
}
