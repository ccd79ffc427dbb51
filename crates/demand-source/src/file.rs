// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A raw image in a local file.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::mapped::{MappedBytes, MappedFile};
use crate::{Completion, Destination, Extent, PageSource, Request, SourceError, extent_of_file};

/// A raw image in a local file or block device: byte i of the file is byte i of the image.
///
/// Reads go straight into the destination, on the calling thread. Holes are found as they are
/// met, so opening an image costs the same whatever its size.
///
/// # Examples
///
/// ```
/// use demand_source::{Destination, LocalFile, PageSource};
///
/// let file = tempfile::NamedTempFile::new().unwrap();
/// file.as_file().set_len(8192).unwrap();
/// let image = LocalFile::open(file.path()).unwrap();
/// assert_eq!(image.size(), 8192);
/// let mut page = [1u8; 4096];
/// image.read_through(4096, &mut Destination::from(&mut page[..])).unwrap();
/// assert_eq!(page, [0; 4096]);
/// ```
#[derive(Debug)]
pub struct LocalFile {
    file: File,
    path: PathBuf,
    size: u64,
    // Made when it is first asked for; `None` where it cannot be.
    mapped: OnceLock<Option<MappedFile>>,
    // Tells images apart in the memory of the last extent that each thread keeps.
    id: u64,
}

#[derive(Clone, Copy)]
struct LastExtent {
    id: u64,
    start: u64,
    extent: Extent,
}

thread_local! {
    // Asking the file system costs a system call; neighbours mostly lie in the extent that was
    // asked for last. One for each thread, so that threads share no written cache line.
    static LAST: Cell<LastExtent> =
        const { Cell::new(LastExtent { id: 0, start: 0, extent: Extent::Hole { end: 0 } }) };
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl LocalFile {
    /// Opens an image.
    ///
    /// # Errors
    ///
    /// [`SourceError::Open`] if it cannot be opened, or is neither a regular file nor a block
    /// device.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, SourceError> {
        let path = path.as_ref();
        let refused = |error| SourceError::Open { image: path.display().to_string(), error };
        // Not to wait for whoever opens the other end of a pipe.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(refused)?;
        LocalFile::of_file(file, path)
    }

    /// An image that is open already; `path` is what errors call it.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn of_file(mut file: File, path: impl Into<PathBuf>) -> Result<Self, SourceError> {
        let path = path.into();
        let refused = |error| SourceError::Open { image: path.display().to_string(), error };
        let kind = file.metadata().map_err(refused)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = if kind.is_dir() { "it is a directory" } else { "it is a special file" };
            return Err(refused(io::Error::new(io::ErrorKind::InvalidInput, what)));
        }
        // A block device has no length in its metadata, but an end.
        let size = file.seek(SeekFrom::End(0)).map_err(refused)?;
        Ok(LocalFile {
            file,
            path,
            size,
            mapped: OnceLock::new(),
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
        })
    }

    /// The file, as the user named it.
    pub(crate) fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn shrunk(&self, offset: u64, len: u64) -> SourceError {
        let end = (&self.file).seek(SeekFrom::End(0)).unwrap_or(0);
        SourceError::Shrunk { image: self.name(), offset, len, end, size: self.size }
    }

    /// The end of `len` bytes at `offset`, if they lie in the image.
    pub(crate) fn check_range(&self, offset: u64, len: u64) -> Result<u64, SourceError> {
        offset.checked_add(len).filter(|end| *end <= self.size).ok_or_else(|| {
            SourceError::OutOfRange { image: self.name(), offset, len, size: self.size }
        })
    }

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
                Err(error) => {
                    return Err(SourceError::Read { image: self.name(), offset, len, error });
                }
            }
        }
        Ok(())
    }

    /// What the file system says of the byte at `offset`, which lies in the image.
    pub(crate) fn find_extent(&self, offset: u64) -> Result<Extent, SourceError> {
        match extent_of_file(&self.file, offset, self.size) {
            Ok(Some(extent)) => Ok(extent),
            // No data from here on, which is a hole only as long as the image is.
            Ok(None) => match (&self.file).seek(SeekFrom::End(0)) {
                Ok(end) if end >= self.size => Ok(Extent::Hole { end: self.size }),
                _ => Err(self.shrunk(offset, self.size - offset)),
            },
            Err(error) => Err(SourceError::Read { image: self.name(), offset, len: 0, error }),
        }
    }

    /// As [`extent`](PageSource::extent), through `check`, which may refuse what was found or
    /// change it; it is not asked again for what this thread remembers.
    pub(crate) fn extent_checked(
        &self,
        offset: u64,
        check: impl FnOnce(Extent) -> Result<Extent, SourceError>,
    ) -> Result<Extent, SourceError> {
        self.check_range(offset, 1)?;
        let last = LAST.get();
        if last.id == self.id && last.start <= offset && offset < last.extent.end() {
            return Ok(last.extent);
        }
        let extent = check(self.find_extent(offset)?)?;
        LAST.set(LastExtent { id: self.id, start: offset, extent });
        Ok(extent)
    }
}

