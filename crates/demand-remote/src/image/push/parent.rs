// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The parent of a push: the chunks that may be taken from it.

use std::collections::{HashMap, HashSet};

use demand_source::{Destination, HashedImage, PageSource, to_usize};

use super::packs::chunks_per_pack;
use crate::Store;
use crate::image::block::{Block, Entry};
use crate::image::error::ImageError;
use crate::image::layout::{BLOCK_CHUNKS, Geometry, Pack};
use crate::image::names::ObjectId;
use crate::image::snapshot::Snapshot;

/// A pack is reused only if at least one of so many of its chunks is in the parent's image.
const LIVE_SHARE: u64 = 4;
/// Number of packs of one block beyond which chunks are stored again.
const MOST_PACKS: usize = 64;

/// An open parent.
pub(super) struct Parent<'a> {
    snapshot: Snapshot,
    blocks: HashMap<u64, Block>,
    /// Numbers of the packs with too few chunks in use.
    thin: HashSet<u32>,
    /// Packs whose chunks of a block are stored again, by block.
    scattered: HashMap<u64, HashSet<u32>>,
    image: Option<&'a HashedImage>,
}

impl<'a> Parent<'a> {
    /// Opens a parent and reads its index.
    pub(super) fn open(
        store: &Store,
        name: &str,
        geometry: Geometry,
        image: Option<&'a HashedImage>,
    ) -> Result<Self, ImageError> {
        let snapshot = store.wait(Snapshot::open(store, name))?;
        let unfit = |why| Err(ImageError::Parent { parent: name.to_owned(), why });
        if snapshot.head.geometry.chunk_size() != geometry.chunk_size() {
            return unfit("its chunks have another size");
        }
        if image.is_some_and(|image| {
            image.generation() != snapshot.head.generation
                || image.size() != snapshot.head.geometry.size()
        }) {
            return unfit("the local image that was given for it is another one");
        }
        let mut live: HashMap<u32, u64> = HashMap::new();
        let (mut blocks, mut scattered) = (HashMap::new(), HashMap::new());
        let most = MOST_PACKS.max(2 * natural_packs(geometry));
        store.wait(snapshot.scan(|number, block| {
            let mut here: HashMap<u32, u64> = HashMap::new();
            for entry in block.entries().iter().flatten() {
                *live.entry(entry.pack).or_default() += 1;
                *here.entry(entry.pack).or_default() += 1;
            }
            if here.len() > most {
                scattered.insert(number, least_used(here, most / 2));
            }
            blocks.insert(number, block.clone());
            Ok(())
        }))?;
        let thin = |(pack, live): (u32, u64)| {
            let chunks = snapshot.head.packs.get(to_usize(u64::from(pack))).map(|pack| pack.chunks);
            chunks.is_none_or(|chunks| live * LIVE_SHARE < u64::from(chunks)).then_some(pack)
        };
        let thin = live.into_iter().filter_map(thin).collect();
        Ok(Parent { snapshot, blocks, thin, scattered, image })
    }

    /// Returns the entry of a chunk, unless it is all zeros or better stored again.
    pub(super) fn entry(&self, chunk: u64) -> Option<Entry> {
        let (number, index) = (chunk / BLOCK_CHUNKS, to_usize(chunk % BLOCK_CHUNKS));
        let entry = self.blocks.get(&number)?.entry(index)?;
        let again = self.thin.contains(&entry.pack)
            || self.scattered.get(&number).is_some_and(|packs| packs.contains(&entry.pack));
        (!again).then_some(entry)
    }

    /// Returns whether the local copy of the parent's image has this content at `offset` (bytes),
    /// and the chunk there has the same length. `buffer` is reused by the next call.
    pub(super) fn has_content(
        &self,
        offset: u64,
        content: &[u8],
        buffer: &mut Vec<u8>,
    ) -> Result<bool, ImageError> {
        let Some(image) = self.image else { return Ok(false) };
        let geometry = self.snapshot.head.geometry;
        if geometry.chunk_len(offset / geometry.chunk_size()) != content.len() {
            return Ok(false);
        }
        buffer.resize(content.len(), 0);
        image.read_through(offset, &mut Destination::from(&mut buffer[..]))?;
        Ok(*buffer == content)
    }

    /// Returns the pack of an entry, which is one of this parent's.
    pub(super) fn pack(&self, entry: &Entry) -> Pack {
        let unknown = Pack { id: ObjectId([0; 32]), len: 0, chunks: 0 };
        // Decoding has checked the number.
        self.snapshot.head.packs.get(to_usize(u64::from(entry.pack))).copied().unwrap_or(unknown)
    }

    /// Checks that the parent was not removed meanwhile, and its packs with it.
    pub(super) fn check_still_there(&self, store: &Store) -> Result<(), ImageError> {
        let parent = self.snapshot.name.clone();
        let now = store.wait(self.snapshot.reads.manifest(&parent));
        if now.is_ok_and(|now| now.index == self.snapshot.manifest.index) {
            return Ok(());
        }
        let why = "it was removed or replaced during the push";
        Err(ImageError::Parent { parent, why })
    }
}

/// Returns the number of packs that a block names if all its chunks are stored in order.
fn natural_packs(geometry: Geometry) -> usize {
    to_usize(BLOCK_CHUNKS.div_ceil(u64::from(chunks_per_pack(geometry)))) + 1
}

/// Returns all packs but the `keep` that have the most chunks.
fn least_used(chunks: HashMap<u32, u64>, keep: usize) -> HashSet<u32> {
    let mut packs: Vec<(u32, u64)> = chunks.into_iter().collect();
    packs.sort_unstable_by_key(|(pack, chunks)| (std::cmp::Reverse(*chunks), *pack));
    packs.into_iter().skip(keep).map(|(pack, _)| pack).collect()
}
