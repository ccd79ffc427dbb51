// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Creates missing huge pages together with their content (`UFFDIO_COPY`).

use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use demand_memory::{Backing, BackingError, BackingKind, LoadUnit, MappedBytes, Mapping, Pager};

use crate::{Features, Modes, OpenError, RangeError, Userfaultfd};

/// Errors from creating a unit loader. Without a loader units are still populated, at a higher
/// cost.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoaderError {
    /// The backing could not be mapped.
    #[error(transparent)]
    Map(#[from] BackingError),
    /// No userfaultfd could be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The mapping could not be registered.
    #[error(transparent)]
    Register(#[from] RangeError),
}

/// Creates huge pages together with their content: see [`LoadUnit`].
///
/// It is meant for 2 MiB pages. A 1 GiB page is never fetched in one piece, and creating one this
/// way would block all changes of the address space meanwhile.
///
/// It has its own mapping, registered only so that the kernel accepts copies to it; no thread reads
/// through it. When all pages are present, the loader releases the mapping and the userfaultfd.
#[derive(Debug)]
pub struct UnitLoader(RwLock<Option<Target>>);

#[derive(Debug)]
struct Target {
    // Closed before the mapping is unmapped.
    uffd: Userfaultfd,
    mapping: Mapping,
}

impl UnitLoader {
    /// Creates a loader for a backing of huge pages.
    ///
    /// # Errors
    ///
    /// [`LoaderError`].
    pub fn new(backing: &dyn Backing) -> Result<Self, LoaderError> {
        let uffd = Userfaultfd::open(Features::GUEST_MEMORY)?;
        let mapping = backing.map()?;
        uffd.register(mapping.address().as_ptr() as u64, mapping.len(), Modes::MISSING)?;
        Ok(UnitLoader(RwLock::new(Some(Target { uffd, mapping }))))
    }

    /// Gives a pager of 2 MiB huge pages a loader; does nothing for other pagers.
    /// [`FaultService::arm_guest`](crate::FaultService::arm_guest) calls this for the guest's
    /// memory.
    ///
    /// # Errors
    ///
    /// [`LoaderError`]. The pager then reads into pages that the kernel has zeroed.
    pub fn install(pager: &Pager) -> Result<(), LoaderError> {
        if pager.backing().kind() == BackingKind::Hugetlb2M {
            pager.set_unit_loader(Arc::new(Self::new(&**pager.backing())?));
        }
        Ok(())
    }
}

impl LoadUnit for UnitLoader {
    fn load(&self, offset: u64, content: MappedBytes<'_>) -> io::Result<()> {
        let target = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let Some(Target { uffd, mapping }) = &*target else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
        let end = offset.checked_add(content.len() as u64);
        if end.is_none_or(|end| end > mapping.len()) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let address = mapping.at(offset).as_ptr() as u64;
        // SAFETY: no Rust reference into the mapping exists, because this type never exposes its
        // address, and the check keeps the range inside it.
        Ok(unsafe { uffd.copy(address, content) }?)
    }

    fn finish(&self) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).take();
    }
}
