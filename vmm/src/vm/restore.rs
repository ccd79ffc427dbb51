// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demand-vmm restore`: restores a Linux guest from a snapshot, and runs it before its memory has
//! arrived.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use demand_kvm::{EngineChoice, open_kvm};
use demand_memory::{PAGE_SIZE, PageRange, Path, Waiter};
use demand_source::HashedImage;

use crate::arch::cpuid;
use crate::arch::layout::MAX_CPUS;
use crate::arch::placement::{check_places, place};
use crate::arch::vcpu_state::StateShape;
use crate::config::{ClockOption, FillOption, RestoreMemory};
use crate::devices::chipset::{Chipset, create_irqchip};
use crate::error::Error;
use crate::report::Report;
use crate::report::progress::Bar;
use crate::snapshot::boot_files::BootSource;
use crate::snapshot::dir;
use crate::snapshot::open::OpenSnapshot;
use crate::snapshot::saved::SavedVm;
use crate::vcpu::set::Vcpus;
use crate::virtio::vhost_user::VhostUserDevice;
use crate::vm::events::Event;
use crate::vm::machine::{Machine, MachineConfig};
use crate::vm::session::{GuestOptions, Prepared, Session, attach, run_guest};
use crate::vm::source_watch::{Awaited, SourceWatch};
use crate::vm::timeouts;
use crate::vm::{Vm, VmParts};

/// The parameters of `restore`.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// The options that every guest takes.
    pub guest: GuestOptions,
    /// The snapshot's directory.
    pub source: PathBuf,
    /// The properties of the memory that differ from the snapshot's.
    pub memory: RestoreMemory,
    /// The number of vCPUs that the user expects the snapshot to have.
    pub cpus: Option<u32>,
    /// The engine that traps vCPU accesses to missing pages.
    pub engine: EngineChoice,
    /// How long the source may fail, or not answer, before the VM is paused with an error; `None`:
    /// without limit.
    pub source_limit: Option<Duration>,
    /// Background fill.
    pub fill: FillOption,
    /// The point from which the guest's clocks continue.
    pub clock: ClockOption,
    /// Whether the whole memory image is read and checked before the guest runs.
    pub verify: bool,
}

/// Restores a guest and runs it until it ends. `started` is the time at which the process began.
/// SIGINT, SIGTERM and SIGHUP end the guest; call this before the process starts other threads.
///
/// # Errors
///
/// One line, with its exit status. The snapshot is left unchanged. The process should exit after an
/// error.
pub fn restore(options: RestoreOptions, started: Instant) -> Result<Report, Error> {
    let files = dir::files(&options.source);
    let inputs = files.each_ref().map(|path| path.as_path());
    run_guest(options.guest.clone(), &inputs, started, move |session| prepare(session, &options))
}

fn prepare(session: &Session, options: &RestoreOptions) -> Result<Prepared, Error> {
    let snapshot = OpenSnapshot::open(&options.source)?;
    let mut saved: SavedVm = snapshot.read_state()?;
    if options.clock == ClockOption::Host {
        saved.vm.follow_host()?;
    }
    let memory = saved.memory.option(&options.memory)?;
    check(&saved, options)?;
    let image = open_image(&snapshot, &saved, options)?;
    let boot = open_boot(&snapshot, &saved, options)?;
    // Before the slow steps.
    check_places(&place(memory.size))?;
    let host = cpuid::guest_cpuid(&open_kvm().map_err(Error::host)?)?;
    for vcpu in &saved.vcpus {
        cpuid::check_host(&vcpu.told()?, &host)?;
    }
    if options.verify {
        verify(&image)?;
        boot.iter().try_for_each(BootSource::check)?;
    }
    let tell = session.tell.clone();
    let source = SourceWatch::new(
        dir::memory(&options.source),
        options.source_limit,
        session.last_error.clone(),
        move |reason| tell.tell(Event::GivenUp(reason)),
    );
    let machine = Arc::new(Machine::new(MachineConfig {
        memory: &memory,
        engine: options.engine,
        source: Arc::new(image),
        stats: session.stats.clone(),
        retrier: source.retrier(),
    })?);
    let awaited = Awaited { memory: machine.memory().clone(), source: Some(source) };
    let _ = session.awaited.set(awaited);
    let shape = Arc::new(StateShape::of(machine.kvm(), machine.vm())?);
    create_irqchip(machine.vm())?;
    let registers = Some((&saved.serial, &saved.registers));
    let chipset = Chipset::new(machine.vm(), &session.guest.serial, registers)?;
    let mut devices = Vec::new();
    let options_and_states = session.guest.vhost_user.iter().zip(&saved.devices);
    for (position, (option, state)) in options_and_states.enumerate() {
        devices.push(Arc::new(VhostUserDevice::restore(option, position, state)?));
    }
    if devices.iter().any(|device| device.wants_full_memory()) {
        fill_first(&machine)?;
    }
    for (position, device) in devices.iter().enumerate() {
        attach(device, position, &machine)?;
    }

    let context = session.context(&machine, &chipset, &devices)?;
    let mut vcpus = Vcpus::paused(context);
    let cpus = saved.vcpus.len() as u32;
    for cpu in 0..cpus {
        let vcpu = machine.create_vcpu(cpu)?;
        vcpus.start(cpu, vcpu, session.tell_vcpu()).map_err(Error::host)?;
    }
    let vm = Vm::new(VmParts {
        // All pages, even if some have arrived by now: those are counted as arrivals, too. Reading
        // the bitmap instead would take time in proportion to the size of memory.
        missing_at_start: machine.pages(),
        machine,
        chipset,
        devices,
        vcpus,
        cpus,
        shape,
        memory,
        boot,
        stats: session.stats.clone(),
        started: session.started,
        last_error: session.last_error.clone(),
        tell: session.tell.clone(),
        reset_asked: session.reset_asked.clone(),
    });
    let fill = match options.fill {
        FillOption::On(rate) => Some(rate),
        FillOption::Off => None,
    };
    Ok(Prepared { vm, begin: Box::new(move |vm| begin(vm, saved)), fill })
}

