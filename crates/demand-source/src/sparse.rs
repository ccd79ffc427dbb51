// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finds the data and the holes of sparse files.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::Extent;

/// Returns the offset of the next data or hole (by `whence`) at or after `offset`, or `None` if
/// there is none before the end of the file.
fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let offset = libc::off64_t::try_from(offset)
        .map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    // SAFETY: lseek accesses no memory of this process.
    let found = unsafe { libc::lseek64(file.as_raw_fd(), offset, whence) };
    if let Ok(found) = u64::try_from(found) {
        return Ok(Some(found));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        error => Err(error),
    }
}

/// Returns the extent of a file at `offset` (bytes), according to its file system at this moment.
/// It ends at `end` at most (bytes, greater than `offset`). Returns `None` if no data follows: that
/// is a hole only if the file is still that long, which the caller must check. The call moves the
/// file's position.
///
/// # Errors
///
/// The system's error.
///
/// # Examples
///
/// ```
/// use demand_source::{Extent, extent_of_file};
///
/// let file = tempfile::tempfile().unwrap();
/// file.set_len(1 << 20).unwrap();
/// std::os::unix::fs::FileExt::write_all_at(&file, &[1; 8192], 4096).unwrap();
/// assert_eq!(extent_of_file(&file, 0, 1 << 20).unwrap(), Some(Extent::Hole { end: 4096 }));
/// assert_eq!(extent_of_file(&file, 4096, 8192).unwrap(), Some(Extent::Data { end: 8192 }));
/// assert_eq!(extent_of_file(&file, 1 << 19, 1 << 20).unwrap(), None);
/// ```
pub fn extent_of_file(file: &File, offset: u64, end: u64) -> io::Result<Option<Extent>> {
    match seek(file, offset, libc::SEEK_DATA) {
        Ok(None) => Ok(None),
        Ok(Some(data)) if data > offset => Ok(Some(Extent::Hole { end: data.min(end) })),
        Ok(Some(_)) => {
            let hole = seek(file, offset, libc::SEEK_HOLE).ok().flatten();
            Ok(Some(Extent::Data { end: hole.map_or(end, |hole| hole.min(end)) }))
        }
        // A file system without holes has data everywhere.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(Some(Extent::Data { end })),
        Err(error) => Err(error),
    }
}
