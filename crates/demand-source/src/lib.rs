// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

#[doc = include_str!("../docs/writing-a-source.md")]
pub mod guide {}

mod blocking;
mod cached;
mod completion;
mod convert;
mod destination;
mod error;
mod file;
mod hash;
mod hashed;
mod hashed_source;
mod image_file;
mod mapped;
mod missing;
mod padded;
mod part;
mod process;
mod replicas;
mod source;
mod sparse;
mod table;
mod threads;
mod writer;
mod written;

pub use blocking::{BlockingSource, Threaded};
pub use completion::{Completer, Completion};
pub use convert::to_usize;
pub use destination::{Destination, Lender, OwnedBytes};
pub use error::{ImageSizeError, Retry, SourceError, TableError};
pub use file::LocalFile;
pub use hash::page_hash;
pub use hashed::HashedImage;
pub use hashed_source::HashedSource;
pub use mapped::MappedBytes;
pub use missing::MissingPages;
pub use padded::ZeroPadded;
pub use part::Part;
pub use process::OwnProcess;
pub use replicas::{OtherSources, ReplicaState, Replicas, ReplicasError};
pub use source::{Chunk, Extent, PageSource, Priority, Request};
pub use sparse::extent_of_file;
pub use threads::join_within;
pub use writer::{ImageSummary, ImageWriter, ImageWriterError, PageCounts};
