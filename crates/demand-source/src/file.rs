// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A raw image in a local file or block device.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::image_file::ImageFile;
use crate::{
    BlockingSource, Completion, Destination, Extent, MappedBytes, PageSource, Request, SourceError,
    Threaded,
};

/// Maximum number of reads of one image that wait for its storage at the same time. If that many
/// hang, all other reads that need the storage wait, too. Half of the threads serve no background
/// fill.
pub(crate) const READERS: usize = 32;

/// A raw image in a local file or block device: byte i of the file is byte i of the image.
///
/// Pages in the page cache are read straight into the destination, on the calling thread.
/// Everything else is read by the image's threads, so that slow or hung storage delays only the
/// threads that need the page. On a file system in memory, every read is of the first kind; on a
/// file system that is not known to be local (such as overlayfs), none is.
///
/// Holes are found as they are reached, so opening an image costs the same whatever its size. On a
/// local disk, each read that waits also finds some of the extents that follow.
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
    reads: Threaded<ImageFile>,
}

impl BlockingSource for ImageFile {
    fn size(&self) -> u64 {
        self.size()
    }

    // It may wait: `LocalFile` has its own `extent_now`, which calls this only for a file in memory.
    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        self.extent_checked(offset, Ok)
    }

    fn read(&self, offset: u64, destination: &mut Destination<'_>) -> Result<(), SourceError> {
        self.read_extents(
            offset,
            destination,
            |at| self.extent_afresh(at, Ok),
            |at, part| ImageFile::read(self, at, part),
        )
    }
}

impl LocalFile {
    /// Opens an image.
    ///
    /// # Errors
    ///
    /// [`SourceError::Open`] if the file cannot be opened, or is neither a regular file nor a block
    /// device.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, SourceError> {
        ImageFile::open(path.as_ref()).map(LocalFile::of)
    }

    /// Wraps an image that is already open; errors name it `path`.
    ///
    /// # Errors
    ///
    /// The same as those of [`open`](Self::open).
    pub fn of_file(file: File, path: impl Into<PathBuf>) -> Result<Self, SourceError> {
        ImageFile::of_file(file, path.into()).map(LocalFile::of)
    }

    fn of(image: ImageFile) -> Self {
        let ahead = |image: &ImageFile, end| image.look_ahead(end, |_, extent| Ok(extent));
        LocalFile { reads: Threaded::lazy(image, READERS, ahead) }
    }

    fn image(&self) -> &ImageFile {
        self.reads.source()
    }
}

impl PageSource for LocalFile {
    fn size(&self) -> u64 {
        self.image().size()
    }

    fn extent(&self, offset: u64) -> Result<Extent, SourceError> {
        self.image().extent_checked(offset, Ok)
    }

    fn extent_now(&self, offset: u64) -> Option<Result<Extent, SourceError>> {
        let image = self.image();
        if image.is_memory() {
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
        self.image().read_now(offset, destination)
    }

    fn mapped(&self, offset: u64, len: u64) -> Option<MappedBytes<'_>> {
        self.image().mapped(offset, len)
    }

