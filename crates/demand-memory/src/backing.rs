// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory object behind a region: its kinds, and those in a memfd.

use std::ffi::CStr;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;
use std::str::FromStr;
use std::sync::Arc;

use crate::{Mapping, PAGE_SIZE, PageRange};

/// The kind of memory behind a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BackingKind {
    /// Ordinary shared memory, in pages of 4096 bytes.
    Shmem,
    /// Huge pages of 2 MiB.
    Hugetlb2M,
    /// Huge pages of 1 GiB.
    Hugetlb1G,
    /// A hypervisor's memory for one VM, in pages of 4096 bytes: [`VmFileBacking`].
    ///
    /// [`VmFileBacking`]: crate::VmFileBacking
    GuestMemfd,
}

impl BackingKind {
    /// All kinds.
    pub const ALL: [BackingKind; 4] = [
        BackingKind::Shmem,
        BackingKind::Hugetlb2M,
        BackingKind::Hugetlb1G,
        BackingKind::GuestMemfd,
    ];

    /// Returns the kind's unit: the page size of the backing, in bytes.
    pub const fn unit(self) -> u64 {
        match self {
            BackingKind::Shmem | BackingKind::GuestMemfd => PAGE_SIZE,
            BackingKind::Hugetlb2M => 2 << 20,
            BackingKind::Hugetlb1G => 1 << 30,
        }
    }

    /// Returns the kind's name, as [`FromStr`] parses it and reports show it.
    pub const fn name(self) -> &'static str {
        match self {
            BackingKind::Shmem => "shmem",
            BackingKind::Hugetlb2M => "hugetlb-2m",
            BackingKind::Hugetlb1G => "hugetlb-1g",
            BackingKind::GuestMemfd => "guest-memfd",
        }
    }

    /// Returns whether the memory consists of huge pages, which come from a pool.
    pub const fn is_hugetlb(self) -> bool {
        matches!(self, BackingKind::Hugetlb2M | BackingKind::Hugetlb1G)
    }

    /// Returns whether a mapping can trap accesses to missing pages. Without that, only the
    /// hypervisor can keep the guest from them, and no other process may reach the memory before
    /// all of it is present.
    pub const fn traps_in_mappings(self) -> bool {
        !matches!(self, BackingKind::GuestMemfd)
    }

    /// Returns the flags of a memfd of this kind; `None` if there is none.
    fn memfd_flags(self) -> Option<libc::c_uint> {
        match self {
            BackingKind::Shmem => Some(0),
            BackingKind::Hugetlb2M => Some(libc::MFD_HUGETLB | libc::MFD_HUGE_2MB),
            BackingKind::Hugetlb1G => Some(libc::MFD_HUGETLB | libc::MFD_HUGE_1GB),
            BackingKind::GuestMemfd => None,
        }
    }

    /// Checks that memory of this kind can have `size` bytes: one or more whole units.
    ///
    /// # Errors
    ///
    /// [`BackingError::Size`].
    pub fn expect_size(self, size: u64) -> Result<(), BackingError> {
        if size == 0 || !size.is_multiple_of(self.unit()) {
            return Err(BackingError::Size { size, kind: self });
        }
        Ok(())
    }
}

impl fmt::Display for BackingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for BackingKind {
    type Err = ParseBackingKindError;

    fn from_str(name: &str) -> Result<Self, ParseBackingKindError> {
        let kind = BackingKind::ALL.into_iter().find(|kind| kind.name() == name);
        kind.ok_or_else(|| ParseBackingKindError { name: name.into() })
    }
}

/// The error from parsing a text that is no [`BackingKind`]'s name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown backing '{name}'; choose one of {}",
    BackingKind::ALL.map(BackingKind::name).join(", ")
)]
pub struct ParseBackingKindError {
    name: String,
}

