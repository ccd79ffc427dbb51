// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of chunked images.

use std::io;
use std::path::PathBuf;

use demand_source::{ImageWriterError, Retry, SourceError};

use crate::StoreError;

/// Bytes that are not what the format prescribes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// An object that is not an index.
    #[error("it is not the index of an image")]
    NotAnIndex,
    /// An object that is not a working set.
    #[error("it is not a working set")]
    NotAWorkingSet,
    /// A version of the format that this crate cannot read.
    #[error("it has version {version}, but this program reads version {readable}")]
    Version {
        /// The object's version.
        version: u32,
        /// The version that this crate reads.
        readable: u32,
    },
    /// Bytes that do not match their digest.
    #[error("the digest of {what} does not match")]
    Digest {
        /// The part with the digest.
        what: &'static str,
    },
    /// A part of another length.
    #[error("{what} has {len} bytes instead of {expected}")]
    Length {
        /// The part.
        what: &'static str,
        /// Its length, in bytes.
        len: u64,
        /// The length that it should have, in bytes.
        expected: u64,
    },
    /// A number outside its bounds.
    #[error("{what} is {value}, which is out of its bounds")]
    Bounds {
        /// The number's meaning.
        what: &'static str,
        /// The number.
        value: u64,
    },
    /// A frame that cannot be decompressed to the length that the format prescribes.
    #[error("the frame cannot be decompressed to {expected} bytes")]
    Frame {
        /// Length of the content, in bytes.
        expected: u64,
    },
    /// A page that does not match its hash.
    #[error("page {page} of the chunk does not match its hash")]
    Page {
        /// Number of the page in the chunk.
        page: u64,
    },
}

/// The reason why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Text that is not a manifest.
    #[error("it is not a manifest: {0}")]
    Json(#[from] serde_json::Error),
    /// Text that is longer than any manifest.
    #[error("it is longer than 1 MiB")]
    TooLong,
    /// The manifest of another kind of snapshot.
    #[error("it describes a {format:?} instead of a \"demand-image\"")]
    Format {
        /// The kind, as the manifest names it.
        format: String,
    },
    /// A version of the format that this crate cannot read.
    #[error("it has version {version}, but this program reads version {readable}")]
    Version {
        /// The manifest's version.
        version: u32,
        /// The version that this crate reads.
        readable: u32,
    },
    /// An image that is encrypted.
    #[error("its chunks are encrypted, which this program cannot read")]
    Encrypted,
    /// A name that no file can have, or that two files have.
    #[error("{name:?} is not a name for a side file, or two files have it")]
    File {
        /// The name.
        name: String,
    },
    /// A number outside its bounds.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

/// An error from writing or reading a chunked image.
///
/// None of them is ever turned into zeros or into old content.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The store failed.
    #[error(transparent)]
    Store(Box<StoreError>),
    /// The store has no such snapshot.
    #[error(
        "cannot open snapshot {snapshot} of {store}: it has no manifest, which a push writes last; \
         check its name, or push it again"
    )]
    NoSnapshot {
        /// The snapshot.
        snapshot: String,
        /// The store, without credentials.
        store: String,
    },
    /// A name that no snapshot or side file can have.
    #[error(
        "cannot use the name {name:?}: it is malformed, reserved or used twice; use letters, \
         digits, '.', '_' and '-', and begin with a letter or digit"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// The manifest is unusable.
    #[error(
        "cannot open snapshot {snapshot} of {store}: {source}; restore its manifest, or push it \
         again"
    )]
    Manifest {
        /// The snapshot.
        snapshot: String,
        /// The store, without credentials.
        store: String,
        /// The reason.
        source: ManifestError,
    },
    /// Bytes of an object are not those that were written.
    #[error("cannot use {object} of {store}: {source}; restore the object, or push it again")]
    Altered {
        /// The object.
        object: String,
        /// The store, without credentials.
        store: String,
        /// The reason.
        source: LayoutError,
    },
    /// A chunk of the image is not what was written.
    #[error(
        "cannot use the chunk at offset {offset} of snapshot {snapshot}, in {object} of {store}: \
         {source}; restore the object, or push the snapshot again"
    )]
    Chunk {
        /// The snapshot.
        snapshot: String,
        /// Offset of the chunk in the image, in bytes.
        offset: u64,
        /// The object.
        object: String,
        /// The store, without credentials.
        store: String,
        /// The reason.
        source: LayoutError,
    },
    /// The options of a push, or the image, do not fit the format.
    #[error("cannot push the image: {0}; choose other values")]
    Options(#[source] LayoutError),
    /// The parent of a push cannot be reused.
    #[error("cannot push with parent {parent}: {why}; choose another parent, or none")]
    Parent {
        /// The parent snapshot.
        parent: String,
        /// The reason.
        why: &'static str,
    },
    /// The image that is pushed cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The image that is pulled cannot be written.
    #[error(transparent)]
    Write(#[from] ImageWriterError),
    /// A file cannot be read or written.
    #[error("cannot access {}: {source}; check its name, its permissions and the disk", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The snapshot has no such side file.
    #[error("cannot read the file {name} of snapshot {snapshot}: it has none of that name")]
    NoFile {
        /// The snapshot.
        snapshot: String,
        /// The side file.
        name: String,
    },
    /// The progress callback cancelled the operation.
    #[error("the operation was cancelled; start it again")]
    Cancelled,
    /// A task of the operation ended without a result, because its code panicked.
    #[error("cannot finish the operation: its code panicked; see the panic message")]
    Panicked,
}

impl From<StoreError> for ImageError {
    fn from(error: StoreError) -> Self {
        ImageError::Store(Box::new(error))
    }
}

impl ImageError {
    /// Returns whether another attempt may succeed: objects can be restored, and networks repaired.
    /// Only wrong names and options stay wrong.
    pub fn retry(&self) -> Retry {
        match self {
            ImageError::Store(error) => error.retry(),
            ImageError::Source(error) => error.retry(),
            ImageError::Name { .. }
            | ImageError::Options(_)
            | ImageError::Parent { .. }
            | ImageError::NoFile { .. } => Retry::Never,
            _ => Retry::Later,
        }
    }
}
