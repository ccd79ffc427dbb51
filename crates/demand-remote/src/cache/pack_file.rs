// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The file of one pack in the cache.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::OnceLock;

use demand_source::{Destination, LocalFile, PageSource};
use rustix::fs::{Mode, OFlags, Timespec, Timestamps, UTIME_NOW, fchmod, futimens, openat};
use rustix::io::Errno;

use super::chunk_key::{ChunkKey, PackKey};
use super::claim::Claimed;
use super::directory::Directory;
use super::record::{Hashes, Layout, PACK_CHUNKS, PAGE};

/// Permission to write for users other than the owner and the group.
const WRITABLE_BY_ALL: u32 = 0o002;

/// The hashes of a chunk's pages, in a box, since most chunks of a pack may never be read.
type Known = Box<(ChunkKey, Hashes)>;

/// The file of a pack, with the hashes of the chunks that were read or written.
#[derive(Debug)]
pub(crate) struct PackFile {
    file: File,
    /// The same open file, for reads that must not wait for the storage.
    cached: LocalFile,
    layout: Layout,
    claimed: Claimed,
    /// By ordinal. Right hashes stay right, whatever happens to the file.
    known: Box<[OnceLock<Known>]>,
}

impl PackFile {
    /// Opens the file of a pack, or returns `None` if it does not exist and must not be created.
    ///
    /// # Errors
    ///
    /// The system's error; [`InvalidInput`](io::ErrorKind::InvalidInput) for anything but a regular
    /// file that has one name, and that only its owner and group can write.
    pub(crate) fn open(dir: &Directory, key: &PackKey, create: bool) -> io::Result<Option<Self>> {
        let name = key.file_name();
        // Without NONBLOCK, opening a pipe or a device could wait.
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = loop {
            match openat(dir.packs(), &*name, flags, Mode::empty()) {
                Err(Errno::NOENT) if create => {}
                Err(Errno::NOENT) => return Ok(None),
                opened => break File::from(opened?),
            }
            let new = flags | OFlags::CREATE | OFlags::EXCL;
            match openat(dir.packs(), &*name, new, dir.file_mode()) {
                // Another process was first.
                Err(Errno::EXIST) => {}
                opened => {
                    let file = File::from(opened?);
                    // The process's mask has narrowed the mode.
                    fchmod(&file, dir.file_mode())?;
                    break file;
                }
            }
        };
        let metadata = file.metadata()?;
        // A file with two names may be anything of another user's; one without a name has been evicted
        // since, and is created again at the next look.
        if metadata.nlink() == 0 {
            return Ok(None);
        }
        let is_own = metadata.is_file() && metadata.nlink() == 1;
        if !is_own || metadata.mode() & WRITABLE_BY_ALL != 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let layout = Layout::of(key);
        // New, or truncated by a crash.
        if metadata.len() < layout.file_len() {
            file.set_len(layout.file_len())?;
        }
        // Eviction begins with the packs that were opened or written longest ago. Without this, it
        // only loses precision.
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let _ = futimens(&file, &Timestamps { last_access: now, last_modification: now });
        let cached = LocalFile::of_file(file.try_clone()?, name).map_err(io::Error::other)?;
        let known = (0..PACK_CHUNKS).map(|_| OnceLock::new()).collect();
        Ok(Some(PackFile { file, cached, layout, claimed: Claimed::default(), known }))
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn claimed(&self) -> &Claimed {
        &self.claimed
    }

    /// Returns whether the file still has its name: it was not evicted.
    pub(crate) fn is_current(&self) -> bool {
        self.file.metadata().is_ok_and(|metadata| metadata.nlink() > 0)
    }

    /// Reads a whole chunk, or returns `None` if it is absent. It may wait for the storage.
    ///
    /// # Errors
    ///
    /// The system's error.
    pub(crate) fn read(&self, chunk: &ChunkKey) -> io::Result<Option<Vec<u8>>> {
        let len = chunk.len as usize;
        let read = |offset, bytes: &mut [u8]| match self.file.read_exact_at(bytes, offset) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        };
        let mut content = vec![0; len];
        Ok(self.read_pages(chunk, 0, &mut content, read)?.then_some(content))
    }

    /// Reads `len` bytes of a chunk, from `start` on, passes them to `deliver` and returns `true`;
    /// or returns `false` if they are absent, or not in memory.
    pub(crate) fn read_now(
        &self,
        chunk: &ChunkKey,
        start: usize,
        len: usize,
        deliver: impl FnOnce(&[u8]),
    ) -> bool {
        let read = |offset, bytes: &mut [u8]| {
            let read = self.cached.read_now(offset, &mut Destination::from(bytes));
            Ok(matches!(read, Some(Ok(()))))
        };
        let first = start / PAGE;
        let pages = (start + len).div_ceil(PAGE) - first;
        // Most faults read one page.
        let (mut page, mut more) = ([0; PAGE], Vec::new());
        let bytes = if pages == 1 {
            &mut page[..]
        } else {
            more.resize(pages * PAGE, 0);
            &mut more[..]
        };
        if !self.read_pages(chunk, first, bytes, read).unwrap_or(false) {
            return false;
        }
        deliver(&bytes[start - first * PAGE..][..len]);
        true
    }

    /// Reads whole pages of a chunk, from page `first` on, and checks them. Returns whether they
    /// are right; `bytes` has something else otherwise.
    fn read_pages(
        &self,
        chunk: &ChunkKey,
        first: usize,
        bytes: &mut [u8],
        read: impl Fn(u64, &mut [u8]) -> io::Result<bool>,
    ) -> io::Result<bool> {
        let Some(known) = self.known.get(usize::from(chunk.ordinal)) else { return Ok(false) };
        if first * PAGE + bytes.len() > chunk.len as usize {
            return Ok(false);
        }
        let (known_chunk, hashes) = &**match known.get() {
            Some(known) => known,
            None => {
                let mut record = vec![0; Hashes::record_len(chunk)];
                if !read(self.layout.record(chunk.ordinal), &mut record)? {
                    return Ok(false);
                }
                let Some(hashes) = Hashes::of_record(chunk, &record) else { return Ok(false) };
                known.get_or_init(|| Box::new((*chunk, hashes)))
            }
        };
        let at = self.layout.content(chunk.ordinal) + (first * PAGE) as u64;
        Ok(known_chunk == chunk && read(at, bytes)? && hashes.match_pages(first, bytes))
    }

    /// Writes a chunk: its content, and then its record, which makes it present. Returns the number
    /// of bytes. It may wait for the storage.
    ///
    /// # Errors
    ///
    /// The system's error.
    pub(crate) fn write(&self, chunk: &ChunkKey, hashes: &[u8], content: &[u8]) -> io::Result<u64> {
        let record = Hashes::encode_record(chunk, hashes);
        self.file.write_all_at(content, self.layout.content(chunk.ordinal))?;
        self.file.write_all_at(&record, self.layout.record(chunk.ordinal))?;
        Ok((content.len() + record.len()) as u64)
    }
}
