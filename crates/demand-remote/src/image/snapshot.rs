// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A snapshot of a store, opened for reading: its manifest, its index, its side files.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use demand_source::to_usize;
use tokio::task::JoinSet;

use super::block::{Block, Entry};
use super::chunk::decode_chunk;
use super::error::{ImageError, LayoutError, ManifestError};
use super::layout::{BLOCK_CHUNKS, Head, digest};
use super::manifest::{FileRef, MOST_MANIFEST, Manifest};
use super::names::{FILES, INDEXES, ObjectId, PACKS, is_snapshot_name, manifest_of};
use crate::runtime;
use crate::{Store, StoreError};

/// Bytes of the index that opening reads, unless its head is longer.
const FIRST: u64 = 512 << 10;
/// Bytes of all side files together that opening reads.
const FIRST_FILES: u64 = 8 << 20;
/// Bytes of the index that a scan reads at once.
const SCAN: u64 = 4 << 20;

/// Numbers of reads from a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadStats {
    /// Requests that were answered.
    pub requests: u64,
    /// Bytes of their answers.
    pub bytes: u64,
}

/// A store whose reads are counted.
#[derive(Debug)]
pub(crate) struct Reads {
    pub(crate) store: Store,
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl Reads {
    pub(crate) fn of(store: &Store) -> Arc<Self> {
        let (requests, bytes) = Default::default();
        Arc::new(Reads { store: store.clone(), requests, bytes })
    }

    fn count(&self, bytes: &Bytes) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }

    pub(crate) async fn range(&self, object: &str, at: Range<u64>) -> Result<Bytes, StoreError> {
        self.store.get_range(object, at).await.inspect(|bytes| self.count(bytes))
    }

    async fn at_most(&self, object: &str, most: u64) -> Result<Option<Bytes>, StoreError> {
        let read = self.store.get_at_most(object, most).await?;
        Ok(read.inspect(|bytes| self.count(bytes)))
    }

    pub(crate) fn stats(&self) -> ReadStats {
        let read = |number: &AtomicU64| number.load(Ordering::Relaxed);
        ReadStats { requests: read(&self.requests), bytes: read(&self.bytes) }
    }

    /// Returns the length of an object, in bytes; 0 if the store does not have it.
    pub(crate) async fn len(&self, object: &str) -> Result<u64, StoreError> {
        Ok(self.store.len(object).await?.unwrap_or(0))
    }

    pub(crate) fn altered(&self, object: &str, source: LayoutError) -> ImageError {
        let (object, store) = (object.to_owned(), self.store.name().to_owned());
        ImageError::Altered { object, store, source }
    }

    /// Reads a whole object of `len` bytes and checks it against its name.
    pub(crate) async fn checked(
        &self,
        folder: &str,
        id: ObjectId,
        len: u64,
    ) -> Result<Bytes, ImageError> {
        let object = id.within(folder);
        // No range of a request is empty.
        let bytes = if len == 0 { Bytes::new() } else { self.range(&object, 0..len).await? };
        if ObjectId::of(&bytes) == id {
            return Ok(bytes);
        }
        Err(self.altered(&object, LayoutError::Digest { what: "the object" }))
    }

    /// Reads the manifest of a snapshot.
    pub(crate) async fn manifest(&self, snapshot: &str) -> Result<Manifest, ImageError> {
        if !is_snapshot_name(snapshot) {
            return Err(ImageError::Name { name: snapshot.to_owned() });
        }
        let (name, store) = (|| snapshot.to_owned(), || self.store.name().to_owned());
        let parsed = match self.at_most(&manifest_of(snapshot), MOST_MANIFEST).await {
            Err(StoreError::Missing { .. }) => {
                return Err(ImageError::NoSnapshot { snapshot: name(), store: store() });
            }
            read => read?.map_or(Err(ManifestError::TooLong), |bytes| Manifest::parse(&bytes)),
        };
        let (snapshot, store) = (name(), store());
        parsed.map_err(|source| ImageError::Manifest { snapshot, store, source })
    }

