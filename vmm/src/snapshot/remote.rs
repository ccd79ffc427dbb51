// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A snapshot behind a URL.
//!
//! | URL | the snapshot |
//! |---|---|
//! | `http://`, `https://`, `s3://` | the files of a snapshot's directory, below the URL |
//! | `nbd://` and its kin | exports with the names of these files, after the URL's name and a slash |

use std::path::Path;
use std::sync::Arc;

use demand_memory::to_usize;
use demand_remote::nbd::{self, NbdSource};
use demand_remote::{Location, ObjectImage};
use demand_source::{Destination, HashedSource, PageSource, SourceError};

use crate::snapshot::dir::{HASHES, MEMORY};
use crate::snapshot::error::ReadError;
use crate::snapshot::image::MemoryImage;
use crate::snapshot::state_file::{MAX_STATE, STATE};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A snapshot behind a URL.
#[derive(Debug)]
pub(crate) struct RemoteSnapshot {
    place: Place,
}

#[derive(Debug)]
enum Place {
    Web(Location),
    Nbd(nbd::Location),
}

impl RemoteSnapshot {
    /// Parses a URL. Nothing is opened yet.
    pub(crate) fn new(url: &str) -> Result<Self, ReadError> {
        let is_nbd = url.split_once("://").is_some_and(|(scheme, _)| scheme.starts_with("nbd"));
        let place = if is_nbd {
            url.parse().map(Place::Nbd).map_err(|error| ReadError::Url(Box::new(error)))
        } else {
            url.parse().map(Place::Web).map_err(|error| ReadError::Url(Box::new(error)))
        };
        Ok(RemoteSnapshot { place: place? })
    }

    /// Opens a file of the snapshot.
    pub(crate) fn open(&self, file: &'static str) -> Result<Arc<dyn PageSource>, ReadError> {
        let opened = match &self.place {
            Place::Web(location) => ObjectImage::open(&location.join(file))
                .map(|it| -> Arc<dyn PageSource> { Arc::new(it) })
                .map_err(BoxError::from),
            Place::Nbd(location) => {
                let options = nbd::NbdOptions::default();
                NbdSource::open(&location.join(file), options)
                    .map(|it| -> Arc<dyn PageSource> { Arc::new(it) })
                    .map_err(BoxError::from)
            }
        };
        opened.map_err(|source| ReadError::Remote { file, source })
    }

    /// Reads the state's file.
    pub(crate) fn state(&self) -> Result<Vec<u8>, ReadError> {
        let source = self.open(STATE)?;
        let failed = |source: SourceError| ReadError::Remote { file: STATE, source: source.into() };
        // One byte more than the limit is refused later, as from a directory.
        let mut bytes = vec![0; to_usize(source.size().min(MAX_STATE + 1))];
        source.read_through(0, &mut Destination::from(&mut bytes[..])).map_err(failed)?;
        Ok(bytes)
    }

    /// Opens the image of the memory; `name` is what errors call it.
    pub(crate) fn memory(&self, name: &Path) -> Result<MemoryImage, ReadError> {
        let (image, table) = (self.open(MEMORY)?, self.open(HASHES)?);
        let name = name.display().to_string();
        let source = HashedSource::open(image, table, &*name)
            .map_err(|error| ReadError::Remote { file: HASHES, source: error.into() })?;
        let generation = source.generation();
        Ok(MemoryImage::Remote { source: Arc::new(source), generation, name })
    }
}
