// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The image of a snapshot's memory, wherever it is.

use std::sync::Arc;

use demand_memory::to_usize;
use demand_source::{Destination, HashedImage, PageSource, SourceError};

/// The image of a snapshot's memory. Each page is checked as it is fetched.
pub(crate) enum MemoryImage {
    /// Files of this system.
    Local(HashedImage),
    /// Another source.
    Remote {
        /// The source, which checks what it delivers.
        source: Arc<dyn PageSource>,
        /// The generation id that the image was written with.
        generation: [u8; 16],
        /// The image's name, for messages.
        name: String,
    },
}

impl MemoryImage {
    /// Returns the generation id that the image was written with.
    pub(crate) fn generation(&self) -> [u8; 16] {
        match self {
            MemoryImage::Local(image) => image.generation(),
            MemoryImage::Remote { generation, .. } => *generation,
        }
    }

    /// Returns the size of the image, in bytes.
    pub(crate) fn size(&self) -> u64 {
        match self {
            MemoryImage::Local(image) => image.size(),
            MemoryImage::Remote { source, .. } => source.size(),
        }
    }

    /// Reads and checks the whole image. It calls `progress` repeatedly with the number of bytes
    /// checked so far; `progress` cancels the check by returning `false`.
    pub(crate) fn verify(&self, progress: &mut dyn FnMut(u64) -> bool) -> Result<(), SourceError> {
        match self {
            MemoryImage::Local(image) => image.verify(progress),
            MemoryImage::Remote { source, name, .. } => read_all(&**source, name, progress),
        }
    }

    /// Returns the source of the memory's pages.
    pub(crate) fn into_source(self) -> Arc<dyn PageSource> {
        match self {
            MemoryImage::Local(image) => Arc::new(image),
            MemoryImage::Remote { source, .. } => source,
        }
    }
}

/// Reads all data of a source, which checks it.
fn read_all(
    source: &dyn PageSource,
    name: &str,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<(), SourceError> {
    /// Bytes that are read at once.
    const STEP: u64 = 1 << 20;
    let mut bytes = vec![0; to_usize(STEP)];
    let (mut at, size) = (0, source.size());
    while at < size {
        let extent = source.extent(at)?;
        if extent.is_hole() {
            at = extent.end();
        } else {
            let len = to_usize(STEP.min(extent.end() - at));
            source.read_through(at, &mut Destination::from(&mut bytes[..len]))?;
            at += len as u64;
        }
        if !progress(at) {
            return Err(SourceError::Cancelled { image: name.to_owned(), at });
        }
    }
    Ok(())
}
