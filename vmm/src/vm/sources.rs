// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The places that a guest's pages come from: their condition, and the figures of what is remote.

use std::sync::{Arc, Mutex};

#[cfg(feature = "remote")]
use demand_remote::image::ImageWatch;
use demand_source::Replicas;

use crate::api::{SourceState, SourceStatus};
use crate::report::{CacheReport, RemoteReport};
#[cfg(feature = "remote")]
use crate::snapshot::remote::HostCache;
use crate::sync::LockExt;

/// The places of a run, which exist once the snapshot is opened. Threads that open places and those
/// that report share it.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The places by preference; empty if there is only one.
    places: Vec<Place>,
    replicas: Option<Arc<Replicas>>,
    #[cfg(feature = "remote")]
    cache: Option<HostCache>,
    #[cfg(feature = "remote")]
    images: Vec<ImageWatch>,
}

#[derive(Debug)]
struct Place {
    name: String,
    /// Its condition until it has joined the others.
    state: SourceState,
}

/// The figures of what is remote; none of what a run does not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceFigures {
    /// The use of the host cache.
    pub cache: Option<CacheReport>,
    /// The requests for pushed snapshots.
    pub remote: Option<RemoteReport>,
}

impl Sources {
    /// Stores the names of several places, all of which are being opened.
    pub(crate) fn set_places(&self, names: impl Iterator<Item = String>) {
        let opening = |name| Place { name, state: SourceState::Opening };
        self.state.lock_always().places = names.map(opening).collect();
    }

    /// Notes that a place, by its preference, was left out.
    pub(crate) fn leave_out(&self, rank: usize) {
        if let Some(place) = self.state.lock_always().places.get_mut(rank) {
            place.state = SourceState::LeftOut;
        }
    }

    /// Stores the sources that were joined.
    pub(crate) fn set_replicas(&self, replicas: Arc<Replicas>) {
        self.state.lock_always().replicas = Some(replicas);
    }

    /// Stores the host cache that chunks are read through.
    #[cfg(feature = "remote")]
    pub(crate) fn set_cache(&self, cache: HostCache) {
        self.state.lock_always().cache = Some(cache);
    }

    /// Adds an image whose requests are counted.
    #[cfg(feature = "remote")]
    pub(crate) fn add_image(&self, image: ImageWatch) {
        self.state.lock_always().images.push(image);
    }

    /// Returns the condition of each of several places, by preference.
    pub(crate) fn status(&self) -> Vec<SourceStatus> {
        let state = self.state.lock_always();
        let joined = state.replicas.as_ref().map(|replicas| replicas.states()).unwrap_or_default();
        let status = |place: &Place| {
            let source = place.name.clone();
            match joined.iter().find(|joined| joined.name == place.name) {
                None => SourceStatus { source, state: place.state, failing_s: None, failures: 0 },
                Some(joined) => SourceStatus {
                    source,
                    state: match joined.is_down {
                        true => SourceState::Failing,
                        false => SourceState::Healthy,
                    },
                    failing_s: joined.down_for.map(|time| time.as_secs()),
                    failures: joined.failures,
                },
            }
        };
        state.places.iter().map(status).collect()
    }

    /// Returns the figures of what is remote.
    #[cfg(feature = "remote")]
    pub(crate) fn figures(&self) -> SourceFigures {
        let state = self.state.lock_always();
        let images = state.images.iter().map(|image| RemoteReport::from(image.figures()));
        SourceFigures {
            cache: state.cache.as_ref().map(|cache| cache.stats().into()),
            remote: images.reduce(RemoteReport::plus),
        }
    }

    /// Returns the figures of what is remote: nothing is.
    #[cfg(not(feature = "remote"))]
    pub(crate) fn figures(&self) -> SourceFigures {
        SourceFigures::default()
    }
}
