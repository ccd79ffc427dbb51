// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads, and numbers that look random.

use std::sync::atomic::{AtomicBool, Ordering};

use demand_source::{Chunk, Completion, Destination, OwnedBytes, PageSource, Priority, Request};

/// A repeatable sequence of numbers, which look random.
pub(crate) fn scrambled(number: u64) -> u64 {
    let mut x = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^= x >> 31;
    x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 29)
}

/// Submits a read.
pub(crate) fn submit(
    source: &impl PageSource,
    priority: Priority,
    offset: u64,
    len: usize,
) -> (Completion, OwnedBytes) {
    let (destination, bytes) = Destination::owned(vec![0xee; len]);
    let chunks = vec![Chunk { offset, destination }];
    (source.submit(Request { priority, chunks }), bytes)
}

/// Reads bytes, which must not fail.
pub(crate) fn read(
    source: &impl PageSource,
    priority: Priority,
    offset: u64,
    len: usize,
) -> Vec<u8> {
    let (completion, bytes) = submit(source, priority, offset, len);
    completion.wait().unwrap();
    bytes.take().unwrap()
}

/// Ends the threads that read until then, also when a test fails.
pub(crate) struct EndsReaders<'a>(pub(crate) &'a AtomicBool);

impl Drop for EndsReaders<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
