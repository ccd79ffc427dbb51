// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! ACPI's fixed hardware, through which a guest powers off or resets, and the keyboard controller's
//! reset line.
//!
//! Source: ACPI 6.5, section 4.8.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_superio::{I8042Device, Trigger};

use crate::arch::layout::{
    PM_TIMER, PM1_CONTROL, PM1_ENABLE, POWER, POWER_SIZE, RESET, RESET_VALUE, S5, SLEEP_CONTROL,
};
use crate::devices::pm_timer::PmTimer;
use crate::devices::registers::SavedRegisters;
use crate::sync::LockExt;

/// Sleep control: the bit that starts the sleep (section 4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;
/// Sleep control: position of the sleep type.
const SLEEP_TYPE_SHIFT: u8 = 2;

/// Events that can be enabled: timer, global lock, power button, sleep button, real-time clock, and
/// wake-up by PCI Express. None of them ever occurs; the register only keeps the bits.
const EVENTS: u16 = 1 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 14;
/// Control: the machine is always in ACPI mode.
const SCI_ENABLE: u16 = 1;
/// Control: position of the sleep type.
const PM1_SLEEP_TYPE_SHIFT: u16 = 10;
/// Control: the bits that keep their written value, BM_RLD and the sleep type.
const PM1_KEPT: u16 = 1 << 1 | 7 << PM1_SLEEP_TYPE_SHIFT;
/// Control: the bit that starts the sleep.
const PM1_SLEEP_ENABLE: u16 = 1 << 13;

/// A request of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PowerRequest {
    /// Power off.
    Off,
    /// Reset.
    Reset,
    /// No request: the guest's kernel has panicked.
    Panicked,
}

/// Callback for a guest's request. It runs on the vCPU's thread, and must not block.
pub(crate) type OnPower = std::sync::Arc<dyn Fn(PowerRequest) + Send + Sync>;

/// ACPI's registers: those of [`SavedRegisters`], the timer, and those that power off or reset.
///
/// The sleep control register belongs to machines without fixed hardware. Guests of older snapshots
/// believe that they run on such a machine.
pub(crate) struct PowerRegisters {
    registers: Arc<Mutex<SavedRegisters>>,
    timer: Arc<PmTimer>,
    tell: OnPower,
}

/// Returns the offset of a port.
const fn offset_of(port: u16) -> usize {
    (port - POWER) as usize
}

/// Returns the byte range of a 16-bit register.
const fn word_at(port: u16) -> Range<usize> {
    offset_of(port)..offset_of(port) + 2
}

impl PowerRegisters {
    /// Creates registers that report requests through `tell`.
    pub(crate) fn new(
        registers: Arc<Mutex<SavedRegisters>>,
        timer: Arc<PmTimer>,
        tell: OnPower,
    ) -> Self {
        PowerRegisters { registers, timer, tell }
    }

