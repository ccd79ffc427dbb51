// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads of an image's chunks through the host cache.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use super::block::Entry;
use super::chunk::hash_bytes;
use super::flights::Urgency;
use super::job::Part;
use super::layout::{MOST_PACK_CHUNKS, PAGE};
use super::snapshot::Snapshot;
use crate::cache::{ChunkKey, Claim, HostCache, Look, PACK_CHUNKS, PackKey};
use crate::runtime;

const _: () = assert!(MOST_PACK_CHUNKS <= PACK_CHUNKS, "each chunk has a place in the cache");

/// Longest time for which a chunk that another process has claimed is waited for. Longer than
/// nearly all requests to a store take, and shorter than a guest's own timeouts, since the owner
/// may be stopped. One of the processes that have waited for so long then fetches the chunk, and
/// the others wait for that one. After three such owners each process fetches the chunk.
const OWNER_PATIENCE: Duration = Duration::from_secs(2);
/// Shortest and longest pause between two looks for a claimed chunk. The pauses grow with the time
/// waited, so that they add at most a quarter to it. A lock that blocks would take a thread for
/// each chunk, and has no time limit.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));
/// Pages of chunks that wait to be written to the cache: 64 MiB. While the disk is that far behind,
/// chunks for faults are not kept, and fill waits.
const ROOM: usize = 16 << 10;
/// Number of chunks that are written at once.
const WRITERS: usize = 4;

/// The host cache, as one image uses it.
#[derive(Debug)]
pub(crate) struct HostReads {
    cache: HostCache,
    room: Arc<Semaphore>,
    writers: Arc<Semaphore>,
}

/// The next step on the way to a chunk.
pub(crate) enum Step {
    /// Its content, from the cache.
    Found(Vec<u8>),
    /// A request to the store, and the claim with which its answer is kept, if it is.
    Fetch(Option<Keep>),
    /// Another look after this time, since another process fetches the chunk.
    Wait(Duration),
}

/// How a chunk gets the room that it takes until it is written to the cache.
#[derive(Clone, Copy)]
pub(crate) enum Room<'a> {
    /// It waits for room, unless a thread waits for the chunk.
    Unless(&'a Urgency),
    /// It waits for room.
    Awaited,
    /// It takes room if there is some, and is not kept otherwise.
    Now,
}

/// A claim on a chunk, and the room for its content until it is written.
#[derive(Debug)]
pub(crate) struct Keep {
    chunk: ChunkKey,
    claim: Claim,
    room: OwnedSemaphorePermit,
}

impl HostReads {
    pub(crate) fn new(cache: HostCache) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        HostReads { cache, room: semaphore(ROOM), writers: semaphore(WRITERS) }
    }

    /// Reads `len` bytes of a chunk, from `start` on, passes them to `deliver` and returns `true`;
    /// or returns `false` if they are absent, or if reading them could wait for the storage.
    pub(crate) fn read_now(
        &self,
        snapshot: &Snapshot,
        chunk: u64,
        entry: &Entry,
        (start, len): (usize, usize),
        deliver: impl FnOnce(&[u8]),
    ) -> bool {
        let key = key_of(snapshot, chunk, entry);
        key.is_some_and(|key| self.cache.read_now(&key, start, len, deliver))
    }

    /// Delivers a part that is in the cache and in memory, or returns it.
    pub(crate) fn deliver_now(
        &self,
        snapshot: &Snapshot,
        entry: &Entry,
        part: Part,
    ) -> Option<Part> {
        let (chunk, start, len) = (part.chunk, part.start(), part.len());
        let mut part = Some(part);
        self.read_now(snapshot, chunk, entry, (start, len), |bytes| {
            if let Some(part) = part.take() {
                part.deliver_exactly(bytes);
            }
        });
        part
    }

    /// Finds the next step on the way to a chunk that was first looked for at `since`.
    pub(crate) async fn step(
        &self,
        snapshot: &Snapshot,
        chunk: u64,
        entry: &Entry,
        since: Instant,
        room: Room<'_>,
    ) -> Step {
        let Some(key) = key_of(snapshot, chunk, entry) else { return Step::Fetch(None) };
        let waited = since.elapsed();
        let overdue = waited.as_millis() / OWNER_PATIENCE.as_millis();
        let overdue = u32::try_from(overdue).unwrap_or(u32::MAX);
        let pause = (waited / 4).clamp(PAUSES.0, PAUSES.1);
        // At first the lock alone is looked at, which is cheap for the many that wait. Later the
        // chunk as well: its owner may have been stopped after it wrote the chunk.
        let early = PAUSES.0..PAUSES.1 * 4;
        if early.contains(&waited) && self.cache.is_claimed(&key, overdue) {
            return Step::Wait(pause);
        }
        let room = self.room(u64::from(key.len) / PAGE, room).await;
        let (cache, may_claim) = (self.cache.clone(), room.is_some());
        // It may wait for the disk, which no thread of the runtime does.
        let look = spawn_blocking(move || cache.look(&key, may_claim, overdue)).await;
        match (look.unwrap_or(Look::Absent), room) {
            (Look::Found(content), _) => Step::Found(content),
            (Look::Busy, _) => Step::Wait(pause),
            (Look::Claimed(claim), Some(room)) => {
                Step::Fetch(Some(Keep { chunk: key, claim, room }))
            }
            _ => Step::Fetch(None),
        }
    }

    /// Takes room for so many pages.
    async fn room(&self, pages: u64, how: Room<'_>) -> Option<OwnedSemaphorePermit> {
        let pages = u32::try_from(pages).ok()?;
        if let Ok(room) = self.room.clone().try_acquire_many_owned(pages) {
            return Some(room);
        }
        let room = self.room.clone().acquire_many_owned(pages);
        match how {
            Room::Unless(urgency) => urgency.until_raised(room).await?.ok(),
            Room::Awaited => room.await.ok(),
            Room::Now => None,
        }
    }

    /// Writes a chunk to the cache, from its stored bytes and its content, which are checked. It
    /// does not wait.
    pub(crate) fn keep(&self, keep: Keep, stored: &Bytes, content: Arc<Vec<u8>>) {
        let Keep { chunk, claim, room } = keep;
        let hashes = stored.slice(..hash_bytes(content.len()).min(stored.len()));
        let (cache, writers) = (self.cache.clone(), self.writers.clone());
        runtime::handle().spawn(async move {
            let _turn = writers.acquire().await;
            let write = move || {
                cache.keep(claim, &chunk, &hashes, &content);
                drop(room);
            };
            // A panic has printed its message, and has ended the claim.
            let _ = spawn_blocking(write).await;
        });
    }
}

/// Returns the identity of a chunk, whatever its place in the image.
fn key_of(snapshot: &Snapshot, chunk: u64, entry: &Entry) -> Option<ChunkKey> {
    let head = &snapshot.head;
    let pack = head.packs.get(usize::try_from(entry.pack).ok()?)?;
    let chunk_size = u32::try_from(head.geometry.chunk_size()).ok()?;
    Some(ChunkKey {
        pack: PackKey { id: pack.id.0, chunk_size },
        ordinal: entry.ordinal,
        digest: entry.digest,
        len: u32::try_from(head.geometry.chunk_len(chunk)).ok()?,
    })
}
