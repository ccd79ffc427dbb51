// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demand-vmm restore`: restores a Linux guest from a snapshot, and runs it before its memory has
//! arrived.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use demand_kvm::{EngineChoice, open_kvm};
use demand_memory::{DemandMemory, FaultPath, PAGE_SIZE, PageRange, Waiter, to_usize};
use demand_paging::{Lazy, ServiceOptions};
use demand_source::SourceError;
use demand_vhost::HangUp;

use crate::api::events::EventKind;
use crate::arch::boot_files::BootSource;
use crate::arch::cpuid;
use crate::arch::layout::MAX_CPUS;
use crate::arch::placement::{check_places, place};
use crate::arch::vcpu_state::{StateShape, VcpuState};
use crate::config::device_kind::DeviceKind;
use crate::config::source::SnapshotPlace;
use crate::config::vm::RestoreConfig;
use crate::config::{
    CacheConfig, ClockConfig, FetchAroundConfig, FillConfig, RestoreMemory, WorkingSetConfig,
    WorkingSetMode,
};
use crate::devices::chipset::{Chipset, create_irqchip};
use crate::error::{Error, Kind};
use crate::report::progress::Progress;
use crate::snapshot::dir;
use crate::snapshot::image::MemoryImage;
use crate::snapshot::open::OpenSnapshot;
use crate::snapshot::saved::SavedVm;
use crate::vcpu::set::Vcpus;
use crate::virtio::vhost_user::VhostUserDevice;
use crate::vm::events::Event;
use crate::vm::kept_probes::kept_probes;
use crate::vm::machine::{Machine, MachineConfig, guest_memory};
use crate::vm::places;
use crate::vm::session::{Ended, GuestOptions, Prepared, Session, attach, run_guest};
use crate::vm::source_watch::SourceWatch;
use crate::vm::timeouts;
use crate::vm::working_set::WorkingSetRun;
use crate::vm::{Vm, VmParts};

/// Errors from restoring a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The snapshot has no vCPU, or too many.
    #[error(
        "cannot restore snapshot {}: it has {cpus} vCPUs, and a guest has 1 to {MAX_CPUS}; use \
         another snapshot",
        snapshot.display()
    )]
    VcpuCount {
        /// The snapshot's directory.
        snapshot: PathBuf,
        /// The number of its vCPUs.
        cpus: usize,
    },
    /// The command line and the snapshot have different numbers of vCPUs.
    #[error("--cpus: {given} vCPUs are given, and the snapshot's guest has {had}; leave it out")]
    OtherVcpuCount {
        /// The number on the command line.
        given: u32,
        /// The number in the snapshot.
        had: usize,
    },
    /// The command line and the snapshot have different numbers of devices.
    #[error("--vhost-user: {given} devices are given, and the snapshot's guest has {}", devices(.had))]
    Devices {
        /// The number on the command line.
        given: usize,
        /// The devices in the snapshot.
        had: Vec<DeviceKind>,
    },
    /// The files of two snapshots were mixed.
    #[error(
        "cannot restore snapshot {}: its memory and state are from different snapshots; use files \
         of the same snapshot",
        snapshot.display()
    )]
    MixedFiles {
        /// The snapshot's directory.
        snapshot: PathBuf,
    },
    /// Two places have different snapshots.
    #[error(
        "cannot restore snapshot {} with {} as another source: that is another snapshot; name \
         places of one snapshot",
        snapshot.display(),
        other.display()
    )]
    OtherSnapshot {
        /// The snapshot.
        snapshot: PathBuf,
        /// The other place.
        other: PathBuf,
    },
    /// The source has failed, or has not answered, for longer than the user's limit, before there is
    /// a guest that could be paused.
    #[error(
        "{reason}; the guest needs all of its memory before it runs, and the source had {} s for \
         it; check that the storage it lies on responds, or allow more time with --source-limit",
        limit.as_secs()
    )]
    SourceLimit {
        /// The source's error.
        reason: String,
        /// The limit.
        limit: Duration,
    },
    /// A host cache for a snapshot without chunks.
    #[error(
        "cannot use --cache with snapshot {}: it was not pushed to a store, so it has no chunks; \
         leave --cache out, or push the snapshot (demand-vmm image push)",
        snapshot.display()
    )]
    CacheOfFiles {
        /// The snapshot.
        snapshot: PathBuf,
    },
    /// A working set of a snapshot that has nothing beside it.
    #[cfg(feature = "remote")]
    #[error(
        "--working-set: there is no place beside snapshot {}, or none that at= names; name a file \
         or the URL of an object, as in at=FILE",
        snapshot.display()
    )]
    NoWorkingSetPlace {
        /// The snapshot's place.
        snapshot: PathBuf,
    },
    /// A working set in a build that has none.
    #[cfg(not(feature = "remote"))]
    #[error("--working-set: this program was built without it; build it with the feature 'remote'")]
    NoWorkingSets,
    /// No thread can be started.
    #[error("cannot open the snapshot's places: no thread starts: {source}; end other processes")]
    Thread {
        /// The system's error.
        source: io::Error,
    },
    /// The serial port's interrupt cannot be raised.
    #[error("cannot raise the serial port's interrupt: {source}")]
    SerialInterrupt {
        /// The system's error.
        source: io::Error,
    },
}

