// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host cache: decoded chunks of images in a directory that all processes of a host share.
//!
//! There is no daemon. The directory has a sparse file for each pack, in which a chunk's place
//! follows from its ordinal. A process that needs a chunk which is not there claims it with a lock
//! on one byte of the pack's file, fetches it, and writes it for the others. The kernel releases
//! the lock when its owner dies.
//!
//! Nothing tells whether a chunk is present but its bytes: each read compares every page with its
//! hash, and the hashes with a digest that names the chunk. So nothing is ever synced, no state has
//! to match the content, and a torn, lost or foreign write is a chunk that is absent.

mod chunk_key;
mod claim;
mod directory;
mod error;
mod evict;
mod file_system;
mod health;
mod host;
mod pack_file;
mod record;
mod stats;

pub(crate) use chunk_key::{ChunkKey, PackKey};
pub(crate) use claim::Claim;
pub use error::{CacheError, CacheErrorKind};
pub use host::HostCache;
pub(crate) use host::Look;
pub(crate) use record::PACK_CHUNKS;
pub use stats::CacheStats;
