// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory object behind a region: shared memory or huge pages.

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
}

impl BackingKind {
    /// All kinds.
    pub const ALL: [BackingKind; 3] =
        [BackingKind::Shmem, BackingKind::Hugetlb2M, BackingKind::Hugetlb1G];

    /// Returns the kind's unit: the page size of the backing, in bytes.
    pub const fn unit(self) -> u64 {
        match self {
            BackingKind::Shmem => PAGE_SIZE,
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
        }
    }

    fn is_hugetlb(self) -> bool {
        self != BackingKind::Shmem
    }

    fn memfd_flags(self) -> libc::c_uint {
        match self {
            BackingKind::Shmem => 0,
            BackingKind::Hugetlb2M => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
            BackingKind::Hugetlb1G => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
        }
    }
}

impl fmt::Display for BackingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for BackingKind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        BackingKind::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let names = BackingKind::ALL.map(BackingKind::name).join(", ");
            format!("unknown backing '{name}'; choose one of {names}")
        })
    }
}

/// Errors from creating, allocating or removing memory of a backing.
#[derive(Debug, thiserror::Error)]
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
    #[error("cannot create {size} bytes of {kind}: {error}; {}", advice(*kind))]
    Create {
        /// The requested size, in bytes.
        size: u64,
        /// The requested kind.
        kind: BackingKind,
        /// The system's error.
        error: io::Error,
    },
    /// Memory that could not be allocated for pages.
    #[error("cannot allocate {len} bytes of {kind} at offset {offset}: {error}; {}", advice(*kind))]
    Allocate {
        /// Offset in the region, in bytes.
        offset: u64,
        /// Length, in bytes.
        len: u64,
        /// The region's kind.
        kind: BackingKind,
        /// The system's error.
        error: io::Error,
    },
    /// Memory without content that could not be found or removed.
    #[error("cannot remove {len} bytes of {kind} without content at offset {offset}: {error}")]
    Remove {
        /// Offset in the region, in bytes.
        offset: u64,
        /// Length, in bytes.
        len: u64,
        /// The region's kind.
        kind: BackingKind,
        /// The system's error.
        error: io::Error,
    },
}

fn advice(kind: BackingKind) -> &'static str {
    match kind {
        BackingKind::Shmem => "free memory, or use less",
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
/// Nothing outside an implementation assumes that the object is a plain memfd, so that others
/// (guest_memfd, for example) can be added.
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

    /// Returns the first run of units from page `from` on that may exist, for example because a
    /// process has touched them. Repeated calls find every unit that exists.
    ///
    /// # Errors
    ///
    /// [`BackingError::Remove`] with the system's error.
    fn next_existing(&self, from: u64) -> Result<Option<PageRange>, BackingError>;

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
}

