// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Image bytes at an address in this process, for the kernel to copy from.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};

use crate::convert::to_usize;

/// Bytes of an image at an address in this process, for the kernel to read.
///
/// There is no slice of them, because they can vanish: if the file shrinks, a system call that
/// reads them fails with `EFAULT`, but a process that reads them itself dies of `SIGBUS`.
#[derive(Debug)]
pub struct MappedBytes<'a> {
    address: NonNull<u8>,
    len: usize,
    // The bytes themselves, if they are a private copy.
    owned: Option<Vec<u8>>,
    lifetime: PhantomData<&'a ()>,
}

/// Capacity of the largest buffer that is kept for reuse, in bytes: the largest unit that is filled
/// from a buffer.
const SPARE: usize = 2 << 20;

thread_local! {
    // The last buffer that this thread used. A new one of this size would be allocated from fresh
    // zeroed memory each time, which costs more than the copy avoids.
    static LAST: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl MappedBytes<'_> {
    /// Describes `len` bytes at `address`.
    ///
    /// # Safety
    ///
    /// For the lifetime `'_`, nothing but these bytes may be mapped there, and nothing but the
    /// kernel may read them through this value.
    pub unsafe fn new(address: NonNull<u8>, len: usize) -> Self {
        MappedBytes { address, len, owned: None, lifetime: PhantomData }
    }

    /// Wraps bytes that a source made or checked for this one use.
    pub fn owned(bytes: Vec<u8>) -> MappedBytes<'static> {
        // A vector's bytes do not move until it is changed or dropped.
        let (address, len) = (NonNull::from(&bytes[..]).cast(), bytes.len());
        MappedBytes { address, len, owned: Some(bytes), lifetime: PhantomData }
    }

    /// Returns a buffer of unspecified content for [`owned`](Self::owned). It reuses this thread's
    /// last buffer if that has been returned.
    pub(crate) fn buffer(len: usize) -> Vec<u8> {
        let mut bytes = LAST.take();
        bytes.resize(len, 0);
        bytes
    }

    /// Returns the address of the first byte.
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// Returns the number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for MappedBytes<'_> {
    fn drop(&mut self) {
        if let Some(bytes) = self.owned.take().filter(|bytes| bytes.capacity() <= SPARE) {
            // It fails only while the thread ends, which needs no buffer any more.
            let _ = LAST.try_with(|last| last.set(bytes));
        }
    }
}

/// Bytes that stay mapped before the mapping is dropped from the page tables, so that page tables
/// and resident memory do not grow with the amount that was read. Dropping costs a fraction of the
/// read itself, so one call drops many reads' pages.
const WINDOW: u64 = 32 << 20;

/// A whole file, mapped read-only.
#[derive(Debug)]
pub(crate) struct MappedFile {
    file: MmapRaw,
    /// Bytes that entered the page tables since they were last dropped.
    populated: AtomicU64,
}

impl MappedFile {
    pub(crate) fn new(file: &File, len: u64) -> io::Result<Self> {
        let len =
            usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        let file = MmapOptions::new().len(len).map_raw_read_only(file)?;
        Ok(MappedFile { file, populated: AtomicU64::new(0) })
    }

    /// Returns whether all bytes of the range are in memory, so that reading them does not wait for
    /// a disk.
    pub(crate) fn is_resident(&self, offset: u64, len: u64) -> bool {
        if offset.checked_add(len).is_none_or(|end| end > self.file.len() as u64) {
            return false;
        }
        let mut pages = vec![0u8; to_usize(len.div_ceil(4096))];
        // SAFETY: the check keeps the range within the mapping, and `pages` has one byte for each
        // page of it, which is all that the kernel writes.
        let result = unsafe {
            let address = self.file.as_mut_ptr().add(to_usize(offset));
            libc::mincore(address.cast(), to_usize(len), pages.as_mut_ptr())
        };
        result == 0 && pages.iter().all(|page| page & 1 == 1)
    }

