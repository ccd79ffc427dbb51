// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opens a snapshot that may be in several places.

use std::sync::Arc;

use demand_source::{PageSource, Replicas};

use crate::config::source::SnapshotPlace;
use crate::error::{Error, Kind};
use crate::snapshot::image::MemoryImage;
use crate::snapshot::open::OpenSnapshot;
use crate::snapshot::remote::HostCache;
use crate::snapshot::saved::{SavedMemory, SavedVm};
use crate::vm::restore::{RestoreError, RestoreOptions};
use crate::vm::session::Session;

/// A snapshot that was opened.
pub(crate) struct Opened<'a> {
    place: &'a SnapshotPlace,
    pub(crate) snapshot: OpenSnapshot,
    /// The places after that one.
    rest: &'a [SnapshotPlace],
    cache: Option<HostCache>,
}

/// Opens the snapshot in the first place whose state can be read, through the host cache if there
/// is one. Returns it, and the state.
pub(crate) fn open<'a>(
    session: &Session,
    options: &'a RestoreOptions,
) -> Result<(Opened<'a>, SavedVm), Error> {
    let cache = open_cache(session, options)?;
    let (mut place, mut rest) = (&options.source, &options.other_sources[..]);
    loop {
        let error = match open_in(place, options, cache.as_ref()) {
            Ok((snapshot, saved)) => return Ok((Opened { place, snapshot, rest, cache }, saved)),
            Err(error) => error,
        };
        let Some((next, others)) = rest.split_first() else { return Err(error) };
        log::warn!("{error}; the next source, {next}, is tried");
        (place, rest) = (next, others);
    }
}

fn open_in(
    place: &SnapshotPlace,
    options: &RestoreOptions,
    cache: Option<&HostCache>,
) -> Result<(OpenSnapshot, SavedVm), Error> {
    let snapshot = OpenSnapshot::open_with(place, cache.cloned())?;
    let is_useless = options.other_sources.is_empty() && !snapshot.is_pushed();
    if cache.is_some() && is_useless {
        return Err(RestoreError::CacheOfFiles { snapshot: place.shown() }.into());
    }
    let saved = snapshot.read_state()?;
    Ok((snapshot, saved))
}

/// Opens the host cache, if there is to be one.
#[cfg(feature = "remote")]
fn open_cache(session: &Session, options: &RestoreOptions) -> Result<Option<HostCache>, Error> {
    let Some(config) = &options.cache else { return Ok(None) };
    if options.other_sources.is_empty() && options.source.directory().is_some() {
        return Err(RestoreError::CacheOfFiles { snapshot: options.source.shown() }.into());
    }
    let cache = HostCache::open(&config.dir, config.size)?;
    session.set_cache(cache.clone());
    Ok(Some(cache))
}

/// Without remote snapshots none has chunks.
#[cfg(not(feature = "remote"))]
fn open_cache(_: &Session, options: &RestoreOptions) -> Result<Option<HostCache>, Error> {
    let unfit = || RestoreError::CacheOfFiles { snapshot: options.source.shown() };
    options.cache.as_ref().map_or(Ok(None), |_| Err(unfit().into()))
}

impl Opened<'_> {
    /// Returns the place of the snapshot.
    pub(crate) fn place(&self) -> &SnapshotPlace {
        self.place
    }

    /// Opens the image of the memory, and those of the places after this one. A place that cannot
    /// be used now is left out.
    pub(crate) fn memory(&self, saved: &SavedMemory) -> Result<MemoryImage, Error> {
        // Whether an image belongs to the state.
        let is_its = |image: &MemoryImage| {
            image.generation()[..] == saved.generation[..] && image.size() == saved.size
        };
        let image = self.snapshot.memory(saved.size)?;
        if !is_its(&image) {
            return Err(RestoreError::MixedFiles { snapshot: self.place.shown() }.into());
        }
        if self.rest.is_empty() {
            return Ok(image);
        }
        let (generation, name) = (image.generation(), self.place.to_string());
        let mut sources: Vec<(String, Arc<dyn PageSource>)> =
            vec![(name.clone(), image.into_source())];
        for place in self.rest {
            let opened = OpenSnapshot::open_with(place, self.cache.clone()).map_err(Error::from);
            match opened.and_then(|snapshot| snapshot.memory(saved.size)) {
                Ok(image) if is_its(&image) => {
                    sources.push((place.to_string(), image.into_source()));
                }
                Ok(_) => {
                    let (snapshot, other) = (self.place.shown(), place.shown());
                    return Err(RestoreError::OtherSnapshot { snapshot, other }.into());
                }
                Err(error) => log::warn!("{error}; this source is left out"),
            }
        }
        let source = Replicas::new(sources).map_err(|error| Error::of(Kind::Failed, error))?;
        Ok(MemoryImage::Remote { source: Arc::new(source), generation, name })
    }
}
