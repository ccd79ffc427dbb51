// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writes images together with the table of their page hashes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::ImageSizeError;
use crate::convert::to_usize;
use crate::hash::{PAGE_BYTES, page_hash};
use crate::table::{self, Header};

/// An error from writing an image or its table.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageWriterError {
    /// An image cannot have this size.
    #[error("cannot create an image: {0}; choose another size")]
    Size(#[source] ImageSizeError),
    /// One of the files could not be created.
    #[error("cannot create {}: {source}; {}", path.display(), advice(source))]
    Create {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The write does not consist of whole pages within the image, or of all up to its end.
    #[error(
        "cannot write {len} bytes at offset {offset} of {}: they are not whole pages of an image \
         of {size} bytes; write multiples of 4096 bytes within it, or all up to its end",
        path.display()
    )]
    Range {
        /// The image.
        path: PathBuf,
        /// Offset in the image, in bytes.
        offset: u64,
        /// Length of the write, in bytes.
        len: u64,
        /// Size of the image, in bytes.
        size: u64,
    },
    /// The page was already written.
    #[error(
        "cannot write the page at offset {offset} of {}: it is already written; write each page \
         once",
        path.display()
    )]
    Twice {
        /// The image.
        path: PathBuf,
        /// Offset of the page in the image, in bytes.
        offset: u64,
    },
    /// A write failed.
    #[error(
        "cannot write {len} bytes at offset {offset} of {}: {source}; {}",
        path.display(),
        advice(source)
    )]
    Write {
        /// The image or its table.
        path: PathBuf,
        /// Offset in the file, in bytes.
        offset: u64,
        /// Length of the write, in bytes.
        len: u64,
        /// The system's error.
        source: io::Error,
    },
    /// The file could not be synced to the disk.
    #[error("cannot sync {} to the disk: {source}; {}", path.display(), advice(source))]
    Sync {
        /// The image or its table.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free space there, or choose another folder, and try again"
        }
        io::ErrorKind::AlreadyExists => {
            "choose a new name, or remove the old file if it is no longer needed"
        }
        io::ErrorKind::FileTooLarge => "choose a file system that supports files of this size",
        io::ErrorKind::NotFound => "create the folder first",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "choose a writable folder"
        }
        _ => "check the kernel log for disk errors, or choose another folder",
    }
}

/// The numbers of data pages and hole pages in a write or in a whole image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Pages of 4096 bytes that are not all zeros.
    pub data: u64,
    /// Pages of zeros, which become holes of the image.
    pub holes: u64,
}

/// The summary of a finished image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSummary {
    /// The image's pages.
    pub pages: PageCounts,
    /// The image's size, in bytes, holes included.
    pub size: u64,
    /// Bytes of data written to the image; the table is not counted.
    pub bytes_written: u64,
}

/// One of the two files, open for writing.
#[derive(Debug)]
struct Output {
    file: File,
    path: PathBuf,
}

impl Output {
    /// Creates a new file of `len` bytes, all of it a hole, that only its owner may access.
    fn create(path: &Path, len: u64) -> Result<Self, ImageWriterError> {
        let refused = |source| ImageWriterError::Create { path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let file = options.open(path).map_err(refused)?;
        file.set_len(len).map_err(|error| {
            // This function created the file, so it removes it.
            let _ = std::fs::remove_file(path);
            refused(error)
        })?;
        Ok(Output { file, path: path.to_owned() })
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), ImageWriterError> {
        self.file.write_all_at(bytes, offset).map_err(|source| ImageWriterError::Write {
            path: self.path.clone(),
            offset,
            len: bytes.len() as u64,
            source,
        })
    }

    fn sync(&self) -> Result<(), ImageWriterError> {
        let refused = |source| ImageWriterError::Sync { path: self.path.clone(), source };
        self.file.sync_all().map_err(refused)
    }
}

/// Writes a sparse image and, beside it, the table of its page hashes that
/// [`HashedImage`](crate::HashedImage) describes and reads.
///
/// Pages of zeros are not written: they stay holes. Opening a pair of files whose writer was not
/// [finished](Self::finish) fails; the caller that created them removes them.
///
/// # Examples
///
/// ```
/// use demand_source::{Destination, HashedImage, ImageWriter, PageSource};
///
/// let folder = tempfile::tempdir().unwrap();
/// let (image, table) = (folder.path().join("memory"), folder.path().join("memory.hashes"));
/// let mut writer = ImageWriter::create(&image, &table, 1 << 20, [1; 16]).unwrap();
/// writer.write(8192, &[7; 4096]).unwrap();
/// let summary = writer.finish().unwrap();
/// assert_eq!((summary.pages.data, summary.pages.holes), (1, 255));
///
/// let image = HashedImage::open(&image, &table).unwrap();
/// assert_eq!(image.generation(), [1; 16]);
/// let mut page = [0; 4096];
/// image.read_through(8192, &mut Destination::from(&mut page[..])).unwrap();
/// assert_eq!(page, [7; 4096]);
/// ```
#[derive(Debug)]
pub struct ImageWriter {
    image: Output,
    table: Output,
    header: Header,
    /// End of the content, in bytes. The rest of the last page is zeros.
    end: u64,
    /// One bit for each page, set if the page was written and is not all zeros.
    written: Vec<u64>,
    data: u64,
    /// The buffer for the hashes of one write, reused by the next.
    hashes: Vec<u64>,
}

impl ImageWriter {
    /// Creates the two files, for an image of `size` bytes. An image consists of whole pages of 4096
    /// bytes: it is padded with zeros. The files must not exist yet; only their owner may read
    /// them. `generation` is stored in the table; it identifies the snapshot that the files belong
    /// to, and [`HashedImage::generation`](crate::HashedImage::generation) returns it.
    ///
    /// # Errors
    ///
    /// [`ImageWriterError::Size`] and [`ImageWriterError::Create`]; no file is left behind.
    pub fn create(
        image: &Path,
        table: &Path,
        size: u64,
        generation: [u8; 16],
    ) -> Result<Self, ImageWriterError> {
        let end = size;
        let size = end.checked_next_multiple_of(PAGE_BYTES as u64).unwrap_or(u64::MAX);
        table::check_size(size).map_err(ImageWriterError::Size)?;
        let image = Output::create(image, size)?;
        let table = Output::create(table, table::table_len(size)).inspect_err(|_| {
            let _ = std::fs::remove_file(&image.path);
        })?;
        let pages = size / PAGE_BYTES as u64;
        let header = Header { size, generation };
        let written = vec![0; to_usize(pages.div_ceil(64))];
        Ok(ImageWriter { image, table, header, end, written, data: 0, hashes: Vec::new() })
    }

