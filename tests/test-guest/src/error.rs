// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of planning.

/// Errors of planning.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A number is out of range.
    #[error("cannot plan with {what} = {value}: {limit}; choose another")]
    OutOfRange {
        /// Name of the number.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The valid range.
        limit: String,
    },
    /// The plan has a disk, but no pristine image of it was given.
    #[error(
        "cannot plan with a disk: no pristine disk image was given; name the one it is a copy of"
    )]
    NoPristine,
    /// The pristine disk cannot be read.
    #[error(
        "cannot read {len} bytes at offset {offset} of the pristine disk image: {source}; give \
         one of at least `disk_sectors` sectors"
    )]
    Pristine {
        /// Offset in the image, in bytes.
        offset: u64,
        /// Length of the read, in bytes.
        len: u64,
        /// The system's error.
        source: std::io::Error,
    },
}

pub(crate) fn refuse(what: &'static str, value: u64, limit: impl Into<String>) -> PlanError {
    PlanError::OutOfRange { what, value, limit: limit.into() }
}
