// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of page sources and of the files that they read.

use std::error::Error;
use std::fmt::{self, Write};
use std::io;

/// Whether a read that failed is worth another attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// It may succeed later: the read is repeated, after growing pauses, until it does.
    Later,
    /// It will fail again unless something changes from outside. The pages stay missing, the
    /// threads that need them keep waiting, and the failure is reported; the read is repeated only
    /// on request, such as when a paused VM is resumed.
    Never,
}

/// An error from opening an image or fetching pages from it.
///
/// No error is ever turned into zeros: the faulter keeps waiting, and the request is retried or
/// given up with an error.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The image cannot be opened, or is neither a regular file nor a block device.
    #[error("cannot open image {image}: {source}; use a readable regular file or block device")]
    Open {
        /// The image, as the user named it.
        image: String,
        /// The system's error.
        source: io::Error,
    },
    /// The system refused a read.
    #[error("cannot read {len} bytes at offset {offset} of {image}: {source}; check the storage")]
    Read {
        /// The image, as the user named it.
        image: String,
        /// Offset in the image, in bytes.
        offset: u64,
        /// Length of the read, in bytes.
        len: u64,
        /// The system's error.
        source: io::Error,
    },
    /// The image ended before the requested bytes: it has shrunk since it was opened.
    #[error(
        "cannot read {len} bytes at offset {offset} of {image}: the image now ends at byte {end}, \
         and had {size} bytes when it was opened; restore its content"
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
        "cannot open image {image} with the page hashes of {table}: {source}; use the unmodified \
         image and table of one snapshot"
    )]
    Table {
        /// The image, as the user named it.
        image: String,
        /// The table of page hashes, as the user named it.
        table: String,
        /// The reason.
        source: TableError,
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
    /// The request was withdrawn before it was read: its [`Completion`](crate::Completion) was
    /// dropped, or the memory of its destinations [was stopped](crate::Destination::is_wanted).
    #[error("cannot read from the page source: the request was withdrawn")]
    Withdrawn,
    /// The error of a source that is none of this crate's: see [`other`](Self::other).
    #[error("cannot read from the page source: {}", OneLine(source))]
    Other {
        /// The source's own error.
        source: Box<dyn Error + Send + Sync>,
        /// Whether another attempt may succeed.
        retry: Retry,
    },
}

impl SourceError {
    /// Wraps the error of a source of one's own. Its text is one line, `CAUSE; HINT`, and follows
    /// `cannot read from the page source: `. Control characters in it, such as a server may send, are
    /// shown escaped.
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_source::{Retry, SourceError};
    ///
    /// let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
    /// let error = SourceError::other(refused, Retry::Later);
    /// assert_eq!(error.to_string(), "cannot read from the page source: connection refused");
    /// assert_eq!(error.retry(), Retry::Later);
    ///
    /// let gone = SourceError::other("the server has no image 'vm7'; check its name", Retry::Never);
    /// assert_eq!(gone.retry(), Retry::Never);
    /// ```
    pub fn other(source: impl Into<Box<dyn Error + Send + Sync>>, retry: Retry) -> Self {
        SourceError::Other { source: source.into(), retry }
    }

    /// Returns whether another attempt may succeed. That is so for all errors of this crate: a file
    /// can be restored to what it was.
    pub fn retry(&self) -> Retry {
        match self {
            SourceError::Other { retry, .. } => *retry,
            _ => Retry::Later,
        }
    }
}

/// Shows an error as one line, whatever its text: control characters are escaped.
struct OneLine<'a, E: ?Sized>(&'a E);

impl<E: fmt::Display + ?Sized> fmt::Display for OneLine<'_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for char in self.0.to_string().chars() {
            if char.is_control() {
                write!(f, "{}", char.escape_default())?;
            } else {
                f.write_char(char)?;
            }
        }
        Ok(())
    }
}

/// The reason why a table of page hashes cannot be used with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// A table whose writer has not finished it.
    #[error("the table is unfinished")]
    Unfinished,
    /// A file that is not a table.
    #[error("the file is not a table of page hashes")]
    NotATable,
    /// A header that does not match its checksum.
    #[error("the table's header is damaged")]
    Damaged,
    /// A version of the format that this crate cannot read.
    #[error("the table has version {version}, but this program reads version {readable}")]
    Version {
        /// The table's version.
        version: u32,
        /// The version that this crate reads.
        readable: u32,
    },
    /// A table for an image of an impossible size.
    #[error(transparent)]
    Size(#[from] ImageSizeError),
    /// A file that is shorter than a header.
    #[error("the table has {len} bytes, less than its header")]
    NoHeader {
        /// Length of the file, in bytes.
        len: u64,
    },
    /// A table for an image of another size.
    #[error("the table is for {expected} bytes, and the image has {size}")]
    OtherImage {
        /// Size of the table's image, in bytes.
        expected: u64,
        /// Size of the image, in bytes.
        size: u64,
    },
    /// A table whose length does not fit the size of its image.
    #[error("the table has {len} bytes instead of {expected}")]
    Length {
        /// Length of the table, in bytes.
        len: u64,
        /// The length that it should have, in bytes.
        expected: u64,
    },
}

/// The reason why an image cannot have a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageSizeError {
    /// A size that is 0 or not a multiple of 4096 bytes.
    #[error("an image of {size} bytes is not a whole number of pages of 4096 bytes")]
    NotPages {
        /// The size, in bytes.
        size: u64,
    },
    /// A size that no file can have.
    #[error("an image of {size} bytes is longer than any file can be")]
    TooLong {
        /// The size, in bytes.
        size: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_of_errors_are_escaped() {
        let error = SourceError::other("gone\n\u{1b}[2Jzürich\u{9b}", Retry::Later);
        let text = "cannot read from the page source: gone\\n\\u{1b}[2Jzürich\\u{9b}";
        assert_eq!(error.to_string(), text);
    }
}
