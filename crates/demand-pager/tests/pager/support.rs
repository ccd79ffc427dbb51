// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images, and reads of them.

use demand_pager::PagerSource;
use demand_source::{Chunk, Completion, Destination, OwnedBytes, PageSource, Priority, Request};
use tempfile::TempDir;

/// A repeatable sequence of numbers, which look random.
pub(crate) fn scrambled(number: u64) -> u64 {
    let mut x = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^= x >> 31;
    x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 29)
}

/// Writes an image, `memory` in a folder, of which a third is zeros. Returns its content.
pub(crate) fn image(len: usize) -> (TempDir, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let mut content = vec![0; len];
    for (number, bytes) in content.chunks_mut(48 << 10).enumerate().filter(|(n, _)| n % 3 != 1) {
        for (word, chunk) in bytes.chunks_mut(8).enumerate() {
            let random = scrambled((number << 32 | word) as u64).to_le_bytes();
            chunk.copy_from_slice(&random[..chunk.len()]);
        }
    }
    std::fs::write(folder.path().join("memory"), &content).unwrap();
    (folder, content)
}

/// Submits a read.
pub(crate) fn submit(
    source: &PagerSource,
    priority: Priority,
    offset: u64,
    len: usize,
) -> (Completion, OwnedBytes) {
    let (destination, bytes) = Destination::owned(vec![0xee; len]);
    let chunks = vec![Chunk { offset, destination }];
    (source.submit(Request { priority, chunks }), bytes)
}

/// Reads bytes, which must not fail.
pub(crate) fn read(source: &PagerSource, priority: Priority, offset: u64, len: usize) -> Vec<u8> {
    let (completion, bytes) = submit(source, priority, offset, len);
    completion.wait().unwrap();
    bytes.take().unwrap()
}
