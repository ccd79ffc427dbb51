// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Arming what a guest sees.

use std::sync::Arc;

use demand_memory::{BackingError, BackingKind, GuestTrapError, Mapping, Pager, Path, VcpuTrap};

use crate::{
    ArmedMapping, FaultService, Features, OpenError, RangeError, ServiceError, UnitLoader,
    Userfaultfd,
};

/// Why the guest's mappings could not be armed. Nothing is of use then, but nothing is lost: no
/// guest has run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArmGuestError {
    /// There is no mapping.
    #[error(transparent)]
    Map(#[from] BackingError),
    /// There is no userfaultfd.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A mapping could not be registered.
    #[error(transparent)]
    Register(#[from] RangeError),
    /// The region is armed already, or it is too late.
    #[error(transparent)]
    Order(#[from] GuestTrapError),
    /// The service cannot serve it.
    #[error(transparent)]
    Serve(#[from] ServiceError),
}

impl ArmedMapping {
    /// Arms the guest's mapping, the one that a memslot is going to be made over, as its backing
    /// and whoever else keeps vCPUs from missing pages allow, and tells the pager, which maps
    /// pages there as they arrive.
    ///
    /// | backing | vCPUs are trapped by | who touches what is caught | counted for |
    /// |---|---|---|---|
    /// | any | the mapping | anybody, any missing page; by units | [`Path::Guest`] |
    /// | shared memory | the hypervisor | its own accesses to any missing page | [`Path::KvmInternal`] |
    /// | huge pages | the hypervisor | its own accesses to wholly missing units | [`Path::KvmInternal`] |
    ///
    /// The last is less than the others: pages of a unit that exists cannot be kept apart by a
    /// mapping, and to trap all of the unit would make vCPUs wait for 2 MiB or more instead of
    /// 4096 bytes. What the hypervisor touches by itself in such a unit must be fetched before,
    /// or be trapped by the hypervisor.
    ///
    /// # Errors
    ///
    /// [`ArmGuestError::Register`] with the system's error, and [`ArmGuestError::Order`] if the
    /// region has an armed guest mapping, a memslot, or pages that were fetched.
    ///
    /// # Panics
    ///
    /// If the mapping is not as long as the region.
    pub fn guest(
        uffd: &Arc<Userfaultfd>,
        mapping: Arc<Mapping>,
        pager: &Arc<Pager>,
        vcpus: VcpuTrap,
    ) -> Result<Arc<Self>, ArmGuestError> {
        pager.can_set_guest_trap()?;
        let huge = pager.backing().kind() != BackingKind::Shmem;
        let armed = match vcpus {
            VcpuTrap::Mapping => Self::own(uffd, mapping, pager, Path::Guest)?,
            VcpuTrap::Hypervisor if huge => {
                Self::own_missing_units(uffd, mapping, pager, Path::KvmInternal)?
            }
            VcpuTrap::Hypervisor => Self::own(uffd, mapping, pager, Path::KvmInternal)?,
        };
        pager.set_guest_trap(armed.clone())?;
        Ok(armed)
    }
}

impl FaultService {
    /// Makes a guest's mapping of each region, arms them on one userfaultfd (see
    /// [`ArmedMapping::guest`]), and serves them from now on; gives pagers of huge pages of
    /// 2 MiB a [`UnitLoader`]. To be called once, before any page is fetched; memslots are made
    /// over the mappings, which come in the order of the pagers.
    ///
    /// # Errors
    ///
    /// [`ArmGuestError`]. The regions before the one at fault may be armed: nothing of it is of use.
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_memory::{
    ///     BackingKind, MemfdBacking, Pager, Path, Retrier, RetryPolicy, Stats, VcpuTrap,
    /// };
    /// use demand_source::LocalFile;
    /// use demand_uffd::{ArmGuestError, DEFAULT_THREADS, FaultService};
    /// use std::sync::Arc;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let image = tempfile::NamedTempFile::new()?;
    /// std::os::unix::fs::FileExt::write_all_at(image.as_file(), b"hello", 0x5000)?;
    /// image.as_file().set_len(1 << 20)?;
    /// let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, 1 << 20, true)?);
    /// let retrier = Retrier::new(RetryPolicy::default(), |failure| eprintln!("{}", failure.error));
    /// let source = Arc::new(LocalFile::open(image.path())?);
    /// let pager = Pager::new(backing, source, 0, Arc::new(Stats::new()), retrier)?;
    ///
    /// let service = FaultService::start(DEFAULT_THREADS)?;
    /// let mappings = match service.arm_guest([&pager], VcpuTrap::Mapping) {
    ///     Err(ArmGuestError::Open(error)) => return Ok(eprintln!("{error}")),
    ///     mappings => mappings?,
    /// };
    /// // What a vCPU does through the memslot. SAFETY: the byte lies in the mapping, and nobody
    /// // writes it.
    /// assert_eq!(unsafe { mappings[0].at(0x5001).as_ptr().read_volatile() }, b'e');
    /// // Faults are counted after who waited goes on; when the threads have ended, all are.
    /// service.stop();
    /// assert_eq!(pager.stats().path(Path::Guest).faults, 1);
    /// # Ok(())
    /// # }
    /// ```
    pub fn arm_guest<'a>(
        &self,
        pagers: impl IntoIterator<Item = &'a Arc<Pager>>,
        vcpus: VcpuTrap,
    ) -> Result<Vec<Arc<Mapping>>, ArmGuestError> {
        let uffd = Arc::new(Userfaultfd::open(Features::GUEST_MEMORY)?);
        let (mut mappings, mut armed) = (Vec::new(), Vec::new());
        for pager in pagers {
            pager.can_set_guest_trap()?;
            // First: where all memory is locked, the loader's mapping creates the units, and what
            // is armed below must not find them.
            if let Err(error) = UnitLoader::install(pager) {
                log::debug!("huge pages are zeroed before they are filled: {error}");
            }
            let mapping = Arc::new(pager.backing().map()?);
            armed.push(ArmedMapping::guest(&uffd, mapping.clone(), pager, vcpus)?);
            mappings.push(mapping);
        }
        // All at once: a fault that is read before its mapping is known would have to come again.
        self.serve(&armed)?;
        Ok(mappings)
    }
}
