// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of a measurement.

use std::io;

use demand_kvm::{FaultError, SlotError};
use vm_memory::GuestMemoryError;

use crate::error::{Error, Kind};

/// Errors of a measurement.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    /// A vCPU does not have so many pages.
    #[error("bench: --pages {wanted}: a vCPU has {most} pages; give a number from 1 to that")]
    Pages { wanted: u64, most: u64 },
    /// The guest cannot address so much memory.
    #[error(
        "bench: {cpus} times {size} bytes of memory exceed the {most} that the guest can address; \
         ask for less with --memory or --cpus"
    )]
    Memory { cpus: u32, size: u64, most: u64 },
    /// The guest's tables cannot be mapped.
    #[error("cannot map the guest's tables: {source}")]
    Tables { source: io::Error },
    /// KVM refuses the memslot of the guest's tables.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A vCPU ended before all were ready.
    #[error("bench: a vCPU ended before the measurement")]
    EndedEarly,
    /// A vCPU ended without a result.
    #[error("bench: a vCPU ended without a result")]
    NoResult,
    /// All threads ended without a report.
    #[error("bench: all vCPU threads ended without a report")]
    NoReport,
    /// The source cannot be read.
    #[error("bench: {0}")]
    Source(String),
    /// A vCPU cannot continue.
    #[error("bench: vCPU {cpu}: {source}")]
    Vcpu { cpu: u32, source: VcpuError },
    /// The guest's memory cannot be read.
    #[error(transparent)]
    Read(#[from] GuestMemoryError),
    /// A page differs from the source.
    #[error(
        "bench: wrong memory content: vCPU {cpu}: expected {expected:#04x} at guest address \
         {address:#x}, found {found:#04x}"
    )]
    Content { cpu: usize, expected: u8, address: u64, found: u8 },
    /// The guest has read other words than the source's.
    #[error(
        "bench: wrong memory content: vCPU {cpu} computed {seen:#x} from the words that it read, \
         the source's give {expected:#x}"
    )]
    Hash { cpu: usize, seen: u32, expected: u32 },
}

/// Errors for which a vCPU of a measurement cannot continue.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VcpuError {
    /// The guest halted too early.
    #[error("it halted before it was ready")]
    Halted,
    /// Another vCPU has failed.
    #[error("the measurement was cancelled")]
    Cancelled,
    /// A missing page cannot be fetched.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// The guest does something that it has no code for.
    #[error("unexpected exit {0}")]
    Exit(String),
    /// The thread cannot be prepared for signals at markers.
    #[error("cannot prepare its thread for signals at missing pages: {source}")]
    Signals { source: io::Error },
    /// `KVM_RUN` fails.
    #[error("cannot run it: {source}; the kernel's log may say more")]
    Run { source: kvm_ioctls::Error },
    /// The result cannot be read.
    #[error("cannot read its registers: {source}")]
    Registers { source: kvm_ioctls::Error },
}

impl From<BenchError> for Error {
    fn from(error: BenchError) -> Self {
        let kind = match error {
            BenchError::Pages { .. } | BenchError::Memory { .. } => Kind::Usage,
            BenchError::Tables { .. } | BenchError::Slot(_) => Kind::Host,
            _ => Kind::Failed,
        };
        Error::of(kind, error)
    }
}
