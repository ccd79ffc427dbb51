// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `Push`, which writes an image and its side files to a store.

mod encode;
mod packs;
mod parent;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use demand_source::{HashedImage, PageSource, to_usize};

use self::encode::{Chunks, Encoded};
use self::packs::{Packs, put_if_missing};
use self::parent::Parent;
use super::block::{Block, Entry};
use super::chunk::{Compression, LEVELS};
use super::error::{ImageError, LayoutError};
use super::layout::{BLOCK_CHUNKS, Geometry, Head, PAGE};
use super::manifest::{ChunkCounts, FileRef, Generation, ImageRef, IndexRef, MOST_FILE, Manifest};
use super::names::{FILES, INDEXES, ObjectId, is_file_name, is_snapshot_name, manifest_of};
use crate::Store;

/// The size of chunks unless another one is chosen, in bytes.
pub const DEFAULT_CHUNK_SIZE: u32 = 64 << 10;

/// The progress of a push.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PushProgress {
    /// Bytes of the image that are done.
    pub done: u64,
    /// Bytes of new packs.
    pub stored: u64,
    /// Bytes of the image whose chunks are those of the parent.
    pub reused: u64,
}

/// The summary of a push.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PushSummary {
    /// Numbers of chunks that are not all zeros, and of those taken from the parent.
    pub chunks: ChunkCounts,
    /// Packs that the index names.
    pub packs: u64,
    /// Bytes of the packs that this push made, including those that the store had.
    pub pack_bytes: u64,
    /// Bytes of the index.
    pub index_bytes: u64,
    /// Objects that were written, with the manifest.
    pub written: u64,
    /// Objects that the store had already, for example from an interrupted push.
    pub skipped: u64,
}

/// A push: an image, and how it is written to a store.
///
/// Chunks that are all zeros are not stored. Objects are written in an order that leaves no
/// snapshot with anything missing: packs, index, side files, and last the manifest. A push that was
/// interrupted is run again: it makes the same objects and skips those that the store has.
///
/// # Examples
///
/// ```
/// use demand_remote::Store;
/// use demand_remote::image::{Push, RemoteImage};
/// use demand_source::{Destination, LocalFile, PageSource};
///
/// let folder = tempfile::tempdir().unwrap();
/// std::fs::write(folder.path().join("memory"), [7; 3 << 16]).unwrap();
/// let memory = LocalFile::open(folder.path().join("memory")).unwrap();
///
/// let store = Store::directory(folder.path().join("store")).unwrap();
/// Push::new(&memory, [1; 16]).run(&store, "vm7", &mut |_| true).unwrap();
///
/// let image = RemoteImage::open(&store, "vm7").unwrap();
/// let mut page = [0; 4096];
/// image.read_through(1 << 16, &mut Destination::from(&mut page[..])).unwrap();
/// assert_eq!(page, [7; 4096]);
/// ```
#[derive(Clone)]
pub struct Push<'a> {
    image: &'a dyn PageSource,
    generation: [u8; 16],
    chunk_size: u32,
    compression: Compression,
    files: Vec<(String, PathBuf)>,
    parent: Option<String>,
    parent_image: Option<&'a HashedImage>,
    created: Option<SystemTime>,
}

impl<'a> Push<'a> {
    /// Prepares the push of an image that has this generation id: see
    /// [`HashedImage::generation`].
    pub fn new(image: &'a dyn PageSource, generation: [u8; 16]) -> Self {
        Push {
            image,
            generation,
            chunk_size: DEFAULT_CHUNK_SIZE,
            compression: Compression::default(),
            files: Vec::new(),
            parent: None,
            parent_image: None,
            created: None,
        }
    }

    /// Sets the size of chunks, in bytes: a power of two from 16 KiB to 1 MiB. It is the amount
    /// that one fault reads.
    pub fn chunk_size(mut self, bytes: u32) -> Self {
        self.chunk_size = bytes;
        self
    }

    /// Sets how chunks are compressed.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// Adds a side file, such as the VM's state, of at most 256 MiB. Its name is made of letters,
    /// digits, `.`, `_` and `-`, and is neither `memory` nor `hashes`.
    pub fn file(mut self, name: impl Into<String>, path: impl AsRef<Path>) -> Self {
        self.files.push((name.into(), path.as_ref().to_owned()));
        self
    }