    /// Returns the size of the image, in bytes: a multiple of 4096.
    pub fn size(&self) -> u64 {
        self.header.size
    }

    /// Writes `bytes` at `offset` (bytes) of the image. The offset and the length are multiples of
    /// 4096, unless the write ends at the size that the image was created with. Pages may be
    /// written in any order, each page once; pages that are never written are zero.
    ///
    /// # Errors
    ///
    /// [`ImageWriterError::Range`], [`ImageWriterError::Twice`] and [`ImageWriterError::Write`].
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<PageCounts, ImageWriterError> {
        let len = bytes.len() as u64;
        let page = PAGE_BYTES as u64;
        let end = offset.checked_add(len).filter(|end| {
            let whole = len.is_multiple_of(page) && *end <= self.header.size;
            offset.is_multiple_of(page) && (whole || *end == self.end)
        });
        let Some(end) = end else {
            let (path, size) = (self.image.path.clone(), self.header.size);
            return Err(ImageWriterError::Range { path, offset, len, size });
        };
        let mut hashes = std::mem::take(&mut self.hashes);
        let (pages, rest) = bytes.split_at(bytes.len() / PAGE_BYTES * PAGE_BYTES);
        let mut result = self.write_pages(offset, pages, &mut hashes);
        if let (Ok(counts), false) = (&mut result, rest.is_empty()) {
            let mut last = [0; PAGE_BYTES];
            last[..rest.len()].copy_from_slice(rest);
            match self.write_pages(end - rest.len() as u64, &last, &mut hashes) {
                Ok(more) => {
                    counts.data += more.data;
                    counts.holes += more.holes;
                }
                Err(error) => result = Err(error),
            }
        }
        self.hashes = hashes;
        result
    }

    /// Writes whole pages, which lie in the image.
    fn write_pages(
        &mut self,
        offset: u64,
        bytes: &[u8],
        hashes: &mut Vec<u64>,
    ) -> Result<PageCounts, ImageWriterError> {
        let (page_bytes, len) = (PAGE_BYTES as u64, bytes.len() as u64);
        let first = offset / page_bytes;
        if let Some(page) = (first..first + len / page_bytes).find(|page| self.is_written(*page)) {
            let path = self.image.path.clone();
            return Err(ImageWriterError::Twice { path, offset: page * page_bytes });
        }
        hashes.clear();
        hashes.extend(bytes.chunks_exact(PAGE_BYTES).map(page_hash));

        let mut counts = PageCounts::default();
        let mut at = 0;
        for run in hashes.chunk_by(|a, b| (*a == 0) == (*b == 0)) {
            let (page, pages) = (first + at as u64, run.len() as u64);
            if run[0] == 0 {
                counts.holes += pages;
            } else {
                let content = &bytes[at * PAGE_BYTES..][..run.len() * PAGE_BYTES];
                self.image.write(page * page_bytes, content)?;
                counts.data += pages;
            }
            at += run.len();
        }
        // Writes the hashes in one piece, including zero hashes in between: they lie in one or two
        // blocks anyway.
        let used = |hash: &u64| *hash != 0;
        if let (Some(low), Some(high)) =
            (hashes.iter().position(used), hashes.iter().rposition(used))
        {
            let entries: Vec<u8> =
                hashes[low..=high].iter().flat_map(|h| h.to_le_bytes()).collect();
            self.table.write(table::hash_offset(first + low as u64), &entries)?;
        }
        for (page, _) in (first..).zip(hashes.iter()).filter(|(_, hash)| used(hash)) {
            self.written[(page / 64) as usize] |= 1 << (page % 64);
        }
        self.data += counts.data;
        Ok(counts)
    }

