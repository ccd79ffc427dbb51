// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A reset: the machine begins anew, with the back-ends that it has and the memory as it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vm_device::DeviceMmio;
use vm_device::bus::MmioAddress;

use crate::boot_files::BootSource;
use crate::error::Error;
use crate::vcpu_state::VcpuState;
use crate::virtio_mmio::STATUS;
use crate::vm::Vm;
use crate::vm_state::VmState;
use crate::{acpi, boot, boot_cpu};

/// How long the vCPUs may take to come out of the guest, and to be reset.
const WITHIN: Duration = Duration::from_secs(10);

/// What KVM has of a machine that was just made: what a reset leads back to.
#[derive(Clone)]
pub(crate) struct Pristine {
    vcpus: Arc<Vec<VcpuState>>,
    vm: VmState,
}

impl Pristine {
    /// Reads the state of a VM whose vCPUs have not run.
    pub(crate) fn of(vm: &Vm) -> Result<Self, Error> {
        let shape = vm.shape.clone();
        let vcpus = vm
            .vcpus()
            .on_parked(WITHIN, move |cpu, vcpu| VcpuState::save(cpu, vcpu.fd(), &shape))
            .map_err(Error::failed)?
            .into_iter()
            .collect::<Result<_, _>>()?;
        Ok(Pristine { vcpus: Arc::new(vcpus), vm: VmState::save(vm.machine.vm())? })
    }

    /// Takes the machine back to its beginning, and lets the guest's kernel boot again. Pages that
    /// are missing arrive as ever, and this waits for those that it needs. `asked` says whether the
    /// guest has asked for a reset that has not come; then no more.
    ///
    /// # Errors
    ///
    /// If there is no kernel to boot, or KVM or a back-end refuses.
    pub(crate) fn reset(
        &self,
        vm: &Vm,
        boot: Option<&BootSource>,
        asked: &AtomicBool,
    ) -> Result<(), Error> {
        let boot = boot.ok_or_else(|| {
            Error::failed(
                "cannot reset the guest: its snapshot holds no kernel, as one of version 1 and one \
                 whose kernel was altered; boot the guest with demand-vmm run and take another",
            )
        })?;
        // Before anything of the guest is gone.
        boot.check()?;
        vm.outside_guest(WITHIN, || {
            self.begin_anew(vm, boot)?;
            // Before the guest runs again and may ask again.
            asked.store(false, Ordering::Release);
            Ok(())
        })
    }

    fn begin_anew(&self, vm: &Vm, boot: &BootSource) -> Result<(), Error> {
        for device in &vm.devices {
            device.mmio_write(MmioAddress(0), STATUS, &0u32.to_le_bytes());
        }
        self.vm.restore_clock(vm.machine.vm())?;
        vm.chipset.reset();
        let entry = boot::load(vm.machine.memory(), boot)?;
        acpi::write(vm.machine.memory(), vm.cpus, vm.devices.len())?;
        vm.chipset.generation.renew(vm.machine.memory())?;
        vm.machine.wait_open_faults()?;
        let (states, shape) = (self.vcpus.clone(), vm.shape.clone());
        let memory = vm.machine.memory().clone();
        vm.vcpus()
            .on_parked(WITHIN, move |cpu, vcpu| {
                vcpu.abandon().map_err(|error| Error::host(format!("vCPU {cpu}: {error}")))?;
                states[cpu as usize].reset(cpu, vcpu.fd(), &shape)?;
                if cpu == 0 { boot_cpu::set_up(vcpu.fd(), &memory, entry) } else { Ok(()) }
            })
            .map_err(Error::failed)?
            .into_iter()
            .collect::<Result<(), _>>()?;
        self.vm.restore(vm.machine.vm())
    }
}
