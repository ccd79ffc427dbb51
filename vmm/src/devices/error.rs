// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The errors of the devices that the VMM emulates itself.

use std::io;
use std::path::PathBuf;

use vm_memory::GuestMemoryError;

use crate::error::{Error, Kind, ThreadError};

/// An error from setting up the machine's own devices, or from using them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChipsetError {
    /// KVM does not create a part of the machine.
    #[error("cannot create {part}: {source}; this KVM cannot run a Linux guest")]
    Create {
        /// The part.
        part: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// The host has no more eventfds, for the interrupt of a device.
    #[error("cannot connect {interrupt}: {source}; raise the limit of open files (ulimit -n)")]
    EventFd {
        /// The interrupt.
        interrupt: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// KVM does not take the interrupt of a device.
    #[error("cannot connect {interrupt}: {source}; raise the limit of open files (ulimit -n)")]
    Interrupt {
        /// The interrupt.
        interrupt: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// The file for the serial port's output cannot be written.
    #[error("cannot write the serial output to {}: {source}; name a writable file", path.display())]
    SerialFile {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The thread that writes the serial port's output cannot be started.
    #[error(transparent)]
    SerialThread(#[from] ThreadError),
    /// The serial port cannot have the registers in the snapshot.
    #[error(
        "cannot set up the serial port from the snapshot: {0}; the snapshot was altered, use \
         another"
    )]
    SerialState(#[source] vm_superio::serial::Error<io::Error>),
    /// The generation identifier cannot be written to memory.
    #[error("cannot write a generation identifier: {0}")]
    WriteGeneration(#[source] GuestMemoryError),
    /// The guest cannot be notified of the generation identifier.
    #[error("cannot notify the guest of its new generation identifier: {0}")]
    NotifyGeneration(#[source] io::Error),
}

impl From<ChipsetError> for Error {
    fn from(error: ChipsetError) -> Self {
        let kind = match error {
            ChipsetError::SerialFile { .. }
            | ChipsetError::SerialState(_)
            | ChipsetError::WriteGeneration(_) => Kind::Failed,
            _ => Kind::Host,
        };
        Error::of(kind, error)
    }
}
