// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's ways to end: ACPI's sleep control and reset registers, and the keyboard
//! controller's reset line.

use std::sync::Mutex;

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_superio::{I8042Device, Trigger};

/// What to write to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of "soft off".
pub const S5: u8 = 5;
/// The bit of the sleep control register that makes it happen (ACPI 6.5, section 4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;
/// Where its sleep type lies.
const SLEEP_TYPE_SHIFT: u8 = 2;

/// What a guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// To be switched off.
    Off,
    /// To begin anew.
    Reset,
}

/// Called on the vCPU's thread, with what its guest asks for. It must not wait.
pub type OnPower = std::sync::Arc<dyn Fn(PowerRequest) + Send + Sync>;

/// ACPI's registers.
pub struct PowerRegisters(OnPower);

impl PowerRegisters {
    /// Registers that tell of what is asked.
    pub fn new(tell: OnPower) -> Self {
        PowerRegisters(tell)
    }
}

impl DevicePio for PowerRegisters {
    fn pio_read(&self, _base: PioAddress, _offset: PioAddressOffset, data: &mut [u8]) {
        // The machine never wakes from sleep, so the status is always 0.
        data.fill(0);
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        match (offset, data) {
            (0, &[value]) if value == SLEEP_ENABLE | S5 << SLEEP_TYPE_SHIFT => {
                (self.0)(PowerRequest::Off);
            }
            (2, &[RESET_VALUE]) => (self.0)(PowerRequest::Reset),
            _ => {}
        }
    }
}

struct ResetLine(OnPower);

impl Trigger for ResetLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        (self.0)(PowerRequest::Reset);
        Ok(())
    }
}

/// A keyboard controller that has nothing but the reset line.
pub struct Keyboard(Mutex<I8042Device<ResetLine>>);

impl Keyboard {
    /// A controller that tells of resets.
    pub fn new(tell: OnPower) -> Self {
        Keyboard(Mutex::new(I8042Device::new(ResetLine(tell))))
    }
}

impl DevicePio for Keyboard {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        data.fill(0);
        if let [byte] = data {
            let mut device = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            *byte = device.read(offset as u8);
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        if let [byte] = data {
            let mut device = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let Ok(()) = device.write(offset as u8, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn only_what_asks_for_an_end_is_an_end() {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let tell: OnPower = {
            let asked = asked.clone();
            Arc::new(move |request| asked.lock().unwrap().push(request))
        };
        let registers = PowerRegisters::new(tell.clone());
        let keyboard = Keyboard::new(tell);
        let base = PioAddress(0);
        for (offset, value) in [(0, S5 << SLEEP_TYPE_SHIFT), (0, 0x20), (1, 0x34), (2, 0)] {
            registers.pio_write(base, offset, &[value]);
        }
        registers.pio_write(base, 0, &[0x34, 0]);
        keyboard.pio_write(base, 4, &[0xf0]);
        assert_eq!(*asked.lock().unwrap(), []);
        registers.pio_write(base, 0, &[S5 << SLEEP_TYPE_SHIFT | SLEEP_ENABLE]);
        registers.pio_write(base, 2, &[RESET_VALUE]);
        keyboard.pio_write(base, 4, &[0xfe]);
        let expected = [PowerRequest::Off, PowerRequest::Reset, PowerRequest::Reset];
        assert_eq!(*asked.lock().unwrap(), expected);
    }
}