impl PageSource for LocalFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        self.extent_checked(offset, Ok)
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

    fn mapped(&self, offset: u64, len: u64) -> Option<MappedBytes<'_>> {
        let mapped = self.mapped.get_or_init(|| MappedFile::new(&self.file, self.size).ok());
        mapped.as_ref()?.bytes(offset, len)
    }

    fn is_intact(&self) -> bool {
        (&self.file).seek(SeekFrom::End(0)).is_ok_and(|end| end >= self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::process::Command;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    /// 3 MiB: data in the first page, a hole, data in the last page.
    fn image() -> (tempfile::NamedTempFile, LocalFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(3 << 20).unwrap();
        file.as_file().write_all_at(&[7; 4096], 0).unwrap();
        file.as_file().write_all_at(&[9; 4096], (3 << 20) - 4096).unwrap();
        let image = LocalFile::open(file.path()).unwrap();
        (file, image)
    }

    #[test]
    fn holes_and_data_are_told_apart() {
        let (_file, image) = image();
        assert_eq!(image.extent(0).unwrap(), Extent::Data { end: 4096 });
        assert_eq!(image.extent(4096).unwrap(), Extent::Hole { end: (3 << 20) - 4096 });
        assert_eq!(image.extent(1 << 20).unwrap(), Extent::Hole { end: (3 << 20) - 4096 });
        assert_eq!(image.extent((3 << 20) - 1).unwrap(), Extent::Data { end: 3 << 20 });
    }

    #[test]
    fn a_trailing_hole_is_a_hole() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let image = LocalFile::open(file.path()).unwrap();
        assert_eq!(image.extent(4096).unwrap(), Extent::Hole { end: 1 << 20 });
    }

    #[test]
    fn content_arrives() {
        let (_file, image) = image();
        let mut bytes = [0; 8192];
        image.read_through((3 << 20) - 8192, &mut Destination::from(&mut bytes[..])).unwrap();
        assert_eq!(bytes[..4096], [0; 4096]);
        assert_eq!(bytes[4096..], [9; 4096]);
    }

    #[test]
    fn past_the_end_is_an_error() {
        let (_file, image) = image();
        let mut bytes = [0; 8192];
        let error = image
            .read_through((3 << 20) - 4096, &mut Destination::from(&mut bytes[..]))
            .unwrap_err();
        assert!(matches!(error, SourceError::OutOfRange { .. }), "{error}");
        assert!(matches!(image.extent(3 << 20), Err(SourceError::OutOfRange { .. })));
    }

    #[test]
    fn a_file_that_shrinks_is_an_error_and_not_zeros() {
        let (file, image) = image();
        file.as_file().set_len(1 << 20).unwrap();
        let mut bytes = [0; 4096];
        let error =
            image.read_through(2 << 20, &mut Destination::from(&mut bytes[..])).unwrap_err();
        assert!(matches!(error, SourceError::Shrunk { end, .. } if end == 1 << 20), "{error}");
        // Where a hole was, the end of the file must not pass for one.
        assert!(matches!(image.extent(2 << 20), Err(SourceError::Shrunk { .. })));
    }

    #[test]
    fn a_directory_and_a_missing_file_are_refused() {
        for path in ["/", "/nonexistent/image"] {
            assert!(matches!(LocalFile::open(path), Err(SourceError::Open { .. })));
        }
    }

    #[test]
    fn a_pipe_is_refused_and_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let (tell, told) = mpsc::channel();
        thread::spawn(move || tell.send(LocalFile::open(pipe).unwrap_err().to_string()));
        let error = told.recv_timeout(Duration::from_secs(10)).expect("nobody waits");
        assert!(error.contains("it is a special file"), "{error}");
    }
}
