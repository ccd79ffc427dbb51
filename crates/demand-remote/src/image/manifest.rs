// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The manifest of a snapshot: the only object that has a name of the user's.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::error::{LayoutError, ManifestError};
use super::layout::{ENTRY_BYTES, Geometry};
use super::names::{ObjectId, is_file_name};
use crate::hex::{hex, parse_hex};

/// Maximum length of a manifest, in bytes.
pub(crate) const MOST_MANIFEST: u64 = 1 << 20;
/// Maximum length of a side file, in bytes.
pub(crate) const MOST_FILE: u64 = 256 << 20;

const FORMAT: &str = "demand-image";
const VERSION: u32 = 1;

/// The checksum of a manifest while it is computed.
const NO_CHECKSUM: ObjectId = ObjectId([0; 32]);

/// A generation id, in hexadecimal: see [`demand_source::HashedImage`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Generation(pub [u8; 16]);

impl From<Generation> for String {
    fn from(generation: Generation) -> String {
        hex(&generation.0)
    }
}

impl TryFrom<String> for Generation {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let bytes =
            parse_hex(&text).ok_or("a generation is not 32 lower-case hexadecimal digits")?;
        Ok(Generation(bytes))
    }
}

/// The image of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRef {
    /// Size, in bytes.
    pub size: u64,
    /// Size of a chunk, in bytes.
    pub chunk_size: u32,
    /// Generation id.
    pub generation: Generation,
}

/// The index of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexRef {
    /// Digest of the index, which is its name.
    pub sha256: ObjectId,
    /// Length, in bytes.
    pub size: u64,
    /// Length of the head, in bytes.
    pub head_size: u64,
    /// Digest of the head, so that it can be checked without the rest.
    pub head_sha256: ObjectId,
}

/// A side file of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRef {
    /// Name in the snapshot.
    pub name: String,
    /// Digest of the file, which is its name in the store.
    pub sha256: ObjectId,
    /// Length, in bytes.
    pub size: u64,
}

/// Numbers of chunks, for information only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkCounts {
    /// Chunks that are not all zeros.
    pub stored: u64,
    /// Those of them that were taken from the parent.
    pub reused: u64,
}

/// The manifest of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    format: String,
    version: u32,
    /// The image.
    pub image: ImageRef,
    /// Its index.
    pub index: IndexRef,
    /// The side files.
    pub files: Vec<FileRef>,
    /// Numbers of chunks.
    pub chunks: ChunkCounts,
    /// Name of the snapshot that chunks were taken from, for information only.
    pub parent: Option<String>,
    /// Time of the push, in seconds since 1970.
    pub created: u64,
    /// The program that wrote the snapshot.
    pub tool: String,
    /// Reserved for the identifier of a key; absent in version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    encryption: Option<serde_json::Value>,
    /// Digest of the manifest's text, in which these digits are zeros.
    checksum: ObjectId,
}

/// The keys that are the same in all versions.
#[derive(Deserialize)]
struct Kind {
    format: String,
    version: u32,
}

impl Manifest {
    pub(crate) fn new(image: ImageRef, index: IndexRef) -> Self {
        Manifest {
            format: FORMAT.to_owned(),
            version: VERSION,
            image,
            index,
            files: Vec::new(),
            chunks: ChunkCounts::default(),
            parent: None,
            created: 0,
            tool: format!("demand-remote {}", env!("CARGO_PKG_VERSION")),
            encryption: None,
            checksum: NO_CHECKSUM,
        }
    }

    /// Reads and checks a manifest.
    ///
    /// # Errors
    ///
    /// [`ManifestError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let Kind { format, version } = serde_json::from_slice(bytes)?;
        if format != FORMAT {
            return Err(ManifestError::Format { format });
        }
        if version != VERSION {
            return Err(ManifestError::Version { version, readable: VERSION });
        }
        let manifest: Manifest = serde_json::from_slice(bytes)?;
        if checksum(bytes, manifest.checksum) != Some(manifest.checksum) {
            return Err(LayoutError::Digest { what: "the manifest" }.into());
        }
        if manifest.encryption.is_some() {
            return Err(ManifestError::Encrypted);
        }
        let geometry = manifest.geometry()?;
        let IndexRef { size, head_size, .. } = manifest.index;
        geometry.packs_of(head_size)?;
        let most = geometry.chunks() * ENTRY_BYTES as u64;
        if size < head_size || size - head_size > most {
            return Err(LayoutError::Bounds { what: "the length of the index", value: size }.into());
        }
        let mut names = HashSet::new();
        for FileRef { name, size, .. } in &manifest.files {
            if !is_file_name(name) || !names.insert(name) {
                return Err(ManifestError::File { name: name.clone() });
            }
            if *size > MOST_FILE {
                let (what, value) = ("the length of a side file", *size);
                return Err(LayoutError::Bounds { what, value }.into());
            }
        }
        Ok(manifest)
    }

    /// Writes the manifest as JSON.
    pub(crate) fn encode(mut self) -> Result<Vec<u8>, ManifestError> {
        self.checksum = NO_CHECKSUM;
        let mut text = serde_json::to_vec_pretty(&self)?;
        text.push(b'\n');
        self.checksum = ObjectId::of(&text);
        text = serde_json::to_vec_pretty(&self)?;
        text.push(b'\n');
        Ok(text)
    }

    /// Returns the sizes of the image and its chunks.
    ///
    /// # Errors
    ///
    /// [`LayoutError::Bounds`].
    pub fn geometry(&self) -> Result<Geometry, LayoutError> {
        Geometry::new(self.image.size, self.image.chunk_size)
    }

    /// Returns the side file of this name.
    pub fn file(&self, name: &str) -> Option<&FileRef> {
        self.files.iter().find(|file| file.name == name)
    }
}

/// Computes the checksum of a manifest's text, which states the checksum `stated`; `None` if it is
/// there more than once.
fn checksum(text: &[u8], stated: ObjectId) -> Option<ObjectId> {
    let digits = stated.to_string();
    let mut places = text.windows(digits.len()).enumerate();
    let mut places = places.by_ref().filter(|(_, window)| *window == digits.as_bytes());
    let at = places.next().filter(|_| places.next().is_none())?.0;
    let mut text = text.to_vec();
    text[at..at + digits.len()].fill(b'0');
    Some(ObjectId::of(&text))
}
