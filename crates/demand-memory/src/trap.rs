// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Traits of trapped mappings, in which an access to a missing page waits.

use std::fmt;
use std::io;

use crate::PageRange;

/// The mechanism that keeps a guest's vCPUs from missing pages. The guest's mapping is armed
/// accordingly, before it is first accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuTrap {
    /// The guest's mapping: a vCPU that touches a missing page blocks there.
    Mapping,
    /// The hypervisor, which checks each page before it uses the mapping. Only the hypervisor's
    /// internal accesses still reach missing pages in the mapping.
    Hypervisor,
}

/// An armed mapping of a region: an access to a page that is not mapped there waits.
///
/// This trait connects the fault paths, which know nothing of each other: demand-uffd implements it
/// for each mapping that it has armed, and the pager calls it as pages arrive.
pub trait Trap: Send + Sync {
    /// Returns the number of bytes that one resolution maps: a power of two, at least one page.
    fn granularity(&self) -> u64;

    /// Maps these pages in the armed mapping and wakes the threads that wait for them. The pager
    /// calls it with pages whose content is complete, before their bits are cleared, on the thread
    /// that publishes them. Pages that are already mapped are not an error.
    ///
    /// A trap whose granularity is more than a page may skip pages whose unit still has missing
    /// pages; it learns from the bitmap when all are present.
    ///
    /// # Errors
    ///
    /// The system's error. The pages then stay missing, and the pager tries again.
    fn map_present(&self, pages: PageRange) -> io::Result<()>;

    /// Stops trapping these pages. Called when all pages of the region are present.
    ///
    /// # Errors
    ///
    /// The system's error.
    fn release(&self, pages: PageRange) -> io::Result<()>;
}

/// The trap of a mapping of this process, kept by the [`Mapping`](crate::Mapping) itself.
///
/// A mapping that outlived its trap would show zeros for missing pages.
pub trait MappingGuard: fmt::Debug + Send + Sync {
    /// Returns whether an access to any missing page is trapped: false for a mapping that traps
    /// only some accesses, and once the trap is removed.
    fn traps_all(&self) -> bool;

    /// Returns whether the trap exists, so that an access may block.
    fn is_active(&self) -> bool;

    /// Wakes every thread blocked on a fault in the mapping, threads of the kernel included. A
    /// thread whose page is still unmapped faults again.
    fn wake(&self);

    /// Removes the trap and wakes every blocked thread. The mapping must no longer be accessible:
    /// missing pages would read as zeros.
    fn remove(&self);
}
