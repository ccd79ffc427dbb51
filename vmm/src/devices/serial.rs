// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The serial port, which is the guest's console.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_ioctls::VmFd;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::arch::layout::SERIAL_GSI;
use crate::config::SerialConfig;
use crate::devices::error::ChipsetError;
use crate::error::ThreadError;
use crate::spool::{Overflow, Spool};
use crate::sync::LockExt;

/// Opens the destination of the output.
fn output(option: &SerialConfig) -> Result<Box<dyn Write + Send>, ChipsetError> {
    match option {
        SerialConfig::Terminal => Ok(Box::new(io::stdout())),
        SerialConfig::Off => Ok(Box::new(io::sink())),
        SerialConfig::File(path) => {
            let mut options = OpenOptions::new();
            // A FIFO without a reader is refused; without O_NONBLOCK, opening it would block.
            options.create(true).append(true).custom_flags(libc::O_NONBLOCK);
            let file: Result<File, _> = options.open(path);
            let refused = |source| ChipsetError::SerialFile { path: path.clone(), source };
            let file = file.map_err(refused)?;
            rustix::fs::fcntl_setfl(&file, OFlags::APPEND).map_err(|e| refused(e.into()))?;
            Ok(Box::new(file))
        }
    }
}

/// The port's registers, as a snapshot keeps them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedSerial(#[serde(with = "Registers")] SerialState);

#[derive(Serialize, Deserialize)]
#[serde(remote = "SerialState", deny_unknown_fields)]
struct Registers {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

struct Irq(Arc<EventFd>);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        match self.0.write(1) {
            // The counter is at its maximum: an interrupt is pending already.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}

/// Signals that the input buffer has room.
struct TellRoom(Arc<EventFd>);

impl SerialEvents for TellRoom {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // A counter at its maximum has been signalled already.
        let _ = self.0.write(1);
    }
}

/// A 16550 serial port.
pub(crate) struct SerialPort {
    uart: Mutex<Serial<Irq, TellRoom, Box<dyn Write + Send>>>,
    irq: Irq,
    room: Arc<EventFd>,
    spool: Spool,
    is_stdout: bool,
}

impl SerialPort {
    /// Creates the machine's port, with output as the option says and, if given, the registers of a
    /// snapshot. The VM must have its interrupt controllers.
    ///
    /// # Errors
    ///
    /// One line: the file cannot be written, the registers are invalid, or the host has no more
    /// eventfds or threads.
    pub(crate) fn new(
        vm: &VmFd,
        option: &SerialConfig,
        saved: Option<&SavedSerial>,
    ) -> Result<Self, ChipsetError> {
        let interrupt = "the serial interrupt";
        let no_eventfd = |source| ChipsetError::EventFd { interrupt, source };
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new).map_err(no_eventfd)?;
        vm.register_irqfd(&event, SERIAL_GSI)
            .map_err(|source| ChipsetError::Interrupt { interrupt, source })?;
        let room = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(no_eventfd)?);
        let registers = saved.map(|saved| saved.0.clone()).unwrap_or_default();
        let spool = Spool::new(output(option)?, "console", Overflow::Warn)
            .map_err(|source| ThreadError { duty: "write the serial output", source })?;
        let output: Box<dyn Write + Send> = Box::new(spool.clone());
        let uart =
            Serial::from_state(&registers, Irq(event.clone()), TellRoom(room.clone()), output)
                .map_err(ChipsetError::SerialState)?;
        let is_stdout = *option == SerialConfig::Terminal;
        Ok(SerialPort { uart: Mutex::new(uart), irq: Irq(event), room, spool, is_stdout })
    }

    /// Returns the registers, for a snapshot.
    pub(crate) fn save(&self) -> SavedSerial {
        SavedSerial(self.uart.lock_always().state())
    }

    /// Interrupts the guest once, whether or not there is a reason. An interrupt that belongs to
    /// the registers of a snapshot may be missing from the saved state: KVM delivers an eventfd's
    /// interrupt on a separate thread, possibly after the local APICs were saved. Without this one,
    /// the guest's driver would wait forever; an extra one does no harm.
    ///
    /// # Errors
    ///
    /// The system's error.
    pub(crate) fn interrupt(&self) -> io::Result<()> {
        self.irq.trigger()
    }

    /// Waits until all of the guest's output is written, at most for `within`. On standard output,
    /// other lines may follow, so the last one is ended.
    pub(crate) fn drain(&self, within: Duration) {
        if self.is_stdout {
            self.spool.end_line();
        }
        self.spool.drain(within);
    }

    /// Passes as many of `bytes` to the guest as fit, and returns their number.
    pub(crate) fn type_in(&self, bytes: &[u8]) -> usize {
        // A full buffer is not an error.
        self.uart.lock_always().enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// Returns the eventfd that becomes readable when the guest has read all of its input.
    pub(crate) fn room(&self) -> &Arc<EventFd> {
        &self.room
    }
}

impl Drop for SerialPort {
    fn drop(&mut self) {
        self.spool.close();
    }
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

impl DevicePio for SerialPort {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        data.fill(0);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.uart.lock_always().read(offset);
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset))
            && let Err(error) = self.uart.lock_always().write(offset, *byte)
        {
            // A console that cannot be written is no reason to stop the guest.
            log::debug!("cannot write the serial output: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_kept_as_json() {
        let state = SerialState { scratch: 7, in_buffer: vec![1, 2], ..Default::default() };
        let saved = SavedSerial(state);
        let text = serde_json::to_string(&saved).unwrap();
        assert_eq!(serde_json::from_str::<SavedSerial>(&text).unwrap(), saved);
        let wrong = text.replace("scratch", "scratched");
        assert!(serde_json::from_str::<SavedSerial>(&wrong).is_err());
    }
}
