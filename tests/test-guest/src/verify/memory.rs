// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory after a run.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use demand_memory::to_usize;

use crate::content::UNIT_BYTES;
use crate::verify::VerifyError;

const WHAT: &str = "guest memory";

/// All of the VM's guest memory after a run; it must not change any more.
#[derive(Debug)]
pub enum FinalMemory<'a> {
    /// In this process.
    Bytes(&'a [u8]),
    /// In files, memfds, or memfds of huge pages: one for each region, by guest address.
    Files(Vec<Part<'a>>),
}

/// One of the files that hold guest memory.
#[derive(Debug)]
pub struct Part<'a> {
    /// Its start in the VM's memory.
    pub(crate) start: u64,
    /// Its length, in bytes.
    pub(crate) len: u64,
    pub(crate) file: &'a File,
    mapping: Option<Mapping>,
}

/// A file's bytes, mapped for reading.
#[derive(Debug)]
struct Mapping {
    start: *const u8,
    len: usize,
}

impl<'a> FinalMemory<'a> {
    /// Opens memory in files, one for each region. A file is mapped if all of it is allocated,
    /// which is faster; otherwise it is read, because reading through a mapping would allocate the
    /// missing pages.
    ///
    /// # Errors
    /// If the system cannot report the size of a file.
    pub fn open(files: &'a [File]) -> io::Result<Self> {
        let mut start = 0;
        let mut parts = Vec::new();
        for file in files {
            let part = Part::open(file, start)?;
            start += part.len;
            parts.push(part);
        }
        Ok(FinalMemory::Files(parts))
    }

    pub(crate) fn check_length(&self, needed: u64) -> Result<(), VerifyError> {
        let found = match self {
            FinalMemory::Bytes(bytes) => bytes.len() as u64,
            FinalMemory::Files(parts) => parts.last().map_or(0, |part| part.start + part.len),
        };
        if found < needed {
            return Err(VerifyError::Short { what: WHAT, found, needed });
        }
        Ok(())
    }

    /// Reads from memory that is known to be long enough, within a unit.
    pub(crate) fn read(&self, packed: u64, to: &mut [u8]) -> Result<(), VerifyError> {
        match self {
            FinalMemory::Bytes(bytes) => {
                to.copy_from_slice(&bytes[to_usize(packed)..][..to.len()]);
                Ok(())
            }
            FinalMemory::Files(parts) => Part::find(parts, packed).read(packed, to),
        }
    }

    /// Returns the bytes of the unit at `packed`, in `buffer` if they must be read.
    pub(crate) fn unit<'b>(
        &'b self,
        packed: u64,
        buffer: &'b mut Vec<u8>,
    ) -> Result<&'b [u8], VerifyError> {
        let (start, bytes) = match self {
            FinalMemory::Bytes(bytes) => (0, Some(*bytes)),
            FinalMemory::Files(parts) => {
                let part = Part::find(parts, packed);
                (part.start, part.mapping.as_ref().map(Mapping::bytes))
            }
        };
        match bytes {
            Some(bytes) => Ok(&bytes[to_usize(packed - start)..][..to_usize(UNIT_BYTES)]),
            None => {
                buffer.resize(to_usize(UNIT_BYTES), 0);
                self.read(packed, buffer)?;
                Ok(buffer)
            }
        }
    }
}

impl<'a> Part<'a> {
    fn open(file: &'a File, start: u64) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let len = metadata.len();
        let whole = len > 0 && metadata.blocks() * 512 >= len;
        Ok(Part { start, len, file, mapping: if whole { Mapping::new(file, len) } else { None } })
    }

    /// Returns the part that contains the byte at `packed`, which must be in one.
    fn find<'b>(parts: &'b [Part<'a>], packed: u64) -> &'b Part<'a> {
        &parts[parts.partition_point(|part| part.start + part.len <= packed)]
    }

    /// Returns whether it is mapped, and not read.
    pub fn is_mapped(&self) -> bool {
        self.mapping.is_some()
    }

    pub(crate) fn read(&self, packed: u64, to: &mut [u8]) -> Result<(), VerifyError> {
        let len = to.len() as u64;
        self.file.read_exact_at(to, packed - self.start).map_err(|source| VerifyError::Read {
            what: WHAT,
            offset: packed,
            len,
            source,
        })
    }
}

impl Mapping {
    /// Maps a file; returns `None` if the system refuses, and the file must be read.
    fn new(file: &File, len: u64) -> Option<Self> {
        // SAFETY: this creates a new mapping at an address that the kernel chooses, so it affects
        // no existing memory.
        let start = unsafe {
            let (prot, flags) = (libc::PROT_READ, libc::MAP_SHARED);
            libc::mmap(std::ptr::null_mut(), to_usize(len), prot, flags, file.as_raw_fd(), 0)
        };
        (start != libc::MAP_FAILED)
            .then(|| Mapping { start: start.cast_const().cast(), len: to_usize(len) })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping has that many bytes and lives as long as `self`; the caller that
        // supplied the file guarantees that it does not change.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` created, and no borrow of it outlives `self`.
        unsafe { libc::munmap(self.start.cast_mut().cast(), self.len) };
    }
}
