// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Steps: what a vCPU's program and the VMM's part of a plan are made of.

/// How many bytes an access has.
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
    /// Bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Width::One => 1,
            Width::Two => 2,
            Width::Four => 4,
            Width::Eight => 8,
        }
    }

    /// `value` cut to the width.
    pub const fn cut(self, value: u64) -> u64 {
        match self {
            Width::One => value as u8 as u64,
            Width::Two => value as u16 as u64,
            Width::Four => value as u32 as u64,
            Width::Eight => value,
        }
    }
}

/// One step of a vCPU's program. Addresses are guest virtual, which are offsets in the memory under
/// test, or the register that a kick names.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// Read, and end in failure unless it is what was expected. The address need not be aligned,
    /// and may lie in two pages.
    Check {
        /// Where.
        address: u64,
        /// What must be there.
        expect: u64,
        /// How much of it.
        width: Width,
    },
    /// Store.
    Write {
        /// Where.
        address: u64,
        /// What.
        value: u64,
        /// How much of it.
        width: Width,
    },
    /// Add to a word of 64 bits in memory, with one instruction.
    Add {
        /// Where.
        address: u64,
        /// What is added.
        value: u64,
    },
    /// Call a function, and end in failure unless it returns what was expected.
    Call {
        /// Where.
        address: u64,
        /// What it must return.
        expect: u64,
    },
    /// Let the back-end see this many available requests.
    PublishAvail {
        /// Of the index in the available ring.
        address: u64,
        /// Its new value.
        value: u16,
    },
    /// Tell the device that a queue has something new: a 32-bit store to its QueueNotify register.
    Kick {
        /// Of the register.
        address: u64,
        /// Which queue.
        queue: u32,
    },
    /// Wait until the index of the used ring is this, or past it.
    WaitUsed {
        /// Of the index in the used ring.
        address: u64,
        /// What to wait for.
        value: u16,
    },
    /// Wait until a flag is at least this.
    WaitFlag {
        /// Which one.
        flag: usize,
        /// What to wait for.
        at_least: u64,
    },
    /// Set a flag.
    SetFlag {
        /// Which one.
        flag: usize,
        /// Its new value.
        value: u64,
    },
}

/// One step of what the VMM does, through vm-memory. Addresses are offsets in the memory under test.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum VmmStep {
    /// Read a page, and fail unless it is what the image holds.
    CheckPage {
        /// Which one.
        page: u64,
    },
    /// Read eight bytes, and fail unless they are what was expected. They may lie in two pages.
    Check {
        /// Where.
        address: u64,
        /// What must be there.
        expect: u64,
    },
    /// Store eight bytes.
    Write {
        /// Where.
        address: u64,
        /// What.
        value: u64,
    },
    /// Wait until a flag is at least this.
    WaitFlag {
        /// Which one.
        flag: usize,
        /// What to wait for.
        at_least: u64,
    },
    /// Set a flag.
    SetFlag {
        /// Which one.
        flag: usize,
        /// Its new value.
        value: u64,
    },
}
