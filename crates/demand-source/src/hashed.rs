// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A raw image with a hash for each page, checked as the page is fetched.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::convert::to_usize;
use crate::file::READERS;
use crate::hash::{PAGE_BYTES, page_hash};
use crate::image_file::ImageFile;
use crate::table::{BLOCK, HashTable};
use crate::{
    BlockingSource, Completion, Destination, Extent, MappedBytes, PageSource, Request, SourceError,
    Threaded,
};

const PAGE: u64 = PAGE_BYTES as u64;
/// Bytes of the image that one read of the table covers.
const STEP: u64 = BLOCK as u64 * PAGE;

/// A raw image with a table of 64-bit hashes, one for each page of 4096 bytes. It is a
/// [`LocalFile`](crate::LocalFile) that checks each page's content before it delivers the page.
/// Content that has changed since the image was written is [`SourceError::Altered`].
///
/// Opening costs the same whatever the size, because it reads only the header of the table. The
/// hashes are read in pieces as pages are fetched.
///
/// # The table
///
/// All numbers are little-endian. The file ends with the last hash.
///
/// | byte | length | |
/// |---|---|---|
/// | 0 | 8 | `DPHASHES` |
/// | 8 | 4 | version of the format: 1 |
/// | 12 | 4 | bytes of a page: 4096 |
/// | 16 | 8 | bytes of the image: a multiple of 4096, and not 0 |
/// | 24 | 16 | generation id, which ties the image to its snapshot |
/// | 40 | 8 | XXH3-64 of the 4096 bytes of the header, with these eight as zeros |
/// | 48 | 4048 | zeros |
/// | 4096 + 8 i | 8 | hash of page i of the image: [`page_hash`](crate::page_hash) |
///
/// A page of zeros is a hole of the image, and its hash is 0. Where all hashes of a block of the
/// table are 0, the table has a hole, too. The header is written last, after everything else is on
/// the disk, so a table that was not finished has no valid header and is refused.
///
/// # Examples
///
/// See [`ImageWriter`](crate::ImageWriter), whose example writes an image and reads it back.
#[derive(Debug)]
pub struct HashedImage {
    reads: Threaded<Hashed>,
}

/// The image and its table. Its methods may wait for the storage, unless they say otherwise.
#[derive(Debug)]
struct Hashed {
    image: ImageFile,
    table: HashTable,
}

impl HashedImage {
    /// Opens an image and its table.
    ///
    /// # Errors
    ///
    /// [`SourceError::Open`] or [`SourceError::Read`] for either file, and [`SourceError::Table`]
    /// if the table is damaged, unfinished, or belongs to another image.
    pub fn open(image: impl AsRef<Path>, table: impl AsRef<Path>) -> Result<Self, SourceError> {
        HashedImage::of(ImageFile::open(image.as_ref())?, ImageFile::open(table.as_ref())?)
    }

    /// Wraps an image and its table that are already open, for example by a caller that follows no
    /// symbolic links. Errors name each file by its path.
    ///
    /// # Errors
    ///
    /// The same as those of [`open`](Self::open).
    pub fn of_files(image: (File, PathBuf), table: (File, PathBuf)) -> Result<Self, SourceError> {
        HashedImage::of(
            ImageFile::of_file(image.0, image.1)?,
            ImageFile::of_file(table.0, table.1)?,
        )
    }

    fn of(image: ImageFile, table: ImageFile) -> Result<Self, SourceError> {
        let table = HashTable::of(table, &image)?;
        let ahead = |hashed: &Hashed, end| {
            hashed.image.look_ahead(end, |at, extent| hashed.check_extent(at, extent));
        };
        Ok(HashedImage { reads: Threaded::lazy(Hashed { image, table }, READERS, ahead) })
    }

    fn hashed(&self) -> &Hashed {
        self.reads.source()
    }

    /// Returns the generation id that the image was written with.
    pub fn generation(&self) -> [u8; 16] {
        self.hashed().table.generation()
    }