/// Errors from creating, allocating or removing memory of a backing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackingError {
    /// A size that is not a multiple of the unit.
    #[error(
        "cannot back {size} bytes with {kind}: the size is not a multiple of {} bytes; round it \
         up or down to one",
        kind.unit()
    )]
    Size {
        /// The requested size, in bytes.
        size: u64,
        /// The requested kind.
        kind: BackingKind,
    },
    /// A memory object that could not be created or mapped.
    #[error("cannot create {size} bytes of {kind}: {source}; {}", advice(*kind))]
    Create {
        /// The requested size, in bytes.
        size: u64,
        /// The requested kind.
        kind: BackingKind,
        /// The system's error.
        source: io::Error,
    },
    /// Memory that belongs to a VM, and was requested without one.
    #[error(
        "cannot create {size} bytes of {kind}: the hypervisor creates it, for one VM; create the \
         VM first, and the memory through it"
    )]
    OfVm {
        /// The requested size, in bytes.
        size: u64,
        /// The requested kind.
        kind: BackingKind,
    },
    /// Memory that could not be allocated for pages.
    #[error("cannot allocate {len} bytes of {kind} at offset {offset}: {source}; {}", advice(*kind))]
    Allocate {
        /// Offset in the region, in bytes.
        offset: u64,
        /// Length, in bytes.
        len: u64,
        /// The region's kind.
        kind: BackingKind,
        /// The system's error.
        source: io::Error,
    },
    /// Memory without content that could not be found or removed.
    #[error("cannot remove {len} bytes of {kind} without content at offset {offset}: {source}")]
    Remove {
        /// Offset in the region, in bytes.
        offset: u64,
        /// Length, in bytes.
        len: u64,
        /// The region's kind.
        kind: BackingKind,
        /// The system's error.
        source: io::Error,
    },
    /// Memory that could not be read.
    #[error("cannot read {len} bytes of {kind} at offset {offset}: {source}")]
    Read {
        /// Offset in the region, in bytes.
        offset: u64,
        /// Length, in bytes.
        len: u64,
        /// The region's kind.
        kind: BackingKind,
        /// The system's error.
        source: io::Error,
    },
}

fn advice(kind: BackingKind) -> &'static str {
    match kind {
        BackingKind::Shmem => "free memory, or use less",
        BackingKind::GuestMemfd => {
            "use a kernel whose hypervisor has such memory and lets it be mapped (Linux 6.18 or \
             newer), or another backing; if it has, free memory"
        }
        BackingKind::Hugetlb2M => {
            "free or add huge pages of 2 MiB (see sysctl vm.nr_hugepages, and HugePages_Free in \
             /proc/meminfo)"
        }
        BackingKind::Hugetlb1G => {
            "free or add huge pages of 1 GiB (see nr_hugepages and free_hugepages in \
             /sys/kernel/mm/hugepages/hugepages-1048576kB)"
        }
    }
}

/// A memory object that can back a region.
///
/// Nothing outside an implementation assumes that the object is a plain memfd.
pub trait Backing: Send + Sync + fmt::Debug {
    /// Returns the kind of memory.
    fn kind(&self) -> BackingKind;

    /// Returns the size of the object, in bytes: a multiple of the kind's unit.
    fn size(&self) -> u64;

    /// Maps the whole object, shared and writable. Each call creates another mapping, so that each
    /// role has a separate one.
    ///
    /// # Errors
    ///
    /// [`BackingError::Create`] with the system's error.
    fn map(&self) -> Result<Mapping, BackingError>;

    /// Ensures that the units of `pages` exist, zeroed if they are new, so that neither a write to
    /// them nor a mapping of them can fail for lack of memory.
    ///
    /// # Errors
    ///
    /// [`BackingError::Allocate`] with the system's error.
    fn allocate(&self, pages: PageRange) -> Result<(), BackingError>;

    /// Returns the first pages of `within` whose units may exist, for example because a process has
    /// touched them. Repeated calls, each from the end of the last answer on, find every unit that
    /// exists.
    ///
    /// # Errors
    ///
    /// [`BackingError::Remove`] with the system's error.
    fn next_existing(&self, within: PageRange) -> Result<Option<PageRange>, BackingError>;

    /// Removes whole units from the object and from every mapping of it, in all processes. Their
    /// reservations are kept. The next access to them finds new units of zeros, so only the pager
    /// may call it, with units of which no page is present or claimed.
    ///
    /// # Errors
    ///
    /// [`BackingError`] with the system's error.
    fn remove(&self, units: PageRange) -> Result<(), BackingError>;

