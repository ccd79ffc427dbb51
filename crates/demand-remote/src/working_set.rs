// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Working sets: the pages of an image that a guest touches first, in that order and with their
//! content, in one object.
//!
//! [`record`] writes one from the touches of a run, and merges it with those of earlier runs.
//! [`ReplayedSource`] reads it: a source over the image's own that delivers the set's pages from
//! it, in frames of up to 64 pages. `docs/working-set-format.md` of the repository specifies the
//! object.

mod error;
mod history;
mod layout;
mod place;
mod replay;
mod save;
mod set;
#[cfg(test)]
mod tests;

pub use error::WorkingSetError;
pub use layout::ImageId;
pub use place::{beside_directory, beside_image};
pub use replay::{ReplayStats, ReplayedSource};
pub use save::{Recording, Saved, record};
pub use set::WorkingSet;

/// The decoders of the object, for tests and fuzzing. No stable part of this crate.
#[doc(hidden)]
pub mod format {
    pub use super::history::Entry;
    pub use super::layout::{Frame, HEAD_BYTES, Head, Stored, decode_table};
}
