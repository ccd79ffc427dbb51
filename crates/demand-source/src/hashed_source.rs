// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image of any source, with a table of page hashes of any source.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::convert::to_usize;
use crate::hash::{PAGE_BYTES, page_hash};
use crate::table::{HASH_BYTES, HEADER_BYTES, Header, hash_offset, table_len};
use crate::{
    Chunk, Completer, Completion, Destination, Extent, MissingPages, PageSource, Priority, Request,
    SourceError, TableError,
};

const PAGE: u64 = PAGE_BYTES as u64;
/// Number of hashes that are read at once, 64 KiB of them: those of 32 MiB of the image.
const BLOCK: u64 = 8192;

type Hashes = Arc<[u64]>;
type Then = Box<dyn FnOnce(Result<Hashes, SourceError>) + Send>;

/// An image with a table of page hashes, both of any [`PageSource`], such as two files on a web
/// server: a [`HashedImage`](crate::HashedImage) at a distance, with the same format of the table.
///
/// Pages whose hash is 0 are holes, whatever the image's source knows of its holes. The table is
/// read in pieces of 64 KiB as pages are fetched, and kept: 2 MiB for each GiB of the image.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
///
/// use demand_source::{HashedSource, ImageWriter, LocalFile, PageSource};
///
/// let folder = tempfile::tempdir().unwrap();
/// let (image, table) = (folder.path().join("memory"), folder.path().join("hashes"));
/// let mut writer = ImageWriter::create(&image, &table, 1 << 20, [7; 16]).unwrap();
/// writer.write(4096, &[1; 4096]).unwrap();
/// writer.finish().unwrap();
///
/// let open = |path| Arc::new(LocalFile::open(path).unwrap());
/// let source = HashedSource::open(open(&image), open(&table), "vm7").unwrap();
/// assert_eq!(source.generation(), [7; 16]);
/// assert_eq!(source.extent(8192).unwrap().end(), 1 << 20);
/// ```
pub struct HashedSource {
    shared: Arc<Shared>,
}

struct Shared {
    image: Arc<dyn PageSource>,
    table: Arc<dyn PageSource>,
    name: String,
    header: Header,
    blocks: Box<[Mutex<Block>]>,
}

/// A piece of the table.
enum Block {
    Unknown,
    /// It is being read; these are called with the outcome.
    Loading(Vec<Then>),
    Known(Hashes),
}

impl HashedSource {
    /// Reads the header of `table`. `name` is what errors call the image.
    ///
    /// # Errors
    ///
    /// The sources' errors, and [`SourceError::Table`] if the table is damaged, unfinished, or
    /// belongs to another image.
    pub fn open(
        image: Arc<dyn PageSource>,
        table: Arc<dyn PageSource>,
        name: impl Into<String>,
    ) -> Result<Self, SourceError> {
        let name = name.into();
        let unfit =
            |source| SourceError::Table { image: name.clone(), table: "its hashes".into(), source };
        let len = table.size();
        if len < HEADER_BYTES as u64 {
            return Err(unfit(TableError::NoHeader { len }));
        }
        let mut bytes = [0; HEADER_BYTES];
        table.read_through(0, &mut Destination::from(&mut bytes[..]))?;
        let header = Header::decode(&bytes).map_err(unfit)?;
        let (expected, size) = (header.size, image.size());
        if expected != size {
            return Err(unfit(TableError::OtherImage { expected, size }));
        }
        let expected = table_len(size);
        if len != expected {
            return Err(unfit(TableError::Length { len, expected }));
        }
        let blocks = (size / PAGE).div_ceil(BLOCK);
        let blocks = (0..blocks).map(|_| Mutex::new(Block::Unknown)).collect();
        Ok(HashedSource { shared: Arc::new(Shared { image, table, name, header, blocks }) })
    }

    /// Returns the generation id that the image was written with.
    pub fn generation(&self) -> [u8; 16] {
        self.shared.header.generation
    }
}

impl Shared {
    fn pages(&self) -> u64 {
        self.header.size / PAGE
    }

    fn block(&self, index: u64) -> MutexGuard<'_, Block> {
        self.blocks[to_usize(index)].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a block of the table if it has been read.
    fn known(&self, index: u64) -> Option<Hashes> {
        match &*self.block(index) {
            Block::Known(hashes) => Some(hashes.clone()),
            _ => None,
        }
    }