    /// Returns the file through which other processes map the object, from its first byte on.
    fn file(&self) -> Option<&Arc<File>>;

    /// Returns the file if it can be read, and tells its holes (`SEEK_HOLE`), without a mapping.
    fn readable_file(&self) -> Option<&Arc<File>> {
        self.file()
    }
}

/// Shared memory or huge pages in a memfd.
///
/// # Examples
///
/// ```
/// use demand_memory::{Backing, BackingKind, MemfdBacking};
///
/// let backing = MemfdBacking::new(BackingKind::Shmem, 1 << 20).unwrap();
/// assert_eq!(backing.size(), 1 << 20);
/// // 3 MiB is not a multiple of 2 MiB.
/// assert!(MemfdBacking::new(BackingKind::Hugetlb2M, 3 << 20).is_err());
/// ```
#[derive(Debug)]
pub struct MemfdBacking {
    file: Arc<File>,
    kind: BackingKind,
    size: u64,
    reserve: bool,
    transparent: bool,
}

impl MemfdBacking {
    /// Creates a memory object of `size` bytes. The first mapping reserves huge pages for all of it,
    /// and fails if they are not free: see [`with_reservation`](Self::with_reservation).
    ///
    /// # Errors
    ///
    /// [`BackingError::Size`], [`BackingError::Create`], and [`BackingError::OfVm`] for a kind that
    /// is no memfd.
    pub fn new(kind: BackingKind, size: u64) -> Result<Self, BackingError> {
        kind.expect_size(size)?;
        let flags = kind.memfd_flags().ok_or(BackingError::OfVm { size, kind })?;
        let refused = |source| BackingError::Create { size, kind, source };
        let file = memfd(c"guest-memory", libc::MFD_ALLOW_SEALING | flags).map_err(refused)?;
        file.set_len(size).map_err(refused)?;
        seal(&file, 0).map_err(refused)?;
        Ok(MemfdBacking { file: Arc::new(file), kind, size, reserve: true, transparent: false })
    }

    /// Sets whether mappings reserve huge pages; initially they do. Without a reservation, an empty
    /// pool causes an error only when a page is fetched. Must be called before the first mapping is
    /// created. Has no effect on shared memory.
    #[must_use]
    pub fn with_reservation(mut self, on: bool) -> Self {
        self.reserve = on;
        self
    }

    /// Sets whether the kernel may use transparent huge pages for shared memory; initially it may
    /// not. Must be called before the first mapping is created. Has no effect on hugetlb memory.
    ///
    /// With them, the kernel allocates a page's neighbours together with it. To the traps, these
    /// are memory without content: the neighbours stay missing, and readers still fault in pages of
    /// 4096 bytes. The benefit is fewer allocations and huge mappings: at once in the populate
    /// mapping, and elsewhere once all pages are present and the kernel collapses them.
    ///
    /// Whether the kernel provides any depends on `shmem_enabled`
    /// (`Documentation/admin-guide/mm/transhuge.rst`): see [`transparent_huge_pages_of_shmem`].
    #[must_use]
    pub fn with_transparent_huge_pages(mut self, on: bool) -> Self {
        self.transparent = on;
        self
    }
}

/// The kernel's setting of transparent huge pages for shared memory.
const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// The reason why shared memory gets no transparent huge pages.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransparentHugePagesError {
    /// A kernel whose setting cannot be read.
    #[error(
        "cannot read {}: {source}; this kernel may lack transparent huge pages for shared memory",
        SHMEM_ENABLED
    )]
    Unreadable {
        /// The system's error.
        source: io::Error,
    },
    /// A kernel whose setting turns them off.
    #[error("{} is '{setting}'; write 'advise' to it", SHMEM_ENABLED)]
    Off {
        /// The setting's text.
        setting: String,
    },
}

