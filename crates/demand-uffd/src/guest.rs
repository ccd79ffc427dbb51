// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Arms the mappings through which a guest accesses its memory.

use std::sync::Arc;

use demand_memory::{BackingKind, FaultPath, GuestMapping, GuestMappingError, Pager, VcpuTrap};

use crate::{
    ArmedMapping, FaultService, Features, OpenError, RangeError, ServiceError, UnitLoader,
    Userfaultfd,
};

/// Errors from arming the guest's mappings. The mappings are then unusable, but nothing is lost: no
/// guest has run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArmGuestError {
    /// Memory of a kind that no userfaultfd traps.
    #[error(
        "cannot arm a guest's mapping of {kind}: no userfaultfd traps accesses to it; use another \
         kind of memory, or a hypervisor that stops the guest at missing pages in all accesses"
    )]
    Untrappable {
        /// The kind of memory.
        kind: BackingKind,
    },
    /// The backing could not be mapped, the region already has a guest mapping, or it is too late
    /// to arm it.
    #[error(transparent)]
    Mapping(#[from] GuestMappingError),
    /// No userfaultfd could be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A mapping could not be registered.
    #[error(transparent)]
    Register(#[from] RangeError),
    /// The service cannot serve the mappings.
    #[error(transparent)]
    Serve(#[from] ServiceError),
}

impl ArmedMapping {
    /// Creates and arms the guest's mapping of a region, over which a memslot is about to be
    /// created. The mode depends on the backing and on the mechanism that traps vCPUs. The pager
    /// maps pages there as it publishes them. Pass the armed mapping to [`FaultService::add`].
    ///
    /// | backing | vCPUs are trapped by | trapped accesses | counted for |
    /// |---|---|---|---|
    /// | any | the mapping | all accesses to any missing page; by units | [`FaultPath::Guest`] |
    /// | any | markers | the first access to any missing page of 512 units; later ones fail, and tell the vCPU | [`FaultPath::Guest`] |
    /// | shared memory | the hypervisor | the hypervisor's own accesses to any missing page | [`FaultPath::HypervisorInternal`] |
    /// | huge pages | the hypervisor | the hypervisor's own accesses to wholly missing units | [`FaultPath::HypervisorInternal`] |
    ///
    /// The last mode traps less than the others. A mapping cannot separate the pages of a unit that
    /// exists, and trapping the whole unit would make vCPUs wait for 2 MiB or more instead of 4096
    /// bytes. Pages of such a unit that the hypervisor itself accesses must be fetched in advance,
    /// or be trapped by the hypervisor.
    ///
    /// # Errors
    ///
    /// [`ArmGuestError::Untrappable`], [`ArmGuestError::Register`] with the operating system's
    /// error, and [`ArmGuestError::Mapping`], also if the region already has a guest mapping, or
    /// pages that were requested or written.
    pub fn guest(
        uffd: &Arc<Userfaultfd>,
        pager: &Arc<Pager>,
        vcpus: VcpuTrap,
    ) -> Result<(Arc<Self>, GuestMapping), ArmGuestError> {
        let kind = pager.backing().kind();
        if !kind.traps_in_mappings() {
            return Err(ArmGuestError::Untrappable { kind });
        }
        pager.can_set_guest_trap().map_err(GuestMappingError::from)?;
        if !pager.bitmap().is_complete() {
            pager.expect_unwritten()?;
        }
        let mapping = Arc::new(pager.backing().map().map_err(GuestMappingError::from)?);
        let huge = kind.is_hugetlb();
        let path = match vcpus {
            VcpuTrap::Mapping | VcpuTrap::Markers => FaultPath::Guest,
            VcpuTrap::Hypervisor => FaultPath::HypervisorInternal,
        };
        let armed = match vcpus {
            VcpuTrap::Hypervisor if huge => {
                Self::own_missing_units(uffd, mapping.clone(), pager, path)?
            }
            VcpuTrap::Markers => Self::own_marked(uffd, mapping.clone(), pager, path)?,
            _ => Self::own(uffd, mapping.clone(), pager, path)?,
        };
        let guest = GuestMapping::armed(pager, mapping, armed.clone(), vcpus)
            .map_err(GuestMappingError::from)?;
        Ok((armed, guest))
    }
}

impl FaultService {
    /// Creates and arms a guest mapping of each region on one userfaultfd (see
    /// [`ArmedMapping::guest`]), and serves them from now on. Gives pagers of 2 MiB huge pages a
    /// [`UnitLoader`]. Call it before any page is fetched; again for regions that are added later.
    /// The mappings are in the order of the pagers; create the memslots over them. They keep the
    /// service's threads running, and are served until they are dropped.
    ///
    /// # Errors
    ///
    /// [`ArmGuestError`]. The regions before the failing one may be armed, but none of them is
    /// usable.
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_memory::{BackingKind, FaultPath, MemfdBacking, Pager, PagerConfig, VcpuTrap};
    /// use demand_source::LocalFile;
    /// use demand_uffd::{ArmGuestError, DEFAULT_THREADS, FaultService};
    /// use std::sync::Arc;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let image = tempfile::NamedTempFile::new()?;
    /// std::os::unix::fs::FileExt::write_all_at(image.as_file(), b"hello", 0x5000)?;
    /// image.as_file().set_len(1 << 20)?;
    /// let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, 1 << 20)?);
    /// let source = Arc::new(LocalFile::open(image.path())?);
    /// let pager = Pager::new(PagerConfig::new(backing, source))?;
    ///
    /// let service = FaultService::start(DEFAULT_THREADS)?;
    /// let mappings = match service.arm_guest([&pager], VcpuTrap::Mapping) {
    ///     Err(ArmGuestError::Open(error)) => return Ok(eprintln!("{error}")),
    ///     mappings => mappings?,
    /// };
    /// // Reads as a vCPU does through the memslot. SAFETY: the byte lies in the mapping, and no
    /// // thread writes it.
    /// assert_eq!(unsafe { mappings[0].mapping().at(0x5001).as_ptr().read_volatile() }, b'e');
    /// // A fault is counted after its faulter is woken; once the threads have ended, all are
    /// // counted.
    /// service.stop();
    /// assert_eq!(pager.stats().path(FaultPath::Guest).faults, 1);
    /// # Ok(())
    /// # }
    /// ```
    pub fn arm_guest<'a>(
        &self,
        pagers: impl IntoIterator<Item = &'a Arc<Pager>>,
        vcpus: VcpuTrap,
    ) -> Result<Vec<GuestMapping>, ArmGuestError> {
        let features = match vcpus {
            VcpuTrap::Markers => Features::GUEST_MEMORY | Features::POISON,
            VcpuTrap::Mapping | VcpuTrap::Hypervisor => Features::GUEST_MEMORY,
        };
        let uffd = Arc::new(Userfaultfd::open(features)?);
        let (mut mappings, mut armed) = (Vec::new(), Vec::new());
        for pager in pagers {
            pager.can_set_guest_trap().map_err(GuestMappingError::from)?;
            // First: if all memory is locked, the loader's mapping creates the units, and arming
            // below must not find them.
            if let Err(error) = UnitLoader::install(pager) {
                log::debug!("huge pages are zeroed before they are filled: {error}");
            }
            let (trap, mapping) = ArmedMapping::guest(&uffd, pager, vcpus)?;
            mappings.push(mapping.keeping(Arc::new(self.serving(&trap))));
            armed.push(trap);
        }
        // All at once: a fault that is read before its mapping is known would have to be repeated.
        self.add(&armed)?;
        Ok(mappings)
    }
}
