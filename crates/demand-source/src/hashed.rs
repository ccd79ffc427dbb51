// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A raw image whose every page is checked as it is fetched.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::file::READERS;
use crate::hash::{PAGE_BYTES, page_hash};
use crate::image_file::ImageFile;
use crate::table::{BLOCK, HashTable};
use crate::{
    BlockingSource, Completion, Destination, Extent, MappedBytes, PageSource, Request, SourceError,
    Threaded,
};

const PAGE: u64 = PAGE_BYTES as u64;
/// Bytes that are looked at in one go: one read of the table.
const STEP: u64 = BLOCK as u64 * PAGE;

/// A raw image with a table of 64-bit hashes, one for each page of 4096 bytes: a
/// [`LocalFile`](crate::LocalFile) of which no page is delivered before its content was found to be what it was when
/// the image was written. What is different is [`SourceError::Altered`].
///
/// Opening costs the same whatever the size: of the table only the header is looked at. The rest is
/// read in pieces, as pages are fetched.
///
/// # The table
///
/// All numbers are little-endian. The file is as long as the last hash reaches.
///
/// | byte | length | |
/// |---|---|---|
/// | 0 | 8 | `DPHASHES` |
/// | 8 | 4 | version of the format: 1 |
/// | 12 | 4 | bytes of a page: 4096 |
/// | 16 | 8 | bytes of the image: a multiple of 4096, and not 0 |
/// | 24 | 16 | generation id: whatever ties the image to its snapshot |
/// | 40 | 8 | XXH3-64 of the 4096 bytes of the header, these eight being zero |
/// | 48 | 4048 | zeros |
/// | 4096 + 8 i | 8 | hash of page i of the image: [`page_hash`](crate::page_hash) |
///
/// A page of zeros is a hole of the image, and its hash is 0; where all hashes of a block are, the
/// table has a hole. The header is written last, when all else is on the disk: a pair of files
/// that was not finished is none.
///
/// # Examples
///
/// [`ImageWriter`](crate::ImageWriter) has one that writes an image and reads it.
#[derive(Debug)]
pub struct HashedImage {
    reads: Threaded<Hashed>,
}

/// The image and its table; what it does may wait for the storage, unless it says otherwise.
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
    /// [`SourceError::Open`] and [`SourceError::Read`] about one of the files, and
    /// [`SourceError::Table`] if the table is damaged, is not finished, or is another image's.
    pub fn open(image: impl AsRef<Path>, table: impl AsRef<Path>) -> Result<Self, SourceError> {
        HashedImage::of(ImageFile::open(image.as_ref())?, ImageFile::open(table.as_ref())?)
    }

    /// An image and its table that are open already, as by a caller that follows no symbolic link;
    /// with what errors call each.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
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

    /// The id that was given to the image when it was written.
    pub fn generation(&self) -> [u8; 16] {
        self.hashed().table.generation()
    }

    /// Size of the image, in bytes.
    pub fn size(&self) -> u64 {
        self.hashed().image.size()
    }

    /// Reads all of the image and checks it, holes included. `progress` is told, again and again,
    /// how many bytes have been checked, and ends it by `false`.
    ///
    /// # Errors
    ///
    /// [`SourceError::Altered`] names the first page that differs; [`SourceError::Cancelled`]; and
    /// those of reading.
    pub fn verify(&self, progress: &mut dyn FnMut(u64) -> bool) -> Result<(), SourceError> {
        let Hashed { image, .. } = self.hashed();
        let mut bytes = Vec::new();
        let mut at = 0;
        while at < self.size() {
            // Asked for afresh: what this thread remembers may be older than a change.
            let extent = self.hashed().check_extent(at, image.find_extent(at)?)?;
            if extent.is_hole() {
                at = extent.end();
            } else {
                let end = extent.end().next_multiple_of(PAGE).min(at + STEP);
                bytes.resize((end - at) as usize, 0);
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

    /// Compares pages of the image, from the one at `offset` on, with their hashes.
    fn check(
        &self,
        offset: u64,
        pages: u64,
        hash_of: impl FnMut(u64) -> u64,
    ) -> Result<(), SourceError> {
        let read = |at, to: &mut Destination<'_>| Some(self.table.read(at, to));
        self.check_with(offset, pages, hash_of, read).unwrap_or(Ok(()))
    }

    /// As [`check`](Self::check), with hashes that `read` reads: `None` if it gives none.
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

    /// Reads whole pages.
    fn read_pages(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        self.image.read(offset, to)?;
        self.check(offset, to.len() as u64 / PAGE, hash_in(to))
    }

    /// Reads whole pages if that needs no waiting.
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

    /// Reads parts of pages, as only tools do: each page is read as a whole, and the part of it
    /// that was asked for is handed on.
    fn read_parts(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        let len = to.len() as u64;
        let end = self.image.check_range(offset, len)?;
        let mut content = [0; PAGE_BYTES];
        let mut at = offset;
        while at < end {
            let (start, within) = (at - at % PAGE, (at % PAGE) as usize);
            self.read_pages(start, &mut Destination::from(&mut content[..]))?;
            let part = &content[within..][..(end - at).min(PAGE - within as u64) as usize];
            to.write_at((at - offset) as usize, part);
            at += part.len() as u64;
        }
        Ok(())
    }

    /// What an extent of the file at `offset` is by the table: a hole only where all hashes say so.
    /// It ends where the table has not been looked at, so that one fault never looks at much.
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
            // A page of data that begins or ends with a hole, on a file system of smaller blocks.
            Some(page) if !offset.is_multiple_of(PAGE) || end < (page + 1) * PAGE => {
                Ok(Extent::Data { end: (page + 1) * PAGE })
            }
            Some(page) => Err(self.altered(page)),
        }
    }
}

/// The hashes of the pages of a loan, by their number in it.
fn hash_in(loan: &Destination<'_>) -> impl FnMut(u64) -> u64 {
    let mut content = [0; PAGE_BYTES];
    move |page| {
        loan.copy_out(page as usize * PAGE_BYTES, &mut content);
        page_hash(&content)
    }
}

impl BlockingSource for Hashed {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        self.image.extent_checked(offset, |extent| self.check_extent(offset, extent))
    }

    fn read(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        if !Self::is_whole_pages(offset, to) {
            return self.read_parts(offset, to);
        }
        let extent = |at| {
            let extent = self.image.extent_afresh(at, |extent| self.check_extent(at, extent))?;
            // Where an extent ends within a page, the page is read as a whole.
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

    /// A copy that has been checked, of at most 2 MiB.
    fn mapped(&self, offset: u64, len: u64) -> Option<MappedBytes<'_>> {
        let len = usize::try_from(len).ok().filter(|_| len <= STEP && len.is_multiple_of(PAGE))?;
        let mut bytes = MappedBytes::buffer(len);
        // What is wrong is told by whoever reads the pages in the ordinary way, which comes next.
        let read = self.read_now(offset, &mut Destination::from(&mut bytes[..]));
        read?.ok()?;
        Some(MappedBytes::owned(bytes))
    }
}
