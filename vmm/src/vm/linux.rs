// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `demand-vmm run --kernel`: boots a Linux guest on memory whose pages are all present.

use std::sync::Arc;
use std::time::Instant;

use demand_kvm::open_kvm;

use crate::arch::acpi;
use crate::arch::boot_cpu;
use crate::arch::cpuid;
use crate::arch::loader;
use crate::arch::vcpu_state::StateShape;
use crate::config::MemoryOption;
use crate::devices::chipset::{Chipset, create_irqchip};
use crate::error::Error;
use crate::report::Report;
use crate::snapshot::boot_files::{BootOption, BootSource};
use crate::vcpu::set::Vcpus;
use crate::virtio::vhost_user::VhostUserDevice;
use crate::vm::machine::Machine;
use crate::vm::session::{GuestOptions, Prepared, Session, attach, run_guest};
use crate::vm::source_watch::Awaited;
use crate::vm::{Vm, VmParts};

/// Options of `run --kernel`.
#[derive(Clone, Debug)]
pub struct LinuxOptions {
    /// The options that every guest takes.
    pub guest: GuestOptions,
    /// Memory.
    pub memory: MemoryOption,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Kernel, initramfs and command line.
    pub boot: BootOption,
}

/// Runs a Linux guest until it powers off. `started` is when the process started. SIGINT, SIGTERM
/// and SIGHUP end the guest; the caller should call this before it starts other threads.
///
/// # Errors
///
/// Returns a one-line error with its exit status. The process should end after an error.
pub fn run(options: LinuxOptions, started: Instant) -> Result<Report, Error> {
    let boot = options.boot.clone();
    let inputs: Vec<_> =
        [Some(&*boot.kernel), boot.initramfs.as_deref()].into_iter().flatten().collect();
    run_guest(options.guest.clone(), &inputs, started, move |session| prepare(session, &options))
}

/// Checks that this host's KVM supports the VM and vCPU configuration that Linux needs. A success
/// does not mean that KVM can execute all of Linux: a KVM that emulates the processor cannot.
///
/// # Errors
///
/// Returns a one-line error that names the missing part.
pub fn check_kvm() -> Result<(), Error> {
    let kvm = open_kvm().map_err(Error::host)?;
    let refused = |what: &str, error: kvm_ioctls::Error| {
        Error::host(format!(
            "cannot create {what} for Linux: {error}; the kernel's log may say more"
        ))
    };
    let vm = kvm.create_vm().map_err(|error| refused("a VM", error))?;
    create_irqchip(&vm)?;
    StateShape::of(&kvm, &vm)?;
    let processor = cpuid::guest_cpuid(&kvm)?;
    let vcpu = vm.create_vcpu(0).map_err(|error| refused("a vCPU", error))?;
    let own = cpuid::for_vcpu(&processor, 0, 1);
    vcpu.set_cpuid2(&own).map_err(|error| refused("a vCPU with this CPUID", error))
}

fn prepare(session: &Session, options: &LinuxOptions) -> Result<Prepared, Error> {
    let machine = Arc::new(Machine::present(&options.memory, &session.stats)?);
    let _ = session.awaited.set(Awaited { memory: machine.memory().clone(), source: None });
    create_irqchip(machine.vm())?;
    let chipset = Chipset::new(machine.vm(), &session.guest.serial, None)?;
    let mut devices = Vec::new();
    for (position, option) in session.guest.vhost_user.iter().enumerate() {
        let device = Arc::new(VhostUserDevice::connect(option, position)?);
        attach(&device, position, &machine)?;
        devices.push(device);
    }
    loader::check_size(machine.memory())?;
    let source = BootSource::open(&options.boot)?;
    let entry = loader::load(machine.memory(), &source)?;
    acpi::write(machine.memory(), options.cpus, devices.len())?;
    chipset.generation.renew(machine.memory())?;

    let processor = cpuid::guest_cpuid(machine.kvm())?;
    let shape = Arc::new(StateShape::of(machine.kvm(), machine.vm())?);
    let mut fds = Vec::new();
    // Create every vCPU before the first one runs: they reach each other through KVM.
    for cpu in 0..options.cpus {
        let vcpu = machine.create_vcpu(cpu)?;
        let own = cpuid::for_vcpu(&processor, cpu, options.cpus);
        let own = cpuid::with_frequency(&own, vcpu.get_tsc_khz().unwrap_or(0));
        vcpu.set_cpuid2(&own)
            .map_err(|error| Error::host(format!("cannot set the CPUID of vCPU {cpu}: {error}")))?;
        if cpu == 0 {
            boot_cpu::set_up(&vcpu, machine.memory(), entry)?;
        }
        fds.push(vcpu);
    }
    let mut vcpus = Vcpus::paused(session.context(&machine, &chipset, &devices)?);
    for (cpu, vcpu) in (0..).zip(fds) {
        vcpus.start(cpu, vcpu, session.tell_vcpu()).map_err(Error::host)?;
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
        started: session.started,
        missing_at_start: 0,
        last_error: session.last_error.clone(),
        tell: session.tell.clone(),
        reset_asked: session.reset_asked.clone(),
    });
    Ok(Prepared { vm, begin: Box::new(|_| Ok(())), fill: None })
}