    /// Calls `then` with a block of the table, once it has been read.
    fn with_block(self: &Arc<Self>, index: u64, priority: Priority, then: Then) {
        let mut block = self.block(index);
        match &mut *block {
            Block::Known(hashes) => {
                let hashes = hashes.clone();
                drop(block);
                return then(Ok(hashes));
            }
            Block::Loading(waiting) => {
                waiting.push(then);
                drop(block);
                if priority == Priority::Demand {
                    self.table.raise(hash_offset(index * BLOCK), 1);
                }
                return;
            }
            Block::Unknown => *block = Block::Loading(vec![then]),
        }
        drop(block);
        let count = BLOCK.min(self.pages() - index * BLOCK);
        let (destination, bytes) = Destination::owned(vec![0; to_usize(count * HASH_BYTES)]);
        let chunks = vec![Chunk { offset: hash_offset(index * BLOCK), destination }];
        let shared = self.clone();
        self.table.submit(Request { priority, chunks }).then(move |outcome| {
            let hashes = outcome.and_then(|()| bytes.take()).map(|bytes| -> Hashes {
                let (hashes, _) = bytes.as_chunks::<{ to_usize(HASH_BYTES) }>();
                hashes.iter().map(|hash| u64::from_le_bytes(*hash)).collect()
            });
            shared.loaded(index, hashes);
        });
    }

    /// Tells those that wait for a block of the table.
    fn loaded(&self, index: u64, outcome: Result<Hashes, SourceError>) {
        let next = match &outcome {
            Ok(hashes) => Block::Known(hashes.clone()),
            Err(_) => Block::Unknown,
        };
        let before = std::mem::replace(&mut *self.block(index), next);
        let Block::Loading(waiting) = before else { return };
        for then in waiting {
            then(match &outcome {
                Ok(hashes) => Ok(hashes.clone()),
                Err(error) => {
                    let text = format!("cannot read the page hashes of {}: {error}", self.name);
                    Err(SourceError::other(text, error.retry()))
                }
            });
        }
    }

    /// Calls `then` once the blocks from `first` to `last` of the table have been read.
    fn with_blocks(
        self: &Arc<Self>,
        first: u64,
        last: u64,
        priority: Priority,
        then: Box<dyn FnOnce(Result<(), SourceError>) + Send>,
    ) {
        let shared = self.clone();
        let next = move |outcome: Result<Hashes, SourceError>| match outcome {
            Err(error) => then(Err(error)),
            Ok(_) if first == last => then(Ok(())),
            Ok(_) => shared.with_blocks(first + 1, last, priority, then),
        };
        self.with_block(first, priority, Box::new(next));
    }

    /// Compares whole pages from `offset` on with their hashes, which have been read.
    fn check(&self, offset: u64, content: &[u8]) -> Result<(), SourceError> {
        let mut block = None;
        for (page, content) in (offset / PAGE..).zip(content.chunks_exact(PAGE_BYTES)) {
            let index = page / BLOCK;
            let hashes = match &block {
                Some((known, hashes)) if *known == index => hashes,
                _ => {
                    let hashes = self.known(index).ok_or(SourceError::Abandoned)?;
                    &block.insert((index, hashes)).1
                }
            };
            if page_hash(content) != hashes[to_usize(page % BLOCK)] {
                let offset = page * PAGE;
                return Err(SourceError::Altered { image: self.name.clone(), offset });
            }
        }
        Ok(())
    }

    /// Returns the extent at `offset` according to a block of hashes, to the block's end at most.
    fn extent_in(&self, offset: u64, hashes: &[u64]) -> Extent {
        let page = offset / PAGE;
        let first = page % BLOCK;
        let rest = &hashes[to_usize(first)..];
        let is_hole = |hash: &u64| *hash == 0;
        let hole = rest.first().is_some_and(is_hole);
        let count = rest.iter().take_while(|hash| is_hole(hash) == hole).count() as u64;
        let end = (page + count) * PAGE;
        if hole { Extent::Hole { end } } else { Extent::Data { end } }
    }

    fn out_of_range(&self, offset: u64, len: u64) -> SourceError {
        let (image, size) = (self.name.clone(), self.header.size);
        SourceError::OutOfRange { image, offset, len, size }
    }

