// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Removal of objects that no snapshot names.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use super::error::ImageError;
use super::names::{FILES, INDEXES, ObjectId, PACKS, SNAPSHOTS, WORKING_SETS};
use super::snapshot::Reads;
use crate::{Listed, Store};

/// The age below which [`gc`] removes nothing unless told otherwise: a day.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(24 * 60 * 60);

/// Options of a [`gc`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GcOptions {
    /// The age, by the store's clock and this host's, below which an object is kept. It is longer
    /// than any push takes, since a push names its objects last.
    pub grace: Duration,
    /// Whether nothing is removed, and only the result is computed.
    pub dry_run: bool,
}

impl Default for GcOptions {
    /// Returns a grace of a day, with removal.
    fn default() -> Self {
        GcOptions { grace: DEFAULT_GRACE, dry_run: false }
    }
}

/// The result of a [`gc`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Garbage {
    /// The objects that were removed, or would be.
    pub removed: Vec<Listed>,
    /// Number of objects that no snapshot names, and that are younger than the grace.
    pub young: u64,
    /// Number of snapshots.
    pub snapshots: u64,
    /// Number of objects that they name, and of working sets that they may have.
    pub live: u64,
}

/// Removes the packs, indexes, side files and working sets that no snapshot names, and the drafts
/// that interrupted writes have left in a directory. It reads each snapshot's manifest and table of
/// packs, and no chunk.
///
/// A snapshot is removed by removing its manifest; `gc` then removes what it alone has used. A push
/// that is resumed after longer than the grace, or whose parent is removed meanwhile, must not run
/// at the same time: it relies on objects that no snapshot names any more.
///
/// # Errors
///
/// [`ImageError`]. If any snapshot is unreadable, nothing is removed.
pub fn gc(store: &Store, options: GcOptions) -> Result<Garbage, ImageError> {
    store.wait(async {
        let mut candidates = Vec::new();
        for folder in [PACKS, INDEXES, FILES, WORKING_SETS] {
            candidates.extend(store.list(folder).await?.into_iter().filter(|listed| {
                // Objects with other names are not of an image.
                let name = listed.name.strip_prefix(folder).and_then(|name| name.strip_prefix('/'));
                name.and_then(ObjectId::parse).is_some()
            }));
        }
        let mut drafts = Vec::new();
        for folder in [PACKS, INDEXES, FILES, WORKING_SETS, SNAPSHOTS] {
            drafts.extend(store.drafts(folder)?);
        }
        // The snapshots are read after the objects are listed: a push that ends in between has
        // written its manifest by then, or its objects are young.
        let (snapshots, live) = live(store).await?;
        candidates.retain(|listed| !live.contains(&listed.name));
        let unnamed = (candidates.len() + drafts.len()) as u64;
        let now = SystemTime::now();
        let is_old = |listed: &Listed| {
            now.duration_since(listed.changed).is_ok_and(|age| age >= options.grace)
        };
        candidates.retain(is_old);
        drafts.retain(is_old);
        if !options.dry_run {
            for listed in &candidates {
                store.remove(&listed.name).await?;
            }
            for draft in &drafts {
                store.remove_draft(&draft.name)?;
            }
        }
        candidates.extend(drafts);
        let young = unnamed - candidates.len() as u64;
        Ok(Garbage { removed: candidates, young, snapshots, live: live.len() as u64 })
    })
}

/// Returns the number of snapshots, and the names of all objects that they name.
async fn live(store: &Store) -> Result<(u64, HashSet<String>), ImageError> {
    let (mut live, mut indexes, mut count) = (HashSet::new(), HashSet::new(), 0);
    let reads = Reads::of(store);
    for listed in store.list(SNAPSHOTS).await? {
        let prefix = format!("{SNAPSHOTS}/");
        let name = listed.name.strip_prefix(&prefix).unwrap_or(&listed.name);
        let manifest = match reads.manifest(name).await {
            // It was removed since it was listed.
            Err(ImageError::NoSnapshot { .. }) => continue,
            read => read?,
        };
        count += 1;
        live.extend(manifest.files.iter().map(|file| file.sha256.within(FILES)));
        let index = manifest.index.sha256;
        live.extend([index.within(INDEXES), index.within(WORKING_SETS)]);
        if indexes.insert(index) {
            let (head, _) = reads.head(&manifest, 0).await?;
            live.extend(head.packs.iter().map(|pack| pack.id.within(PACKS)));
        }
    }
    Ok((count, live))
}
