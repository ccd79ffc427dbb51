// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images for the example pagers.

use tempfile::TempDir;

use crate::support::scrambled;

/// Writes an image, `memory` in a folder, of which a third is zeros. Returns its content.
pub(crate) fn image(len: usize) -> (TempDir, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let mut content = vec![0; len];
    for (number, bytes) in content.chunks_mut(48 << 10).enumerate().filter(|(n, _)| n % 3 != 1) {
        for (word, chunk) in bytes.chunks_mut(8).enumerate() {
            let random = scrambled(((number << 32) | word) as u64).to_le_bytes();
            chunk.copy_from_slice(&random[..chunk.len()]);
        }
    }
    std::fs::write(folder.path().join("memory"), &content).unwrap();
    (folder, content)
}
