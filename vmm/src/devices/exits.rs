// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Handles a Linux guest's vCPU exits: accesses to the buses, and shutdown.

use kvm_ioctls::VcpuExit;
use vm_device::bus::{MmioAddress, PioAddress};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};

use crate::devices::power::{OnPower, PowerRequest};
use crate::vcpu::{ServeExit, Served, unserved};

/// Handles exits with the devices on the buses. Without a device at the address, reads return all
/// ones and writes have no effect, as on hardware, because kernels probe for absent devices.
pub(crate) struct BusExits {
    buses: IoManager,
    power: OnPower,
}

impl BusExits {
    /// Returns a handler for these buses. It reports a guest that crashes into a reset to `power`.
    pub(crate) fn new(buses: IoManager, power: OnPower) -> Self {
        BusExits { buses, power }
    }
}

impl ServeExit for BusExits {
    fn serve(&self, cpu: u32, exit: VcpuExit<'_>) -> Served {
        match exit {
            VcpuExit::IoIn(port, data) => {
                if self.buses.pio_read(PioAddress(port), data).is_err() {
                    data.fill(0xff);
                }
            }
            VcpuExit::IoOut(port, data) => {
                if self.buses.pio_write(PioAddress(port), data).is_err() {
                    log::trace!("vCPU {cpu} wrote to port {port:#x}, where no device is");
                }
            }
            VcpuExit::MmioRead(address, data) => {
                if self.buses.mmio_read(MmioAddress(address), data).is_err() {
                    data.fill(0xff);
                }
            }
            VcpuExit::MmioWrite(address, data) => {
                if self.buses.mmio_write(MmioAddress(address), data).is_err() {
                    log::trace!("vCPU {cpu} wrote to {address:#x}, where no device is");
                }
            }
            // A kernel without a better way resets by a triple fault. With SVM, KVM has already put
            // the vCPU into its power-on state, in which it would run at the reset vector, without
            // any firmware there.
            VcpuExit::Shutdown => {
                (self.power)(PowerRequest::Reset);
                return Served::Hold;
            }
            other => return unserved(cpu, &other),
        }
        Served::Continue
    }
}