    fn is_intact(&self) -> bool {
        self.image().is_intact()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cached::Storage;
    use crate::{Chunk, HashedImage, ImageWriter, Priority};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;
    use std::process::Command;
    use std::sync::mpsc;
    use std::thread;
    use std::time::{Duration, Instant};

    /// An image of 3 MiB: data in the first page, a hole, data in the last page.
    fn image() -> (tempfile::NamedTempFile, LocalFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(3 << 20).unwrap();
        file.as_file().write_all_at(&[7; 4096], 0).unwrap();
        file.as_file().write_all_at(&[9; 4096], (3 << 20) - 4096).unwrap();
        let image = LocalFile::open(file.path()).unwrap();
        (file, image)
    }

    #[test]
    fn holes_and_data_are_distinguished() {
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
    fn shrunk_file_is_an_error_and_not_zeros() {
        let (file, image) = image();
        file.as_file().set_len(1 << 20).unwrap();
        let mut bytes = [0; 4096];
        let error =
            image.read_through(2 << 20, &mut Destination::from(&mut bytes[..])).unwrap_err();
        assert!(matches!(error, SourceError::Shrunk { end, .. } if end == 1 << 20), "{error}");
        // A file that is only made longer again has a hole there, which a raw image cannot tell.
        assert!(error.to_string().ends_with("; restore its content"), "{error}");
        // Beyond the new end there must not be a hole, even where one was before.
        assert!(matches!(image.extent(2 << 20), Err(SourceError::Shrunk { .. })));
    }

    /// Fetches a page as a pager does; whether it took a thread of the image.
    fn fetch(source: &dyn PageSource, page: u64) -> Result<bool, SourceError> {
        let offset = page * 4096;
        let extent = source.extent_now(offset).transpose()?;
        if extent.is_some_and(|extent| extent.is_hole()) {
            return Ok(false);
        }
        let (destination, _bytes) = Destination::owned(vec![0xee; 4096]);
        let mut near = vec![0xee; 4096];
        if let Some(read) = source.read_now(offset, &mut Destination::from(&mut near[..])) {
            return read.map(|()| false);
        }
        let chunks = vec![Chunk { offset, destination }];
        source.submit(Request { priority: Priority::Demand, chunks }).wait()?;
        Ok(true)
    }

    /// An image in which every other page is a hole, and its hashes; `None` where the disk is not
    /// known to be local.
    fn fragmented(pages: u64) -> Option<(tempfile::TempDir, PathBuf, PathBuf)> {
        let folder = tempfile::tempdir().unwrap();
        let (image, table) = (folder.path().join("image"), folder.path().join("table"));
        let mut writer = ImageWriter::create(&image, &table, pages * 4096, [5; 16]).unwrap();
        for page in (0..pages).step_by(2) {
            writer.write(page * 4096, &[7; 4096]).unwrap();
        }
        writer.finish().unwrap();
        let local = Storage::of(&File::open(&image).unwrap()).unwrap() == Storage::Cached;
        local.then_some((folder, image, table))
    }

    /// Waits until the extent of a page is known to threads that must not wait.
    fn foreseen(source: &dyn PageSource, page: u64) -> Extent {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(extent) = source.extent_now(page * 4096) {
                return extent.unwrap();
            }
            assert!(Instant::now() < deadline, "page {page} is not foreseen");
            thread::yield_now();
        }
    }

    #[test]
    fn few_holes_need_a_thread() {
        const PAGES: u64 = 4096;
        let Some((_folder, image, table)) = fragmented(PAGES) else { return };
        // Upwards, and here and there: an odd step meets each page once.
        for step in [1, 1597] {
            let raw = LocalFile::open(&image).unwrap();
            let hashed = HashedImage::open(&image, &table).unwrap();
            for source in [&raw as &dyn PageSource, &hashed] {
                let pages = (0..PAGES).map(|nth| nth * step % PAGES);
                let waits = pages.filter(|page| fetch(source, *page).unwrap()).count();
                assert!(waits < 700, "{waits} waits for {} holes in steps of {step}", PAGES / 2);
            }
        }
    }

    #[test]
    fn foreseen_hole_of_shrunk_file_is_an_error() {
        let Some((_folder, image, _)) = fragmented(64) else { return };
        let source = LocalFile::open(&image).unwrap();
        assert!(fetch(&source, 1).unwrap());
        assert_eq!(foreseen(&source, 5), Extent::Hole { end: 6 * 4096 });
        assert!(!fetch(&source, 5).unwrap());
        File::options().write(true).open(&image).unwrap().set_len(4 * 4096).unwrap();
        let error = fetch(&source, 5).unwrap_err();
        assert!(matches!(error, SourceError::Shrunk { .. }), "{error}");
    }

    #[test]
    fn foreseen_extents_are_checked() {
        let Some((_folder, image, table)) = fragmented(64) else { return };
        let file = File::options().write(true).open(&image).unwrap();
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the call touches no memory.
        assert_eq!(unsafe { libc::fallocate64(file.as_raw_fd(), mode, 4 * 4096, 4096) }, 0);
        let source = HashedImage::open(&image, &table).unwrap();
        assert!(fetch(&source, 1).unwrap());
        // The file has a hole up to page 6.
        assert_eq!(foreseen(&source, 3), Extent::Hole { end: 4 * 4096 });
        let error = fetch(&source, 4).unwrap_err();
        assert!(matches!(error, SourceError::Altered { offset, .. } if offset == 4 * 4096));
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
        let error = told.recv_timeout(Duration::from_secs(10)).expect("the open blocks");
        assert!(error.contains("it is a special file"), "{error}");
    }
}