    /// Names a snapshot of the store from which chunks are taken that are the same at the same
    /// offset. It must have chunks of the same size; a chunk is the same if it is stored as the same
    /// bytes, so a parent with another compression saves nothing, except by
    /// [`parent_image`](Self::parent_image). The snapshot that is written does not depend on its
    /// parent, which can be removed.
    pub fn parent(mut self, snapshot: impl Into<String>) -> Self {
        self.parent = Some(snapshot.into());
        self
    }

    /// Gives a local copy of the parent's image, so that chunks that are the same are found without
    /// compressing them. Its generation id must be that of the parent.
    pub fn parent_image(mut self, image: &'a HashedImage) -> Self {
        self.parent_image = Some(image);
        self
    }

    /// Sets the time of creation that the manifest states. The default is the time of the push.
    pub fn created(mut self, time: SystemTime) -> Self {
        self.created = Some(time);
        self
    }

    /// Writes the snapshot to a store, in place of one that has the name. It calls `progress`
    /// repeatedly; `progress` cancels the push by returning `false`.
    ///
    /// # Errors
    ///
    /// [`ImageError`]. What was written until then is of use to the next attempt; until then
    /// [`gc`](super::gc) removes it.
    pub fn run(
        &self,
        store: &Store,
        snapshot: &str,
        progress: &mut dyn FnMut(PushProgress) -> bool,
    ) -> Result<PushSummary, ImageError> {
        let size = self.image.size().checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        let geometry = Geometry::new(size, self.chunk_size).map_err(ImageError::Options)?;
        if let Compression::Zstd(level) = self.compression
            && !LEVELS.contains(&level)
        {
            let (what, value) = ("the level of zstd", u64::from(level.unsigned_abs()));
            return Err(ImageError::Options(LayoutError::Bounds { what, value }));
        }
        self.check_names(snapshot)?;
        let files = self.files.iter().map(|(name, path)| read_file(name, path));
        let files = files.collect::<Result<Vec<_>, _>>()?;
        let parent = match &self.parent {
            Some(name) => Some(Parent::open(store, name, geometry, self.parent_image)?),
            None if self.parent_image.is_some() => {
                let (parent, why) = ("none".to_owned(), "its image is given, but not its name");
                return Err(ImageError::Parent { parent, why });
            }
            None => None,
        };
        let chunks = Chunks {
            image: self.image,
            geometry,
            compression: self.compression,
            parent: parent.as_ref(),
        };
        let mut writing = Writing::new(store, geometry, parent.as_ref());
        chunks.encode_all(&mut |first, encoded| writing.add(first, encoded, progress))?;
        let (head, index) = writing.finish(self.generation)?;
        let mut summary = writing.summary;
        summary.packs = head.packs.len() as u64;
        summary.index_bytes = index.len() as u64;

        let head_bytes = index.slice(..head.head_len());
        let index_ref = IndexRef {
            sha256: ObjectId::of(&index),
            size: index.len() as u64,
            head_size: head.head_len() as u64,
            head_sha256: ObjectId::of(&head_bytes),
        };
        let (chunk_size, generation) = (self.chunk_size, Generation(self.generation));
        let mut manifest = Manifest::new(ImageRef { size, chunk_size, generation }, index_ref);
        summary.put(store, INDEXES, index)?;
        for (name, bytes) in files {
            let size = bytes.len() as u64;
            let sha256 = summary.put(store, FILES, bytes)?;
            manifest.files.push(FileRef { name, sha256, size });
        }
        manifest.chunks = summary.chunks;
        manifest.parent.clone_from(&self.parent);
        let created = self.created.unwrap_or_else(SystemTime::now);
        manifest.created = created.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        if let Some(parent) = &parent {
            parent.check_still_there(store)?;
        }
        let bytes = manifest.encode().map_err(|source| {
            let (snapshot, store) = (snapshot.to_owned(), store.name().to_owned());
            ImageError::Manifest { snapshot, store, source }
        })?;
        store.wait(store.put(&manifest_of(snapshot), bytes.into()))?;
        summary.written += 1;
        Ok(summary)
    }

