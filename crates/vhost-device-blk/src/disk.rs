// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The disk: a raw image or a block device, read and written directly from guest memory.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Resource, getrlimit};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::error::{Error, Result};
use crate::lock::{self, Lock};
use crate::range::{Range, SECTOR_SIZE};
use crate::shared::Shared;
use crate::topology::{self, Topology};
use crate::zero::Means;

/// The maximum number of segments of one preadv or pwritev (`UIO_MAXIOV`).
const MAX_IOVECS: usize = 1024;

/// Options for opening a disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskOptions {
    /// Whether writes are refused.
    pub read_only: bool,
    /// The logical block size reported to the guest, in bytes: a power of two, 512 to 4096. The
    /// default is that of the block device, and 512 for a file.
    pub block_size: Option<u32>,
    /// Whether the disk's space stays allocated when the guest discards it.
    pub keep_space: bool,
    /// Whether other processes may write to the image, which is then not locked.
    pub shared: bool,
}

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
    topology: Topology,
    means: Means,
    /// Whether written data has been lost; no later flush may then succeed. Shared with the
    /// processes that serve front-ends, because the host reports a loss only once, to the first of
    /// them that flushes.
    lost: Shared<AtomicBool>,
    /// Whether the disk is an image, which other processes can truncate.
    is_image: bool,
    /// Whether a truncation of the image has been reported, by any of these processes.
    truncation_reported: Shared<AtomicBool>,
}

/// Refuses an image that this process may not write up to its end: the guest would otherwise get
/// I/O errors there.
fn check_file_limit(path: &Path, bytes: u64) -> Result<()> {
    match getrlimit(Resource::Fsize).current {
        Some(most) if most < bytes => Err(Error::DiskTooLarge { path: path.into(), bytes, most }),
        _ => Ok(()),
    }
}

/// Locks the image. Where the file system has no locks, a warning says so.
fn lock_image(file: &File, path: &Path, write: bool) -> Result<()> {
    match lock::lock(file, write) {
        Ok(Lock::Held) => Ok(()),
        Ok(Lock::Busy) => Err(Error::Locked { path: path.to_path_buf() }),
        Err(error) => {
            log::warn!(
                "cannot lock --blk-file {}: {error}; make sure that no other process writes to it",
                path.display()
            );
            Ok(())
        }
    }
}

/// The direction of a transfer.
#[derive(Clone, Copy)]
enum Transfer {
    FromDisk,
    ToDisk,
}