/// Checks whether this kernel uses transparent huge pages for shared memory that asks for them.
///
/// # Errors
///
/// [`TransparentHugePagesError`] if it does not.
pub fn transparent_huge_pages_of_shmem() -> Result<(), TransparentHugePagesError> {
    let text = std::fs::read_to_string(SHMEM_ENABLED)
        .map_err(|source| TransparentHugePagesError::Unreadable { source })?;
    match chosen(&text) {
        Some("never" | "deny") | None => {
            Err(TransparentHugePagesError::Off { setting: text.trim().into() })
        }
        Some(_) => Ok(()),
    }
}

/// Returns the word in brackets of a list such as `always [madvise] never`.
fn chosen(setting: &str) -> Option<&str> {
    setting.split_once('[')?.1.split_once(']').map(|(word, _)| word)
}

impl Backing for MemfdBacking {
    fn kind(&self) -> BackingKind {
        self.kind
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self) -> Result<Mapping, BackingError> {
        let refused = |source| BackingError::Create { size: self.size, kind: self.kind, source };
        let map = if self.kind.is_hugetlb() && !self.reserve {
            Mapping::shared_without_reservation
        } else {
            Mapping::shared
        };
        let mapping = map(&self.file, self.size).map_err(refused)?;
        if !self.kind.is_hugetlb() {
            // Kernels built without transparent huge pages for shared memory refuse both values.
            let _ = mapping.advise(match self.transparent {
                true => libc::MADV_HUGEPAGE,
                false => libc::MADV_NOHUGEPAGE,
            });
        }
        Ok(mapping)
    }

    fn allocate(&self, pages: PageRange) -> Result<(), BackingError> {
        let unit = self.kind.unit();
        let units = pages.grow_to_units(unit / PAGE_SIZE, self.size / PAGE_SIZE);
        let (offset, len) = (units.offset(), units.bytes());
        // Without flags, it creates pages that do not exist and changes no byte of those that do.
        fallocate(&self.file, 0, units).map_err(|source| BackingError::Allocate {
            offset,
            len,
            kind: self.kind,
            source,
        })
    }

    fn next_existing(&self, within: PageRange) -> Result<Option<PageRange>, BackingError> {
        let failed = |source| {
            let (offset, len, kind) = (within.offset(), within.bytes(), self.kind);
            BackingError::Remove { offset, len, kind, source }
        };
        if within.is_empty() {
            return Ok(None);
        }
        if self.kind.is_hugetlb() {
            // Huge pages cannot be located, but they are counted.
            let blocks = self.file.metadata().map_err(failed)?.blocks();
            return Ok((blocks > 0).then_some(within));
        }
        let first = seek(&self.file, within.first, libc::SEEK_DATA).map_err(failed)?;
        let Some(first) = first.filter(|first| *first < within.end()) else { return Ok(None) };
        let hole = seek(&self.file, first, libc::SEEK_HOLE).map_err(failed)?;
        let end = hole.map_or(within.end(), |hole| hole.min(within.end()));
        Ok(Some(PageRange::new(first, end - first)))
    }

    fn remove(&self, units: PageRange) -> Result<(), BackingError> {
        let (offset, len) = (units.offset(), units.bytes());
        let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, how, units).map_err(|source| BackingError::Remove {
            offset,
            len,
            kind: self.kind,
            source,
        })?;
        if self.kind.is_hugetlb() && self.reserve {
            // The reservation of a huge page is lost with the page; a new mapping reserves the ones
            // that lack it.
            let refused =
                |source| BackingError::Create { size: self.size, kind: self.kind, source };
            Mapping::reserve(&self.file, self.size).map_err(refused)?;
        }
        Ok(())
    }

    fn file(&self) -> Option<&Arc<File>> {
        Some(&self.file)
    }
}

