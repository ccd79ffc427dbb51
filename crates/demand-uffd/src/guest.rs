// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Arms the guest's mappings.

use std::sync::Arc;

use demand_memory::{BackingError, BackingKind, GuestTrapError, Mapping, Pager, Path, VcpuTrap};

use crate::{
    ArmedMapping, FaultService, Features, OpenError, RangeError, ServiceError, UnitLoader,
    Userfaultfd,
};

/// Errors from arming the guest's mappings. The mappings are then unusable, but nothing is lost: no
/// guest has run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArmGuestError {
    /// The backing could not be mapped.
    #[error(transparent)]
    Map(#[from] BackingError),
    /// No userfaultfd could be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A mapping could not be registered.
    #[error(transparent)]
    Register(#[from] RangeError),
    /// The region is already armed, or it is too late to arm it.
    #[error(transparent)]
    Order(#[from] GuestTrapError),
    /// The service cannot serve the mappings.
    #[error(transparent)]
    Serve(#[from] ServiceError),
}

impl ArmedMapping {
    /// Arms the guest's mapping, over which a memslot is about to be created. The mode depends on
    /// the backing and on the mechanism that traps vCPUs. Also registers the mapping with the
    /// pager, which maps pages there as it publishes them.
    ///
    /// | backing | vCPUs are trapped by | trapped accesses | counted for |
    /// |---|---|---|---|
    /// | any | the mapping | all accesses to any missing page; by units | [`Path::Guest`] |
    /// | shared memory | the hypervisor | the hypervisor's own accesses to any missing page | [`Path::KvmInternal`] |
    /// | huge pages | the hypervisor | the hypervisor's own accesses to wholly missing units | [`Path::KvmInternal`] |
    ///
    /// The last mode traps less than the others. A mapping cannot separate the pages of a unit that
    /// exists, and trapping the whole unit would make vCPUs wait for 2 MiB or more instead of 4096
    /// bytes. Pages of such a unit that the hypervisor itself accesses must be fetched in advance,
    /// or be trapped by the hypervisor.
    ///
    /// # Errors
    ///
    /// [`ArmGuestError::Register`] with the operating system's error, and [`ArmGuestError::Order`]
    /// if the region already has an armed guest mapping, a memslot, or pages that were fetched.
    ///
    /// # Panics
    ///
    /// If the lengths of the mapping and the region differ.
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
    /// Creates and arms a guest mapping of each region on one userfaultfd (see
    /// [`ArmedMapping::guest`]), and serves them from now on. Gives pagers of 2 MiB huge pages a
    /// [`UnitLoader`]. Call it once, before any page is fetched. The mappings are in the order of
    /// the pagers; create the memslots over them.
    ///
    /// # Errors
    ///
    /// [`ArmGuestError`]. The regions before the failing one may be armed, but none of them is
    /// usable.
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
    /// // Reads as a vCPU does through the memslot. SAFETY: the byte lies in the mapping, and no
    /// // thread writes it.
    /// assert_eq!(unsafe { mappings[0].at(0x5001).as_ptr().read_volatile() }, b'e');
    /// // A fault is counted after its faulter is woken; once the threads have ended, all are
    /// // counted.
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
            // First: if all memory is locked, the loader's mapping creates the units, and arming
            // below must not find them.
            if let Err(error) = UnitLoader::install(pager) {
                log::debug!("huge pages are zeroed before they are filled: {error}");
            }
            let mapping = Arc::new(pager.backing().map()?);
            armed.push(ArmedMapping::guest(&uffd, mapping.clone(), pager, vcpus)?);
            mappings.push(mapping);
        }
        // All at once: a fault that is read before its mapping is known would have to be repeated.
        self.serve(&armed)?;
        Ok(mappings)
    }
}