    fn check_names(&self, snapshot: &str) -> Result<(), ImageError> {
        let taken = |at: usize, name| self.files[..at].iter().any(|(other, _)| other == name);
        let mut files = self.files.iter().enumerate();
        let bad = files.find(|(at, (name, _))| !is_file_name(name) || taken(*at, name));
        let bad = bad.map(|(_, (name, _))| name.as_str());
        match bad.or_else(|| (!is_snapshot_name(snapshot)).then_some(snapshot)) {
            Some(name) => Err(ImageError::Name { name: name.to_owned() }),
            None => Ok(()),
        }
    }
}

impl PushSummary {
    /// Writes an object, unless the store has it.
    fn put(&mut self, store: &Store, folder: &str, bytes: Bytes) -> Result<ObjectId, ImageError> {
        let id = ObjectId::of(&bytes);
        let written = store.wait(put_if_missing(store, id.within(folder), bytes))?;
        self.count(written);
        Ok(id)
    }

    fn count(&mut self, written: bool) {
        *(if written { &mut self.written } else { &mut self.skipped }) += 1;
    }
}

fn read_file(name: &str, path: &Path) -> Result<(String, Bytes), ImageError> {
    let failed = |source| ImageError::File { path: path.to_owned(), source };
    let len = std::fs::metadata(path).map_err(failed)?.len();
    if len > MOST_FILE {
        let (what, value) = ("the length of a side file", len);
        return Err(ImageError::Options(LayoutError::Bounds { what, value }));
    }
    Ok((name.to_owned(), std::fs::read(path).map_err(failed)?.into()))
}

/// The packs and the index in the making.
struct Writing<'a> {
    geometry: Geometry,
    packs: Packs<'a>,
    /// The blocks before the one that is in the making.
    blocks: Vec<Option<Vec<u8>>>,
    block: Vec<Option<Entry>>,
    progress: PushProgress,
    summary: PushSummary,
}

impl<'a> Writing<'a> {
    fn new(store: &'a Store, geometry: Geometry, parent: Option<&'a Parent<'a>>) -> Self {
        let packs = Packs::new(store, geometry, parent);
        let (blocks, block, progress, summary) = Default::default();
        Writing { geometry, packs, blocks, block, progress, summary }
    }

    /// Adds the chunks from number `first` on.
    fn add(
        &mut self,
        first: u64,
        encoded: Vec<Encoded>,
        progress: &mut dyn FnMut(PushProgress) -> bool,
    ) -> Result<(), ImageError> {
        for (chunk, encoded) in (first..).zip(encoded) {
            let len = self.geometry.chunk_len(chunk) as u64;
            self.progress.done += len;
            self.summary.chunks.stored += u64::from(!matches!(encoded, Encoded::Zero));
            let entry = match encoded {
                Encoded::Zero => None,
                Encoded::Reused(entry) => {
                    self.summary.chunks.reused += 1;
                    self.progress.reused += len;
                    Some(self.packs.reuse(entry))
                }
                Encoded::New(coding, stored) => {
                    Some(self.packs.add(coding, &stored, &mut self.summary)?)
                }
            };
            self.block.push(entry);
            if self.block.len() as u64 == BLOCK_CHUNKS {
                self.end_block();
            }
        }
        self.progress.stored = self.packs.bytes();
        if progress(self.progress) { Ok(()) } else { Err(ImageError::Cancelled) }
    }

    fn end_block(&mut self) {
        self.blocks.push(Block::encode(&self.block));
        self.block.clear();
    }

    /// Writes the last packs, and returns the index.
    fn finish(&mut self, generation: [u8; 16]) -> Result<(Head, Bytes), ImageError> {
        if !self.block.is_empty() {
            self.end_block();
        }
        let packs = self.packs.finish(&mut self.summary)?;
        self.summary.pack_bytes = self.packs.bytes();
        let stored = self.summary.chunks.stored;
        let mut head = Head { geometry: self.geometry, generation, stored, packs, blocks: vec![] };
        head.place_blocks(&self.blocks);
        let mut index = head.encode();
        index.reserve(to_usize(head.index_len()) - index.len());
        for block in self.blocks.drain(..).flatten() {
            index.extend(block);
        }
        Ok((head, index.into()))
    }
}

impl fmt::Debug for Push<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Push").field("chunk_size", &self.chunk_size).finish_non_exhaustive()
    }
}
