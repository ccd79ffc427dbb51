// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `test-vmm run`: runs the test guest on demand-paged memory, and then compares memory and disk
//! with their expected content.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use demand_kvm::PlainSlot;
use demand_memory::{
    DemandMemory, FaultPath, Fill, FillOptions, PAGE_SIZE, PageRange, Stats, Waiter,
};
use demand_paging::{Lazy, ServiceOptions};
use demand_source::LocalFile;
use demand_vmm::arch::placement::LOW_MEMORY_END;
use demand_vmm::config::FillConfig;
use demand_vmm::error::Error;
use demand_vmm::report::progress::Progress;
use demand_vmm::report::{Report, picture, size};
use demand_vmm::vcpu::VcpuContext;
use demand_vmm::vcpu::set::Vcpus;
use demand_vmm::vm::interrupt::{Interrupt, on_signals};
use demand_vmm::vm::kept_probes::kept_probes;
use demand_vmm::vm::machine::{Machine, MachineConfig};
use demand_vmm::vm::source_watch::{LastError, SourceWatch};
use demand_vmm::vm::supervise::supervise;
use test_guest::guest_layout::ControlMemory;
use test_guest::plan::{DiskParams, Plan, PlanParams};
use test_guest::vmm_actor::run_vmm_actor;
use vm_memory::{Bytes, GuestAddress};

use crate::disk::Disk;
use crate::event_loop::{Event, EventLoop};
use crate::exits::TestExits;
use crate::run_options::RunOptions;
use crate::verify::verify;

/// How long a vCPU that has halted may take to stop.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// Runs the test guest, and returns the report and its picture (SVG). `started` is the time at
/// which the process began. SIGINT, SIGTERM and SIGHUP end the run with an error, because it has
/// proved nothing then; call this before the process starts other threads.
///
/// # Errors
///
/// One line, with its exit status. The process should exit after an error, because a thread may be
/// left that is blocked forever.
pub(crate) fn run(options: RunOptions, started: Instant) -> Result<(Report, String), Error> {
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
    // The interrupt is the cause of any later error.
    supervise(&interrupt, &awaited, work)
        .map_err(|error| interrupt.reason().map_or(error, Error::failed))
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
    awaited: &OnceLock<DemandMemory>,
    parts: &mut Parts,
) -> Result<(Report, String), Error> {
    // Errors in the command line are reported before those of the host.
    let plan = Arc::new(plan(options)?);
    let (sender, events) = channel();
    let stats = Arc::new(Stats::new());
    if options.timeline {
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
        probes: kept_probes(),
        lazy: Lazy::Require,
        source: Arc::new(LocalFile::open(&options.source).map_err(Error::failed)?),
        service: ServiceOptions::default(),
        stats: stats.clone(),
        retrier: source.retrier(),
    })?);
    parts.machine = Some(machine.clone());
    let memory = machine.memory().clone();
    let _ = awaited.set(memory);
    let interrupted = sender.clone();
    let _told = interrupt.when_raised(move || drop(interrupted.send(Event::Interrupted)));
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
        u32::try_from(machine.slots().len()).expect("memory has a few slots"),
        GuestAddress(control.layout().address()),
        control.mapping().clone(),
    )
    .map_err(Error::host)?;
    parts.control_slot = Some(control_slot);
    lay_out_rings(&machine, &plan)?;
    if let Some(option) = &options.vhost_user {
        parts.disk = Some(Disk::connect(option, &machine, &plan)?);
    }

    let ports = sender.clone();
    let context = Arc::new(VcpuContext {
        exits: Arc::new(TestExits::new(parts.disk.as_ref().map(Disk::notify), move |write| {
            // This fails only after the run's end.
            let _ = ports.send(Event::Port(write));
        })),
        first_run: Arc::default(),
    });
    if let FillConfig::On(fill) = &options.fill {
        parts.fill = Some(start_fill(&machine, fill.clone())?);
    }
    let threads = parts.threads.insert(Threads::new(context.clone()));
    threads.start(options, &machine, &control, &plan, &sender)?;

    let mut event_loop = EventLoop {
        progress: options.progress.then(|| {
            let progress = Progress::new("memory", "pages present", machine.pages());
            progress.without_bar().with_lines(true)
        }),
        machine: &machine,
        control: &control,
        disk: parts.disk.as_mut(),
        events,
        finished: false,
    };
    event_loop.until_done(options.cpus)?;
    // The vCPUs have halted, so no thread waits for a page.
    if let Some(threads) = &mut parts.threads {
        threads.vcpus.stop(STOP_WITHIN).map_err(Error::failed)?;
    }
    parts.fill = None;
    // Memory that the guest does not use arrives only by background fill.
    let untouched = options.fill == FillConfig::Off && plan.windows().gaps().next().is_some();
    if options.verify && !event_loop.finished {
        if untouched {
            fetch_windows(&machine, &plan)?;
        } else {
            parts.fill = Some(start_fill(&machine, FillOptions::default())?);
            event_loop.until_complete()?;
        }
    }
    let finished = event_loop.finished;
    if let Some(disk) = &mut parts.disk {
        disk.stop()?;
    }
    parts.disk = None;
    let verified = options.verify && verify(options, &machine, &plan, untouched, interrupt)?;

    let since_start = |instant: &Instant| {
        let us = instant.duration_since(started).as_micros();
        u64::try_from(us).expect("a run ends within 500,000 years")
    };
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
    let picture = picture(&report, &stats, machine.pages(), &[]);
    Ok((report, picture))
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

fn open(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|error| failed_on(path, error))
}

fn failed_on(path: &Path, error: std::io::Error) -> Error {
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

fn start_fill(machine: &Machine, options: FillOptions) -> Result<Fill, Error> {
    Fill::start(machine.pagers().cloned().collect(), options)
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
                pager.ensure(pages, FaultPath::Fill, &waiter).map_err(Error::failed)?;
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
            control
                .layout()
                .setup_vcpu(machine.kvm(), vcpu.fd(), cpu as usize)
                .map_err(Error::host)?;
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
        for (cpu, vcpu) in (0..).zip(vcpus) {
            let events = events.clone();
            let tell = move |event| drop(events.send(Event::Vcpu(event)));
            self.vcpus.start(cpu, vcpu, tell).map_err(Error::host)?;
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
