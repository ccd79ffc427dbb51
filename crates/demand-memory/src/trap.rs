// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a pager asks of a mapping whose readers are trapped.

use std::fmt;
use std::io;

use crate::PageRange;

/// Who keeps a guest's vCPUs from pages that have not arrived. The guest's mapping is armed
/// accordingly, before anybody touches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuTrap {
    /// The guest's mapping: a vCPU that touches a missing page waits at it.
    Mapping,
    /// The hypervisor, page by page, before it looks at the mapping. Who still gets there is the
    /// hypervisor itself, with accesses of its own.
    Hypervisor,
}

/// An armed mapping of a region: whoever touches a page of it that is not mapped there waits.
///
/// It is how the fault paths meet without knowing each other: the userfaultfd side implements it
/// for each mapping that it has armed, and the pager calls it as pages arrive.
pub trait Trap: Send + Sync {
    /// Bytes that one resolution maps, a power of two of at least one page.
    fn granularity(&self) -> u64;

    /// Maps these pages where the mapping's readers look, and lets those go on that wait for
    /// them. The pager calls it with pages whose content is complete, before their bits are
    /// cleared, on the thread that brought them in. Pages that are mapped already are no error.
    ///
    /// A trap whose granularity is more than a page may leave pages alone whose unit is not
    /// whole; it learns from the bitmap when it is.
    ///
    /// # Errors
    ///
    /// The system's. The pages then stay missing and the pager tries again.
    fn map_present(&self, pages: PageRange) -> io::Result<()>;

    /// Stops trapping these pages. Called when all pages of the region are present.
    ///
    /// # Errors
    ///
    /// The system's.
    fn release(&self, pages: PageRange) -> io::Result<()>;
}

/// The trap of a mapping of this process, which the [`Mapping`](crate::Mapping) itself keeps.
///
/// A mapping whose trap were dropped before it would show zeros for pages that are missing.
pub trait MappingGuard: fmt::Debug + Send + Sync {
    /// Whether an access to any missing page is trapped. False for a mapping that guards only some
    /// accesses, and once the trap is gone.
    fn traps_all(&self) -> bool;

    /// Whether the trap exists: an access may block.
    fn is_active(&self) -> bool;

    /// Wakes every thread blocked on a fault in the mapping, threads of the kernel included. A
    /// thread whose page is still unmapped faults again.
    fn wake(&self);

    /// Removes the trap and wakes every blocked thread. The mapping must not be accessible any
    /// more: missing pages would read as zeros.
    fn remove(&self);
}
