// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The identities of packs and chunks, whatever image they are read for.

use crate::hex::{hex, parse_hex};

/// The identity of a pack's file in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PackKey {
    /// The SHA-256 of the pack.
    pub(crate) id: [u8; 32],
    /// Size of its chunks, in bytes. It is a part of the name, so that the places in a file never
    /// depend on the image that is read.
    pub(crate) chunk_size: u32,
}

impl PackKey {
    /// Returns the name of the pack's file.
    pub(crate) fn file_name(&self) -> String {
        format!("{}.{}k", hex(&self.id), self.chunk_size >> 10)
    }

    /// Returns whether a file has the name of a pack's file.
    pub(crate) fn is_file_name(name: &str) -> bool {
        let parts = name.split_once('.');
        let parts = parts.and_then(|(id, size)| Some((id, size.strip_suffix('k')?)));
        parts.is_some_and(|(id, size)| {
            let digits = !size.is_empty() && size.bytes().all(|digit| digit.is_ascii_digit());
            parse_hex::<32>(id).is_some() && digits
        })
    }
}

/// The identity of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChunkKey {
    pub(crate) pack: PackKey,
    /// Number of the chunk in its pack.
    pub(crate) ordinal: u16,
    /// Digest of the stored bytes, from which the content was decoded.
    pub(crate) digest: [u8; 16],
    /// Length of the content, in bytes: whole pages.
    pub(crate) len: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_files_have_names_of_packs() {
        let key = PackKey { id: [0xab; 32], chunk_size: 64 << 10 };
        let name = key.file_name();
        assert_eq!(name, format!("{}.64k", "ab".repeat(32)));
        assert!(PackKey::is_file_name(&name));
        for other in [&name[1..], &name[..67], &name.to_uppercase(), "a.64k", "", ".64k"] {
            assert!(!PackKey::is_file_name(other), "{other}");
        }
        assert!(!PackKey::is_file_name(&format!("{name}.bak")));
    }
}