pub(crate) fn fallocate(file: &File, mode: libc::c_int, pages: PageRange) -> io::Result<()> {
    let (offset, len) = (pages.offset() as i64, pages.bytes() as i64);
    loop {
        // SAFETY: the call touches no memory of this process. The caller knows the mappings of the
        // memory object, and answers for the effect on them.
        if unsafe { libc::fallocate64(file.as_raw_fd(), mode, offset, len) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Returns the first page from `from` on that is data or a hole, as `whence` says; `None` if none
/// follows.
fn seek(file: &File, from: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    // SAFETY: the call touches no memory.
    let at = unsafe { libc::lseek64(file.as_raw_fd(), (from * PAGE_SIZE) as i64, whence) };
    match u64::try_from(at) {
        Ok(at) => Ok(Some(at / PAGE_SIZE)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

/// Seals the size, adds the seals `more` and forbids further ones. Other processes hold the
/// descriptor as well, and a thread that touches a mapping past the end of its object gets SIGBUS.
pub(crate) fn seal(file: &File, more: libc::c_int) -> io::Result<()> {
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL | more;
    // SAFETY: fcntl with this command touches no memory.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Creates a memfd.
pub(crate) fn memfd(name: &CStr, flags: libc::c_uint) -> io::Result<File> {
    // SAFETY: the name is a C string that outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::error::Error;

    #[test]
    fn sizes_other_than_whole_units_are_refused() {
        for (kind, size) in [
            (BackingKind::Shmem, 0),
            (BackingKind::Shmem, 4097),
            (BackingKind::Hugetlb2M, 4096),
            (BackingKind::Hugetlb1G, 3 << 29),
            (BackingKind::GuestMemfd, 4097),
        ] {
            let error = MemfdBacking::new(kind, size).unwrap_err();
            assert!(matches!(error, BackingError::Size { .. }), "{error}");
        }
    }

    #[test]
    fn memory_of_a_vm_is_no_memfd() {
        let error = MemfdBacking::new(BackingKind::GuestMemfd, 4096).unwrap_err();
        assert!(error.to_string().contains("create the VM first"), "{error}");
    }

    #[test]
    fn a_setting_is_the_word_in_brackets() {
        assert_eq!(chosen("always within_size [advise] never deny force\n"), Some("advise"));
        assert_eq!(chosen("always never"), None);
    }

    #[test]
    fn names_are_read_back() {
        for kind in BackingKind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert!("tmpfs".parse::<BackingKind>().unwrap_err().to_string().contains("hugetlb-2m"));
    }

    #[test]
    fn length_of_memory_is_sealed() {
        let backing = MemfdBacking::new(BackingKind::Shmem, 1 << 20).unwrap();
        for size in [0, 4096, 2 << 20] {
            let error = backing.file().unwrap().set_len(size).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{size}: {error}");
        }
        assert_eq!(backing.file().unwrap().metadata().unwrap().len(), 1 << 20);
    }

    #[test]
    fn existing_units_are_found_and_removed() {
        check_existing_pages(&MemfdBacking::new(BackingKind::Shmem, 1 << 20).unwrap());
    }

    /// Checks a backing of 256 pages, none of which exists yet.
    pub(crate) fn check_existing_pages(backing: &dyn Backing) {
        let from = |page| backing.next_existing(PageRange::new(page, 256 - page)).unwrap();
        assert_eq!(from(0), None);
        let mapping = backing.map().unwrap();
        for page in [3, 4, 255] {
            // SAFETY: the byte lies in the mapping, and nothing else refers to it.
            unsafe { mapping.at(page * PAGE_SIZE).write_volatile(1) };
        }
        assert_eq!(from(0), Some(PageRange::new(3, 2)));
        assert_eq!(from(4), Some(PageRange::page(4)));
        let some = |first, count| backing.next_existing(PageRange::new(first, count)).unwrap();
        assert_eq!((some(0, 4), some(5, 250)), (Some(PageRange::page(3)), None));
        backing.remove(PageRange::new(3, 200)).unwrap();
        assert_eq!(from(0), Some(PageRange::page(255)));
        assert_eq!(from(256), None);
        // SAFETY: as above.
        let bytes = [4, 255].map(|page| unsafe { mapping.at(page * PAGE_SIZE).read_volatile() });
        assert_eq!(bytes, [0, 1]);
    }

    #[test]
    fn an_empty_pool_is_an_error() {
        // No machine has 1 PiB of huge pages.
        let backing = MemfdBacking::new(BackingKind::Hugetlb2M, 1 << 50).unwrap();
        let error = backing.map().unwrap_err();
        assert!(error.to_string().contains("vm.nr_hugepages"), "{error}");
        assert!(error.source().is_some(), "{error:?}");
    }
}
