// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The serial port, which is the guest's console.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvm_ioctls::VmFd;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::arch::layout::SERIAL_GSI;
use crate::error::{Error, no_thread};
use crate::spool::{Overflow, Spool};

/// The value of `--serial`: `tty`, `file=PATH` or `off`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialOption {
    /// Output to standard output, input from standard input.
    Terminal,
    /// Output to a file, without input.
    File(PathBuf),
    /// Neither output nor input.
    Off,
}

impl FromStr for SerialOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "tty" => Ok(SerialOption::Terminal),
            "off" => Ok(SerialOption::Off),
            _ => match text.strip_prefix("file=") {
                Some(path) if !path.is_empty() => Ok(SerialOption::File(path.into())),
                _ => Err("--serial: choose tty, file=PATH or off".into()),
            },
        }
    }
}

impl SerialOption {
    fn output(&self) -> Result<Box<dyn Write + Send>, Error> {
        match self {
            SerialOption::Terminal => Ok(Box::new(io::stdout())),
            SerialOption::Off => Ok(Box::new(io::sink())),
            SerialOption::File(path) => {
                let mut options = OpenOptions::new();
                // A FIFO without a reader is refused; without O_NONBLOCK, opening it would block.
                options.create(true).append(true).custom_flags(libc::O_NONBLOCK);
                let file: Result<File, _> = options.open(path);
                let refused = |error| {
                    Error::failed(format!(
                        "cannot write the serial output to {}: {error}; name a writable file",
                        path.display()
                    ))
                };
                let file = file.map_err(refused)?;
                rustix::fs::fcntl_setfl(&file, OFlags::APPEND).map_err(|e| refused(e.into()))?;
                Ok(Box::new(file))
            }
        }
    }
}

/// The port's registers, as a snapshot keeps them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedSerial(#[serde(with = "Registers")] SerialState);

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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A 16550 serial port.
pub struct SerialPort {
    uart: Mutex<Serial<Irq, TellRoom, Box<dyn Write + Send>>>,
    irq: Irq,
    room: Arc<EventFd>,
    spool: Spool,
}

impl SerialPort {
    /// Creates the machine's port, with output as the option says and, if given, the registers of a
    /// snapshot. The VM must have its interrupt controllers.
    ///
    /// # Errors
    ///
    /// One line: the file cannot be written, the registers are invalid, or the host has no more
    /// eventfds or threads.
    pub fn new(
        vm: &VmFd,
        option: &SerialOption,
        saved: Option<&SavedSerial>,
    ) -> Result<Self, Error> {
        let failed = |error: &dyn fmt::Display| {
            Error::host(format!(
                "cannot connect the serial interrupt: {error}; raise the limit of open files \
                 (ulimit -n)"
            ))
        };
        let event = EventFd::new(EFD_NONBLOCK).map(Arc::new).map_err(|error| failed(&error))?;
        vm.register_irqfd(&event, SERIAL_GSI).map_err(|error| failed(&error))?;
        let room = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(|error| failed(&error))?);
        let registers = saved.map(|saved| saved.0.clone()).unwrap_or_default();
        let spool = Spool::new(option.output()?, "console", Overflow::Warn)
            .map_err(|error| no_thread("write the serial output", error))?;
        let output: Box<dyn Write + Send> = Box::new(spool.clone());
        let uart =
            Serial::from_state(&registers, Irq(event.clone()), TellRoom(room.clone()), output)
                .map_err(|error| {
                    Error::failed(format!(
                        "cannot set up the serial port from the snapshot: {error}; the snapshot \
                         was altered, use another"
                    ))
                })?;
        Ok(SerialPort { uart: Mutex::new(uart), irq: Irq(event), room, spool })
    }

    /// Returns the registers, for a snapshot.
    pub fn save(&self) -> SavedSerial {
        SavedSerial(lock(&self.uart).state())
    }

    /// Interrupts the guest once, whether or not there is a reason. An interrupt that belongs to
    /// the registers of a snapshot may be missing from the saved state: KVM delivers an eventfd's
    /// interrupt on a separate thread, possibly after the local APICs were saved. Without this one,
    /// the guest's driver would wait forever; an extra one does no harm.
    ///
    /// # Errors
    ///
    /// The system's error.
    pub fn interrupt(&self) -> io::Result<()> {
        self.irq.trigger()
    }

    /// Waits until all of the guest's output is written, at most for `within`.
    pub fn drain(&self, within: Duration) {
        self.spool.drain(within);
    }

    /// Passes as many of `bytes` to the guest as fit, and returns their number.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        // A full buffer is not an error.
        lock(&self.uart).enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// Returns the eventfd that becomes readable when the guest has read all of its input.
    pub fn room(&self) -> &Arc<EventFd> {
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
        if let [byte] = data {
            *byte = lock(&self.uart).read(offset as u8);
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        if let [byte] = data
            && let Err(error) = lock(&self.uart).write(offset as u8, *byte)
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
    fn options() {
        assert_eq!("tty".parse(), Ok(SerialOption::Terminal));
        assert_eq!("file=a,b".parse(), Ok(SerialOption::File("a,b".into())));
        for text in ["", "file=", "pty", "file"] {
            assert!(text.parse::<SerialOption>().unwrap_err().starts_with("--serial"), "{text}");
        }
    }

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
