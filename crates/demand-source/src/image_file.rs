// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image's file: its reads and extents, with and without waiting for the storage.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, RwLock};

use crate::cached::Storage;
use crate::convert::to_usize;
use crate::mapped::{MappedBytes, MappedFile};
use crate::{Destination, Extent, SourceError, extent_of_file};

/// Maximum number of remembered extents: about 3 MiB.
const REMEMBERED: usize = 1 << 16;

/// Maximum number of extents that are looked up after each read that waited.
const AHEAD: usize = 16;

/// A regular file or block device that is read as an image.
#[derive(Debug)]
pub(crate) struct ImageFile {
    file: File,
    path: PathBuf,
    size: u64,
    storage: Storage,
    // Created on first use; `None` if the file cannot be mapped.
    mapped: OnceLock<Option<MappedFile>>,
    // Identifies the image in each thread's `LAST`.
    id: u64,
    // Extents found by calls that may wait, by the offset that was asked for.
    found: RwLock<BTreeMap<u64, Extent>>,
    // Held by the thread that looks ahead: one, so that a disk that hangs costs one thread.
    ahead: Mutex<()>,
}

#[derive(Clone, Copy)]
struct LastExtent {
    id: u64,
    start: u64,
    extent: Extent,
}

thread_local! {
    // The last extent that this thread found. Asking the file system costs a system call, and the
    // next page mostly lies in the same extent. It is thread-local so that threads share no written
    // cache line.
    static LAST: Cell<LastExtent> =
        const { Cell::new(LastExtent { id: 0, start: 0, extent: Extent::Hole { end: 0 } }) };
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl ImageFile {
    pub(crate) fn open(path: &Path) -> Result<Self, SourceError> {
        let refused = |source| SourceError::Open { image: path.display().to_string(), source };
        // Without this flag, opening a pipe would wait for a writer.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(refused)?;
        ImageFile::of_file(file, path.to_owned())
    }

    /// Wraps a file that is already open; errors name it `path`.
    pub(crate) fn of_file(mut file: File, path: PathBuf) -> Result<Self, SourceError> {
        let refused = |source| SourceError::Open { image: path.display().to_string(), source };
        let kind = file.metadata().map_err(refused)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = if kind.is_dir() { "it is a directory" } else { "it is a special file" };
            return Err(refused(io::Error::new(io::ErrorKind::InvalidInput, what)));
        }
        // The metadata of a block device has no length, but seeking to its end works.
        let size = file.seek(SeekFrom::End(0)).map_err(refused)?;
        let storage = if kind.is_block_device() {
            Storage::Cached
        } else {
            Storage::of(&file).map_err(refused)?
        };
        Ok(ImageFile {
            file,
            path,
            size,
            storage,
            mapped: OnceLock::new(),
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            found: RwLock::default(),
            ahead: Mutex::default(),
        })
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Returns the file's path, as the user named it.
    pub(crate) fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// Returns whether the file is stored in memory, so that no read of it waits for storage.
    pub(crate) fn is_memory(&self) -> bool {
        self.storage == Storage::Memory
    }

    fn shrunk(&self, offset: u64, len: u64) -> SourceError {
        let end = (&self.file).seek(SeekFrom::End(0)).unwrap_or(0);
        SourceError::Shrunk { image: self.name(), offset, len, end, size: self.size }
    }

    fn refused(&self, offset: u64, len: u64, source: io::Error) -> SourceError {
        SourceError::Read { image: self.name(), offset, len, source }
    }

    /// Returns the end of the `len` bytes at `offset` if they lie in the image.
    pub(crate) fn check_range(&self, offset: u64, len: u64) -> Result<u64, SourceError> {
        offset.checked_add(len).filter(|end| *end <= self.size).ok_or_else(|| {
            SourceError::OutOfRange { image: self.name(), offset, len, size: self.size }
        })
    }

    /// Reads bytes of the file; may wait for the storage.
    pub(crate) fn read(
        &self,
        offset: u64,
        destination: &mut Destination<'_>,
    ) -> Result<(), SourceError> {
        let len = destination.len() as u64;
        self.check_range(offset, len)?;
        let mut done = 0;
        while done < destination.len() {
            match destination.read_from(done, &self.file, offset + done as u64) {
                Ok(0) => return Err(self.shrunk(offset, len)),
                Ok(read) => done += read,
                Err(error) => return Err(self.refused(offset, len, error)),
            }
        }
        Ok(())
    }

    /// Reads bytes of the file, or returns `None` if that would have to wait for the storage. After
    /// `None`, part of the destination may have been written.
    pub(crate) fn read_now(
        &self,
        offset: u64,
        destination: &mut Destination<'_>,
    ) -> Option<Result<(), SourceError>> {
        let len = destination.len() as u64;
        match self.storage {
            Storage::Memory => return Some(self.read(offset, destination)),
            Storage::Away => return None,
            Storage::Cached => {}
        }
        if let Err(error) = self.check_range(offset, len) {
            return Some(Err(error));
        }
        if !crate::cached::is_cached(&self.file, offset, len) {
            return None;
        }
        let mut done = 0;
        while done < destination.len() {
            match destination.read_cached(done, &self.file, offset + done as u64) {
                Ok(0) => return Some(Err(self.shrunk(offset, len))),
                Ok(read) => done += read,
                // The read that may wait reports the error.
                Err(_) => return None,
            }
        }
        Some(Ok(()))
    }

    /// Returns the bytes where they are mapped in this process, if they are in memory.
    pub(crate) fn mapped(&self, offset: u64, len: u64) -> Option<MappedBytes<'_>> {
        if self.storage == Storage::Away {
            return None;
        }
        let mapped = self.mapped.get_or_init(|| MappedFile::new(&self.file, self.size).ok());
        let mapped = mapped.as_ref()?;
        if self.storage == Storage::Cached && !mapped.is_resident(offset, len) {
            return None;
        }
        mapped.bytes(offset, len)
    }

    /// Whether the file is as long as it was. It does not wait for the storage.
    pub(crate) fn is_intact(&self) -> bool {
        // Not by a seek, which waits while another thread's seek for data waits for the storage.
        // Such a seek never waits on a block device, which has no length here.
        self.file.metadata().is_ok_and(|metadata| {
            metadata.len() >= self.size
                || !metadata.is_file()
                    && (&self.file).seek(SeekFrom::End(0)).is_ok_and(|end| end >= self.size)
        })
    }

    /// Asks the file system for the extent at `offset`, which lies in the image. It may wait for
    /// the storage.
    pub(crate) fn find_extent(&self, offset: u64) -> Result<Extent, SourceError> {
        match extent_of_file(&self.file, offset, self.size) {
            Ok(Some(extent)) => Ok(extent),
            // No data follows. It is a hole only if the file has not shrunk.
            Ok(None) => match (&self.file).seek(SeekFrom::End(0)) {
                Ok(end) if end >= self.size => Ok(Extent::Hole { end: self.size }),
                _ => Err(self.shrunk(offset, self.size - offset)),
            },
            Err(error) => Err(self.refused(offset, 0, error)),
        }
    }

    /// Like [`extent`](crate::PageSource::extent), but passes the extent through `check`, which may
    /// refuse or change it. An extent that this thread remembers is not checked again.
    pub(crate) fn extent_checked(
        &self,
        offset: u64,
        check: impl FnOnce(Extent) -> Result<Extent, SourceError>,
    ) -> Result<Extent, SourceError> {
        self.check_range(offset, 1)?;
        if let Some(extent) = self.last_extent(offset) {
            return Ok(extent);
        }
        self.extent_afresh(offset, check)
    }

    /// Like [`extent_checked`](Self::extent_checked), but ignores the extent that this thread
    /// remembers.
    pub(crate) fn extent_afresh(
        &self,
        offset: u64,
        check: impl FnOnce(Extent) -> Result<Extent, SourceError>,
    ) -> Result<Extent, SourceError> {
        let extent = check(self.find_extent(offset)?)?;
        self.remember(offset, extent);
        Ok(extent)
    }

    /// Returns the extent at `offset` if it was found before; never waits for the storage.
    pub(crate) fn known_extent(&self, offset: u64) -> Option<Extent> {
        let extent = self.last_extent(offset).or_else(|| {
            let (start, extent) = self.found_extent(offset)?;
            LAST.set(LastExtent { id: self.id, start, extent });
            Some(extent)
        })?;
        // A hole that was found before the file shrank is none; the read that waits tells so.
        let gone = self.storage == Storage::Cached && extent.is_hole() && !self.is_intact();
        (!gone).then_some(extent)
    }

    /// The extent of the byte at `offset` if a thread found it that might wait, and where it was
    /// asked for.
    fn found_extent(&self, offset: u64) -> Option<(u64, Extent)> {
        let found = self.found.read().unwrap_or_else(PoisonError::into_inner);
        let (&start, &extent) = found.range(..=offset).next_back()?;
        (offset < extent.end()).then_some((start, extent))
    }

    /// Looks up some extents from `offset` on, for faults to come, each through `check` as in
    /// [`extent_checked`](Self::extent_checked). It may wait for the storage.
    pub(crate) fn look_ahead(
        &self,
        offset: u64,
        check: impl Fn(u64, Extent) -> Result<Extent, SourceError>,
    ) {
        // Each question to storage that is away may be a round trip.
        if self.storage != Storage::Cached {
            return;
        }
        let Ok(_alone) = self.ahead.try_lock() else { return };
        let (mut at, mut extents) = (offset, Vec::with_capacity(AHEAD));
        for _ in 0..AHEAD {
            if at >= self.size {
                break;
            }
            let extent = match self.found_extent(at) {
                Some((_, extent)) => extent,
                None => {
                    let extent = self.find_extent(at).and_then(|extent| check(at, extent));
                    // An error is told to the thread that needs the extent.
                    let Some(extent) = extent.ok().filter(|extent| extent.end() > at) else {
                        break;
                    };
                    extents.push((at, extent));
                    extent
                }
            };
            at = extent.end();
        }
        self.note(extents);
    }

    fn last_extent(&self, offset: u64) -> Option<Extent> {
        let last = LAST.get();
        let hit = last.id == self.id && last.start <= offset && offset < last.extent.end();
        hit.then_some(last.extent)
    }

    fn remember(&self, start: u64, extent: Extent) {
        LAST.set(LastExtent { id: self.id, start, extent });
        // On storage in memory every thread can ask, so the shared map is not needed.
        if self.is_memory() {
            return;
        }
        self.note([(start, extent)]);
    }

    /// Keeps extents for threads that must not wait.
    fn note(&self, extents: impl IntoIterator<Item = (u64, Extent)>) {
        let mut found = self.found.write().unwrap_or_else(PoisonError::into_inner);
        // Freed when the lock is: that takes a while.
        let full = (found.len() >= REMEMBERED).then(|| std::mem::take(&mut *found));
        found.extend(extents);
        drop(found);
        drop(full);
    }

    /// Reads extent by extent, as `extent` returns them: fills holes with zeros, and reads data
    /// through `data`. It may wait for the storage.
    pub(crate) fn read_extents(
        &self,
        offset: u64,
        destination: &mut Destination<'_>,
        extent: impl Fn(u64) -> Result<Extent, SourceError>,
        data: impl Fn(u64, &mut Destination<'_>) -> Result<(), SourceError>,
    ) -> Result<(), SourceError> {
        let end = self.check_range(offset, destination.len() as u64)?;
        let mut at = offset;
        while at < end {
            let here = extent(at)?;
            let until = here.end().min(end);
            destination.fill_part(to_usize(at - offset), to_usize(until - at), |part| {
                if here.is_hole() {
                    part.fill_zeros();
                    return Ok(());
                }
                data(at, part)
            })?;
            at = until;
        }
        Ok(())
    }
}
