// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#![doc = include_str!("../README.md")]

mod blocking;
mod completion;
mod destination;
mod error;
mod file;
mod mapped;
mod source;

pub use blocking::{BlockingSource, Threaded};
pub use completion::{Completer, Completion};
pub use destination::Destination;
pub use error::SourceError;
pub use file::LocalFile;
pub use mapped::MappedBytes;
pub use source::{Chunk, Extent, PageSource, Priority, Request};
