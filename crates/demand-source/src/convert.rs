// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Conversion of numbers of bytes and pages, which are `u64` everywhere, to the host's sizes.

/// Converts a number of bytes or pages to `usize`, without loss: demand paging supports 64-bit
/// hosts only, and does not compile for others.
///
/// ```
/// assert_eq!(demand_source::to_usize(64 << 30), 64 << 30);
/// ```
#[expect(
    clippy::cast_possible_truncation,
    reason = "the assertion shows that the types are as wide"
)]
pub const fn to_usize(count: u64) -> usize {
    const { assert!(usize::BITS == u64::BITS, "demand paging needs a 64-bit host") };
    count as usize
}
