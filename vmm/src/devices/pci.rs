// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PCI's configuration ports: a host bridge without devices, and the reset control register.
//!
//! Kernels probe these ports even if the machine's tables do not mention PCI. If no bridge answers,
//! Linux reports an error, and does not use the reset control register.
//!
//! Sources: PCI Local Bus Specification 3.0, section 3.2.2.3.2; Intel's ICH9 datasheet, section
//! 13.7.5, for the register.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

use crate::devices::power::{OnPower, PowerRequest};
use crate::devices::registers::SavedRegisters;
use crate::sync::LockExt;

/// Offset of the address register.
const ADDRESS: PioAddressOffset = 0;
/// Offset of the reset control register.
const RESET_CONTROL: PioAddressOffset = 1;
/// Offsets of the data that the address register selects.
const DATA: Range<PioAddressOffset> = 4..8;

/// Address register: accesses to the data go to configuration space.
const ENABLE: u32 = 1 << 31;
/// Address register: the bits that select bus, device and function.
const FUNCTION: u32 = 0xff_ff00;
/// Address register: the bits that select four bytes of a function.
const REGISTER: u32 = 0xfc;

/// Reset control: a reset affects the whole machine.
const SYSTEM_RESET: u8 = 1 << 1;
/// Reset control: a change of this bit from 0 to 1 resets.
const RESET_CPU: u8 = 1 << 2;
/// Reset control: a reset cycles the power.
const FULL_RESET: u8 = 1 << 3;

/// The header of the host bridge that Firecracker's and Cloud Hypervisor's guests find: Intel's
/// identifier for virtual machines. All other fields are zero.
const BRIDGE: [(usize, u16); 3] = [
    (0x00, 0x8086),
    (0x02, 0x0d57),
    // Class: host bridge.
    (0x0a, 0x0600),
];

/// The configuration ports.
pub(crate) struct PciPorts {
    registers: Arc<Mutex<SavedRegisters>>,
    tell: OnPower,
}

impl PciPorts {
    /// Creates ports whose state is in `registers`, and that report resets through `tell`.
    pub(crate) fn new(registers: Arc<Mutex<SavedRegisters>>, tell: OnPower) -> Self {
        PciPorts { registers, tell }
    }

    fn lock(&self) -> MutexGuard<'_, SavedRegisters> {
        self.registers.lock_always()
    }
}

/// Returns a byte of the configuration space that the address register selects.
fn config(address: u32, offset: PioAddressOffset) -> u8 {
    if address & ENABLE == 0 || address & FUNCTION != 0 {
        return 0xff;
    }
    let at = (address & REGISTER) as usize + usize::from(offset);
    let of_bridge = BRIDGE.iter().find(|(field, _)| *field == at & !1);
    of_bridge.map_or(0, |(_, value)| value.to_le_bytes()[at & 1])
}

impl DevicePio for PciPorts {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        let registers = self.lock();
        match (offset, data.len()) {
            (ADDRESS, 4) => data.copy_from_slice(&registers.pci_address.to_le_bytes()),
            (RESET_CONTROL, 1) => data[0] = registers.reset_control,
            _ if DATA.contains(&offset) => {
                for (byte, offset) in data.iter_mut().zip(offset - DATA.start..) {
                    *byte = config(registers.pci_address, offset);
                }
            }
            _ => data.fill(0xff),
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        let mut registers = self.lock();
        match (offset, data) {
            (ADDRESS, &[a, b, c, d]) => registers.pci_address = u32::from_le_bytes([a, b, c, d]),
            (RESET_CONTROL, &[value]) => {
                let before = registers.reset_control;
                registers.reset_control = value & (SYSTEM_RESET | RESET_CPU | FULL_RESET);
                let rises = value & !before & RESET_CPU != 0;
                drop(registers);
                if rises {
                    (self.tell)(PowerRequest::Reset);
                }
            }
            // The bridge has no writable register.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports() -> (PciPorts, Arc<Mutex<Vec<PowerRequest>>>) {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let told = asked.clone();
        let tell: OnPower = Arc::new(move |request| told.lock().unwrap().push(request));
        (PciPorts::new(Arc::default(), tell), asked)
    }

    fn read(ports: &PciPorts, offset: u16, len: usize) -> u32 {
        let mut bytes = [0; 4];
        ports.pio_read(PioAddress(0), offset, &mut bytes[..len]);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn bridge_is_the_only_function() {
        let (ports, _) = ports();
        let select = |address: u32| ports.pio_write(PioAddress(0), ADDRESS, &address.to_le_bytes());
        assert_eq!(read(&ports, 4, 4), u32::MAX);
        select(ENABLE);
        assert_eq!(read(&ports, 0, 4), ENABLE);
        assert_eq!(read(&ports, 4, 4), 0x0d57_8086);
        assert_eq!(
            (read(&ports, 4, 2), read(&ports, 6, 2), read(&ports, 7, 1)),
            (0x8086, 0xd57, 0xd)
        );
        // Linux checks the class. The header type, BARs and capabilities are zero.
        select(ENABLE | 8);
        assert_eq!(read(&ports, 6, 2), 0x0600);
        for register in [0xc, 0x10, 0x34, 0xfc] {
            select(ENABLE | register);
            assert_eq!(read(&ports, 4, 4), 0, "{register:#x}");
        }
        for function in [1 << 8, 1 << 11, 0x1f << 11, 1 << 16] {
            select(ENABLE | function);
            assert_eq!(read(&ports, 4, 4), u32::MAX, "{function:#x}");
        }
        // An access of one byte does not reach the address register.
        ports.pio_write(PioAddress(0), 3, &[1]);
        assert_eq!(read(&ports, 0, 4), ENABLE | 1 << 16);
        assert_eq!(read(&ports, 0, 1), 0xff);
    }

    #[test]
    fn reset_comes_when_its_bit_rises() {
        let (ports, asked) = ports();
        let write = |value| ports.pio_write(PioAddress(0), RESET_CONTROL, &[value]);
        write(0x02);
        ports.pio_write(PioAddress(0), ADDRESS, &[0x00, 0x06, 0, 0]);
        assert_eq!((read(&ports, 1, 1), asked.lock().unwrap().len()), (0x02, 0));
        write(0x06);
        assert_eq!(*asked.lock().unwrap(), [PowerRequest::Reset]);
        write(0x0e);
        assert_eq!(asked.lock().unwrap().len(), 1);
        write(0);
        write(0xff);
        assert_eq!((asked.lock().unwrap().len(), read(&ports, 1, 1)), (2, 0x0e));
    }
}
