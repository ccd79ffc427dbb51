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
    #[error("open image {image}: {error}; name a readable regular file or block device")]
    Open {
        /// The image, as the user named it.
        image: String,
        /// The system's error.
        error: io::Error,
    },
    /// The system refused a read.
    #[error("read {len} bytes at offset {offset} of {image}: {error}; the read is tried again")]
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
        "read {len} bytes at offset {offset} of {image}: the image ends at byte {end}, it had \
         {size} bytes when it was opened; restore the file to its full length"
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
         that is a mistake in the source's implementation"
    )]
    Short {
        /// Bytes that were written, each counted once.
        wrote: u64,
        /// Bytes that were requested.
        len: u64,
    },
    /// The range lies outside the image.
    #[error(
        "read {len} bytes at offset {offset} of {image}: the image has {size} bytes; use an \
         image that is at least as long as the memory it fills"
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
        "read the page at offset {offset} of {image}: its content is not what the table of page \
         hashes says; put back both files as they were written, or take a new snapshot"
    )]
    Altered {
        /// The image, as the user named it.
        image: String,
        /// Offset of the page in the image, in bytes.
        offset: u64,
    },
    /// The table of page hashes is unusable, or belongs to another image.
    #[error(
        "open image {image} with the page hashes of {table}: {why}; name both files of one \
             snapshot, as they were written"
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
    #[error("check image {image}: ended at byte {at}, as was asked; start it again")]
    Cancelled {
        /// The image, as the user named it.
        image: String,
        /// Offset up to which the image was checked, in bytes.
        at: u64,
    },
    /// The source was dropped before it answered.
    #[error("the page source ended before it answered a request; start it again")]
    Abandoned,
    /// The source's code panicked.
    #[error("cannot read from the page source: its code panicked; the read is tried again")]
    Panicked,
}
