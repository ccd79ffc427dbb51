// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of vCPUs and their threads.

use std::io;
use std::time::Duration;

use demand_kvm::KickError;
use demand_paging::Error as PagingError;

use crate::error::{Error, Kind};

/// Error for vCPUs that did not leave the guest in time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[error(
    "{} did not stop within {} ms: {} blocked inside KVM on a page fault; check the page source",
    names(cpus),
    within.as_millis(),
    if cpus.len() == 1 { "it is" } else { "they are" }
)]
pub struct StillInside {
    /// The vCPUs.
    pub cpus: Vec<u32>,
    /// The time limit.
    pub within: Duration,
}

impl StillInside {
    /// Returns the vCPUs' names for messages.
    pub(crate) fn names(&self) -> String {
        names(&self.cpus)
    }
}

/// Errors from jobs on the vCPUs' threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParkedError {
    /// The VM is not paused, or was resumed or stopped meanwhile.
    #[error("vCPU {cpu} is not paused; pause the VM, and keep it paused")]
    NotPaused {
        /// The vCPU.
        cpu: u32,
    },
    /// The vCPU's thread has ended.
    #[error("vCPU {cpu} has ended, and its state is gone")]
    Ended {
        /// The vCPU.
        cpu: u32,
    },
    /// The vCPU is in the middle of an instruction that needs a missing page.
    #[error(
        "vCPU {cpu} waits for the page at guest address {gpa:#x}, which did not arrive within {} \
         ms; check the page source",
        within.as_millis()
    )]
    Waiting {
        /// The vCPU.
        cpu: u32,
        /// Guest physical address.
        gpa: u64,
        /// The time limit.
        within: Duration,
    },
    /// The vCPU did not leave the guest, or did not finish the job, in time.
    #[error(
        "vCPU {cpu} did not respond within {} ms; check the page source",
        within.as_millis()
    )]
    Late {
        /// The vCPU.
        cpu: u32,
        /// The time limit.
        within: Duration,
    },
}

fn names(cpus: &[u32]) -> String {
    let numbers: Vec<_> = cpus.iter().map(ToString::to_string).collect();
    format!("{} {}", if cpus.len() == 1 { "vCPU" } else { "vCPUs" }, numbers.join(", "))
}

/// Error for an exit that the machine does not serve.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("vCPU {cpu} {exit}")]
pub struct UnservedExit {
    /// The vCPU.
    pub cpu: u32,
    /// The exit in words: what the guest did.
    pub exit: String,
}

/// Errors for which a vCPU cannot continue.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuError {
    /// The machine does not serve an exit.
    #[error(transparent)]
    Unserved(#[from] UnservedExit),
    /// The processor does not accept the vCPU's state.
    #[error(
        "vCPU {cpu}: the processor refused to enter the guest (reason {reason:#x}); the kernel's \
         log may say more"
    )]
    Entry {
        /// The vCPU.
        cpu: u32,
        /// The processor's reason.
        reason: u64,
    },
    /// KVM cannot run the vCPU: in most cases, it cannot emulate an instruction.
    #[error(
        "vCPU {cpu}{}: KVM {} (suberror {suberror}); the kernel's log may say more",
        rip.map_or(String::new(), |rip| format!(" at {rip:#x}")),
        match *suberror {
            kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "cannot emulate an instruction",
            _ => "has met an internal error",
        }
    )]
    Internal {
        /// The vCPU.
        cpu: u32,
        /// The instruction pointer, if it is known.
        rip: Option<u64>,
        /// KVM's number for the cause.
        suberror: u32,
    },
    /// `KVM_RUN` fails, or a missing page cannot be fetched.
    #[error("vCPU {cpu}: {source}")]
    Step {
        /// The vCPU.
        cpu: u32,
        /// The cause.
        source: PagingError,
    },
}

/// Errors from starting a vCPU's thread.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The vCPU cannot be kicked.
    #[error(transparent)]
    Kick(#[from] KickError),
    /// The host has no more threads.
    #[error("cannot start a vCPU thread: {0}; raise the limit of threads (ulimit -u)")]
    Thread(#[from] io::Error),
}

impl From<StartError> for Error {
    fn from(error: StartError) -> Self {
        Error::of(Kind::Host, error)
    }
}

impl From<VcpuError> for Error {
    fn from(error: VcpuError) -> Self {
        Error::of(Kind::Failed, error)
    }
}

impl From<StillInside> for Error {
    fn from(error: StillInside) -> Self {
        Error::of(Kind::Failed, error)
    }
}

impl From<ParkedError> for Error {
    fn from(error: ParkedError) -> Self {
        Error::of(Kind::Failed, error)
    }
}
