// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Names of the objects of an image: digests in hexadecimal, and names that users choose.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::hex::{hex, parse_hex};

/// Folder of the packs in a store.
pub(crate) const PACKS: &str = "packs";
/// Folder of the indexes in a store.
pub(crate) const INDEXES: &str = "index";
/// Folder of the side files in a store.
pub(crate) const FILES: &str = "state";
/// Folder of the working sets in a store: each has the name of the index that it belongs to.
pub(crate) const WORKING_SETS: &str = "ws";
/// Folder of the manifests in a store.
pub(crate) const SNAPSHOTS: &str = "snapshots";

/// Name of the image's file where a snapshot is pulled to.
pub(crate) const MEMORY: &str = "memory";
/// Name of the file with the hashes of its pages.
pub(crate) const HASHES: &str = "hashes";

/// Maximum length of a name that a user chooses, in bytes.
const MOST_NAME: usize = 200;

/// The SHA-256 of an object's bytes, which is the object's name, in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ObjectId(pub [u8; 32]);

impl ObjectId {
    /// Computes the SHA-256 of an object's bytes.
    pub fn of(bytes: &[u8]) -> Self {
        ObjectId(Sha256::digest(bytes).into())
    }

    /// Returns the identifier that `text` spells in 64 lower-case hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        parse_hex(text).map(ObjectId)
    }

    /// Returns the object's name in a folder of the store.
    pub(crate) fn within(&self, folder: &str) -> String {
        format!("{folder}/{self}")
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<ObjectId> for String {
    fn from(id: ObjectId) -> String {
        id.to_string()
    }
}

impl TryFrom<String> for ObjectId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        ObjectId::parse(&text).ok_or("a digest is not 64 lower-case hexadecimal digits")
    }
}

/// Returns whether a side file may have this name, which is its file's wherever the snapshot is
/// pulled to: neither of the image's files has it.
pub(crate) fn is_file_name(name: &str) -> bool {
    is_plain(name) && ![MEMORY, HASHES].contains(&name)
}

/// Returns whether a name is a letter or digit, then letters, digits, `.`, `_` and `-`.
fn is_plain(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    name.len() <= MOST_NAME
        && name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && name.bytes().all(plain)
}

/// Returns whether a snapshot may have this name: plain names, separated by slashes.
pub(crate) fn is_snapshot_name(name: &str) -> bool {
    name.len() <= MOST_NAME && name.split('/').all(is_plain)
}

/// Returns the name of a snapshot's manifest.
pub(crate) fn manifest_of(snapshot: &str) -> String {
    format!("{SNAPSHOTS}/{snapshot}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_read_back() {
        let id = ObjectId::of(b"abc");
        let text = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(id.to_string(), text);
        assert_eq!(ObjectId::parse(text), Some(id));
        for wrong in [&text[1..], &text.to_uppercase(), &text.replace('b', "g")] {
            assert_eq!(ObjectId::parse(wrong), None);
        }
    }

    #[test]
    fn names_stay_below_their_folder() {
        for name in ["vm7", "team/vm-7.2", "0"] {
            assert!(is_snapshot_name(name), "{name}");
        }
        for name in ["", "..", "a/../b", "/a", "a/", ".a", "a b", "a\n", "\u{e4}", "a//b"] {
            assert!(!is_snapshot_name(name), "{name}");
        }
        for name in ["a/b", "memory", "hashes"] {
            assert!(!is_file_name(name), "{name}");
        }
    }
}
