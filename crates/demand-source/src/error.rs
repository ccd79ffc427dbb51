// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can go wrong between a page and its source.

use std::io;

/// Why a source could not deliver what was asked of it.
///
/// None of these is ever answered with zeros: whoever asked keeps waiting, and the request is
/// tried again or given up in the open.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The image could not be opened, or is not something that pages can be read from.
    #[error("open image {image}: {error}; name a readable regular file or block device")]
    Open {
        /// The image, as the user named it.
        image: String,
        /// What the system said.
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
        /// What the system said.
        error: io::Error,
    },
    /// The image ended before the bytes that were asked for: it is shorter than it was when it
    /// was opened.
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
        /// Where the image ends now, in bytes.
        end: u64,
        /// Its size when it was opened, in bytes.
        size: u64,
    },
    /// The source reported success and had not written all bytes.
    #[error(
        "cannot use {len} bytes of the page source: it wrote only {wrote} and reported success; \
         that is a mistake in the source's implementation"
    )]
    Short {
        /// Bytes that were written, each counted once.
        wrote: u64,
        /// Bytes that were asked for.
        len: u64,
    },
    /// The range was never part of the image.
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
    /// A page of the image is not what it was when the image was written.
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
    /// The table of page hashes is not usable, or not this image's.
    #[error(
        "open image {image} with the page hashes of {table}: {why}; name both files of one \
             snapshot, as they were written"
    )]
    Table {
        /// The image, as the user named it.
        image: String,
        /// The table, as the user named it.
        table: String,
        /// What is wrong.
        why: String,
    },
    /// Whoever watched a check had it end.
    #[error("check image {image}: ended at byte {at}, as was asked; start it again")]
    Cancelled {
        /// The image, as the user named it.
        image: String,
        /// Where the check had come to, in bytes.
        at: u64,
    },
    /// The source was taken down before it had answered.
    #[error("the page source ended before it answered a request; start it again")]
    Abandoned,
    /// The source's code panicked.
    #[error("cannot read from the page source: its code panicked; the read is tried again")]
    Panicked,
}
