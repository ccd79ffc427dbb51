// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A Linux guest's exits: accesses to the buses, and its end.

use std::thread;
use std::time::Duration;

use kvm_ioctls::VcpuExit;
use vm_device::bus::{MmioAddress, PioAddress};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};

use crate::power::{OnPower, PowerRequest};
use crate::vcpu::{ServeExit, Served, unserved};

/// How long a vCPU that has shut down rests before it looks again.
const AFTER_SHUTDOWN: Duration = Duration::from_millis(5);

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
            // A triple fault is how kernels reset that know no better way. Until the reset comes,
            // KVM says the same again.
            VcpuExit::Shutdown => {
                (self.power)(PowerRequest::Reset);
                thread::sleep(AFTER_SHUTDOWN);
            }
            other => return unserved(cpu, &other),
        }
        Served::Continue
    }
}
