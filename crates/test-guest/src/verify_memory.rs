// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory after the fact.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use crate::content::UNIT_BYTES;
use crate::verify::VerifyError;

const WHAT: &str = "guest memory";

/// Guest memory after the fact; nothing may change it any more.
#[derive(Debug)]
pub enum FinalMemory<'a> {
    /// In this process.
    Bytes(&'a [u8]),
    /// In a file, a memfd, or a memfd of huge pages.
    File(&'a File),
    /// Likewise, mapped.
    Mapped(Mapping),
}

/// A file's bytes, mapped to be read.
#[derive(Debug)]
pub struct Mapping {
    start: *const u8,
    len: usize,
}

impl<'a> FinalMemory<'a> {
    /// Takes memory from a file: maps it if all of it is allocated, which is faster; else it is
    /// read, because reading a mapping would allocate what is not there.
    ///
    /// # Errors
    /// If the system refuses to say how large it is.
    pub fn open(file: &'a File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let len = metadata.len();
        if len > 0 && metadata.blocks() * 512 >= len {
            // SAFETY: a new mapping at an address that the kernel chooses.
            let start = unsafe {
                let (prot, flags) = (libc::PROT_READ, libc::MAP_SHARED);
                libc::mmap(std::ptr::null_mut(), len as usize, prot, flags, file.as_raw_fd(), 0)
            };
            if start != libc::MAP_FAILED {
                let mapping = Mapping { start: start.cast_const().cast(), len: len as usize };
                return Ok(FinalMemory::Mapped(mapping));
            }
        }
        Ok(FinalMemory::File(file))
    }

    fn bytes(&self) -> Option<&[u8]> {
        match self {
            FinalMemory::Bytes(bytes) => Some(bytes),
            // SAFETY: the mapping has that many bytes and lives as long as `self`; the caller has
            // said that nothing changes it.
            FinalMemory::Mapped(mapping) => unsafe {
                Some(std::slice::from_raw_parts(mapping.start, mapping.len))
            },
            FinalMemory::File(_) => None,
        }
    }

    pub(crate) fn check_length(&self, needed: u64) -> Result<(), VerifyError> {
        let found = match (self, self.bytes()) {
            (_, Some(bytes)) => bytes.len() as u64,
            (FinalMemory::File(file), None) => file.metadata().map_or(0, |m| m.len()),
            (_, None) => 0,
        };
        if found < needed {
            return Err(VerifyError::Short { what: WHAT, found, needed });
        }
        Ok(())
    }

    /// Reads from memory that is known to be long enough.
    pub(crate) fn read(&self, address: u64, to: &mut [u8]) -> Result<(), VerifyError> {
        let len = to.len() as u64;
        match self {
            FinalMemory::File(file) => file
                .read_exact_at(to, address)
                .map_err(|error| VerifyError::Read { what: WHAT, offset: address, len, error }),
            _ => {
                let bytes = self.bytes().unwrap_or_default();
                to.copy_from_slice(&bytes[address as usize..][..to.len()]);
                Ok(())
            }
        }
    }

    /// The bytes of a unit, in `buffer` if they have to be read.
    pub(crate) fn unit<'b>(
        &'b self,
        unit: u64,
        buffer: &'b mut Vec<u8>,
    ) -> Result<&'b [u8], VerifyError> {
        let start = unit * UNIT_BYTES;
        match self.bytes() {
            Some(bytes) => Ok(&bytes[start as usize..][..UNIT_BYTES as usize]),
            None => {
                buffer.resize(UNIT_BYTES as usize, 0);
                self.read(start, buffer)?;
                Ok(buffer)
            }
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping that `open` made; whoever borrowed from it is gone.
        unsafe { libc::munmap(self.start.cast_mut().cast(), self.len) };
    }
}