/// Returns the number and kinds of a snapshot's devices, and the hint for a wrong number of them.
fn devices(kinds: &[DeviceKind]) -> String {
    if kinds.is_empty() {
        return "none; leave them out".into();
    }
    let names: Vec<_> = kinds.iter().map(ToString::to_string).collect();
    let (number, names) = (kinds.len(), names.join(", "));
    format!("{number} ({names}); name a back-end for each, in this order")
}

impl From<RestoreError> for Error {
    fn from(error: RestoreError) -> Self {
        let kind = match error {
            RestoreError::VcpuCount { .. }
            | RestoreError::MixedFiles { .. }
            | RestoreError::SourceLimit { .. } => Kind::Failed,
            RestoreError::OtherVcpuCount { .. }
            | RestoreError::Devices { .. }
            | RestoreError::OtherSnapshot { .. }
            | RestoreError::CacheOfFiles { .. } => Kind::Usage,
            #[cfg(feature = "remote")]
            RestoreError::NoWorkingSetPlace { .. } => Kind::Usage,
            #[cfg(not(feature = "remote"))]
            RestoreError::NoWorkingSets => Kind::Usage,
            RestoreError::Thread { .. } | RestoreError::SerialInterrupt { .. } => Kind::Host,
        };
        Error::of(kind, error)
    }
}

/// The parameters of `restore`.
#[derive(Clone, Debug)]
pub(crate) struct RestoreOptions {
    /// The options that every guest takes.
    pub guest: GuestOptions,
    /// The place of the snapshot.
    pub source: SnapshotPlace,
    /// Further places of the same snapshot.
    pub other_sources: Vec<SnapshotPlace>,
    /// The host cache that the snapshot's chunks are read through.
    pub cache: Option<CacheConfig>,
    /// The parts of a pushed snapshot that are fetched beside one that a fault needs.
    pub fetch_around: FetchAroundConfig,
    /// The properties of the memory that differ from the snapshot's.
    pub memory: RestoreMemory,
    /// The number of vCPUs that the user expects the snapshot to have.
    pub cpus: Option<u32>,
    /// The engine that traps vCPU accesses to missing pages.
    pub engine: EngineChoice,
    /// Whether the guest runs before its memory has arrived.
    pub lazy: Lazy,
    /// How long the source may fail, or not answer, before the VM is paused with an error; `None`:
    /// without limit.
    pub source_limit: Option<Duration>,
    /// Background fill.
    pub fill: FillConfig,
    /// The working set.
    pub working_set: Option<WorkingSetConfig>,
    /// The point from which the guest's clocks continue.
    pub clock: ClockConfig,
    /// Whether the whole memory image is read and checked before the guest runs.
    pub verify: bool,
}

impl RestoreOptions {
    /// Returns the options of a VM of this configuration; `run` has those of the process.
    pub(crate) fn new(config: RestoreConfig, run: GuestOptions) -> Self {
        let guest = GuestOptions {
            vhost_user: config.devices,
            serial: config.serial,
            on_panic: config.on_panic,
            ..run
        };
        RestoreOptions {
            guest,
            source: config.source,
            other_sources: config.other_sources,
            cache: config.cache,
            fetch_around: config.fetch_around,
            memory: config.memory,
            cpus: config.cpus,
            engine: config.engine,
            lazy: config.lazy,
            source_limit: config.source_limit_s.map(Duration::from_secs),
            fill: config.fill,
            working_set: config.working_set.filter(|set| set.mode != WorkingSetMode::Off),
            clock: config.clock,
            verify: config.verify,
        }
    }
}

/// Restores a guest and runs it until it ends. `started` is the time at which the process began.
/// The snapshot is left unchanged.
///
/// # Errors
///
/// As for [`run_guest`].
pub(crate) fn restore(options: RestoreOptions, started: Instant) -> Result<Ended, Error> {
    run_guest(options.guest.clone(), started, move |session| prepare(session, &options))
}

