// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of a running VM.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use demand_kvm::StepError;

use crate::arch::layout::MAX_DEVICES;
use crate::error::{Error, Kind};
use crate::vcpu::error::StillInside;
use crate::vcpu::error::VcpuError;
use crate::virtio::error::DeviceError;
use crate::virtio::request::Request;
use crate::vm::timeouts;

/// Errors of a running VM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// More devices than the machine has room for.
    #[error("--vhost-user: {given} devices are too many; a VM has room for {MAX_DEVICES}")]
    TooManyDevices {
        /// The number of devices on the command line.
        given: usize,
    },
    /// The terminal cannot be the guest's console.
    #[error("cannot use the terminal as the guest's console: {source}")]
    Terminal {
        /// The system's error.
        source: io::Error,
    },
    /// The event queue cannot be created.
    #[error("cannot create an eventfd: {source}; raise the limit of open files (ulimit -n)")]
    EventQueue {
        /// The system's error.
        source: io::Error,
    },
    /// The main loop cannot wait for its descriptors.
    #[error(
        "cannot watch the VM's descriptors: {source}; raise the limit of open files (ulimit -n)"
    )]
    EventLoop {
        /// The error of epoll.
        source: event_manager::Error,
    },
    /// A vCPU cannot continue.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A vCPU's thread has panicked.
    #[error("vCPU {cpu} stopped: its thread has panicked; see its message above")]
    VcpuPanicked {
        /// The vCPU.
        cpu: u32,
    },
    /// vCPUs do not leave the guest, because they wait for a page.
    #[error(transparent)]
    StillInside(#[from] StillInside),
    /// vCPUs do not leave the guest, because they wait for a back-end.
    #[error(
        "{} did not stop within {} ms: device {device} waits for its back-end at {socket} to \
         {request}, without an answer; check that it runs",
        source.names(),
        source.within.as_millis(),
        socket = socket.display()
    )]
    BackEndSilent {
        /// The vCPUs.
        source: StillInside,
        /// The device's name.
        device: String,
        /// The request that the back-end has not answered.
        request: Request,
        /// The back-end's socket.
        socket: PathBuf,
    },
    /// More than one device does not resume.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Devices(Vec<DeviceError>),
    /// The guest was restored from a snapshot without boot files.
    #[error("the VM's own snapshot has none")]
    NoBootFiles,
    /// The same, when it resets itself.
    #[error(
        "cannot reset the guest: its snapshot has no kernel, because it has version 1 or its \
         kernel was altered; boot the guest with demand-vmm run and take another snapshot"
    )]
    NoKernel,
    /// A vCPU's pending I/O cannot be dropped for a reset.
    #[error("vCPU {cpu}: {source}")]
    Abandon {
        /// The vCPU.
        cpu: u32,
        /// The error of the vCPU.
        source: StepError,
    },
    /// The guest resets itself again and again.
    #[error(
        "the guest reset itself {resets} times, each within {} ms of its start; check that the \
         kernel fits its memory, command line and initramfs",
        within.as_millis()
    )]
    ResetLoop {
        /// The number of resets in a row.
        resets: u32,
        /// The interval within which each of them came.
        within: Duration,
    },
    /// The guest's kernel has panicked, and the user wants the VM to end then.
    #[error(
        "the guest's kernel has panicked; its console may say why; the VM has ended, as its \
         on-panic says"
    )]
    Panicked,
    /// The thread of the run has panicked.
    #[error("the run's thread ended without a result")]
    NoResult,
    /// The run did not end in time after it was asked to.
    #[error(
        "cannot end the run in order ({reason}): it did not stop within {} s; check what its \
         log says it waits for, and that the storage of its files responds",
        (3 * timeouts::SIGNAL).as_secs()
    )]
    NotInTime {
        /// The reason for the end.
        reason: String,
    },
    /// The VM did not end cleanly, for a reason that was logged.
    #[error("the VM did not end cleanly")]
    Unclean,
}

impl From<VmError> for Error {
    fn from(error: VmError) -> Self {
        let kind = match &error {
            VmError::TooManyDevices { .. } => Kind::Usage,
            VmError::EventQueue { .. } | VmError::EventLoop { .. } | VmError::Abandon { .. } => {
                Kind::Host
            }
            _ => Kind::Failed,
        };
        Error::of(kind, error)
    }
}
