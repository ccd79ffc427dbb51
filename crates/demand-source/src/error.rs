// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The error that a page source reports.

use std::io;

/// An error from opening an image or fetching pages from it.
///
/// No error is ever turned into zeros: the faulter keeps waiting, and the request is retried or
/// given up with an error.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The image cannot be opened, or is neither a regular file nor a block device.
    #[error("cannot open image {image}: {error}; use a readable regular file or block device")]
    Open {
        /// The image, as the user named it.
        image: String,
        /// The system's error.
        error: io::Error,
    },
    /// The system refused a read.
    #[error("cannot read {len} bytes at offset {offset} of {image}: {error}; check the storage")]
    Read {
        /// The image, as the user named it.
        image: String,
        /// Offset in the image, in bytes.
        offset: u64,
        /// Length of the read, in bytes.
        len: u64,
        /// The system's error.
        error: io::Error,
    },
    /// The image ended before the requested bytes: it has shrunk since it was opened.
    #[error(
        "cannot read {len} bytes at offset {offset} of {image}: the image now ends at byte {end}, \
         and had {size} bytes when it was opened; restore the file to its full length"
    )]
    Shrunk {
        /// The image, as the user named it.
        image: String,
        /// Offset in the image, in bytes.
        offset: u64,
        /// Length of the read, in bytes.
        len: u64,
        /// Current size of the image, in bytes.
        end: u64,
        /// Its size when it was opened, in bytes.
        size: u64,
    },
    /// The source reported success but had not written all bytes.
    #[error(
        "cannot use {len} bytes of the page source: it wrote only {wrote} and reported success; \
         this is a bug in the source"
    )]
    Short {
        /// Bytes that were written, each counted once.
        wrote: u64,
        /// Bytes that were requested.
        len: u64,
    },
    /// The range lies outside the image.
    #[error(
        "cannot read {len} bytes at offset {offset} of {image}: the image has only {size} bytes; \
         use an image that is at least as long as the memory"
    )]
    OutOfRange {
        /// The image, as the user named it.
        image: String,
        /// Offset in the image, in bytes.
        offset: u64,
        /// Length of the read, in bytes.
        len: u64,
        /// The image's size, in bytes.
        size: u64,
    },
    /// A page of the image has changed since the image was written.
    #[error(
        "cannot use the page at offset {offset} of {image}: its content does not match the table \
         of page hashes; restore the original image and table, or take a new snapshot"
    )]
    Altered {
        /// The image, as the user named it.
        image: String,
        /// Offset of the page in the image, in bytes.
        offset: u64,
    },
    /// The table of page hashes is unusable, or belongs to another image.
    #[error(
        "cannot open image {image} with the page hashes of {table}: {why}; use the unmodified \
         image and table of one snapshot"
    )]
    Table {
        /// The image, as the user named it.
        image: String,
        /// The table of page hashes, as the user named it.
        table: String,
        /// The reason.
        why: String,
    },
    /// The progress callback of a check cancelled it.
    #[error("check of image {image} cancelled at byte {at}; start it again")]
    Cancelled {
        /// The image, as the user named it.
        image: String,
        /// Offset up to which the image was checked, in bytes.
        at: u64,
    },
    /// The source was dropped before it answered.
    #[error("cannot read from the page source: it ended before it answered the request")]
    Abandoned,
    /// The source's code panicked.
    #[error("cannot read from the page source: its code panicked; see the panic message")]
    Panicked,
}
