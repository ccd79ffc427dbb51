// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A snapshot behind a URL.
//!
//! | URL | the snapshot |
//! |---|---|
//! | `s3://STORE/NAME`, `https:`, `http:`, `file:` | one that was pushed to the store, by its name |
//! | `s3://PREFIX`, `https:`, `http:` | else the files of a snapshot's directory, below the URL |
//! | `nbd:` and its kin | exports with the names of these files, after the URL's name and a slash |
//! | `pager:SOCKET` | the same of a pager; with `files=DIR`, all but the memory is in a directory |
//! | `pager+firecracker:SOCKET?files=DIR` | the memory by a page fault handler, the rest in a directory |
//!
//! All but the last two need the feature `remote`.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use demand_memory::to_usize;
use demand_pager::firecracker::FirecrackerSource;
use demand_pager::{PagerError, PagerOptions, PagerSource};
#[cfg(feature = "remote")]
pub(crate) use demand_remote::HostCache;
#[cfg(feature = "remote")]
use demand_remote::image::{FetchAround, ImageError, ObjectId, RemoteImage, RemoteOptions};
#[cfg(feature = "remote")]
use demand_remote::nbd::{self, NbdOptions, NbdSource};
#[cfg(feature = "remote")]
use demand_remote::{Location, ObjectImage, Store};
use demand_source::{
    Chunk, Destination, HashedSource, LocalFile, PageSource, Priority, Request, SourceError,
};

use crate::config::FetchAroundConfig;
use crate::config::pager::{PagerKind, PagerPlace};
use crate::late_file::LateFile;
use crate::snapshot::dir::{HASHES, MEMORY};
use crate::snapshot::error::ReadError;
use crate::snapshot::image::MemoryImage;
use crate::snapshot::open::{open_directory, open_file};
use crate::snapshot::state_file::{MAX_STATE, STATE};

/// Without remote snapshots there is no host cache.
#[cfg(not(feature = "remote"))]
pub(crate) type HostCache = std::convert::Infallible;

/// How the chunks of a pushed snapshot are read.
#[derive(Clone, Debug)]
pub(crate) struct Reading {
    /// The host cache that they are read through.
    pub(crate) cache: Option<HostCache>,
    /// The ones that are fetched beside one that a fault needs.
    #[cfg_attr(not(feature = "remote"), allow(dead_code, reason = "no snapshot is pushed"))]
    pub(crate) around: FetchAroundConfig,
}

#[cfg(feature = "remote")]
impl Reading {
    fn options(&self) -> RemoteOptions {
        let around = match self.around {
            FetchAroundConfig::Auto => FetchAround::Auto,
            FetchAroundConfig::Bytes(bytes) => FetchAround::Bytes(bytes),
            FetchAroundConfig::Off => FetchAround::Off,
        };
        RemoteOptions { around, ..RemoteOptions::default() }
    }
}

/// Bytes of a boot file that are read at once.
const STEP: u64 = 1 << 20;

/// A snapshot behind a URL.
#[derive(Debug)]
pub(crate) enum RemoteSnapshot {
    /// One that was pushed to a store.
    #[cfg(feature = "remote")]
    Pushed(Arc<RemoteImage>),
    /// Files on a web server or in an object store.
    #[cfg(feature = "remote")]
    Web(Location),
    /// Exports of an NBD server.
    #[cfg(feature = "remote")]
    Nbd(nbd::Location),
    /// Images of a pager.
    Pager {
        /// The protocol.
        kind: PagerKind,
        /// The pager, and the snapshot's name there.
        location: demand_pager::Location,
        /// The files except the memory, unless the pager has them.
        files: Option<Directory>,
    },
}

/// A directory with the files of a snapshot, except the memory.
#[derive(Debug)]
pub(crate) struct Directory {
    dir: OwnedFd,
    path: PathBuf,
}

impl RemoteSnapshot {
    /// Finds the snapshot behind a URL. The chunks of one that was pushed are read as `reading` says.
    pub(crate) fn open(url: &str, reading: &Reading) -> Result<Self, ReadError> {
        if PagerKind::of(url).is_none() {
            return RemoteSnapshot::open_far(url, reading);
        }
        let place = url.parse::<PagerPlace>().map_err(|error| ReadError::Url(error.into()))?;
        let PagerPlace { kind, location, files } = place;
        let directory = |path: PathBuf| open_directory(&path).map(|dir| Directory { dir, path });
        Ok(RemoteSnapshot::Pager { kind, location, files: files.map(directory).transpose()? })
    }

    #[cfg(not(feature = "remote"))]
    fn open_far(_: &str, _: &Reading) -> Result<Self, ReadError> {
        Err(ReadError::NoRemote)
    }

