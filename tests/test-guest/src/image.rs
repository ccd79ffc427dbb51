// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Files with the content of the test guest's memory and disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use demand_memory::to_usize;

use crate::content::{Class, Content, PAGE_BYTES, UNIT_BYTES, UNIT_PAGES, disk_words};
use crate::windows::Windows;

impl Content {
    /// Creates (or replaces) a sparse file with the memory of a VM in which the image fills these
    /// windows; hole pages and memory outside the windows are not written.
    ///
    /// # Errors
    /// The error of the file system.
    pub fn write_image(&self, path: &Path, windows: &Windows) -> io::Result<()> {
        self.write_image_to(&File::create(path)?, windows, &mut |_| true)
    }

    /// Does the same in an empty file, and passes `progress` the number of bytes of the windows that
    /// are done. It ends the work by returning `false`.
    ///
    /// # Errors
    /// The error of the file system, and [`Interrupted`](io::ErrorKind::Interrupted).
    pub fn write_image_to(
        &self,
        file: &File,
        windows: &Windows,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> io::Result<()> {
        file.set_len(windows.vm_bytes())?;
        let mut buffer = vec![0; to_usize(UNIT_BYTES)];
        for unit in 0..windows.memory_bytes() / UNIT_BYTES {
            let first = unit * UNIT_PAGES;
            let packed = windows.packed(unit * UNIT_BYTES);
            let mut start = None;
            for i in 0..to_usize(UNIT_PAGES) {
                if self.class(first + i as u64) == Class::Hole {
                    write_run(file, &buffer, packed, start.take(), i)?;
                } else {
                    start = start.or(Some(i));
                    let page = buffer[i * PAGE_BYTES..].first_chunk_mut();
                    self.page(first + i as u64, page.expect("the buffer has a unit's pages"));
                }
            }
            write_run(file, &buffer, packed, start, to_usize(UNIT_PAGES))?;
            check_wanted(progress((unit + 1) * UNIT_BYTES))?;
        }
        Ok(())
    }
}

fn check_wanted(wanted: bool) -> io::Result<()> {
    if wanted { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
}

/// Writes pages `start` to `end` of the unit in `buffer`, whose place in the image is `packed`;
/// does nothing if there is no start.
fn write_run(
    file: &File,
    buffer: &[u8],
    packed: u64,
    start: Option<usize>,
    end: usize,
) -> io::Result<()> {
    let Some(start) = start else { return Ok(()) };
    let offset = packed + (start * PAGE_BYTES) as u64;
    file.write_all_at(&buffer[start * PAGE_BYTES..end * PAGE_BYTES], offset)
}

/// Creates (or replaces) a disk image of `bytes` bytes full of data, for tests without a real disk.
/// No two words are equal.
///
/// # Errors
/// If `bytes` is not a multiple of a sector, or the file system fails.
pub fn write_disk(path: &Path, seed: u64, bytes: u64) -> io::Result<()> {
    write_disk_to(&File::create(path)?, seed, bytes, &mut |_| true)
}

/// Does the same in an empty file, and passes `progress` the number of bytes that are done. It ends
/// the work by returning `false`.
///
/// # Errors
/// As there, and [`Interrupted`](io::ErrorKind::Interrupted).
pub fn write_disk_to(
    file: &File,
    seed: u64,
    bytes: u64,
    progress: &mut dyn FnMut(u64) -> bool,
) -> io::Result<()> {
    if !bytes.is_multiple_of(512) {
        let what = format!("a disk has a multiple of 512 bytes, not {bytes}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let word = disk_words(seed);
    let mut buffer = vec![0; to_usize(UNIT_BYTES)];
    let mut offset = 0;
    while offset < bytes {
        for (i, bytes) in buffer.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *bytes = word(offset / 8 + i as u64).to_le_bytes();
        }
        let len = UNIT_BYTES.min(bytes - offset);
        file.write_all_at(&buffer[..to_usize(len)], offset)?;
        offset += len;
        check_wanted(progress(offset))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn image_is_sparse_and_right() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let content = Content::new(6);
        let size = 6 << 30;
        let windows = Windows::new(16 * UNIT_BYTES, size).unwrap();
        content.write_image(&path, &windows).unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(file.metadata().unwrap().len(), size);
        assert!(file.metadata().unwrap().blocks() * 512 < 16 * UNIT_BYTES);
        let mut bytes = [0; PAGE_BYTES];
        for page in 0..16 * UNIT_PAGES {
            let at = windows.packed(page * PAGE_BYTES as u64);
            file.read_exact_at(&mut bytes, at).unwrap();
            assert!(content.page_is(page, &bytes), "{page}");
        }
    }

    #[test]
    fn disk_has_any_number_of_sectors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        write_disk(&path, 1, UNIT_BYTES + 512).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), UNIT_BYTES + 512);
        assert!(write_disk(&path, 1, 100).is_err());
    }
}
