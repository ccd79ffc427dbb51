// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Chunked images in a store: snapshots of memory whose parts are compressed, shared with other
//! snapshots, and read one by one.
//!
//! A [`Push`] writes a snapshot, [`RemoteImage`] serves its pages, [`pull`] copies it to a
//! directory, [`verify`] checks it, [`info`] describes it, and [`gc`] removes what no snapshot of a
//! store uses. `docs/image-format.md` of the repository specifies the format.

mod around;
mod block;
pub(crate) mod chunk;
mod error;
mod flights;
mod gc;
mod hedge;
#[cfg(feature = "cache")]
mod host;
mod info;
mod job;
pub(crate) mod layout;
mod manifest;
mod names;
mod pull;
mod push;
mod recent;
mod remote;
mod snapshot;
#[cfg(test)]
mod tests;
mod walk;

pub use around::{AroundStats, FetchAround};
pub use chunk::Compression;
pub use error::{ImageError, LayoutError, ManifestError};
pub use gc::{DEFAULT_GRACE, Garbage, GcOptions, gc};
pub use hedge::HedgeStats;
pub use info::{Info, info};
pub use manifest::{ChunkCounts, FileRef, Generation, ImageRef, IndexRef, Manifest};
pub use names::ObjectId;
pub(crate) use names::WORKING_SETS;
pub use pull::{VerifySummary, pull, verify};
pub use push::{DEFAULT_CHUNK_SIZE, Push, PushProgress, PushSummary};
pub use remote::{ImageFigures, ImageWatch, RemoteImage, RemoteOptions};
pub use snapshot::ReadStats;

/// The decoders of the format, for tests and fuzzing. No stable part of this crate.
#[doc(hidden)]
pub mod format {
    pub use super::block::{Block, Entry};
    pub use super::chunk::{Coding, decode_chunk};
    pub use super::layout::{BlockRef, Digest, Geometry, Head, Pack, digest};
}
