// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demand-vmm run --kernel`: boots a Linux guest on memory whose pages are all present.

use std::sync::Arc;
use std::time::Instant;

use demand_kvm::{Virtualization, open_kvm};
use demand_vhost::HangUp;

use crate::api::events::EventKind;
use crate::arch::acpi;
use crate::arch::boot_cpu;
use crate::arch::boot_files::{BootConfig, BootSource};
use crate::arch::cpuid;
use crate::arch::layout::MAX_CPUS;
use crate::arch::loader;
use crate::arch::vcpu_state::StateShape;
use crate::config::MemoryConfig;
use crate::config::vm::VmConfig;
use crate::devices::chipset::{Chipset, create_irqchip};
use crate::error::{Error, Kind};
use crate::vcpu::set::Vcpus;
use crate::virtio::vhost_user::VhostUserDevice;
use crate::vm::machine::{Machine, zeroed_memory};
use crate::vm::session::{
    Ended, GuestOptions, Prepared, Session, attach, check_devices, run_guest,
};
use crate::vm::{Vm, VmParts};

/// Errors from what KVM must offer to a Linux guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinuxError {
    /// A Linux guest cannot have so many vCPUs.
    #[error("--cpus: {cpus} vCPUs are not supported; a Linux guest can have 1 to {MAX_CPUS}")]
    Cpus {
        /// The number that was asked for.
        cpus: u32,
    },
    /// KVM refuses a VM or a vCPU.
    #[error("cannot create {what} for Linux: {source}; the kernel's log may say more")]
    Create {
        /// The refused object.
        what: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// KVM refuses the CPUID of a vCPU.
    #[error("cannot set the CPUID of vCPU {cpu}: {source}")]
    Cpuid {
        /// The vCPU.
        cpu: u32,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
}

impl From<LinuxError> for Error {
    fn from(error: LinuxError) -> Self {
        let kind = match error {
            LinuxError::Cpus { .. } => Kind::Usage,
            LinuxError::Create { .. } | LinuxError::Cpuid { .. } => Kind::Host,
        };
        Error::of(kind, error)
    }
}

/// Options of `run --kernel`.
#[derive(Clone, Debug)]
pub(crate) struct LinuxOptions {
    /// The options that every guest takes.
    pub guest: GuestOptions,
    /// Memory.
    pub memory: MemoryConfig,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Kernel, initramfs and command line.
    pub boot: BootConfig,
}

impl LinuxOptions {
    /// Returns the options of a VM of this configuration; `run` has those of the process.
    pub(crate) fn new(config: VmConfig, run: GuestOptions) -> Self {
        let VmConfig { memory, cpus, kernel, initramfs, cmdline, devices, serial, on_panic } =
            config;
        let guest = GuestOptions { vhost_user: devices, serial, on_panic, ..run };
        LinuxOptions { guest, memory, cpus, boot: BootConfig { kernel, initramfs, cmdline } }
    }
}

/// Refuses a VM that there cannot be on any host, before anything is done for it.
///
/// # Errors
///
/// One line, of kind [`Usage`](Kind::Usage).
pub(crate) fn check(config: &VmConfig) -> Result<(), Error> {
    check_devices(&config.devices)?;
    Ok(check_cpus(config.cpus)?)
}

/// Refuses a number of vCPUs that a Linux guest cannot have.
pub(crate) fn check_cpus(cpus: u32) -> Result<(), LinuxError> {
    if cpus == 0 || cpus > MAX_CPUS { Err(LinuxError::Cpus { cpus }) } else { Ok(()) }
}

/// Runs a Linux guest until it ends. `started` is when the process started.
///
/// # Errors
///
/// As for [`run_guest`].
pub(crate) fn run(options: LinuxOptions, started: Instant) -> Result<Ended, Error> {
    run_guest(options.guest.clone(), started, move |session| prepare(session, &options))
}

/// Checks that this host's KVM supports the VM and vCPU configuration that Linux needs. A success
/// does not mean that KVM can execute all of Linux: a KVM that emulates the processor cannot.
///
/// # Errors
///
/// Returns a one-line error that names the missing part.
pub(crate) fn check_kvm() -> Result<(), Error> {
    let kvm = open_kvm()?;
    let refused = |what| move |source| LinuxError::Create { what, source };
    let vm = kvm.create_vm().map_err(refused("a VM"))?;
    create_irqchip(&vm)?;
    StateShape::of(&kvm, &vm)?;
    let processor = cpuid::guest_cpuid(&kvm)?;
    let vcpu = vm.create_vcpu(0).map_err(refused("a vCPU"))?;
    let own = cpuid::for_vcpu(&processor, 0, 1);
    Ok(vcpu.set_cpuid2(&own).map_err(refused("a vCPU with this CPUID"))?)
}

/// The reason that a KVM without virtualization in the processor boots no Linux.
pub(crate) const EMULATED: &str = "an emulating KVM cannot boot an unmodified Linux";

fn prepare(session: &Session, options: &LinuxOptions) -> Result<Prepared, Error> {
    session.log.add(EventKind::Booting { kernel: options.boot.kernel.clone() });
    let zeroed = zeroed_memory(&options.memory, &session.stats)?;
    session.set_machine(&zeroed, &options.memory, options.cpus);
    let machine = Arc::new(Machine::attach(zeroed)?);
    create_irqchip(machine.vm())?;
    let chipset = Chipset::new(machine.vm(), &session.guest.serial, None)?;
    let mut devices = Vec::new();
    for (position, option) in session.guest.vhost_user.iter().enumerate() {
        let begun = |hang_up: &HangUp| session.hang_up_at_end(hang_up);
        let device = Arc::new(VhostUserDevice::connect_with(option, position, begun)?);
        attach(&device, position, &machine)?;
        devices.push(device);
    }
    loader::check_size(machine.memory())?;
    let source = BootSource::open(&options.boot, &|| session.is_ending())?;
    let entry = loader::load(machine.memory(), &source)?;
    acpi::write(machine.memory(), options.cpus, devices.len())?;
    chipset.generation.renew(machine.memory())?;

    let processor = cpuid::guest_cpuid(machine.kvm())?;
    let shape = Arc::new(StateShape::of(machine.kvm(), machine.vm())?);
    let mut made = Vec::new();
    // Create every vCPU before the first one runs: they reach each other through KVM.
    for cpu in 0..options.cpus {
        let vcpu = machine.create_vcpu(cpu)?;
        let own = cpuid::for_vcpu(&processor, cpu, options.cpus);
        let own = cpuid::with_frequency(&own, vcpu.fd().get_tsc_khz().unwrap_or(0));
        vcpu.fd().set_cpuid2(&own).map_err(|source| LinuxError::Cpuid { cpu, source })?;
        if cpu == 0 {
            boot_cpu::set_up(vcpu.fd(), machine.memory(), entry)?;
        }
        made.push(vcpu);
    }
    let mut vcpus = Vcpus::paused(session.context(&chipset, &devices));
    for (cpu, vcpu) in (0..).zip(made) {
        vcpus.start(cpu, vcpu, session.tell_vcpu())?;
    }
    // Another kernel may be made for it, so this is not an error.
    if Virtualization::of_host() == Virtualization::Emulated {
        log::warn!(
            "{EMULATED}: the guest may print nothing; use a machine with Intel VMX or AMD SVM"
        );
    }
    let vm = Vm::new(VmParts {
        machine,
        chipset,
        devices,
        vcpus,
        cpus: options.cpus,
        shape,
        memory: options.memory.clone(),
        boot: Some(source),
        stats: session.stats.clone(),
        sources: session.sources(),
        started: session.started,
        missing_at_start: 0,
        last_error: session.last_error.clone(),
        events: session.events.clone(),
        log: session.log.clone(),
        reset_asked: session.reset_asked.clone(),
        working_set: None,
    });
    Ok(Prepared { vm, begin: Box::new(|_| Ok(())), fill: None })
}
