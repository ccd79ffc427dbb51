// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Facts about a snapshot, from its index.

use std::collections::HashMap;

use super::block::Block;
use super::error::ImageError;
use super::layout::BLOCK_CHUNKS;
use super::manifest::Manifest;
use super::names::ObjectId;
use super::snapshot::Snapshot;
use crate::Store;

/// Facts about a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// The manifest: sizes of the image, its chunks and its side files, the parent and the time.
    pub manifest: Manifest,
    /// Number of chunks of the image.
    pub chunks: u64,
    /// Those of them that are all zeros, and are not stored.
    pub zero: u64,
    /// Bytes of the stored chunks, each counted once for each chunk of the image.
    pub stored_bytes: u64,
    /// Chunks that are stored in the same place as the parent's, or `None` if the store does not
    /// have the parent any more.
    pub shared: Option<u64>,
    /// Number of packs.
    pub packs: u64,
    /// Bytes of these packs, including chunks that only other snapshots use.
    pub pack_bytes: u64,
}

/// Reads the index of a snapshot, and that of its parent, and returns what they say.
///
/// # Errors
///
/// [`ImageError`].
pub fn info(store: &Store, snapshot: &str) -> Result<Info, ImageError> {
    store.wait(async {
        let snapshot = Snapshot::open(store, snapshot).await?;
        let (mut stored, mut stored_bytes) = (0_u64, 0);
        snapshot
            .scan(|_, block| {
                for entry in block.entries().iter().flatten() {
                    stored += 1;
                    stored_bytes += u64::from(entry.len);
                }
                Ok(())
            })
            .await?;
        let shared = match &snapshot.manifest.parent {
            Some(parent) => match Snapshot::open(store, parent).await {
                Ok(parent) => Some(shared(&snapshot, &parent).await?),
                Err(ImageError::NoSnapshot { .. }) => None,
                Err(error) => return Err(error),
            },
            None => Some(0),
        };
        let chunks = snapshot.head.geometry.chunks();
        Ok(Info {
            chunks,
            zero: chunks - stored,
            stored_bytes,
            shared,
            packs: snapshot.head.packs.len() as u64,
            pack_bytes: snapshot.head.packs.iter().map(|pack| u64::from(pack.len)).sum(),
            manifest: snapshot.manifest,
        })
    })
}

/// Returns the number of chunks that both snapshots have in the same place.
async fn shared(one: &Snapshot, other: &Snapshot) -> Result<u64, ImageError> {
    let mut places: HashMap<u64, (ObjectId, u32)> = HashMap::new();
    other
        .scan(|number, block| {
            places.extend(places_of(other, number, block));
            Ok(())
        })
        .await?;
    let mut count = 0;
    one.scan(|number, block| {
        let same =
            places_of(one, number, block).filter(|(chunk, place)| places.get(chunk) == Some(place));
        count += same.count() as u64;
        Ok(())
    })
    .await?;
    Ok(count)
}

/// Returns the chunks of a block that are not all zeros, and their packs and offsets there.
fn places_of(
    snapshot: &Snapshot,
    number: u64,
    block: &Block,
) -> impl Iterator<Item = (u64, (ObjectId, u32))> {
    (number * BLOCK_CHUNKS..).zip(block.entries()).filter_map(|(chunk, entry)| {
        let entry = (*entry)?;
        let pack = snapshot.head.packs.get(usize::try_from(entry.pack).ok()?)?;
        Some((chunk, (pack.id, entry.offset)))
    })
}
