// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Units that come into being with their content, by `UFFDIO_COPY`.

use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use demand_memory::{Backing, BackingError, BackingKind, LoadUnit, MappedBytes, Mapping, Pager};

use crate::{Features, Modes, OpenError, RangeError, Userfaultfd};

/// Why units cannot be loaded whole. They arrive all the same, with a little more work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoaderError {
    /// There is no mapping.
    #[error(transparent)]
    Map(#[from] BackingError),
    /// There is no userfaultfd.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The mapping could not be registered.
    #[error(transparent)]
    Register(#[from] RangeError),
}

/// Creates huge pages with their content: see [`LoadUnit`].
///
/// It is for pages of 2 MiB. One of 1 GiB is never asked for in one go, and creating it so would
/// keep the address space from changing meanwhile.
///
/// It has a mapping of its own, registered so that the kernel may be told to fill it; nobody reads
/// through it. When all pages are present it lets go of both.
#[derive(Debug)]
pub struct UnitLoader(RwLock<Option<Target>>);

#[derive(Debug)]
struct Target {
    // Closed before its mapping is gone.
    uffd: Userfaultfd,
    mapping: Mapping,
}

impl UnitLoader {
    /// A loader for huge pages.
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

    /// Gives the pager of huge pages of 2 MiB a loader; does nothing with another.
    /// [`FaultService::arm_guest`](crate::FaultService::arm_guest) does so for the guest's memory.
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
        // SAFETY: nobody refers to the mapping, whose address this type keeps to itself, and the
        // check keeps the range within it.
        Ok(unsafe { uffd.copy_mapped(address, content) }?)
    }

    fn finish(&self) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).take();
    }
}