/// Shared memory or huge pages in a memfd.
///
/// # Examples
///
/// ```
/// use demand_memory::{Backing, BackingKind, MemfdBacking};
///
/// let backing = MemfdBacking::new(BackingKind::Shmem, 1 << 20, true).unwrap();
/// assert_eq!(backing.size(), 1 << 20);
/// // 3 MiB is not a multiple of 2 MiB.
/// assert!(MemfdBacking::new(BackingKind::Hugetlb2M, 3 << 20, true).is_err());
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
    /// Creates a memory object of `size` bytes. With `reserve`, the first mapping reserves huge
    /// pages for all of it, and fails if they are not free; without, an empty pool causes an error
    /// only when a page is fetched.
    ///
    /// # Errors
    ///
    /// [`BackingError::Size`] and [`BackingError::Create`].
    pub fn new(kind: BackingKind, size: u64, reserve: bool) -> Result<Self, BackingError> {
        if size == 0 || !size.is_multiple_of(kind.unit()) {
            return Err(BackingError::Size { size, kind });
        }
        let refused = |error| BackingError::Create { size, kind, error };
        let file = memfd(c"guest-memory", libc::MFD_ALLOW_SEALING | kind.memfd_flags())
            .map_err(refused)?;
        file.set_len(size).map_err(refused)?;
        seal(&file, 0).map_err(refused)?;
        Ok(MemfdBacking { file: Arc::new(file), kind, size, reserve, transparent: false })
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

/// Checks whether this kernel uses transparent huge pages for shared memory that asks for them.
///
/// # Errors
///
/// One line of text: the reason, and the remedy.
pub fn transparent_huge_pages_of_shmem() -> Result<(), String> {
    const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let text = std::fs::read_to_string(SETTING).map_err(|error| {
        format!(
            "cannot read {SETTING}: {error}; this kernel may lack transparent huge pages for \
             shared memory"
        )
    })?;
    match chosen(&text) {
        Some("never" | "deny") | None => {
            Err(format!("{SETTING} is '{}'; write 'advise' to it", text.trim()))
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
        let refused = |error| BackingError::Create { size: self.size, kind: self.kind, error };
        let no_reserve = self.kind.is_hugetlb() && !self.reserve;
        let mapping = Mapping::shared(&self.file, self.size, no_reserve).map_err(refused)?;
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
        fallocate(&self.file, 0, units).map_err(|error| BackingError::Allocate {
            offset,
            len,
            kind: self.kind,
            error,
        })
    }

    fn next_existing(&self, from: u64) -> Result<Option<PageRange>, BackingError> {
        let end = self.size / PAGE_SIZE;
        let failed = |error| {
            let (offset, kind) = (from * PAGE_SIZE, self.kind);
            BackingError::Remove { offset, len: self.size - offset, kind, error }
        };
        if from >= end {
            return Ok(None);
        }
        if self.kind.is_hugetlb() {
            // Huge pages cannot be located, but they are counted.
            let blocks = self.file.metadata().map_err(failed)?.blocks();
            return Ok((blocks > 0).then_some(PageRange::new(from, end - from)));
        }
        let Some(first) = seek(&self.file, from, libc::SEEK_DATA).map_err(failed)? else {
            return Ok(None);
        };
        let end = seek(&self.file, first, libc::SEEK_HOLE).map_err(failed)?.unwrap_or(end);
        Ok(Some(PageRange::new(first, end - first)))
    }

    fn remove(&self, units: PageRange) -> Result<(), BackingError> {
        let (offset, len) = (units.offset(), units.bytes());
        let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, how, units).map_err(|error| BackingError::Remove {
            offset,
            len,
            kind: self.kind,
            error,
        })?;
        if self.kind.is_hugetlb() && self.reserve {
            // The reservation of a huge page is lost with the page; a new mapping reserves the ones
            // that lack it.
            let refused = |error| BackingError::Create { size: self.size, kind: self.kind, error };
            Mapping::reserve(&self.file, self.size).map_err(refused)?;
        }
        Ok(())
    }

    fn file(&self) -> Option<&Arc<File>> {
        Some(&self.file)
    }
}

fn fallocate(file: &File, mode: libc::c_int, pages: PageRange) -> io::Result<()> {
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
mod tests {
    use super::*;

    #[test]
    fn sizes_other_than_whole_units_are_refused() {
        for (kind, size) in [
            (BackingKind::Shmem, 0),
            (BackingKind::Shmem, 4097),
            (BackingKind::Hugetlb2M, 4096),
            (BackingKind::Hugetlb1G, 3 << 29),
        ] {
            let error = MemfdBacking::new(kind, size, true).unwrap_err();
            assert!(matches!(error, BackingError::Size { .. }), "{error}");
        }
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
        assert!("tmpfs".parse::<BackingKind>().unwrap_err().contains("hugetlb-2m"));
    }

    #[test]
    fn length_of_memory_is_sealed() {
        let backing = MemfdBacking::new(BackingKind::Shmem, 1 << 20, true).unwrap();
        for size in [0, 4096, 2 << 20] {
            let error = backing.file().unwrap().set_len(size).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{size}: {error}");
        }
        assert_eq!(backing.file().unwrap().metadata().unwrap().len(), 1 << 20);
    }

    #[test]
    fn existing_units_are_found_and_removed() {
        let backing = MemfdBacking::new(BackingKind::Shmem, 1 << 20, true).unwrap();
        assert_eq!(backing.next_existing(0).unwrap(), None);
        let mapping = backing.map().unwrap();
        for page in [3, 4, 255] {
            // SAFETY: the byte lies in the mapping, and nothing else refers to it.
            unsafe { mapping.at(page * PAGE_SIZE).write_volatile(1) };
        }
        assert_eq!(backing.next_existing(0).unwrap(), Some(PageRange::new(3, 2)));
        assert_eq!(backing.next_existing(4).unwrap(), Some(PageRange::page(4)));
        backing.remove(PageRange::new(3, 200)).unwrap();
        assert_eq!(backing.next_existing(0).unwrap(), Some(PageRange::page(255)));
        assert_eq!(backing.next_existing(256).unwrap(), None);
        // SAFETY: as above.
        let bytes = [4, 255].map(|page| unsafe { mapping.at(page * PAGE_SIZE).read_volatile() });
        assert_eq!(bytes, [0, 1]);
    }

    #[test]
    fn an_empty_pool_is_an_error() {
        // No machine has 1 PiB of huge pages.
        let backing = MemfdBacking::new(BackingKind::Hugetlb2M, 1 << 50, true).unwrap();
        let error = backing.map().unwrap_err();
        assert!(error.to_string().contains("vm.nr_hugepages"), "{error}");
    }
}