fn prepare(session: &Session, options: &RestoreOptions) -> Result<Prepared, Error> {
    session.log.add(EventKind::Restoring { source: options.source.shown() });
    let (opened, mut saved) = places::open(session, options)?;
    if options.clock == ClockConfig::Host {
        saved.vm.follow_host()?;
    }
    let memory = saved.memory.option(&options.memory)?;
    check(&saved, options)?;
    let image = opened.memory(&saved.memory)?;
    let boot = open_boot(opened.snapshot(), &saved, options)?;
    // Before the slow steps.
    check_places(&place(memory.size))?;
    let cpuids = saved.vcpus.iter().map(VcpuState::guest_cpuid).collect::<Result<Vec<_>, _>>()?;
    cpuid::check_kvm(&cpuids, &open_kvm()?)?;
    if options.verify {
        verify(&image, session)?;
        boot.iter().try_for_each(|boot| boot.check(&|| session.is_ending()))?;
    }
    let (facts, image) = ((image.generation(), image.size()), image.into_source());
    let working_set = options.working_set.as_ref().map(|config| {
        WorkingSetRun::open(config, (opened.snapshot(), opened.place()), facts, image.clone())
    });
    let working_set = working_set.transpose()?;
    let image = working_set.as_ref().map_or(image, |run| run.source());
    let (events, reading) = (session.events.clone(), Arc::new(Reading::default()));
    let (read, kicked) = (reading.clone(), reading.clone());
    let source = SourceWatch::new(
        dir::memory(&options.source.shown()),
        options.source_limit,
        session.last_error.clone(),
        move |reason| {
            read.give_up(&reason);
            events.send(Event::GivenUp(reason));
        },
    );
    let lazy = guest_memory(MachineConfig {
        memory: &memory,
        engine: options.engine,
        probes: (options.lazy != Lazy::Off).then(kept_probes).flatten(),
        lazy: options.lazy,
        source: image,
        service: ServiceOptions::default(),
        stats: session.stats.clone(),
        retrier: source.retrier(),
    })?;
    let cpus = u32::try_from(saved.vcpus.len()).expect("at most MAX_CPUS, as was checked");
    session.set_machine(&lazy, &memory, cpus);
    let _kick = session.when_ending(move || kicked.waiter.kick());
    if lazy.engine().is_none() {
        let name = "memory, before the guest runs";
        read_all(lazy.memory(), name, session, options, &reading)?;
    }
    // All of the memory was read otherwise, and nothing is missing.
    let working_set = working_set.filter(|_| lazy.engine().is_some());
    let regions = place(memory.size);
    if let Some(run) = &working_set {
        run.note(lazy.memory(), &regions)?;
        session.set_working_set(run.clone());
    }
    let machine = Arc::new(Machine::attach(lazy)?);
    let shape = Arc::new(StateShape::of(machine.kvm(), machine.vm())?);
    create_irqchip(machine.vm())?;
    let registers = Some((&saved.serial, &saved.registers));
    let chipset = Chipset::new(machine.vm(), &session.guest.serial, registers)?;
    let mut devices = Vec::new();
    let options_and_states = session.guest.vhost_user.iter().zip(&saved.devices);
    for (position, (option, state)) in options_and_states.enumerate() {
        let begun = |hang_up: &HangUp| session.hang_up_at_end(hang_up);
        let device = VhostUserDevice::restore_with(option, position, state, begun)?;
        devices.push(Arc::new(device));
    }
    if devices.iter().any(|device| device.wants_full_memory()) {
        let name = "memory, for a back-end without post-copy";
        read_all(machine.memory(), name, session, options, &reading)?;
    }
    for (position, device) in devices.iter().enumerate() {
        attach(device, position, &machine)?;
    }

    let context = session.context(&chipset, &devices);
    let mut vcpus = Vcpus::paused(context);
    for cpu in 0..cpus {
        let vcpu = machine.create_vcpu(cpu)?;
        vcpus.start(cpu, vcpu, session.tell_vcpu())?;
    }
    let vm = Vm::new(VmParts {
        // All pages, even if some have arrived by now: those are counted as arrivals, too. Reading
        // the bitmap instead would take time in proportion to the size of memory.
        missing_at_start: machine.engine().map_or(0, |_| machine.pages()),
        machine,
        chipset,
        devices,
        vcpus,
        cpus,
        shape,
        memory,
        boot,
        stats: session.stats.clone(),
        sources: session.sources(),
        started: session.started,
        last_error: session.last_error.clone(),
        events: session.events.clone(),
        log: session.log.clone(),
        reset_asked: session.reset_asked.clone(),
        working_set,
    });
    let fill = match &options.fill {
        FillConfig::On(options) => Some(options.clone()),
        FillConfig::Off => None,
    };
    let fill = match &vm.working_set {
        Some(run) => run.fill(fill, &regions),
        None => fill,
    };
    Ok(Prepared { vm, begin: Box::new(move |vm| begin(vm, saved)), fill })
}