    fn lock(&self) -> MutexGuard<'_, SavedRegisters> {
        self.registers.lock_always()
    }

    /// Returns all readable bytes except the timer's.
    fn bytes(&self) -> [u8; POWER_SIZE as usize] {
        let registers = self.lock();
        let mut bytes = [0; POWER_SIZE as usize];
        bytes[word_at(PM1_ENABLE)].copy_from_slice(&registers.pm1_enable.to_le_bytes());
        let control = registers.pm1_control | SCI_ENABLE;
        bytes[word_at(PM1_CONTROL)].copy_from_slice(&control.to_le_bytes());
        bytes
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

impl DevicePio for PowerRegisters {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        let mut bytes = self.bytes();
        let timer = offset_of(PM_TIMER)..offset_of(PM_TIMER) + 4;
        let read = usize::from(offset)..usize::from(offset) + data.len();
        if overlap(&read, &timer) {
            bytes[timer].copy_from_slice(&self.timer.count().to_le_bytes());
        }
        // The bus ensures that no access reaches past the registers.
        data.copy_from_slice(&bytes[read]);
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        let written = usize::from(offset)..usize::from(offset) + data.len();
        let mut bytes = self.bytes();
        bytes[written.clone()].copy_from_slice(data);
        // The register's value after the access, if the access touches it.
        let word = |port| {
            overlap(&written, &word_at(port))
                .then(|| u16::from_le_bytes([bytes[offset_of(port)], bytes[offset_of(port) + 1]]))
        };
        let mut asked = None;
        if let Some(enable) = word(PM1_ENABLE) {
            self.lock().pm1_enable = enable & EVENTS;
        }
        if let Some(control) = word(PM1_CONTROL) {
            self.lock().pm1_control = control & PM1_KEPT;
            let sleep = control & (PM1_SLEEP_ENABLE | 7 << PM1_SLEEP_TYPE_SHIFT);
            if sleep == PM1_SLEEP_ENABLE | u16::from(S5) << PM1_SLEEP_TYPE_SHIFT {
                asked = Some(PowerRequest::Off);
            }
        }
        let byte =
            |port, value| written.contains(&offset_of(port)) && bytes[offset_of(port)] == value;
        if byte(SLEEP_CONTROL, SLEEP_ENABLE | S5 << SLEEP_TYPE_SHIFT) {
            asked = Some(PowerRequest::Off);
        }
        if byte(RESET, RESET_VALUE) {
            asked = Some(PowerRequest::Reset);
        }
        if let Some(request) = asked {
            (self.tell)(request);
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

/// A keyboard controller with only the reset line.
pub(crate) struct Keyboard(Mutex<I8042Device<ResetLine>>);

impl Keyboard {
    /// Creates a controller that reports resets through `tell`.
    pub(crate) fn new(tell: OnPower) -> Self {
        Keyboard(Mutex::new(I8042Device::new(ResetLine(tell))))
    }
}

impl DevicePio for Keyboard {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        data.fill(0);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            let mut device = self.0.lock_always();
            *byte = device.read(offset);
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            let mut device = self.0.lock_always();
            let Ok(()) = device.write(offset, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Weak;

    use crate::arch::layout::PM1_STATUS;

    const BASE: PioAddress = PioAddress(POWER);

    fn registers() -> (PowerRegisters, OnPower, Arc<Mutex<Vec<PowerRequest>>>) {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let told = asked.clone();
        let tell: OnPower = Arc::new(move |request| told.lock().unwrap().push(request));
        let timer = Arc::new(PmTimer::new(Weak::new()));
        (PowerRegisters::new(Arc::default(), timer, tell.clone()), tell, asked)
    }

    fn read(registers: &PowerRegisters, port: u16) -> u16 {
        let mut word = [0; 2];
        registers.pio_read(BASE, port - POWER, &mut word);
        u16::from_le_bytes(word)
    }

    #[test]
    fn only_complete_power_requests_count() {
        let (registers, tell, asked) = registers();
        let keyboard = Keyboard::new(tell);
        for (offset, value) in [(0, S5 << SLEEP_TYPE_SHIFT), (0, 0x20), (1, 0x34), (2, 0)] {
            registers.pio_write(BASE, offset, &[value]);
        }
        // The sleep type alone, the sleep bit alone, another sleep type; then an event.
        for control in [0x1400, 0x2000, 0x3000] {
            registers.pio_write(BASE, PM1_CONTROL - POWER, &u16::to_le_bytes(control));
        }
        registers.pio_write(BASE, PM1_ENABLE - POWER, &[0x21, 0x34]);
        keyboard.pio_write(PioAddress(0x60), 4, &[0xf0]);
        assert_eq!(*asked.lock().unwrap(), []);
        registers.pio_write(BASE, 0, &[S5 << SLEEP_TYPE_SHIFT | SLEEP_ENABLE]);
        registers.pio_write(BASE, 2, &[RESET_VALUE]);
        keyboard.pio_write(PioAddress(0x60), 4, &[0xfe]);
        registers.pio_write(BASE, PM1_CONTROL - POWER, &0x3401u16.to_le_bytes());
        let expected =
            [PowerRequest::Off, PowerRequest::Reset, PowerRequest::Reset, PowerRequest::Off];
        assert_eq!(*asked.lock().unwrap(), expected);
    }

    /// Linux considers the hardware broken if an event does not stay enabled.
    #[test]
    fn registers_keep_written_values() {
        let (registers, _, asked) = registers();
        assert_eq!(read(&registers, PM1_CONTROL), SCI_ENABLE);
        registers.pio_write(BASE, PM1_ENABLE - POWER, &0x0021u16.to_le_bytes());
        assert_eq!(read(&registers, PM1_ENABLE), 0x0021);
        registers.pio_write(BASE, PM1_ENABLE - POWER + 1, &[0xff]);
        assert_eq!(read(&registers, PM1_ENABLE), 0x4721);
        registers.pio_write(BASE, PM1_CONTROL - POWER, &0x1403u16.to_le_bytes());
        assert_eq!(read(&registers, PM1_CONTROL), 0x1403);
        // Clearing a status bit sets nothing.
        registers.pio_write(BASE, PM1_STATUS - POWER, &u16::MAX.to_le_bytes());
        assert_eq!((read(&registers, PM1_STATUS), read(&registers, PM1_ENABLE)), (0, 0x4721));
        let mut timer = [1; 4];
        registers.pio_read(BASE, PM_TIMER - POWER, &mut timer);
        assert_eq!((timer, asked.lock().unwrap().len()), ([0; 4], 0));
    }
}
