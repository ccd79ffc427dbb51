// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The packs of a push: fills them with chunks and writes them to the store.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use demand_source::to_usize;
use tokio::task::JoinHandle;

use super::PushSummary;
use super::parent::Parent;
use crate::image::block::{ALIGNMENT, Entry};
use crate::image::chunk::Coding;
use crate::image::error::ImageError;
use crate::image::layout::{Geometry, MOST_PACK_CHUNKS, Pack, digest};
use crate::image::names::{ObjectId, PACKS};
use crate::{Store, StoreError, runtime};

/// Bytes of content that one pack is for: small enough for one plain write.
const PACK_CONTENT: u64 = 32 << 20;
/// Number of packs that are written at the same time.
const UPLOADS: usize = 2;

/// Returns the number of chunks that a push puts into one pack.
pub(super) fn chunks_per_pack(geometry: Geometry) -> u16 {
    let chunks = PACK_CONTENT / geometry.chunk_size();
    u16::try_from(chunks).unwrap_or(u16::MAX).min(MOST_PACK_CHUNKS)
}

/// Writes an object unless the store has it whole; returns whether it wrote.
pub(super) async fn put_if_missing(
    store: &Store,
    object: String,
    bytes: Bytes,
) -> Result<bool, StoreError> {
    if store.has(&object, &bytes).await? {
        return Ok(false);
    }
    store.put(&object, bytes).await?;
    Ok(true)
}

/// A pack of the index's table.
enum Slot {
    /// The parent's pack.
    Known(Pack),
    /// A pack that is being filled or written.
    Pending,
}

/// A write in progress: the pack, and whether the store did not have it.
type Upload = JoinHandle<Result<(Pack, bool), StoreError>>;

/// The packs of one push.
pub(super) struct Packs<'a> {
    store: &'a Store,
    parent: Option<&'a Parent<'a>>,
    chunks_per_pack: u16,
    /// The table of packs, in the order of their first chunks.
    table: Vec<Slot>,
    /// Numbers in the table of the parent's packs, by their numbers there.
    reused: HashMap<u32, u32>,
    /// The pack that is being filled, and the number of its chunks.
    filling: Vec<u8>,
    chunks: u16,
    /// Its number in the table.
    number: u32,
    bytes: u64,
    uploads: VecDeque<(u32, Upload)>,
}

impl<'a> Packs<'a> {
    pub(super) fn new(
        store: &'a Store,
        geometry: Geometry,
        parent: Option<&'a Parent<'a>>,
    ) -> Self {
        let (table, reused, filling, uploads) = Default::default();
        Packs {
            store,
            parent,
            chunks_per_pack: chunks_per_pack(geometry),
            table,
            reused,
            filling,
            chunks: 0,
            number: 0,
            bytes: 0,
            uploads,
        }
    }

    /// Returns the number of bytes of the new packs so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes + self.filling.len() as u64
    }

    /// Adds a pack to the table and returns its number.
    fn add_slot(&mut self, slot: Slot) -> u32 {
        let number = u32::try_from(self.table.len()).unwrap_or(u32::MAX);
        self.table.push(slot);
        number
    }

    /// Returns the entry for a chunk of the parent.
    pub(super) fn reuse(&mut self, entry: Entry) -> Entry {
        let number = match (self.reused.get(&entry.pack), self.parent) {
            (Some(number), _) => *number,
            (None, Some(parent)) => {
                let number = self.add_slot(Slot::Known(parent.pack(&entry)));
                self.reused.insert(entry.pack, number);
                number
            }
            // Only a parent's entries are reused.
            (None, None) => u32::MAX,
        };
        Entry { pack: number, ..entry }
    }

    /// Stores a chunk and returns its entry.
    pub(super) fn add(
        &mut self,
        coding: Coding,
        stored: &[u8],
        summary: &mut PushSummary,
    ) -> Result<Entry, ImageError> {
        if self.chunks == 0 {
            self.number = self.add_slot(Slot::Pending);
        }
        self.filling.resize(self.filling.len().next_multiple_of(ALIGNMENT as usize), 0);
        let entry = Entry {
            pack: self.number,
            offset: u32::try_from(self.filling.len()).unwrap_or(u32::MAX),
            len: u32::try_from(stored.len()).unwrap_or(u32::MAX),
            coding,
            ordinal: self.chunks,
            digest: digest(stored),
        };
        self.filling.extend(stored);
        self.chunks += 1;
        if self.chunks == self.chunks_per_pack {
            self.write(summary)?;
        }
        Ok(entry)
    }

    /// Begins to write the pack that is being filled.
    fn write(&mut self, summary: &mut PushSummary) -> Result<(), ImageError> {
        while self.uploads.len() >= UPLOADS {
            self.end_upload(summary)?;
        }
        let capacity = self.filling.len();
        let bytes = std::mem::replace(&mut self.filling, Vec::with_capacity(capacity));
        let (chunks, store) = (std::mem::take(&mut self.chunks), self.store.clone());
        self.bytes += bytes.len() as u64;
        let write = async move {
            let bytes = Bytes::from(bytes);
            let id = ObjectId::of(&bytes);
            let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let written = put_if_missing(&store, id.within(PACKS), bytes).await?;
            Ok((Pack { id, len, chunks }, written))
        };
        self.uploads.push_back((self.number, runtime::handle().spawn(write)));
        Ok(())
    }

    /// Waits for the first pack in progress.
    fn end_upload(&mut self, summary: &mut PushSummary) -> Result<(), ImageError> {
        let Some((number, upload)) = self.uploads.pop_front() else { return Ok(()) };
        let (pack, written) = self.store.wait(upload).map_err(|_| ImageError::Panicked)??;
        self.table[to_usize(u64::from(number))] = Slot::Known(pack);
        summary.count(written);
        Ok(())
    }

    /// Writes the last pack, waits for all, and returns the table.
    pub(super) fn finish(&mut self, summary: &mut PushSummary) -> Result<Vec<Pack>, ImageError> {
        if self.chunks > 0 {
            self.write(summary)?;
        }
        while !self.uploads.is_empty() {
            self.end_upload(summary)?;
        }
        let known = self.table.iter().filter_map(|slot| match slot {
            Slot::Known(pack) => Some(*pack),
            Slot::Pending => None,
        });
        Ok(known.collect())
    }
}

impl Drop for Packs<'_> {
    fn drop(&mut self) {
        for (_, upload) in &self.uploads {
            upload.abort();
        }
    }
}