    /// Returns the size of the image, in bytes.
    pub fn size(&self) -> u64 {
        self.hashed().image.size()
    }

    /// Reads and checks the whole image, holes included. It calls `progress` repeatedly with the
    /// number of bytes checked so far; `progress` cancels the check by returning `false`.
    ///
    /// # Errors
    ///
    /// [`SourceError::Altered`] for the first page that differs, [`SourceError::Cancelled`], and
    /// the errors of reading.
    pub fn verify(&self, progress: &mut dyn FnMut(u64) -> bool) -> Result<(), SourceError> {
        let Hashed { image, .. } = self.hashed();
        let mut bytes = Vec::new();
        let mut at = 0;
        while at < self.size() {
            // The remembered extent may be older than a change, so this asks the file system.
            let extent = self.hashed().check_extent(at, image.find_extent(at)?)?;
            if extent.is_hole() {
                at = extent.end();
            } else {
                let end = extent.end().next_multiple_of(PAGE).min(at + STEP);
                bytes.resize(to_usize(end - at), 0);
                self.hashed().read_pages(at, &mut Destination::from(&mut bytes[..]))?;
                at = end;
            }
            if !progress(at) {
                return Err(SourceError::Cancelled { image: image.name(), at });
            }
        }
        Ok(())
    }
}

impl Hashed {
    fn altered(&self, page: u64) -> SourceError {
        SourceError::Altered { image: self.image.name(), offset: page * PAGE }
    }

    /// Compares `pages` pages of the image, from `offset` on, with their hashes.
    fn check(
        &self,
        offset: u64,
        pages: u64,
        hash_of: impl FnMut(u64) -> u64,
    ) -> Result<(), SourceError> {
        let read = |at, to: &mut Destination<'_>| Some(self.table.read(at, to));
        self.check_with(offset, pages, hash_of, read).unwrap_or(Ok(()))
    }