/// Refuses options that do not match the snapshot's guest.
fn check(saved: &SavedVm, options: &RestoreOptions) -> Result<(), Error> {
    let cpus = saved.vcpus.len();
    if cpus == 0 || cpus > MAX_CPUS as usize {
        return Err(Error::failed(format!(
            "cannot restore snapshot {}: it has {cpus} vCPUs, and a guest has 1 to {MAX_CPUS}; \
             use another snapshot",
            options.source.display()
        )));
    }
    if let Some(wanted) = options.cpus
        && wanted as usize != cpus
    {
        return Err(Error::usage(format!(
            "--cpus: {wanted} vCPUs are given, and the snapshot's guest has {cpus}; leave it out"
        )));
    }
    let (given, had) = (&options.guest.vhost_user, &saved.devices);
    if had.is_empty() && !given.is_empty() {
        return Err(Error::usage(format!(
            "--vhost-user: {} devices are given, and the snapshot's guest has none; leave them out",
            given.len()
        )));
    }
    if given.len() != had.len() {
        let kinds: Vec<_> = had.iter().map(|device| device.kind.to_string()).collect();
        return Err(Error::usage(format!(
            "--vhost-user: {} devices are given, and the snapshot's guest has {} ({}); name a \
             back-end for each, in this order",
            given.len(),
            had.len(),
            kinds.join(", ")
        )));
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
            options.source.display()
        );
        return Ok(None);
    };
    BootSource::in_snapshot(snapshot, boot).map(Some)
}

fn open_image(
    snapshot: &OpenSnapshot,
    saved: &SavedVm,
    options: &RestoreOptions,
) -> Result<HashedImage, Error> {
    let image =
        HashedImage::of_files(snapshot.memory()?, snapshot.hashes()?).map_err(Error::failed)?;
    if image.generation()[..] != saved.memory.generation[..] || image.size() != saved.memory.size {
        return Err(Error::failed(format!(
            "cannot restore snapshot {}: its memory and state are from different snapshots; use \
             files of the same snapshot",
            options.source.display()
        )));
    }
    Ok(image)
}

/// Reads the whole image, and compares it with its hashes.
fn verify(image: &HashedImage) -> Result<(), Error> {
    let bar = Bar::new("verify", "pages", image.size() / PAGE_SIZE);
    let mut progress = |bytes: u64| {
        bar.set(bytes / PAGE_SIZE);
        true
    };
    image.verify(&mut progress).map_err(Error::failed)
}

/// Fetches all memory, for back-ends that cannot wait for missing pages.
fn fill_first(machine: &Machine) -> Result<(), Error> {
    /// Pages that are requested at once: 128 MiB.
    const STEP: u64 = 1 << 15;
    let bar =
        Bar::new("memory, for a back-end without post-copy", "pages present", machine.pages());
    let (waiter, mut done) = (Waiter::new(), 0);
    for pager in machine.pagers() {
        let pages = pager.pages();
        for first in (0..pages).step_by(STEP as usize) {
            let range = PageRange::new(first, STEP.min(pages - first));
            pager.ensure(range, Path::Fill, &waiter).map_err(Error::failed)?;
            done += range.count;
            bar.set(done);
        }
    }
    Ok(())
}

/// Sets the VM's state. Waits for the pages that KVM accesses by itself, and for those that hold
/// the devices' queues.
fn begin(vm: &Vm, saved: SavedVm) -> Result<(), Error> {
    let handler = vm.machine.fault_handler()?;
    let waiter = Waiter::new();
    for vcpu in &saved.vcpus {
        handler.fetch_pages(&vcpu.own_pages(), &waiter).map_err(Error::failed)?;
    }
    // Before the vCPUs: when their MSRs are set, KVM computes the guest's wall clock from this one.
    saved.vm.restore_clock(vm.machine.vm())?;
    let (states, shape) = (Arc::new(saved.vcpus), vm.shape.clone());
    let aligned = states.clone();
    vm.vcpus()
        .on_parked(timeouts::RESTORE, move |cpu, vcpu| {
            states[cpu as usize].restore(cpu, vcpu.fd(), &shape)
        })
        .map_err(Error::failed)?
        .into_iter()
        .collect::<Result<(), _>>()?;
    // After the local APICs, which receive the interrupts that were in flight.
    saved.vm.restore(vm.machine.vm())?;
    vm.chipset.serial.interrupt().map_err(|error| {
        Error::host(format!("cannot raise the serial port's interrupt: {error}"))
    })?;
    // From here on the guest differs from the snapshot's.
    vm.chipset.generation.renew(vm.machine.memory())?;
    vm.devices.iter().try_for_each(|device| device.resume())?;
    vm.chipset.generation.tell()?;
    if let Some((then, now)) = saved.vm.align_clock(vm.machine.vm())? {
        vm.vcpus()
            .on_parked(timeouts::RESTORE, move |cpu, vcpu| {
                aligned[cpu as usize].align_tsc(cpu, vcpu.fd(), then, now)
            })
            .map_err(Error::failed)?
            .into_iter()
            .collect::<Result<(), _>>()?;
    }
    Ok(())
}
