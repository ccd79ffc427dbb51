// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A Linux guest's exits: accesses to the buses, and its end.

use kvm_ioctls::VcpuExit;
use vm_device::bus::{MmioAddress, PioAddress};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};

use crate::power::{OnPower, PowerRequest};
use crate::vcpu::{ServeExit, Served, unserved};

/// Serves exits by the devices on the buses. Where there is none, reads give all ones and writes
/// are lost, as on hardware: kernels look for what may not be there.
pub struct BusExits {
    buses: IoManager,
    power: OnPower,
}

impl BusExits {
    /// Serves by these buses; a guest that crashes into a reset tells `power`.
    pub fn new(buses: IoManager, power: OnPower) -> Self {
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
                    log::trace!("vCPU {cpu} wrote to port {port:#x}, where nothing is");
                }
            }
            VcpuExit::MmioRead(address, data) => {
                if self.buses.mmio_read(MmioAddress(address), data).is_err() {
                    data.fill(0xff);
                }
            }
            VcpuExit::MmioWrite(address, data) => {
                if self.buses.mmio_write(MmioAddress(address), data).is_err() {
                    log::trace!("vCPU {cpu} wrote to {address:#x}, where nothing is");
                }
            }
            // A triple fault is how kernels reset that know no better way. With SVM, KVM has put
            // the vCPU back to its power-on state by itself, from which it would run where there
            // is no firmware.
            VcpuExit::Shutdown => {
                (self.power)(PowerRequest::Reset);
                return Served::Hold;
            }
            other => return unserved(cpu, &other),
        }
        Served::Continue
    }
}