    /// Reads and checks the pages that a chunk touches, of which the table is known, and then fills
    /// the chunk.
    fn read(self: &Arc<Self>, priority: Priority, chunk: Chunk, done: Completer) {
        let Chunk { offset, mut destination } = chunk;
        let within = to_usize(offset % PAGE);
        let start = offset - offset % PAGE;
        let len = (within + destination.len()).next_multiple_of(PAGE_BYTES);
        let (bounce, bytes) = Destination::owned(vec![0; len]);
        let chunks = vec![Chunk { offset: start, destination: bounce }];
        let shared = self.clone();
        self.image.submit(Request { priority, chunks }).then(move |outcome| {
            let checked = outcome.and_then(|()| bytes.take()).and_then(|bytes| {
                shared.check(start, &bytes)?;
                destination.write_at(0, &bytes[within..][..destination.len()]);
                Ok(())
            });
            drop(destination);
            done.complete(checked);
        });
    }
}

/// The outcome of several reads: success once all have succeeded, or the first failure.
struct All {
    done: Mutex<(usize, Option<Completer>)>,
}

impl All {
    fn one_ended(&self, outcome: Result<(), SourceError>) {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        done.0 -= 1;
        if outcome.is_err() || done.0 == 0 {
            let completer = done.1.take();
            drop(done);
            if let Some(completer) = completer {
                completer.complete(outcome);
            }
        }
    }
}

impl PageSource for HashedSource {
    fn size(&self) -> u64 {
        self.shared.header.size
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        if offset >= self.size() {
            return Err(self.shared.out_of_range(offset, 1));
        }
        let (completer, completion) = Completion::pair();
        let index = offset / PAGE / BLOCK;
        let then =
            move |outcome: Result<Hashes, SourceError>| completer.complete(outcome.map(drop));
        self.shared.with_block(index, Priority::Demand, Box::new(then));
        completion.wait()?;
        let hashes = self.shared.known(index).ok_or(SourceError::Abandoned)?;
        Ok(self.shared.extent_in(offset, &hashes))
    }

    fn extent_now(&self, offset: u64) -> Option<Result<Extent, SourceError>> {
        if offset >= self.size() {
            return Some(Err(self.shared.out_of_range(offset, 1)));
        }
        let hashes = self.shared.known(offset / PAGE / BLOCK)?;
        Some(Ok(self.shared.extent_in(offset, &hashes)))
    }

    fn submit(&self, request: Request) -> Completion {
        let (completer, completion) = Completion::pair();
        let Request { priority, chunks } = request;
        for chunk in &chunks {
            let (offset, len) = (chunk.offset, chunk.destination.len() as u64);
            if offset.checked_add(len).is_none_or(|end| end > self.size()) {
                return Completion::ready(Err(self.shared.out_of_range(offset, len)));
            }
        }
        let chunks: Vec<_> =
            chunks.into_iter().filter(|chunk| !chunk.destination.is_empty()).collect();
        if chunks.is_empty() {
            return Completion::ready(Ok(()));
        }
        let all = Arc::new(All { done: Mutex::new((chunks.len(), Some(completer))) });
        for chunk in chunks {
            let (done, ended) = Completion::pair();
            let all = all.clone();
            ended.then(move |outcome| all.one_ended(outcome));
            let first = chunk.offset / PAGE / BLOCK;
            let last = (chunk.offset + chunk.destination.len() as u64 - 1) / PAGE / BLOCK;
            let shared = self.shared.clone();
            let then = move |outcome: Result<(), SourceError>| match outcome {
                Err(error) => {
                    drop(chunk);
                    done.complete(Err(error));
                }
                Ok(()) if !chunk.destination.is_wanted() => {
                    drop(chunk);
                    done.complete(Err(SourceError::Withdrawn));
                }
                Ok(()) => shared.read(priority, chunk, done),
            };
            self.shared.with_blocks(first, last, priority, Box::new(then));
        }
        completion
    }

    fn share_missing(&self, missing: &MissingPages) {
        self.shared.image.share_missing(missing);
    }

    fn raise(&self, offset: u64, len: u64) {
        self.shared.image.raise(offset, len);
        // A piece of the table that is being read begins with its first hash.
        let first = hash_offset(offset / PAGE / BLOCK * BLOCK);
        let behind = hash_offset(offset.saturating_add(len).div_ceil(PAGE));
        self.shared.table.raise(first, behind - first);
    }
}

impl fmt::Debug for HashedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HashedSource")
            .field("name", &self.shared.name)
            .field("size", &self.shared.header.size)
            .finish_non_exhaustive()
    }
}
