// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The uses of pages, and the actors of a plan.

use crate::plan::step::Width;

/// The use of a page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// Not touched.
    Untouched,
    /// Part of the rings, headers and status bytes.
    Rings,
    /// This vCPU reads words of it.
    GuestCheck(u8),
    /// Two vCPUs read words of it, at about the same time.
    GuestCheckShared(u8, u8),
    /// This vCPU writes to it, and reads it back at the end.
    GuestWrite(u8),
    /// This vCPU calls the function in it.
    GuestCall(u8),
    /// The back-end reads from the disk into it; this vCPU checks a part of that.
    DiskRead(u8),
    /// The back-end writes it to the disk.
    DiskWrite,
    /// The VMM reads it.
    VmmCheck,
    /// The VMM writes to it; this vCPU checks that.
    VmmWrite(u8),
}

/// A participant that accesses units.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Actor {
    /// The guest: one vCPU or two.
    Guest,
    /// The back-end.
    BackEnd,
    /// The VMM.
    Vmm,
}

/// The order in which a unit's actors arrive at it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Arrival {
    /// One after the other.
    InTurn([Actor; 3]),
    /// All at once: each waits until all have arrived.
    AtOnce,
    /// Unsynchronised.
    Free,
}

/// A store by the guest or the VMM, and the resulting content of memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Store {
    /// Offset in the memory under test.
    pub address: u64,
    /// The final value.
    pub value: u64,
    /// Its width.
    pub width: Width,
}