/// Refuses options that do not match the snapshot's guest.
fn check(saved: &SavedVm, options: &RestoreOptions) -> Result<(), RestoreError> {
    let cpus = saved.vcpus.len();
    if cpus == 0 || cpus > MAX_CPUS as usize {
        return Err(RestoreError::VcpuCount { snapshot: options.source.shown(), cpus });
    }
    if let Some(given) = options.cpus
        && given as usize != cpus
    {
        return Err(RestoreError::OtherVcpuCount { given, had: cpus });
    }
    let (given, had) = (&options.guest.vhost_user, &saved.devices);
    if given.len() != had.len() {
        let had = had.iter().map(|device| device.kind).collect();
        return Err(RestoreError::Devices { given: given.len(), had });
    }
    Ok(())
}

/// Opens the files that a reset boots from, if the snapshot holds them.
fn open_boot(
    snapshot: &OpenSnapshot,
    saved: &SavedVm,
    options: &RestoreOptions,
) -> Result<Option<BootSource>, Error> {
    let Some(boot) = &saved.boot else {
        log::warn!(
            "snapshot {} has no kernel: a reset of its guest will end the VM with an error; boot \
             the guest with demand-vmm run and take another snapshot",
            options.source
        );
        return Ok(None);
    };
    Ok(Some(BootSource::in_snapshot(snapshot, boot)?))
}

/// Reads the whole image, and compares it with its hashes, unless the run is asked to end.
fn verify(image: &MemoryImage, session: &Session) -> Result<(), SourceError> {
    let pages = image.size() / PAGE_SIZE;
    let shown = Progress::new("verify", "pages read and checked", pages);
    let mut shown = shown.with_lines(session.guest.progress);
    let mut progress = |bytes: u64| {
        shown.set(bytes / PAGE_SIZE);
        !session.is_ending()
    };
    image.verify(&mut progress)
}

/// A read of all memory before the guest runs, which ends when the source is given up.
#[derive(Default)]
struct Reading {
    waiter: Waiter,
    given_up: OnceLock<String>,
}

impl Reading {
    fn give_up(&self, reason: &str) {
        let _ = self.given_up.set(reason.into());
        self.waiter.kick();
    }
}

/// Fetches all memory, for guests or back-ends that cannot wait for missing pages.
fn read_all(
    memory: &DemandMemory,
    name: &'static str,
    session: &Session,
    options: &RestoreOptions,
    reading: &Reading,
) -> Result<(), Error> {
    /// Pages that are requested at once: 128 MiB.
    const STEP: u64 = 1 << 15;
    let pages = memory.pagers().map(|pager| pager.pages()).sum();
    let shown = Progress::new(name, "pages present", pages);
    let mut shown = shown.with_lines(session.guest.progress);
    let mut done = 0;
    for pager in memory.pagers() {
        let pages = pager.pages();
        for first in (0..pages).step_by(to_usize(STEP)) {
            let range = PageRange::new(first, STEP.min(pages - first));
            let fetched = pager.ensure(range, FaultPath::Fill, &reading.waiter);
            fetched.map_err(|error| match (reading.given_up.get(), options.source_limit) {
                (Some(reason), Some(limit)) => {
                    let reason = reason.clone();
                    RestoreError::SourceLimit { reason, limit }.into()
                }
                _ => Error::from(error),
            })?;
            done += range.count;
            shown.set(done);
        }
    }
    Ok(())
}

/// Sets the VM's state. Waits for the pages that KVM accesses by itself, and for those that hold
/// the devices' queues.
fn begin(vm: &Vm, saved: SavedVm) -> Result<(), Error> {
    for vcpu in &saved.vcpus {
        vm.machine.fetch_pages(&vcpu.own_pages())?;
    }
    // Before the vCPUs: when their MSRs are set, KVM computes the guest's wall clock from this one.
    saved.vm.restore_clock(vm.machine.vm())?;
    let (states, shape) = (Arc::new(saved.vcpus), vm.shape.clone());
    let aligned = states.clone();
    vm.vcpus()
        .on_parked(timeouts::RESTORE, move |cpu, vcpu| {
            states[cpu as usize].restore(cpu, vcpu.fd(), &shape)
        })?
        .into_iter()
        .collect::<Result<(), _>>()?;
    // After the local APICs, which receive the interrupts that were in flight.
    saved.vm.restore(vm.machine.vm())?;
    let raised = vm.chipset.serial.interrupt();
    raised.map_err(|source| RestoreError::SerialInterrupt { source })?;
    // From here on the guest differs from the snapshot's.
    vm.chipset.generation.renew(vm.machine.memory())?;
    vm.devices.iter().try_for_each(|device| device.resume())?;
    vm.chipset.generation.tell()?;
    if let Some((then, now)) = saved.vm.align_clock(vm.machine.vm())? {
        vm.vcpus()
            .on_parked(timeouts::RESTORE, move |cpu, vcpu| {
                aligned[cpu as usize].align_tsc(cpu, vcpu.fd(), then, now)
            })?
            .into_iter()
            .collect::<Result<(), _>>()?;
    }
    Ok(())
}