impl Disk {
    /// Opens the image or block device at `path`.
    ///
    /// # Errors
    /// [`Error::Disk`] if it cannot be opened, is neither a file nor a block device, or is smaller
    /// than one block; [`Error::ReadOnly`] if it must be writable but can only be read;
    /// [`Error::Locked`] if another process uses it and one of the two writes;
    /// [`Error::DiskTooLarge`] if this process may not write up to its end.
    pub fn open(path: &Path, options: &DiskOptions) -> Result<Self> {
        let failed = |source| Error::Disk { path: path.to_path_buf(), source };
        let unusable = |why: String| failed(io::Error::new(io::ErrorKind::InvalidInput, why));
        let read_only = |source| Error::ReadOnly { path: path.to_path_buf(), source };
        let open = |write: bool| {
            // Opening a pipe must not block until its other end is opened.
            let flags = libc::O_NONBLOCK;
            OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)
        };
        let mut file = open(!options.read_only).map_err(|error| {
            // A file system, a flag or a permission may prevent writing only.
            let only_read = !options.read_only && is_forbidden(&error) && open(false).is_ok();
            if only_read { read_only(error) } else { failed(error) }
        })?;
        let metadata = file.metadata().map_err(failed)?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(unusable("it is neither a regular file nor a block device".into()));
        }
        // The host opens a read-only device for writing, and then fails the writes.
        if !options.read_only && kind.is_block_device() && topology::is_read_only(&file) {
            return Err(read_only(io::Error::new(
                io::ErrorKind::ReadOnlyFilesystem,
                "the block device is read-only",
            )));
        }
        if !options.shared {
            lock_image(&file, path, !options.read_only)?;
        }
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let (topology, device_block) = if kind.is_block_device() {
            let (topology, own) = Topology::of_device(&file, options.block_size);
            (topology, Some(own))
        } else {
            (Topology::of_file(&metadata, options.block_size), None)
        };
        if kind.is_file() && !options.read_only {
            check_file_limit(path, bytes)?;
        }
        let block_size = u64::from(topology.block_size);
        if bytes < block_size {
            return Err(unusable(format!(
                "it has {bytes} bytes, less than a block of {block_size}"
            )));
        }
        if !bytes.is_multiple_of(block_size) {
            log::warn!(
                "cannot show the guest the last {} bytes of --blk-file {}: they are less than a block \
                 of {block_size}",
                bytes % block_size,
                path.display()
            );
        }
        let discard = !options.read_only && !options.keep_space;
        Ok(Disk {
            sectors: bytes / block_size * (block_size / SECTOR_SIZE),
            read_only: options.read_only,
            topology,
            means: Means::probe(&file, bytes, device_block, discard),
            lost: Shared::zeroed("map memory for the state of the disk")?,
            is_image: kind.is_file(),
            truncation_reported: Shared::zeroed("map memory for the state of the disk")?,
            file,
        })
    }

    /// Returns the capacity in sectors of 512 bytes.
    pub(crate) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Returns whether writes are refused.
    pub(crate) fn read_only(&self) -> bool {
        self.read_only
    }

    /// Returns the block sizes reported to the guest.
    pub(crate) fn topology(&self) -> Topology {
        self.topology
    }

    /// Returns whether a discard returns space to the host.
    pub(crate) fn can_discard(&self) -> bool {
        self.means.can_discard()
    }

    /// Reads from byte `offset` until all of `slices` is filled. The caller must first make missing
    /// pages of `slices` present: a page fault in the system call would wait under the file's lock.
    ///
    /// # Errors
    /// The error that the host returns; `UnexpectedEof` if the image has been truncated.
    pub fn read<B: BitmapSlice>(
        &self,
        slices: &[VolatileSlice<'_, B>],
        offset: u64,
    ) -> io::Result<()> {
        let result = self.transfer(slices, offset, Transfer::FromDisk).map_err(|error| {
            if error.kind() != io::ErrorKind::UnexpectedEof {
                return error;
            }
            self.report_truncation(offset, len_of(slices));
            io::Error::new(error.kind(), "the image has been truncated")
        });
        // Even a failed read may have written some of the slices.
        for slice in slices {
            slice.bitmap().mark_dirty(0, slice.len());
        }
        result
    }

    /// Writes all of `slices` from byte `offset`; see [`Disk::read`].
    ///
    /// # Errors
    /// The error that the host returns.
    pub(crate) fn write<B: BitmapSlice>(
        &self,
        slices: &[VolatileSlice<'_, B>],
        offset: u64,
    ) -> io::Result<()> {
        // Before the write extends the image again.
        self.report_truncation(offset, len_of(slices));
        self.transfer(slices, offset, Transfer::ToDisk)
    }

    /// Returns when everything written so far is on stable storage.
    ///
    /// # Errors
    /// The error that the host returns. Once a flush has failed, every later one fails too, in this
    /// process and in every process forked with this disk: the host reports a loss only once.
    pub(crate) fn flush(&self) -> io::Result<()> {
        if self.lost.load(Ordering::SeqCst) {
            return Err(io::Error::other(
                "an earlier write was lost; check the disk, and restart this daemon",
            ));
        }
        self.file.sync_data().inspect_err(|_| self.lost.store(true, Ordering::SeqCst))
    }

    /// Returns the space of a range to the host, if possible.
    ///
    /// # Errors
    /// The error that the host returns.
    pub(crate) fn discard(&self, range: &Range) -> io::Result<()> {
        self.means.discard(&self.file, range.offset, range.len)
    }

    /// Makes a range read as zeros.
    ///
    /// # Errors
    /// The error that the host returns.
    pub(crate) fn write_zeroes(&self, range: &Range) -> io::Result<()> {
        self.report_truncation(range.offset, range.len);
        self.means.write_zeroes(&self.file, range.offset, range.len, range.unmap)
    }

    /// Warns, once, if the image ends before `offset + len`, within the capacity that the guest
    /// knows: another process has truncated it.
    fn report_truncation(&self, offset: u64, len: u64) {
        if !self.is_image || self.truncation_reported.load(Ordering::Relaxed) {
            return;
        }
        // An image whose size is unknown fails in the transfer, too.
        let Ok(bytes) = self.file.metadata().map(|metadata| metadata.len()) else { return };
        if offset.saturating_add(len) <= bytes
            || self.truncation_reported.swap(true, Ordering::Relaxed)
        {
            return;
        }
        log::warn!(
            "the image has been truncated: it has {bytes} bytes, and the guest's disk {}; what was \
             past its end is lost, reads there fail, and writes extend it again with zeros between: \
             end the guest, and restore the image",
            self.sectors * SECTOR_SIZE
        );
    }

    fn transfer<B: BitmapSlice>(
        &self,
        slices: &[VolatileSlice<'_, B>],
        mut offset: u64,
        direction: Transfer,
    ) -> io::Result<()> {
        // Kept until the end: a pointer is valid only as long as its guard exists.
        let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let mut iovecs: Vec<libc::iovec> = guards
            .iter()
            .map(|g| libc::iovec { iov_base: g.as_ptr().cast(), iov_len: g.len() })
            .collect();
        let mut rest = &mut iovecs[..];
        while !skip(&mut rest, 0).is_empty() {
            let count = rest.len().min(MAX_IOVECS);
            let count = libc::c_int::try_from(count).expect("it is at most 1024");
            let position = libc::off_t::try_from(offset).map_err(io::Error::other)?;
            let fd = self.file.as_raw_fd();
            // SAFETY: the vectors describe guest memory that the guards keep mapped; the kernel may
            // read and write it at any time, as the guest may, because no reference to it exists
            // here.
            let n = unsafe {
                match direction {
                    Transfer::FromDisk => libc::preadv(fd, rest.as_ptr(), count, position),
                    Transfer::ToDisk => libc::pwritev(fd, rest.as_ptr(), count, position),
                }
            };
            match usize::try_from(n) {
                Ok(0) => {
                    return Err(match direction {
                        Transfer::FromDisk => io::ErrorKind::UnexpectedEof.into(),
                        Transfer::ToDisk => io::ErrorKind::WriteZero.into(),
                    });
                }
                Ok(n) => {
                    offset += n as u64;
                    skip(&mut rest, n);
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Returns the total length of `slices` in bytes.
fn len_of<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

/// Returns whether opening a file failed for lack of permission.
fn is_forbidden(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS))
}

/// Removes `n` bytes from the front, and all empty vectors there.
fn skip<'s>(rest: &'s mut &mut [libc::iovec], mut n: usize) -> &'s [libc::iovec] {
    let mut vectors = std::mem::take(rest);
    while let Some(first) = vectors.first_mut() {
        if n < first.iov_len {
            first.iov_base = first.iov_base.wrapping_byte_add(n);
            first.iov_len -= n;
            break;
        }
        n -= first.iov_len;
        vectors = &mut vectors[1..];
    }
    *rest = vectors;
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn disk(bytes: usize) -> (tempfile::NamedTempFile, Disk) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let data: Vec<u8> = (0..bytes).map(|i| (i / 512) as u8).collect();
        file.write_all(&data).unwrap();
        let disk = Disk::open(file.path(), &DiskOptions::default()).unwrap();
        (file, disk)
    }

    #[test]
    fn capacity_is_in_whole_blocks() {
        assert_eq!(disk(1024 + 100).1.sectors(), 2);
        let (file, _) = disk(8192 + 512);
        let blocks = DiskOptions { block_size: Some(4096), ..Default::default() };
        assert_eq!(Disk::open(file.path(), &blocks).unwrap().sectors(), 16);

        let read_only = DiskOptions { read_only: true, ..Default::default() };
        let (small, _) = disk(2048);
        let open = |path| Disk::open(path, &read_only);
        assert!(Disk::open(small.path(), &blocks).is_err());
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(open(file.path()), Err(Error::Disk { .. })));
        assert!(open(Path::new("/dev/null")).is_err());
        assert!(open(Path::new("/nonexistent/disk")).is_err());
        assert!(open(Path::new("/")).is_err());
    }

    #[test]
    fn scattered_transfers_beyond_one_call() {
        let sectors = 3000;
        let (_file, disk) = disk(sectors * 512);
        let mut memory = vec![0u8; sectors * 512];
        let slices: Vec<_> = memory.chunks_mut(512).map(VolatileSlice::from).collect();
        disk.read(&slices, 0).unwrap();
        drop(slices);
        assert!(memory.chunks(512).enumerate().all(|(i, s)| s.iter().all(|b| *b == i as u8)));

        memory.fill(0xa5);
        let slices: Vec<_> = memory.chunks_mut(512).rev().map(VolatileSlice::from).collect();
        disk.write(&slices[..2000], 512).unwrap();
        disk.flush().unwrap();
        drop(slices);
        let slices = [VolatileSlice::from(&mut memory[..1024])];
        disk.read(&slices, 0).unwrap();
        assert_eq!((memory[0], memory[512]), (0, 0xa5));
    }

    #[test]
    fn a_cut_off_image_is_an_error() {
        let (file, disk) = disk(4096);
        file.as_file().set_len(1024).unwrap();
        let mut memory = [0u8; 2048];
        let slices = [VolatileSlice::from(&mut memory[..])];
        let error = disk.read(&slices, 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn skipping() {
        let mut bytes = [0u8; 10];
        let base: *mut libc::c_void = bytes.as_mut_ptr().cast();
        let mut iovecs = [3, 0, 7].map(|iov_len| libc::iovec { iov_base: base, iov_len });
        let mut rest = &mut iovecs[..];
        assert_eq!(skip(&mut rest, 2).len(), 3);
        assert_eq!(rest[0].iov_len, 1);
        assert_eq!(skip(&mut rest, 1).len(), 1);
        assert_eq!(skip(&mut rest, 6)[0].iov_len, 1);
        assert_eq!(rest[0].iov_base, base.wrapping_byte_add(6));
        assert!(skip(&mut rest, 1).is_empty());
    }
}
