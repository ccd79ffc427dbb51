// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of working sets.

use demand_source::SourceError;

use crate::StoreError;
use crate::image::LayoutError;

/// An error from reading or writing a working set. None of them concerns the image: its pages
/// arrive without the set, too.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkingSetError {
    /// No working set is at the place.
    #[error("cannot replay the working set {place}: there is none; record one first")]
    Missing {
        /// The place, without credentials.
        place: String,
    },
    /// The working set is that of another image.
    #[error(
        "cannot use the working set {place}: it was recorded with another image; record a new one"
    )]
    OtherImage {
        /// The place, without credentials.
        place: String,
    },
    /// The object is damaged, or is not a working set.
    #[error("cannot use the working set {place}: {source}; record a new one")]
    Layout {
        /// The place, without credentials.
        place: String,
        /// The reason.
        source: LayoutError,
    },
    /// The store failed.
    #[error(transparent)]
    Store(Box<StoreError>),
    /// The place names no object.
    #[error("cannot use {place} as a working set: it names a folder; name a file or an object")]
    Folder {
        /// The place, without credentials.
        place: String,
    },
    /// The image cannot be read.
    #[error("cannot record the working set {place}: {source}; check the image")]
    Source {
        /// The place, without credentials.
        place: String,
        /// The source's error.
        source: SourceError,
    },
    /// The caller has ended the recording.
    #[error("cannot record the working set {place}: it would have taken too long")]
    Cancelled {
        /// The place, without credentials.
        place: String,
    },
}

impl From<StoreError> for WorkingSetError {
    fn from(error: StoreError) -> Self {
        WorkingSetError::Store(Box::new(error))
    }
}