    fn is_written(&self, page: u64) -> bool {
        self.written[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    /// Syncs both files to the disk and makes them valid. The caller syncs the directory that
    /// contains them.
    ///
    /// # Errors
    ///
    /// [`ImageWriterError::Write`] and [`ImageWriterError::Sync`].
    pub fn finish(self) -> Result<ImageSummary, ImageWriterError> {
        self.image.sync()?;
        // The header declares the files complete, so it is written after everything else is on the
        // disk.
        self.table.sync()?;
        self.table.write(0, &self.header.encode())?;
        self.table.sync()?;
        let (size, data) = (self.header.size, self.data);
        let holes = size / PAGE_BYTES as u64 - data;
        let pages = PageCounts { data, holes };
        Ok(ImageSummary { pages, size, bytes_written: data * PAGE_BYTES as u64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn writer(folder: &Path, size: u64) -> Result<ImageWriter, ImageWriterError> {
        ImageWriter::create(&folder.join("image"), &folder.join("table"), size, [0; 16])
    }

    #[test]
    fn files_are_new_and_their_owners_only() {
        let folder = tempfile::tempdir().unwrap();
        writer(folder.path(), 1 << 30).unwrap().finish().unwrap();
        for name in ["image", "table"] {
            let metadata = std::fs::metadata(folder.path().join(name)).unwrap();
            assert_eq!(metadata.mode() & 0o777, 0o600);
            assert!(metadata.blocks() * 512 <= 1 << 16, "{name} takes {}", metadata.blocks());
        }
        let error = writer(folder.path(), 4096).unwrap_err();
        assert!(error.to_string().contains("remove the old file"), "{error}");
        // The table's name is taken, so the image is not left behind.
        std::fs::remove_file(folder.path().join("image")).unwrap();
        writer(folder.path(), 4096).unwrap_err();
        assert!(!folder.path().join("image").exists());
    }

    #[test]
    fn invalid_sizes_and_pages_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        for size in [0, u64::MAX - 4095, u64::MAX] {
            let error = writer(folder.path(), size).unwrap_err();
            assert!(matches!(error, ImageWriterError::Size(_)), "{error}");
        }
        let mut writer = writer(folder.path(), 8192).unwrap();
        let page = [1; 4096];
        for (offset, bytes) in
            [(1, &page[..]), (0, &page[1..]), (8192, &page[..]), (u64::MAX - 4095, &page[..])]
        {
            let error = writer.write(offset, bytes).unwrap_err();
            assert!(matches!(error, ImageWriterError::Range { .. }), "{error}");
        }
        let counts = writer.write(4096, &page).unwrap();
        assert_eq!(counts, PageCounts { data: 1, holes: 0 });
        // Writing zeros is refused, too: the page would keep its old content.
        for content in [page, [0; 4096]] {
            let error = writer.write(4096, &content).unwrap_err();
            assert!(matches!(error, ImageWriterError::Twice { offset: 4096, .. }), "{error}");
        }
        // A write of zeros does not count as a write of the page.
        writer.write(0, &[0; 4096]).unwrap();
        writer.write(0, &page).unwrap();
        assert_eq!(writer.finish().unwrap().pages, PageCounts { data: 2, holes: 0 });
    }

    #[test]
    fn image_of_any_length_is_padded() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = writer(folder.path(), 10_001).unwrap();
        assert_eq!(writer.size(), 12_288);
        let bytes = [7; 10_001];
        // Neither in the middle, nor past the end.
        for (offset, len) in [(0, 5000), (8192, 1810), (8193, 1808), (4096, 5906)] {
            let error = writer.write(offset, &bytes[..len]).unwrap_err();
            assert!(matches!(error, ImageWriterError::Range { .. }), "{offset}: {error}");
        }
        let counts = writer.write(4096, &bytes[4096..]).unwrap();
        assert_eq!(counts, PageCounts { data: 2, holes: 0 });
        let error = writer.write(8192, &bytes[8192..]).unwrap_err();
        assert!(matches!(error, ImageWriterError::Twice { offset: 8192, .. }), "{error}");
        writer.finish().unwrap();

        let [image, table] = ["image", "table"].map(|name| folder.path().join(name));
        let image = crate::HashedImage::open(image, table).unwrap();
        image.verify(&mut |_| true).unwrap();
        let mut read = vec![1; 12_288];
        let mut to = crate::Destination::from(&mut read[..]);
        crate::PageSource::read_through(&image, 0, &mut to).unwrap();
        assert_eq!(read[..4096], [0; 4096]);
        assert_eq!(read[4096..10_001], bytes[4096..]);
        assert_eq!(read[10_001..], [0; 2287]);
    }

    #[test]
    fn full_disk_error_has_offset_and_advice() {
        let full = Output {
            file: OpenOptions::new().write(true).open("/dev/full").unwrap(),
            path: "/dev/full".into(),
        };
        let error = full.write(8192, &[1; 4096]).unwrap_err().to_string();
        assert!(
            error.contains("offset 8192 of /dev/full") && error.contains("free space"),
            "{error}"
        );
    }
}
