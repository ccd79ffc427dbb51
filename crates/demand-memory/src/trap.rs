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
    /// Markers in the guest's mapping: the vCPU's thread gets a signal when the vCPU touches a
    /// missing page, and fetches the page itself. Other accesses fail there. Where a range has no
    /// markers yet, an access blocks, as under [`Mapping`](Self::Mapping).
    Markers,
}

/// The outcome of [`MapPresent::map_unit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapped {
    /// The unit was not mapped, and now is.
    Now,
    /// The unit was mapped already.
    Before,
    /// The hardware has lost the unit's content, which the kernel therefore does not map.
    Lost,
}

/// Maps pages in the guest's armed mapping, in which an access to a page that is not mapped waits.
///
/// This trait is a border between crates, and has one implementor: the pager calls it as pages
/// arrive, and demand-uffd, which depends on the pager, implements it for its armed mappings.
pub trait MapPresent: Send + Sync {
    /// Maps these pages in the armed mapping and wakes the threads that wait for them. The pager
    /// calls it with pages whose content is complete, before their bits are cleared, on the thread
    /// that publishes them. Pages that are already mapped are not an error.
    ///
    /// An implementor that maps units of more than a page may skip pages whose unit still has
    /// missing pages; it learns from the bitmap when all are present.
    ///
    /// # Errors
    ///
    /// The system's error. The pages then stay missing, and the pager tries again.
    fn map_present(&self, pages: PageRange) -> io::Result<()>;

    /// Maps a unit of the backing, all of whose pages are present, in place of the marker that it
    /// may have ([`VcpuTrap::Markers`]).
    ///
    /// # Errors
    ///
    /// The system's error; by default `Unsupported`, for mappings without markers.
    fn map_unit(&self, unit: PageRange) -> io::Result<Mapped> {
        let _ = unit;
        Err(io::ErrorKind::Unsupported.into())
    }
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
