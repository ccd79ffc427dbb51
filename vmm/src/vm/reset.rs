// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A reset of the VM: the machine returns to its reset state, and keeps its back-ends and the
//! content of its memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vm_device::DeviceMmio;
use vm_device::bus::MmioAddress;

use crate::arch::acpi;
use crate::arch::boot_cpu;
use crate::arch::boot_files::BootSource;
use crate::arch::loader;
use crate::arch::vcpu_state::VcpuState;
use crate::arch::vm_state::VmState;
use crate::error::Error;
use crate::virtio::mmio::STATUS;
use crate::vm::Vm;
use crate::vm::error::VmError;

/// Time limit for the vCPUs to leave the guest, and again for each step on their threads.
const WITHIN: Duration = Duration::from_secs(10);

/// The reset state: KVM's state of a machine that was just created.
#[derive(Clone)]
pub(crate) struct ResetState {
    vcpus: Arc<Vec<VcpuState>>,
    vm: VmState,
}

impl ResetState {
    /// Reads the state of a VM whose vCPUs have not run.
    pub(crate) fn of(vm: &Vm) -> Result<Self, Error> {
        let shape = vm.shape.clone();
        let vcpus = vm
            .vcpus()
            .on_parked(WITHIN, move |cpu, vcpu| VcpuState::save(cpu, vcpu.fd(), &shape))?
            .into_iter()
            .collect::<Result<_, _>>()?;
        Ok(ResetState { vcpus: Arc::new(vcpus), vm: VmState::save(vm.machine.vm())? })
    }

    /// Returns the machine to its reset state, and boots the guest's kernel again. Missing pages
    /// still arrive on demand, and this function waits for those that it needs. `asked` says
    /// whether a reset that the guest requested is pending; a successful reset clears it.
    ///
    /// # Errors
    ///
    /// If there is no kernel to boot, if a boot file was altered, or if KVM or a back-end refuses.
    pub(crate) fn reset(
        &self,
        vm: &Vm,
        boot: Option<&BootSource>,
        asked: &AtomicBool,
    ) -> Result<(), Error> {
        let boot = boot.ok_or(VmError::NoKernel)?;
        // Before any state of the guest is lost.
        boot.check(&|| vm.lifecycle.is_ending())?;
        vm.outside_guest(WITHIN, || {
            self.begin_anew(vm, boot)?;
            // Before the guest runs again, because it may then request another reset.
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
        let entry = loader::load(vm.machine.memory(), boot)?;
        acpi::write(vm.machine.memory(), vm.cpus, vm.devices.len())?;
        vm.chipset.generation.renew(vm.machine.memory())?;
        vm.machine.wait_open_faults()?;
        let (states, shape) = (self.vcpus.clone(), vm.shape.clone());
        let memory = vm.machine.memory().clone();
        vm.vcpus()
            .on_parked(WITHIN, move |cpu, vcpu| {
                vcpu.abandon().map_err(|source| VmError::Abandon { cpu, source })?;
                states[cpu as usize].reset(cpu, vcpu.fd(), &shape)?;
                if cpu == 0 {
                    boot_cpu::set_up(vcpu.fd(), &memory, entry)?;
                }
                Ok::<_, Error>(())
            })?
            .into_iter()
            .collect::<Result<(), _>>()?;
        Ok(self.vm.restore(vm.machine.vm())?)
    }
}
