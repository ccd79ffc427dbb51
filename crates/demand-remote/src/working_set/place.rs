// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The places of working sets.

use std::path::Path;

use super::WorkingSetError;
use crate::image::{ObjectId, WORKING_SETS};
use crate::{Location, Store};

/// The name of the working set beside the files of a snapshot.
const NAME: &str = "working-set";

/// Returns the place of the working set of a snapshot whose files are below this one.
pub fn beside_directory(snapshot: &Location) -> Location {
    snapshot.join(NAME)
}

/// Returns the place of the working set of an image in a store, by the digest of its index.
pub fn beside_image(store: &Location, index: ObjectId) -> Location {
    store.join(WORKING_SETS).join(&index.to_string())
}

/// Opens the store that has, or will have, an object. Returns it, and the object's name there.
pub(crate) fn store_of(place: &Location) -> Result<(Store, String), WorkingSetError> {
    // The URL itself is the object's, with its query, which may be a signature.
    if matches!(place, Location::Web(_)) {
        return Ok((Store::open(place)?, String::new()));
    }
    let folder = || WorkingSetError::Folder { place: place.to_string() };
    if let Location::Path(path) = place
        && path.is_dir()
    {
        return Err(folder());
    }
    let (store, name) = place.split().ok_or_else(folder)?;
    Ok((Store::open(&store)?, name))
}

/// Returns whether a place is a path at which there is nothing. Its folder is not created.
pub(crate) fn is_missing_path(place: &Location) -> bool {
    matches!(place, Location::Path(path) if !exists(path))
}

fn exists(path: &Path) -> bool {
    path.try_exists().unwrap_or(true)
}
