// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Steps: the elements of a vCPU's program and of the VMM's part of a plan.

/// The number of bytes of an access.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Width {
    /// 8 bits.
    One,
    /// 16 bits.
    Two,
    /// 32 bits.
    Four,
    /// 64 bits.
    Eight,
}

impl Width {
    /// Returns the number of bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Width::One => 1,
            Width::Two => 2,
            Width::Four => 4,
            Width::Eight => 8,
        }
    }

    /// Returns `value` truncated to the width.
    pub const fn cut(self, value: u64) -> u64 {
        match self {
            Width::One => value & 0xff,
            Width::Two => value & 0xffff,
            Width::Four => value & 0xffff_ffff,
            Width::Eight => value,
        }
    }
}

/// One step of a vCPU's program. Addresses are guest virtual, which are offsets in the memory under
/// test, or the register for a kick.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// Read, and fail unless the value is the expected one. The address may be unaligned, and the
    /// access may span two pages.
    Check {
        /// The address.
        address: u64,
        /// The expected value.
        expect: u64,
        /// The width of the access.
        width: Width,
    },
    /// Store.
    Write {
        /// The address.
        address: u64,
        /// The value.
        value: u64,
        /// The width of the access.
        width: Width,
    },
    /// Add to a 64-bit word in memory, with one instruction.
    Add {
        /// The address.
        address: u64,
        /// The addend.
        value: u64,
    },
    /// Call a function, and fail unless it returns the expected value.
    Call {
        /// The address.
        address: u64,
        /// The expected result.
        expect: u64,
    },
    /// Make this many available requests visible to the back-end.
    PublishAvail {
        /// Address of the index in the available ring.
        address: u64,
        /// Its new value.
        value: u16,
    },
    /// Notify the device of new requests in a queue: a 32-bit store to its QueueNotify register.
    Kick {
        /// Address of the register.
        address: u64,
        /// Index of the queue.
        queue: u32,
    },
    /// Wait until the index of the used ring is at or past a value.
    WaitUsed {
        /// Address of the index in the used ring.
        address: u64,
        /// The value.
        value: u16,
    },
    /// Wait until a flag has at least a value.
    WaitFlag {
        /// Index of the flag.
        flag: usize,
        /// The value.
        at_least: u64,
    },
    /// Set a flag.
    SetFlag {
        /// Index of the flag.
        flag: usize,
        /// Its new value.
        value: u64,
    },
}

/// One step of the VMM, through vm-memory. Addresses are offsets in the memory under test.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum VmmStep {
    /// Read a page, and fail unless it equals the image's.
    CheckPage {
        /// Index of the page.
        page: u64,
    },
    /// Read eight bytes, and fail unless they have the expected value. They may span two pages.
    Check {
        /// The address.
        address: u64,
        /// The expected value.
        expect: u64,
    },
    /// Store eight bytes.
    Write {
        /// The address.
        address: u64,
        /// The value.
        value: u64,
    },
    /// Wait until a flag has at least a value.
    WaitFlag {
        /// Index of the flag.
        flag: usize,
        /// The value.
        at_least: u64,
    },
    /// Set a flag.
    SetFlag {
        /// Index of the flag.
        flag: usize,
        /// Its new value.
        value: u64,
    },
}