    /// Returns bytes of the file after reading them from the disk and mapping them in the page
    /// tables. Returns `None` if that fails: an ordinary read of them then reports the error.
    pub(crate) fn bytes(&self, offset: u64, len: u64) -> Option<MappedBytes<'_>> {
        if offset.checked_add(len).is_none_or(|end| end > self.file.len() as u64) {
            return None;
        }
        if self.populated.fetch_add(len, Ordering::Relaxed) >= WINDOW {
            self.populated.store(len, Ordering::Relaxed);
            // A thread that is reading part of this now faults it in again.
            // SAFETY: the mapping is shared and file-backed, so dropped pages can be read again,
            // and no reference to its bytes exists.
            unsafe { self.file.unchecked_advise(UncheckedAdvice::DontNeed) }.ok()?;
        }
        let (offset, len) = (to_usize(offset), to_usize(len));
        match self.file.advise_range(Advice::PopulateRead, offset, len) {
            Ok(()) => {}
            // Linux before 5.14 lacks this advice and reads page by page, on access.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(_) => return None,
        }
        let first = NonNull::new(self.file.as_mut_ptr())?;
        // SAFETY: the check above keeps the bytes within the mapping, which lives as long as
        // `self`. Only this type knows its address, so no Rust code reads it.
        Some(unsafe { MappedBytes::new(first.add(offset), len) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    /// Returns the bytes that the kernel reads there.
    fn read(bytes: MappedBytes<'_>) -> io::Result<Vec<u8>> {
        let to = file(0);
        // SAFETY: only the kernel reads the bytes; it answers with an error if they are not mapped.
        let written = unsafe {
            libc::pwrite(to.as_raw_fd(), bytes.address().as_ptr().cast(), bytes.len(), 0)
        };
        let written = usize::try_from(written).map_err(|_| io::Error::last_os_error())?;
        let mut content = vec![0; written];
        to.read_exact_at(&mut content, 0)?;
        Ok(content)
    }

    #[test]
    fn the_bytes_are_the_files() {
        let file = file(3 << 20);
        file.write_all_at(&[7; 8192], 1 << 20).unwrap();
        let mapped = MappedFile::new(&file, 3 << 20).unwrap();
        let bytes = mapped.bytes((1 << 20) + 4096, 8192).unwrap();
        assert_eq!((bytes.len(), bytes.is_empty()), (8192, false));
        let content = read(bytes).unwrap();
        assert!(content[..4096].iter().all(|byte| *byte == 7));
        assert!(content[4096..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn buffer_is_reused_only_after_its_last_use() {
        let mut first = MappedBytes::buffer(8192);
        first.fill(7);
        let first = MappedBytes::owned(first);
        let address = first.address();
        let mut second = MappedBytes::buffer(8192);
        second.fill(9);
        assert_eq!(read(first).unwrap(), [7; 8192]);
        let third = MappedBytes::buffer(4096);
        assert_eq!(third.as_ptr(), address.as_ptr());
        // A buffer that is too large is not kept.
        drop(MappedBytes::owned(vec![1; SPARE + 1]));
        assert_eq!(LAST.take().capacity(), 0);
    }

    #[test]
    fn bytes_past_the_end_are_refused() {
        let file = file(3 << 20);
        let mapped = MappedFile::new(&file, 3 << 20).unwrap();
        assert!(mapped.bytes(2 << 20, 2 << 20).is_none());
        assert!(mapped.bytes(u64::MAX - 4095, 8192).is_none());
        let before = mapped.bytes(2 << 20, 4096).unwrap();
        file.set_len(1 << 20).unwrap();
        assert!(mapped.bytes(2 << 20, 4096).is_none(), "the file has shrunk");
        assert_eq!(read(before).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    }

    #[test]
    fn resident_bytes_are_bounded() {
        let len = 4 * WINDOW;
        let mapped = MappedFile::new(&file(len), len).unwrap();
        for offset in (0..len).step_by(2 << 20) {
            mapped.bytes(offset, 2 << 20).unwrap();
        }
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", mapped.file.as_ptr() as usize);
        let mut lines = maps.lines().skip_while(|line| !line.starts_with(&start));
        let resident = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
        let resident: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
        assert!((1..=WINDOW >> 10).contains(&resident), "{resident} KiB are resident");
    }
}
