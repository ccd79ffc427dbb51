// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A raw image whose every page is checked as it is fetched.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::hash::{PAGE_BYTES, page_hash};
use crate::mapped::MappedBytes;
use crate::table::{BLOCK, HashTable};
use crate::{Completion, Destination, Extent, LocalFile, PageSource, Request, SourceError};

const PAGE: u64 = PAGE_BYTES as u64;
/// Bytes that are looked at in one go: one read of the table.
const STEP: u64 = BLOCK as u64 * PAGE;

/// A raw image with a table of 64-bit hashes, one for each page of 4096 bytes: a
/// [`LocalFile`] of which no page is delivered before its content was found to be what it was when
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
    image: LocalFile,
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
        HashedImage::of(LocalFile::open(image)?, LocalFile::open(table)?)
    }

    /// An image and its table that are open already, as by a caller that follows no symbolic link;
    /// with what errors call each.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn of_files(image: (File, PathBuf), table: (File, PathBuf)) -> Result<Self, SourceError> {
        HashedImage::of(
            LocalFile::of_file(image.0, image.1)?,
            LocalFile::of_file(table.0, table.1)?,
        )
    }

    fn of(image: LocalFile, table: LocalFile) -> Result<Self, SourceError> {
        let table = HashTable::of(table, &image)?;
        Ok(HashedImage { image, table })
    }

    /// The id that was given to the image when it was written.
    pub fn generation(&self) -> [u8; 16] {
        self.table.generation()
    }

    /// Size of the image, in bytes.
    pub fn size(&self) -> u64 {
        self.image.size()
    }

    /// Reads all of the image and checks it, holes included. `progress` is told, again and again,
    /// how many bytes have been checked, and ends it by `false`.
    ///
    /// # Errors
    ///
    /// [`SourceError::Altered`] names the first page that differs; [`SourceError::Cancelled`]; and
    /// those of reading.
    pub fn verify(&self, progress: &mut dyn FnMut(u64) -> bool) -> Result<(), SourceError> {
        let mut bytes = Vec::new();
        let mut at = 0;
        while at < self.size() {
            // Asked for afresh: what this thread remembers may be older than a change.
            let extent = self.check_extent(at, self.image.find_extent(at)?)?;
            if extent.is_hole() {
                at = extent.end();
            } else {
                let end = extent.end().next_multiple_of(PAGE).min(at + STEP);
                bytes.resize((end - at) as usize, 0);
                self.read_pages(at, &mut Destination::from(&mut bytes[..]))?;
                at = end;
            }
            if !progress(at) {
                return Err(SourceError::Cancelled { image: self.image.name(), at });
            }
        }
        Ok(())
    }

    fn altered(&self, page: u64) -> SourceError {
        SourceError::Altered { image: self.image.name(), offset: page * PAGE }
    }

    /// Compares pages of the image, from the one at `offset` on, with their hashes.
    fn check(
        &self,
        offset: u64,
        pages: u64,
        mut hash_of: impl FnMut(u64) -> u64,
    ) -> Result<(), SourceError> {
        let first = offset / PAGE;
        let mut wrong = None;
        self.table.look(first, pages, |page, hash| {
            let right = hash_of(page - first) == hash;
            if !right {
                wrong = Some(page);
            }
            right
        })?;
        wrong.map_or(Ok(()), |page| Err(self.altered(page)))
    }

    /// Reads whole pages.
    fn read_pages(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        self.image.read(offset, to)?;
        let mut content = [0; PAGE_BYTES];
        self.check(offset, to.len() as u64 / PAGE, |page| {
            to.copy_out(page as usize * PAGE_BYTES, &mut content);
            page_hash(&content)
        })
    }

    fn read(&self, offset: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        if offset.is_multiple_of(PAGE) && to.len().is_multiple_of(PAGE_BYTES) {
            return self.read_pages(offset, to);
        }
        let len = to.len() as u64;
        let end = self.image.check_range(offset, len)?;
        // Only a tool reads parts of pages. Each page is read as a whole, and what was asked for of
        // it is handed on.
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

impl PageSource for HashedImage {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        self.image.extent_checked(offset, |extent| self.check_extent(offset, extent))
    }

    fn submit(&self, request: Request) -> Completion {
        let mut outcome = Ok(());
        for mut chunk in request.chunks {
            outcome = outcome.and_then(|()| self.read(chunk.offset, &mut chunk.destination));
        }
        Completion::ready(outcome)
    }

    fn read_now(
        &self,
        offset: u64,
        destination: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        Some(self.read(offset, destination))
    }

    /// A copy that has been checked, of at most 2 MiB.
    fn mapped(&self, offset: u64, len: u64) -> Option<MappedBytes<'_>> {
        let len = usize::try_from(len).ok().filter(|_| len <= STEP && len.is_multiple_of(PAGE))?;
        let mut bytes = MappedBytes::buffer(len);
        self.image.read(offset, &mut Destination::from(&mut bytes[..])).ok()?;
        let hash_of = |page| page_hash(&bytes[page as usize * PAGE_BYTES..][..PAGE_BYTES]);
        // What is wrong is told by whoever reads the pages in the ordinary way, which comes next.
        self.check(offset, len as u64 / PAGE, hash_of).ok()?;
        Some(MappedBytes::owned(bytes))
    }
}