    /// Like [`check`](Self::check), but reads the table through `read`. Returns `None` if `read`
    /// does.
    fn check_with(
        &self,
        offset: u64,
        pages: u64,
        mut hash_of: impl FnMut(u64) -> u64,
        read: impl FnMut(u64, &mut Destination<'_>) -> Option<Result<(), SourceError>>,
    ) -> Option<Result<(), SourceError>> {
        let first = offset / PAGE;
        let mut wrong = None;
        let looked = self.table.look_with(first, pages, read, |page, hash| {
            let right = hash_of(page - first) == hash;
            if !right {
                wrong = Some(page);
            }
            right
        })?;
        Some(looked.and_then(|()| wrong.map_or(Ok(()), |page| Err(self.altered(page)))))
    }

    /// Reads and checks whole pages.
    fn read_pages(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        self.image.read(offset, to)?;
        self.check(offset, to.len() as u64 / PAGE, hash_in(to))
    }

    /// Reads and checks whole pages, or returns `None` if that would have to wait for the storage.
    fn read_pages_now(
        &self,
        offset: u64,
        to: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        if let Err(error) = self.image.read_now(offset, to)? {
            return Some(Err(error));
        }
        let read = |at, to: &mut Destination<'_>| self.table.read_now(at, to);
        self.check_with(offset, to.len() as u64 / PAGE, hash_in(to), read)
    }

    fn is_whole_pages(offset: u64, to: &Destination<'_>) -> bool {
        offset.is_multiple_of(PAGE) && to.len().is_multiple_of(PAGE_BYTES)
    }

    /// Reads parts of pages, which only tools do: reads and checks each page as a whole, and copies
    /// out the requested part.
    fn read_parts(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        let len = to.len() as u64;
        let end = self.image.check_range(offset, len)?;
        let mut content = [0; PAGE_BYTES];
        let mut at = offset;
        while at < end {
            let (start, within) = (at - at % PAGE, (at % PAGE) as usize);
            self.read_pages(start, &mut Destination::from(&mut content[..]))?;
            let part = &content[within..][..to_usize((end - at).min(PAGE - within as u64))];
            to.write_at(to_usize(at - offset), part);
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Checks an extent of the file at `offset` against the table: it is a hole only if all its
    /// hashes are 0. The returned extent covers at most one read of the table, which bounds the
    /// work of one fault.
    fn check_extent(&self, offset: u64, extent: Extent) -> Result<Extent, SourceError> {
        let Extent::Hole { end } = extent else { return Ok(extent) };
        let first = offset / PAGE;
        let limit = end.min((first * PAGE).saturating_add(STEP));
        let mut used = None;
        self.table.look(first, limit.div_ceil(PAGE) - first, |page, hash| {
            used = (hash != 0).then_some(page);
            hash == 0
        })?;
        match used {
            None => Ok(Extent::Hole { end: limit }),
            Some(page) if page > first => Ok(Extent::Hole { end: page * PAGE }),
            // A page of data that begins or ends with a hole: the blocks of the file system are
            // smaller than a page.
            Some(page) if !offset.is_multiple_of(PAGE) || end < (page + 1) * PAGE => {
                Ok(Extent::Data { end: (page + 1) * PAGE })
            }
            Some(page) => Err(self.altered(page)),
        }
    }
}

/// Returns a function that hashes a page of the loan, by the page's index in it.
fn hash_in(loan: &Destination<'_>) -> impl FnMut(u64) -> u64 {
    let mut content = [0; PAGE_BYTES];
    move |page| {
        loan.copy_out(to_usize(page) * PAGE_BYTES, &mut content);
        page_hash(&content)
    }
}

impl BlockingSource for Hashed {
    fn size(&self) -> u64 {
        self.image.size()
    }

    // It may wait: `HashedImage` has its own `extent_now`, which calls this only for files in memory.
    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        self.image.extent_checked(offset, |extent| self.check_extent(offset, extent))
    }

    fn read(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        if !Self::is_whole_pages(offset, to) {
            return self.read_parts(offset, to);
        }
        let extent = |at| {
            let extent = self.image.extent_afresh(at, |extent| self.check_extent(at, extent))?;
            // A page in which an extent ends is read as a whole.
            let end = extent.end() / PAGE * PAGE;
            Ok(match extent {
                Extent::Hole { .. } if end > at => Extent::Hole { end },
                Extent::Hole { .. } => Extent::Data { end: at + PAGE },
                Extent::Data { end } => Extent::Data { end: end.next_multiple_of(PAGE) },
            })
        };
        self.image.read_extents(offset, to, extent, |at, part| self.read_pages(at, part))
    }
}

impl PageSource for HashedImage {
    fn size(&self) -> u64 {
        self.size()
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        BlockingSource::extent(self.hashed(), offset)
    }

    fn extent_now(&self, offset: u64) -> Option<Result<Extent, SourceError>> {
        let Hashed { image, table } = self.hashed();
        if image.is_memory() && table.is_memory() {
            return Some(self.extent(offset));
        }
        image.known_extent(offset).map(Ok)
    }

    fn submit(&self, request: Request) -> Completion {
        self.reads.queue(request)
    }

    fn raise(&self, offset: u64, len: u64) {
        self.reads.raise_queued(offset, len);
    }

    fn read_now(
        &self,
        offset: u64,
        destination: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        let hashed = self.hashed();
        if Hashed::is_whole_pages(offset, destination) {
            return hashed.read_pages_now(offset, destination);
        }
        None
    }

    /// Returns a checked copy of at most 2 MiB.
    fn mapped(&self, offset: u64, len: u64) -> Option<MappedBytes<'_>> {
        let len = usize::try_from(len).ok().filter(|_| len <= STEP && len.is_multiple_of(PAGE))?;
        let mut bytes = MappedBytes::buffer(len);
        let mut destination = Destination::from(&mut bytes[..]);
        // The ordinary read that follows a `None` reports the error.
        let read = self.read_now(offset, &mut destination);
        read?.and_then(|()| destination.check_filled()).ok()?;
        Some(MappedBytes::owned(bytes))
    }
}
