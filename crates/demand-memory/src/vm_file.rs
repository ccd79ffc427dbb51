// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory in a file that a hypervisor has created for one VM.

use std::fs::File;
use std::io;
use std::sync::Arc;

use demand_source::to_usize;

use crate::backing::fallocate;
use crate::{Backing, BackingError, BackingKind, Mapping, PAGE_SIZE, PageRange};

/// Pages whose state is asked for at once: 64 MiB.
const ASK: u64 = (64 << 20) / PAGE_SIZE;

/// Memory in a file that a hypervisor has created for one VM ([`BackingKind::GuestMemfd`]). The
/// guest reaches the file itself, and not a mapping of it, so no mapping can trap the guest.
///
/// The file can be mapped and allocated, and has no system calls to read it, write it or find its
/// holes. demand-kvm's `guest_memfd` creates one.
#[derive(Debug)]
pub struct VmFileBacking {
    file: Arc<File>,
    size: u64,
    /// Never accessed: the kernel tells by it which pages exist.
    whole: Mapping,
}

impl VmFileBacking {
    /// Takes a file of `size` bytes whose memory is shared between the guest and its mappings.
    ///
    /// # Errors
    ///
    /// [`BackingError::Size`], and [`BackingError::Create`] if the file cannot be mapped.
    pub fn new(file: File, size: u64) -> Result<Self, BackingError> {
        let kind = BackingKind::GuestMemfd;
        kind.expect_size(size)?;
        let refused = |source| BackingError::Create { size, kind, source };
        let whole = Mapping::shared(&file, size).map_err(refused)?;
        Ok(VmFileBacking { file: Arc::new(file), size, whole })
    }
}

impl Backing for VmFileBacking {
    fn kind(&self) -> BackingKind {
        BackingKind::GuestMemfd
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self) -> Result<Mapping, BackingError> {
        let (size, kind) = (self.size, self.kind());
        Mapping::shared(&self.file, size).map_err(|source| BackingError::Create {
            size,
            kind,
            source,
        })
    }

    fn allocate(&self, pages: PageRange) -> Result<(), BackingError> {
        let pages = pages.grow_to_units(1, self.size / PAGE_SIZE);
        // The size of the file cannot change, and the kernel wants that said.
        fallocate(&self.file, libc::FALLOC_FL_KEEP_SIZE, pages).map_err(|source| {
            let (offset, len, kind) = (pages.offset(), pages.bytes(), self.kind());
            BackingError::Allocate { offset, len, kind, source }
        })
    }

    fn next_existing(&self, within: PageRange) -> Result<Option<PageRange>, BackingError> {
        for first in (within.first..within.end()).step_by(to_usize(ASK)) {
            let asked = PageRange::new(first, ASK.min(within.end() - first));
            let exist = self.whole.existing_pages(asked).map_err(|source| {
                let (offset, len, kind) = (asked.offset(), asked.bytes(), self.kind());
                BackingError::Remove { offset, len, kind, source }
            })?;
            if let Some(skipped) = exist.iter().position(|exists| *exists) {
                let run = exist[skipped..].iter().take_while(|exists| **exists).count();
                return Ok(Some(PageRange::new(first + skipped as u64, run as u64)));
            }
        }
        Ok(None)
    }

    fn remove(&self, units: PageRange) -> Result<(), BackingError> {
        let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, how, units).map_err(|source| BackingError::Remove {
            offset: units.offset(),
            len: units.bytes(),
            kind: self.kind(),
            source,
        })
    }

    fn file(&self) -> Option<&Arc<File>> {
        Some(&self.file)
    }

    fn readable_file(&self) -> Option<&Arc<File>> {
        None
    }
}

impl Mapping {
    /// Returns, for each of these pages, whether the mapped file has it. A process that may not know
    /// is told that it has all of them.
    fn existing_pages(&self, pages: PageRange) -> io::Result<Vec<bool>> {
        assert!(pages.offset() + pages.bytes() <= self.len());
        let mut state = vec![0; to_usize(pages.count)];
        let address = self.at(pages.offset()).as_ptr().cast();
        // SAFETY: the range lies in this mapping, of which no byte is accessed, and `state` has a
        // byte for each page.
        let result = unsafe { libc::mincore(address, to_usize(pages.bytes()), state.as_mut_ptr()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(state.into_iter().map(|state: u8| state & 1 == 1).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemfdBacking;
    use crate::backing::tests::check_existing_pages;

    /// Returns a backing over a memfd, which the kernel treats alike, except that it could be read.
    fn backing(size: u64) -> VmFileBacking {
        let memfd = MemfdBacking::new(BackingKind::Shmem, size).unwrap();
        VmFileBacking::new(memfd.file().unwrap().try_clone().unwrap(), size).unwrap()
    }

    #[test]
    fn existing_pages_are_found_and_removed() {
        let backing = backing(1 << 20);
        check_existing_pages(&backing);
        let mapping = backing.map().unwrap();
        backing.allocate(PageRange::new(0, 8)).unwrap();
        // SAFETY: the byte lies in the mapping, and nothing else refers to it.
        assert_eq!(unsafe { mapping.at(255 * PAGE_SIZE).read_volatile() }, 1);
    }

    #[test]
    fn whole_pages_are_needed() {
        for size in [0, 4097] {
            let file = tempfile::tempfile().unwrap();
            let error = VmFileBacking::new(file, size).unwrap_err();
            assert!(matches!(error, BackingError::Size { .. }), "{error}");
        }
    }
}
