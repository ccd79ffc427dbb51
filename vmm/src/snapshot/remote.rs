// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A snapshot behind a URL.
//!
//! | URL | the snapshot |
//! |---|---|
//! | `s3://STORE/NAME`, `https:`, `http:`, `file:` | one that was pushed to the store, by its name |
//! | `s3://PREFIX`, `https:`, `http:` | else the files of a snapshot's directory, below the URL |
//! | `nbd:` and its kin | exports with the names of these files, after the URL's name and a slash |

use std::path::Path;
use std::sync::Arc;

use demand_memory::to_usize;
use demand_remote::image::{ImageError, RemoteImage};
use demand_remote::nbd::{self, NbdOptions, NbdSource};
use demand_remote::{Location, ObjectImage, Store};
use demand_source::{Chunk, Destination, HashedSource, PageSource, Priority, Request, SourceError};

use crate::late_file::LateFile;
use crate::snapshot::dir::{HASHES, MEMORY};
use crate::snapshot::error::ReadError;
use crate::snapshot::image::MemoryImage;
use crate::snapshot::state_file::{MAX_STATE, STATE};

/// Bytes of a boot file that are read at once.
const STEP: u64 = 1 << 20;

/// A snapshot behind a URL.
#[derive(Debug)]
pub(crate) enum RemoteSnapshot {
    /// One that was pushed to a store.
    Pushed(Arc<RemoteImage>),
    /// Files on a web server or in an object store.
    Web(Location),
    /// Exports of an NBD server.
    Nbd(nbd::Location),
}

impl RemoteSnapshot {
    /// Finds the snapshot behind a URL.
    pub(crate) fn open(url: &str) -> Result<Self, ReadError> {
        let unusable = |error| ReadError::Url(error);
        if url.split_once("://").is_some_and(|(scheme, _)| scheme.starts_with("nbd")) {
            let location = url.parse::<nbd::Location>();
            return location.map(RemoteSnapshot::Nbd).map_err(|error| unusable(error.into()));
        }
        let location = url.parse::<Location>().map_err(|error| unusable(error.into()))?;
        let Some((folder, name)) = location.split() else {
            return Ok(RemoteSnapshot::Web(location));
        };
        let store = Store::open(&folder).map_err(|error| unusable(error.into()))?;
        match RemoteImage::open(&store, &name) {
            Ok(image) => Ok(RemoteSnapshot::Pushed(Arc::new(image))),
            // Names that no pushed snapshot can have, and those that the store does not know.
            Err(ImageError::NoSnapshot { .. } | ImageError::Name { .. })
                if !matches!(location, Location::Path(_)) =>
            {
                Ok(RemoteSnapshot::Web(location))
            }
            Err(error) => Err(unusable(error.into())),
        }
    }

    /// Opens a file that is not part of a pushed snapshot.
    fn open_file(&self, file: &'static str) -> Result<Arc<dyn PageSource>, ReadError> {
        let failed = |source| ReadError::Remote { file, source };
        match self {
            RemoteSnapshot::Web(location) => match ObjectImage::open(&location.join(file)) {
                Ok(source) => Ok(Arc::new(source)),
                Err(error) => Err(failed(error.into())),
            },
            RemoteSnapshot::Nbd(location) => {
                match NbdSource::open(&location.join(file), NbdOptions::default()) {
                    Ok(source) => Ok(Arc::new(source)),
                    Err(error) => Err(failed(error.into())),
                }
            }
            RemoteSnapshot::Pushed(_) => Err(ReadError::Missing { file }),
        }
    }

    /// Reads the state's file.
    pub(crate) fn state(&self) -> Result<Vec<u8>, ReadError> {
        if let RemoteSnapshot::Pushed(image) = self {
            return image.file(STATE).map_err(|error| ReadError::Url(error.into()));
        }
        let source = self.open_file(STATE)?;
        let failed = |source: SourceError| ReadError::Remote { file: STATE, source: source.into() };
        // One byte more than the limit is refused later, as from a directory.
        let mut bytes = vec![0; to_usize(source.size().min(MAX_STATE + 1))];
        source.read_through(0, &mut Destination::from(&mut bytes[..])).map_err(failed)?;
        Ok(bytes)
    }

    /// Opens the image of the memory; `name` is what errors call it.
    pub(crate) fn memory(&self, name: &Path) -> Result<MemoryImage, ReadError> {
        let name = name.display().to_string();
        if let RemoteSnapshot::Pushed(image) = self {
            let generation = image.generation();
            return Ok(MemoryImage::Remote { source: image.clone(), generation, name });
        }
        let (image, table) = (self.open_file(MEMORY)?, self.open_file(HASHES)?);
        let source = HashedSource::open(image, table, &*name)
            .map_err(|error| ReadError::Remote { file: HASHES, source: error.into() })?;
        let generation = source.generation();
        Ok(MemoryImage::Remote { source: Arc::new(source), generation, name })
    }

    /// Begins to copy a boot file; `check` is called with its length first.
    pub(crate) fn boot_file(
        &self,
        name: &'static str,
        check: impl Fn(u64) -> Result<(), ReadError>,
    ) -> Result<Arc<LateFile>, ReadError> {
        let begun = if let RemoteSnapshot::Pushed(image) = self {
            let file = image.manifest().files.iter().find(|file| file.name == name);
            let len = file.ok_or(ReadError::Missing { file: name })?.size;
            check(len)?;
            let image = image.clone();
            LateFile::begin(name, len, move |at| {
                let content = image.file(name).map_err(|error| error.to_string())?;
                Ok(content[to_usize(at)..].to_vec())
            })
        } else {
            let source = self.open_file(name)?;
            let len = source.size();
            check(len)?;
            LateFile::begin(name, len, move |at| {
                read(&*source, at, STEP.min(len - at)).map_err(|error| error.to_string())
            })
        };
        begun.map_err(|source| ReadError::File { file: name, source })
    }
}

/// Reads bytes with the priority of background fill: faults come first.
fn read(source: &dyn PageSource, offset: u64, len: u64) -> Result<Vec<u8>, SourceError> {
    let (destination, bytes) = Destination::owned(vec![0; to_usize(len)]);
    let chunks = vec![Chunk { offset, destination }];
    source.submit(Request { priority: Priority::Fill, chunks }).wait()?;
    bytes.take()
}
