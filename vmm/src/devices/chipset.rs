// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The devices of a Linux guest's machine: interrupt controllers, the serial port, the power
//! registers, the generation identifier, and the virtio devices on its buses.

use std::sync::{Arc, Mutex};

use demand_memory::to_usize;
use kvm_bindings::{
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, kvm_irqchip,
    kvm_pit_config,
};
use kvm_ioctls::VmFd;
use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioRange};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vm_device::{DeviceMmio, DevicePio};

use crate::arch::layout::{
    DEVICE_SIZE, I8042, I8042_SIZE, KVM_IDENTITY_MAP, KVM_TSS, PANIC, PANIC_SIZE, PCI, PCI_SIZE,
    POWER, POWER_SIZE, SERIAL, SERIAL_SIZE, device_address,
};
use crate::config::SerialConfig;
use crate::devices::error::ChipsetError;
use crate::devices::health::{GuestHealth, PanicPort};
use crate::devices::pci::PciPorts;
use crate::devices::pm_timer::PmTimer;
use crate::devices::power::{Keyboard, OnPower, PowerRegisters};
use crate::devices::registers::SavedRegisters;
use crate::devices::serial::{SavedSerial, SerialPort};
use crate::devices::vmgenid::Generation;
use crate::sync::LockExt;

/// Creates the VM's interrupt controllers and its timer, all inside KVM. The caller must do this
/// before it creates the first vCPU.
///
/// # Errors
///
/// If KVM returns an error.
pub(crate) fn create_irqchip(vm: &VmFd) -> Result<(), ChipsetError> {
    let failed = |part, source| ChipsetError::Create { part, source };
    vm.set_identity_map_address(KVM_IDENTITY_MAP)
        .map_err(|error| failed("an identity map", error))?;
    vm.set_tss_address(to_usize(KVM_TSS)).map_err(|error| failed("a task state segment", error))?;
    vm.create_irq_chip().map_err(|error| failed("interrupt controllers", error))?;
    mask_pics(vm).map_err(|error| failed("interrupt controllers", error))?;
    let timer = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(timer).map_err(|error| failed("a timer", error))
}

/// Masks the PICs, as firmware leaves them. KVM's PICs start with all interrupts unmasked, at
/// vectors from 0 on. An interrupt before the kernel has set the PICs up, for example after a
/// restore early in its boot, would arrive as an exception.
fn mask_pics(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let mut pic = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut pic)?;
        pic.chip.pic.imr = 0xff;
        vm.set_irqchip(&pic)?;
    }
    Ok(())
}

/// The devices of every machine.
pub(crate) struct Chipset {
    /// The guest's console.
    pub serial: Arc<SerialPort>,
    /// The generation identifier.
    pub generation: Generation,
    /// The guest's condition.
    pub health: Arc<GuestHealth>,
    timer: Arc<PmTimer>,
    registers: Arc<Mutex<SavedRegisters>>,
}

impl Chipset {
    /// Creates the devices of a VM that already has its interrupt controllers.
    ///
    /// # Errors
    ///
    /// Those of [`SerialPort::new`] and [`Generation::new`].
    pub(crate) fn new(
        vm: &Arc<VmFd>,
        serial: &SerialConfig,
        saved: Option<(&SavedSerial, &SavedRegisters)>,
    ) -> Result<Self, ChipsetError> {
        let (saved, registers) = saved.unzip();
        Ok(Chipset {
            serial: Arc::new(SerialPort::new(vm, serial, saved)?),
            generation: Generation::new(vm)?,
            health: Arc::default(),
            timer: Arc::new(PmTimer::new(Arc::downgrade(vm))),
            registers: Arc::new(Mutex::new(registers.cloned().unwrap_or_default())),
        })
    }

    /// Returns the registers of ACPI and PCI, for a snapshot.
    pub(crate) fn registers(&self) -> SavedRegisters {
        self.registers.lock_always().clone()
    }

    /// Resets the registers. The vCPUs must be outside the guest, and the VM's clock must have been
    /// reset.
    pub(crate) fn reset(&self) {
        *self.registers.lock_always() = SavedRegisters::default();
        self.timer.reset();
        self.health.reset();
    }

    /// Returns the buses with these devices and the virtio devices, in their order. The guest's
    /// power requests go to `power`.
    ///
    /// # Panics
    ///
    /// If there are more devices than `layout` has room for. The callers refuse more devices before
    /// they create any.
    pub(crate) fn buses(
        &self,
        virtio: impl IntoIterator<Item = Arc<dyn DeviceMmio + Send + Sync>>,
        power: OnPower,
    ) -> IoManager {
        let mut buses = IoManager::new();
        let pci = PciPorts::new(self.registers.clone(), power.clone());
        let keyboard = Keyboard::new(power.clone());
        let panic = PanicPort::new(self.health.clone(), power.clone());
        let acpi = PowerRegisters::new(self.registers.clone(), self.timer.clone(), power);
        let ports: [(u16, u16, Arc<dyn DevicePio + Send + Sync>); 5] = [
            (SERIAL, SERIAL_SIZE, self.serial.clone()),
            (I8042, I8042_SIZE, Arc::new(keyboard)),
            (POWER, POWER_SIZE, Arc::new(acpi)),
            (PCI, PCI_SIZE, Arc::new(pci)),
            (PANIC, PANIC_SIZE, Arc::new(panic)),
        ];
        const APART: &str = "the layout keeps devices apart";
        for (base, size, device) in ports {
            let range = PioRange::new(PioAddress(base), size).expect(APART);
            buses.register_pio(range, device).expect(APART);
        }
        for (position, device) in virtio.into_iter().enumerate() {
            let base = MmioAddress(device_address(position));
            let range = MmioRange::new(base, DEVICE_SIZE).expect(APART);
            buses.register_mmio(range, device).expect(APART);
        }
        buses
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The whole-system test is a guest that is snapshotted early in its boot
    /// (`tests/tests/linux.rs`).
    #[test]
    fn no_interrupt_comes_before_the_guest_wants_any() {
        let Ok(kvm) = demand_kvm::open_kvm() else {
            return test_support::host::skip("there is no usable /dev/kvm");
        };
        let vm = kvm.create_vm().unwrap();
        create_irqchip(&vm).unwrap();
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
            let mut pic = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut pic).unwrap();
            // SAFETY: the chip is a PIC, so `pic` is the active member of the union, and KVM has
            // written all of it.
            assert_eq!(unsafe { pic.chip.pic.imr }, 0xff);
        }
    }
}
