// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A read-only map of an image, whose pages are fetched when this process first reads them.

use std::fmt;
use std::ops::Deref;
use std::slice;
use std::sync::Arc;

use demand_memory::{
    Backing, BackingError, BackingKind, BitmapReader, FaultPath, Mapping, MemfdBacking, PAGE_SIZE,
    Pager, PagerConfig, PagerError, Stats, to_usize,
};
use demand_source::PageSource;

use crate::{
    Access, ArmedMapping, FaultService, Features, OpenError, OwnFaults, RangeError, ServiceError,
    Userfaultfd,
};

/// The features that a map needs of the kernel.
const NEEDED: Features =
    Features::from_bits(Features::MISSING_SHMEM.bits() | Features::MINOR_SHMEM.bits());

/// The options of a [`LazyMap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LazyMapOptions {
    /// Number of bytes that one fault fetches and maps: see [`OwnFaults::around`].
    pub around: u64,
    /// The most that is fetched ahead of a sequential reader, in bytes; 0: nothing.
    pub readahead: u64,
}

impl Default for LazyMapOptions {
    /// Returns 64 KiB for each fault, and at most 8 MiB ahead of a sequential reader.
    fn default() -> Self {
        LazyMapOptions { around: 64 << 10, readahead: 8 << 20 }
    }
}

/// Errors from creating a [`LazyMap`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LazyMapError {
    /// The image has no bytes.
    #[error("cannot map an image: it is empty; name one that has content")]
    Empty,
    /// The memory could not be created.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The image does not fit.
    #[error(transparent)]
    Pager(#[from] PagerError),
    /// No userfaultfd could be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The mapping could not be armed.
    #[error(transparent)]
    Arm(#[from] RangeError),
    /// The faults cannot be served.
    #[error(transparent)]
    Serve(#[from] ServiceError),
}

/// A read-only map of an image, whose pages are fetched from their source when this process first
/// reads them. Unlike a map of a file, it works with any [`PageSource`].
///
/// It needs no permission. A process that may open a userfaultfd for all accesses gets one
/// ([`access`](Self::access) returns the way); any other process gets one for the accesses of
/// user-mode code ([`Access::UserMode`]). With that, a system call that is given bytes of the map
/// fails with `EFAULT` if their pages are not present, or stops before them: writing the map to a
/// file, for example. Copy the bytes first, or read one byte of each page.
///
/// A read waits for as long as the source is unavailable, and never returns zeros instead; failed
/// attempts, and pages without an answer for ten seconds, are logged, through the crate `log`: a
/// program without a logger does not show them. The image must not change while it is mapped. A
/// child process made by `fork` does not get the map: an access there ends the child with SIGSEGV,
/// and dropping it there changes nothing for the parent.
///
/// # Examples
///
/// ```
/// use demand_source::LocalFile;
/// use demand_uffd::{LazyMap, LazyMapOptions};
/// use std::sync::Arc;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let file = tempfile::NamedTempFile::new()?;
/// std::os::unix::fs::FileExt::write_all_at(file.as_file(), b"hello", 0x5_0000)?;
/// file.as_file().set_len(1 << 20)?;
///
/// let source = Arc::new(LocalFile::open(file.path())?);
/// let map = match LazyMap::new(source, LazyMapOptions::default()) {
///     Ok(map) => map,
///     // One line: the operation, the system's answer, a remedy.
///     Err(error) => return Ok(eprintln!("{error}")),
/// };
/// assert_eq!(map.len(), 1 << 20);
/// assert_eq!(&map[0x5_0000..0x5_0005], b"hello");
/// // Only the pages around the bytes are present.
/// assert!(map.bitmap().is_missing(0));
/// # Ok(())
/// # }
/// ```
pub struct LazyMap {
    service: FaultService,
    pager: Arc<Pager>,
    mapping: Arc<Mapping>,
    access: Access,
    len: usize,
}

impl LazyMap {
    /// Maps the whole image of `source`.
    ///
    /// # Errors
    ///
    /// [`LazyMapError`].
    pub fn new(source: Arc<dyn PageSource>, options: LazyMapOptions) -> Result<Self, LazyMapError> {
        let (uffd, access) = match Userfaultfd::open_with_access(NEEDED) {
            Err(OpenError::NotPermitted { .. }) => {
                (Userfaultfd::open_user_mode(NEEDED)?, Access::UserMode)
            }
            opened => opened?,
        };
        Self::on(uffd, access, source, options)
    }

    /// Like [`new`](Self::new), but uses only what a process without permissions can use, whether
    /// this one has any or not.
    ///
    /// # Errors
    ///
    /// [`LazyMapError`].
    pub fn in_user_mode(
        source: Arc<dyn PageSource>,
        options: LazyMapOptions,
    ) -> Result<Self, LazyMapError> {
        Self::on(Userfaultfd::open_user_mode(NEEDED)?, Access::UserMode, source, options)
    }

    fn on(
        uffd: Userfaultfd,
        access: Access,
        source: Arc<dyn PageSource>,
        options: LazyMapOptions,
    ) -> Result<Self, LazyMapError> {
        let len = source.size();
        let size = len.checked_next_multiple_of(PAGE_SIZE).filter(|size| *size > 0);
        let size = size.ok_or(LazyMapError::Empty)?;
        let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, size)?);
        let mapping = Arc::new(backing.map()?);
        let pager = Pager::new(PagerConfig::new(backing, source))?;
        if options.readahead > 0 {
            pager.read_ahead(options.readahead);
        }
        let faults = OwnFaults { path: FaultPath::Vmm, around: options.around };
        let armed = ArmedMapping::own(&Arc::new(uffd), mapping.clone(), &pager, faults)?;
        let service = FaultService::start(crate::DEFAULT_THREADS)?;
        service.add(&[armed])?;
        Ok(LazyMap { service, pager, mapping, access, len: to_usize(len) })
    }

    /// Returns the way in which its userfaultfd was opened.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Returns which pages are missing.
    pub fn bitmap(&self) -> &BitmapReader {
        self.pager.bitmap()
    }

    /// Returns the counters of its faults, on the path [`FaultPath::Vmm`].
    pub fn stats(&self) -> &Arc<Stats> {
        self.pager.stats()
    }
}

impl Deref for LazyMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is as long as the image, rounded up to pages, and `self` keeps it
        // mapped. The bytes never change: the memory object belongs to this value alone, a page
        // becomes reachable here only once its content is complete, and present is final. A read of
        // any other page waits for it.
        unsafe { slice::from_raw_parts(self.mapping.address().as_ptr(), self.len) }
    }
}

impl Drop for LazyMap {
    fn drop(&mut self) {
        if !self.service.is_of_this_process() {
            // Its threads are the parent's. What a child inherits goes with it.
            std::mem::forget((self.pager.clone(), self.mapping.clone()));
            return;
        }
        // No reader is left. Fetches that would be retried keep the memory until they end.
        self.pager.stop();
        self.service.stop();
    }
}

impl fmt::Debug for LazyMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyMap")
            .field("len", &self.len)
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}