    /// Reads the beginning of an index, `len` bytes but at least its head, and checks the head
    /// against the manifest.
    pub(crate) async fn head(
        &self,
        manifest: &Manifest,
        len: u64,
    ) -> Result<(Head, Bytes), ImageError> {
        let index = &manifest.index;
        let object = index.sha256.within(INDEXES);
        let len = index.size.min(len.max(index.head_size));
        let bytes = self.range(&object, 0..len).await?;
        let head = bytes.slice(..to_usize(index.head_size));
        let altered = |source| self.altered(&object, source);
        if ObjectId::of(&head) != index.head_sha256 {
            return Err(altered(LayoutError::Digest { what: "the index's head" }));
        }
        let head = Head::decode(&head).map_err(altered)?;
        let bad = |what, value| Err(altered(LayoutError::Bounds { what, value }));
        if manifest.geometry().ok() != Some(head.geometry)
            || manifest.image.generation.0 != head.generation
        {
            return bad("the image's size, which the manifest has as well,", head.geometry.size());
        }
        if head.index_len() != index.size {
            return bad("the length of the index", index.size);
        }
        Ok((head, bytes))
    }
}

/// An open snapshot.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) reads: Arc<Reads>,
    pub(crate) name: String,
    pub(crate) manifest: Manifest,
    pub(crate) head: Head,
    files: HashMap<ObjectId, Bytes>,
    blocks: RwLock<HashMap<u64, Arc<Block>>>,
}

impl Snapshot {
    /// Opens a snapshot in two rounds of requests, whatever its size: the manifest, and then the
    /// beginning of the index beside the side files.
    pub(crate) async fn open(store: &Store, name: &str) -> Result<Self, ImageError> {
        let reads = Reads::of(store);
        let manifest = reads.manifest(name).await?;
        let mut left = FIRST_FILES;
        let mut tasks = JoinSet::new();
        for FileRef { sha256, size, .. } in &manifest.files {
            let Some(rest) = left.checked_sub(*size) else { continue };
            left = rest;
            let (reads, id, len) = (reads.clone(), *sha256, *size);
            let read = async move { Ok((id, reads.checked(FILES, id, len).await?)) };
            tasks.spawn_on(read, runtime::handle());
        }
        let (head, first) = reads.head(&manifest, FIRST).await?;
        let mut files = HashMap::new();
        while let Some(read) = tasks.join_next().await {
            let (id, bytes) = read.unwrap_or(Err(ImageError::Panicked))?;
            files.insert(id, bytes);
        }
        let (name, blocks) = (name.to_owned(), RwLock::default());
        let snapshot = Snapshot { reads, name, manifest, head, files, blocks };
        for (number, block) in (0..).zip(&snapshot.head.blocks) {
            let Some(block) = block else { continue };
            let start = to_usize(block.offset);
            let end = start + snapshot.head.geometry.block_len(number);
            let Some(bytes) = first.get(start..end) else { break };
            snapshot.keep_block(number, snapshot.decode_block(number, bytes)?);
        }
        Ok(snapshot)
    }

    pub(crate) fn index(&self) -> String {
        self.manifest.index.sha256.within(INDEXES)
    }

    fn decode_block(&self, number: u64, bytes: &[u8]) -> Result<Block, ImageError> {
        Block::decode(bytes, &self.head, number)
            .map_err(|source| self.reads.altered(&self.index(), source))
    }

    /// Returns a block that has been read.
    pub(crate) fn known_block(&self, number: u64) -> Option<Arc<Block>> {
        self.blocks.read().unwrap_or_else(PoisonError::into_inner).get(&number).cloned()
    }

    /// Returns whether all chunks of a block are zeros, which the head knows.
    pub(crate) fn is_zero_block(&self, number: u64) -> bool {
        self.head.blocks.get(to_usize(number)).is_none_or(Option::is_none)
    }

    /// Keeps a block for [`known_block`](Self::known_block).
    fn keep_block(&self, number: u64, block: Block) -> Arc<Block> {
        let block = Arc::new(block);
        let mut blocks = self.blocks.write().unwrap_or_else(PoisonError::into_inner);
        blocks.insert(number, block.clone());
        block
    }

    /// Reads a block, checks it and keeps it.
    pub(crate) async fn read_block(&self, number: u64) -> Result<Arc<Block>, ImageError> {
        if let Some(block) = self.known_block(number) {
            return Ok(block);
        }
        let at = self.head.blocks.get(to_usize(number)).copied().flatten();
        let bytes = match at {
            Some(at) => {
                let end = at.offset + self.head.geometry.block_len(number) as u64;
                self.reads.range(&self.index(), at.offset..end).await?
            }
            None => Bytes::new(),
        };
        Ok(self.keep_block(number, self.decode_block(number, &bytes)?))
    }

