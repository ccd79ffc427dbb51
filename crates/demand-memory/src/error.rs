// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of pagers.

use std::io;

use demand_source::{Retry, SourceError};

use crate::BackingError;

/// Errors from creating a pager.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagerError {
    /// A backing that could not be mapped.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// A missing bitmap that could not be created.
    #[error(
        "cannot create a missing bitmap for {pages} pages: {source}; free memory, or use less \
         guest memory"
    )]
    Bitmap {
        /// Number of pages of the region.
        pages: u64,
        /// The system's error.
        source: io::Error,
    },
    /// An image that ends before the region does.
    #[error(
        "cannot fill {size} bytes of memory from offset {image_offset} of the image: it has only \
         {image_size} bytes; use an image of at least {} bytes, or less memory",
        image_offset.saturating_add(*size)
    )]
    ImageShort {
        /// Size of the region, in bytes.
        size: u64,
        /// Offset of the region in the image, in bytes.
        image_offset: u64,
        /// Size of the image, in bytes.
        image_size: u64,
    },
    /// A mapping that is shorter than the size that the backing reports.
    #[error(
        "cannot use a backing of {size} bytes: its mapping has only {mapped} bytes; this is a bug \
         in the backing"
    )]
    MappingShort {
        /// Size of the backing, in bytes.
        size: u64,
        /// Length of its mapping, in bytes.
        mapped: u64,
    },
    /// A region whose last byte would lie past the last guest address.
    #[error(
        "cannot place {size} bytes of memory at guest address {start:#x}: they exceed the last \
         guest address; choose a lower address"
    )]
    PastTheEnd {
        /// Guest physical address of the region.
        start: u64,
        /// Size of the region, in bytes.
        size: u64,
    },
    /// An image offset that is not a multiple of the page size.
    #[error("cannot fill memory from offset {0} of the image: it is not a multiple of 4096 bytes")]
    Unaligned(u64),
}

/// Errors from fetching pages or waiting for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// A wait that a kick ended; the caller may ask again.
    #[error("the wait for a page was interrupted by a kick; call again to resume")]
    Kicked,
    /// A stop of the memory: the VM is shutting down, and the pages will not arrive.
    #[error("the wait for missing pages ended: the memory was stopped")]
    Stopped,
    /// A range that does not lie in the region.
    #[error("cannot fetch {count} pages from page {first}: the region has {pages} pages")]
    OutOfRange {
        /// First page of the request.
        first: u64,
        /// Number of pages of the request.
        count: u64,
        /// Number of pages of the region.
        pages: u64,
    },
}

/// Errors from arming the guest's mapping of a region, or from creating an unarmed one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GuestTrapError {
    /// A guest mapping that is armed already.
    #[error("cannot make another guest mapping: the region already has an armed one")]
    Twice,
    /// An unarmed guest mapping that exists: a memslot over it would show zeros.
    #[error(
        "cannot arm the guest's mapping: the region has an unarmed one, over which a memslot may \
         exist; arm it first, or drop the other"
    )]
    AfterUnarmed,
    /// Pages that were requested earlier.
    #[error(
        "cannot arm the guest's mapping: {pages} pages from page {first} on were requested before, \
         such as by a read or write through vm-memory; arm it before the first request"
    )]
    AfterFetch {
        /// First page that is present or being fetched.
        first: u64,
        /// Number of pages that are present or being fetched.
        pages: u64,
    },
    /// Memory that was written past the pager, and that the source's content would replace.
    #[error(
        "cannot arm the guest's mapping: {pages} pages from page {first} on were written before, \
         through another mapping of the backing; write through vm-memory, after arming"
    )]
    AfterWrite {
        /// First page that holds data.
        first: u64,
        /// Number of pages that hold data.
        pages: u64,
    },
    /// A mapping that is not as long as the region.
    #[error(
        "cannot use a mapping of {mapping} bytes for the guest of a region of {region}; map the \
         region's backing"
    )]
    Length {
        /// Length of the mapping, in bytes.
        mapping: u64,
        /// Length of the region, in bytes.
        region: u64,
    },
    /// A mapping without the trap that its vCPUs need.
    #[error(
        "cannot use a mapping for the guest: accesses to missing pages are not trapped there; arm \
         it first"
    )]
    NotTrapped,
}

/// Errors from populating or mapping claimed pages.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PopulateError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Backing(#[from] BackingError),
    #[error("cannot map populated pages for the guest: {0}; retrying")]
    Map(#[source] io::Error),
}

impl PopulateError {
    /// Returns whether another attempt may succeed without a change from outside.
    pub(crate) fn retry(&self) -> Retry {
        match self {
            PopulateError::Source(error) => error.retry(),
            PopulateError::Backing(_) | PopulateError::Map(_) => Retry::Later,
        }
    }
}
