// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Disks on the bus and the interrupt lines of a KVM VM.

use std::sync::Arc;

use demand_tests::driver::Driver;
use demand_tests::host;
use demand_vmm::arch::layout::DEVICE_SIZE;
use demand_vmm::virtio::vhost_user::VhostUserDevice;
use kvm_bindings::{KVM_IRQCHIP_PIC_MASTER, kvm_irqchip};
use test_support::wait::until;
use vm_device::bus::{MmioAddress, MmioRange};
use vm_device::device_manager::{IoManager, MmioManager};

use crate::{Place, disk_of, memory, service, use_disk};

/// Returns the pending interrupts of a KVM's first interrupt controller: bits by number.
fn waiting_interrupts(vm: &kvm_ioctls::VmFd) -> u8 {
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_PIC_MASTER, ..Default::default() };
    vm.get_irqchip(&mut chip).unwrap();
    // SAFETY: the union holds the state of the chip that was requested, the PIC.
    unsafe { chip.chip.pic.irr }
}

/// Interrupts go through KVM, each device's on a separate line.
#[test]
fn devices_are_attached_to_a_vm() {
    if !host::has_kvm() {
        return host::skip("there is no usable /dev/kvm");
    }
    let places = [Place::new(), Place::new()];
    let vm = kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap();
    {
        let back_end = places[0].back_end(2);
        let device = VhostUserDevice::connect(&disk_of(&back_end, 2), 0).unwrap();
        let error = device.attach(&vm, 0xd000_0000, 5).unwrap_err().to_string();
        assert!(error.contains("interrupt 5") && error.contains("KVM_CREATE_IRQCHIP"), "{error}");
    }
    vm.create_irq_chip().unwrap();
    let mut bus = IoManager::new();
    let devices = [0, 1].map(|n: u32| {
        let back_end = places[n as usize].back_end(2);
        let device = VhostUserDevice::connect(&disk_of(&back_end, 2), n as usize).unwrap();
        let address = 0xd000_0000 + DEVICE_SIZE * u64::from(n);
        device.attach(&vm, address, 4 + n).unwrap();
        let device = Arc::new(device);
        let range = MmioRange::new(MmioAddress(address), DEVICE_SIZE).unwrap();
        bus.register_mmio(range, device.clone()).unwrap();
        (device, back_end)
    });
    let mut magic = [0; 4];
    bus.mmio_read(MmioAddress(0xd000_1000), &mut magic).unwrap();
    assert_eq!(&magic, b"virt");
    let memory = memory(&places[1].image());
    let (device, _back_end) = &devices[1];
    device.share_memory(&memory, &service()).unwrap();
    let mut driver = Driver::new(device, &memory, 2);
    driver.set_up();
    assert_eq!(waiting_interrupts(&vm), 0);
    use_disk(&mut driver, &places[1].disk(), 3, 4);
    until("KVM has the interrupt", || waiting_interrupts(&vm) == 1 << 5);
}