    /// Returns the entry of a chunk in a block that has been read: `None` if it has not been read,
    /// and `Some(None)` if the chunk is all zeros.
    pub(crate) fn known_entry(&self, chunk: u64) -> Option<Option<Entry>> {
        let (block, index) = (chunk / BLOCK_CHUNKS, to_usize(chunk % BLOCK_CHUNKS));
        if self.is_zero_block(block) {
            return Some(None);
        }
        self.known_block(block).map(|block| block.entry(index))
    }

    /// Reads the whole index in pieces, checks it against its name, and calls `each` with every
    /// block that is not all zeros, in order. Nothing is kept.
    pub(crate) async fn scan(
        &self,
        mut each: impl FnMut(u64, &Block) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let len = self.manifest.index.size;
        let mut hasher = sha2::Sha256::default();
        let mut pending = Vec::new();
        let (mut start, mut read) = (0, 0);
        let mut blocks =
            (0_u64..).zip(&self.head.blocks).filter_map(|(number, at)| Some((number, (*at)?)));
        let mut next = blocks.next();
        while read < len {
            let end = len.min(read + SCAN);
            let bytes = self.reads.range(&self.index(), read..end).await?;
            sha2::Digest::update(&mut hasher, &bytes);
            pending.extend_from_slice(&bytes);
            read = end;
            while let Some((number, at)) = next {
                let first = to_usize(at.offset - start);
                let behind = first + self.head.geometry.block_len(number);
                let Some(bytes) = pending.get(first..behind) else { break };
                each(number, &self.decode_block(number, bytes)?)?;
                next = blocks.next();
            }
            let done = next.map_or(read, |(_, at)| at.offset.min(read));
            pending.drain(..to_usize(done - start));
            start = done;
        }
        if ObjectId(sha2::Digest::finalize(hasher).into()) == self.manifest.index.sha256 {
            return Ok(());
        }
        Err(self.reads.altered(&self.index(), LayoutError::Digest { what: "the index" }))
    }

    /// Returns the name of the object that a chunk is in.
    pub(crate) fn pack_of(&self, entry: &Entry) -> String {
        let pack = usize::try_from(entry.pack).ok().and_then(|pack| self.head.packs.get(pack));
        pack.map_or_else(String::new, |pack| pack.id.within(PACKS))
    }

    /// Reads a chunk's stored bytes.
    pub(crate) async fn read_stored(&self, entry: &Entry) -> Result<Bytes, ImageError> {
        self.read_packed(entry, entry.offset..entry.offset + entry.len).await
    }

    /// Reads bytes of the pack that a chunk is in.
    pub(crate) async fn read_packed(
        &self,
        entry: &Entry,
        range: Range<u32>,
    ) -> Result<Bytes, ImageError> {
        let range = u64::from(range.start)..u64::from(range.end);
        Ok(self.reads.range(&self.pack_of(entry), range).await?)
    }

    /// Decodes a chunk, after checking the digest of its stored bytes.
    pub(crate) fn decode(
        &self,
        chunk: u64,
        entry: &Entry,
        stored: &[u8],
    ) -> Result<Vec<u8>, ImageError> {
        let geometry = self.head.geometry;
        let decoded = if digest(stored) == entry.digest {
            decode_chunk(entry.coding, stored, geometry.chunk_len(chunk))
        } else {
            Err(LayoutError::Digest { what: "the stored chunk" })
        };
        decoded.map_err(|source| ImageError::Chunk {
            snapshot: self.name.clone(),
            offset: geometry.offset(chunk),
            object: self.pack_of(entry),
            store: self.reads.store.name().to_owned(),
            source,
        })
    }

    /// Returns a side file's content, which opening has read unless it is large.
    pub(crate) async fn file(&self, name: &str) -> Result<Bytes, ImageError> {
        let Some(FileRef { sha256, size, .. }) = self.manifest.file(name) else {
            let (snapshot, name) = (self.name.clone(), name.to_owned());
            return Err(ImageError::NoFile { snapshot, name });
        };
        match self.files.get(sha256) {
            Some(bytes) => Ok(bytes.clone()),
            None => self.reads.checked(FILES, *sha256, *size).await,
        }
    }
}