    #[cfg(feature = "remote")]
    fn open_far(url: &str, reading: &Reading) -> Result<Self, ReadError> {
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
        let options = reading.options();
        let opened = match reading.cache.clone() {
            Some(cache) => RemoteImage::open_cached(&store, &name, options, cache),
            None => RemoteImage::open_with(&store, &name, options),
        };
        match opened {
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

    /// Returns the image of a snapshot that was pushed to a store.
    #[cfg(feature = "remote")]
    pub(crate) fn pushed(&self) -> Option<&RemoteImage> {
        match self {
            RemoteSnapshot::Pushed(image) => Some(image),
            _ => None,
        }
    }

    /// Returns whether the snapshot was pushed to a store.
    pub(crate) fn is_pushed(&self) -> bool {
        #[cfg(feature = "remote")]
        return matches!(self, RemoteSnapshot::Pushed(_));
        #[cfg(not(feature = "remote"))]
        false
    }

    /// Returns the digest of the index of a snapshot that was pushed to a store.
    #[cfg(feature = "remote")]
    pub(crate) fn index(&self) -> Option<ObjectId> {
        match self {
            RemoteSnapshot::Pushed(image) => Some(image.manifest().index.sha256),
            _ => None,
        }
    }

    /// Opens a file that is not part of a pushed snapshot.
    fn open_file(&self, file: &'static str) -> Result<Arc<dyn PageSource>, ReadError> {
        let failed = |source| ReadError::Remote { file, source };
        match self {
            RemoteSnapshot::Pager { files: Some(Directory { dir, path }), .. }
                if file != MEMORY =>
            {
                match LocalFile::of_file(open_file(dir, file)?, path.join(file)) {
                    Ok(source) => Ok(Arc::new(source)),
                    Err(error) => Err(failed(error.into())),
                }
            }
            RemoteSnapshot::Pager { kind: PagerKind::Firecracker, .. } => {
                Err(ReadError::Missing { file })
            }
            RemoteSnapshot::Pager { location, .. } => {
                match PagerSource::open(&location.join(file), PagerOptions::default()) {
                    Ok(source) => Ok(Arc::new(source)),
                    Err(error) => Err(failed(error.into())),
                }
            }
            #[cfg(feature = "remote")]
            RemoteSnapshot::Web(location) => match ObjectImage::open(&location.join(file)) {
                Ok(source) => Ok(Arc::new(source)),
                Err(error) => Err(failed(error.into())),
            },
            #[cfg(feature = "remote")]
            RemoteSnapshot::Nbd(location) => {
                match NbdSource::open(&location.join(file), NbdOptions::default()) {
                    Ok(source) => Ok(Arc::new(source)),
                    Err(error) => Err(failed(error.into())),
                }
            }
            #[cfg(feature = "remote")]
            RemoteSnapshot::Pushed(_) => Err(ReadError::Missing { file }),
        }
    }

    /// Reads the state's file.
    pub(crate) fn state(&self) -> Result<Vec<u8>, ReadError> {
        #[cfg(feature = "remote")]
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

    /// Opens the image of the memory, which has `size` bytes; `name` is what errors call it.
    pub(crate) fn memory(&self, name: &Path, size: u64) -> Result<MemoryImage, ReadError> {
        let name = name.display().to_string();
        #[cfg(feature = "remote")]
        if let RemoteSnapshot::Pushed(image) = self {
            let generation = image.generation();
            return Ok(MemoryImage::Remote { source: image.clone(), generation, name });
        }
        let image: Arc<dyn PageSource> = match self {
            RemoteSnapshot::Pager { kind: PagerKind::Firecracker, location, .. } => {
                let source =
                    FirecrackerSource::open(location.socket(), size, PagerOptions::default());
                let failed =
                    |error: PagerError| ReadError::Remote { file: MEMORY, source: error.into() };
                Arc::new(source.map_err(failed)?)
            }
            _ => self.open_file(MEMORY)?,
        };
        let table = self.open_file(HASHES)?;
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
        let failed = |source| ReadError::File { file: name, source };
        #[cfg(feature = "remote")]
        if let RemoteSnapshot::Pushed(image) = self {
            let file = image.manifest().files.iter().find(|file| file.name == name);
            let len = file.ok_or(ReadError::Missing { file: name })?.size;
            check(len)?;
            let image = image.clone();
            let begun = LateFile::begin(name, len, move |at| {
                let content = image.file(name).map_err(|error| error.to_string())?;
                Ok(content[to_usize(at)..].to_vec())
            });
            return begun.map_err(failed);
        }
        let source = self.open_file(name)?;
        let len = source.size();
        check(len)?;
        let begun = LateFile::begin(name, len, move |at| {
            read(&*source, at, STEP.min(len - at)).map_err(|error| error.to_string())
        });
        begun.map_err(failed)
    }
}

/// Reads bytes with the priority of background fill: faults come first.
fn read(source: &dyn PageSource, offset: u64, len: u64) -> Result<Vec<u8>, SourceError> {
    let (destination, bytes) = Destination::owned(vec![0; to_usize(len)]);
    let chunks = vec![Chunk { offset, destination }];
    source.submit(Request { priority: Priority::Fill, chunks }).wait()?;
    bytes.take()
}
