// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The mapping through which a guest accesses a region.

use std::any::Any;
use std::sync::Arc;

use crate::pager::Held;
use crate::{BackingError, GuestTrapError, MapPresent, Mapping, PAGE_SIZE, Pager, VcpuTrap};

/// Errors from creating an unarmed guest mapping.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestMappingError {
    /// The backing could not be mapped, or not be read to look for what another has written.
    #[error(transparent)]
    Map(#[from] BackingError),
    /// The region's guest mapping is armed, or the backing's mapping is not as long as the region.
    #[error(transparent)]
    Order(#[from] GuestTrapError),
}

/// The mapping through which a guest accesses a region: the only thing that a demand-paged memslot
/// is made of.
///
/// It knows how it is trapped, so that a memslot can refuse a mapping in which its engine would
/// show zeros. It keeps all that the guest's accesses need: the region's pager, which
/// serves pages even after the region is dropped, the mapping, and its trap.
///
/// Dropping the last clone unmaps the mapping, unless it is [unarmed](Self::unarmed); if its region
/// was dropped before, the pager is [stopped](Pager::stop).
///
/// # Examples
///
/// A mapping for an engine that traps every access without it, such as the hypervisor's own check
/// of the missing bitmap. `FaultService::arm_guest` of demand-uffd makes the others.
///
/// ```
/// use demand_memory::{BackingKind, GuestMapping, MemfdBacking, Pager, PagerConfig};
/// use demand_source::LocalFile;
/// use std::sync::Arc;
///
/// let image = tempfile::NamedTempFile::new().unwrap();
/// image.as_file().set_len(1 << 20).unwrap();
/// let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, 1 << 20).unwrap());
/// let source = Arc::new(LocalFile::open(image.path()).unwrap());
/// let pager = Pager::new(PagerConfig::new(backing, source)).unwrap();
///
/// let guest = GuestMapping::unarmed(&pager).unwrap();
/// assert_eq!(guest.armed_for(), None);
/// assert_eq!(guest.mapping().len(), 1 << 20);
/// ```
#[derive(Clone, Debug)]
#[must_use = "dropping the guest's mapping may unmap it; create a memslot over it"]
pub struct GuestMapping {
    mapping: Arc<Mapping>,
    pager: Held,
    armed_for: Option<VcpuTrap>,
    /// Dropped last: whatever serves the trap's faults.
    _kept: Option<Arc<dyn Any + Send + Sync>>,
}

impl GuestMapping {
    /// Gives the guest the mapping through which the pager writes content, without a trap: an access
    /// to a missing page through it reads zeros, or a part of its content. Use it only where another
    /// mechanism keeps every access away, the hypervisor's own included, or where no page is
    /// missing. The region can then no longer be armed.
    ///
    /// # Errors
    ///
    /// [`GuestMappingError`].
    pub fn unarmed(pager: &Arc<Pager>) -> Result<Self, GuestMappingError> {
        // A page that was written through it is in its page tables already: a mapping of the
        // guest's own would cost a second page fault of the kernel for each page.
        let mapping = pager.populate_mapping().clone();
        expect_length(pager, &mapping)?;
        pager.note_unarmed(&mapping)?;
        Ok(GuestMapping { mapping, pager: Held::new(pager), armed_for: None, _kept: None })
    }

    /// Declares `mapping`, whose accesses to missing pages `trap` answers, the guest's mapping of
    /// the region. From then on the pager maps pages there before it publishes them. Code that
    /// implements [`MapPresent`] calls it, after it has armed the mapping for `vcpus`.
    ///
    /// # Errors
    ///
    /// [`GuestTrapError`]; nothing has changed then.
    pub fn armed(
        pager: &Arc<Pager>,
        mapping: Arc<Mapping>,
        trap: Arc<dyn MapPresent>,
        vcpus: VcpuTrap,
    ) -> Result<Self, GuestTrapError> {
        expect_length(pager, &mapping)?;
        let traps = match vcpus {
            VcpuTrap::Mapping | VcpuTrap::Markers => mapping.traps_all(),
            VcpuTrap::Hypervisor => mapping.is_trapped(),
        };
        if !traps {
            return Err(GuestTrapError::NotTrapped);
        }
        pager.set_guest_trap(trap)?;
        pager.note_guest_mapping(&mapping);
        Ok(GuestMapping { mapping, pager: Held::new(pager), armed_for: Some(vcpus), _kept: None })
    }

    /// Returns this mapping, which from now on keeps `owner`: the threads that serve its faults.
    pub fn keeping(self, owner: Arc<dyn Any + Send + Sync>) -> Self {
        GuestMapping { _kept: Some(owner), ..self }
    }

    /// Returns the pager of the region.
    pub fn pager(&self) -> &Arc<Pager> {
        self.pager.pager()
    }

    /// Returns the mapping. Its bytes belong to the guest. A page may be missing, and reading the
    /// mapping from here does not fetch it unless the mapping is armed.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Returns the mechanism for which the mapping was armed; `None` if it is unarmed.
    pub fn armed_for(&self) -> Option<VcpuTrap> {
        self.armed_for
    }
}

fn expect_length(pager: &Pager, mapping: &Mapping) -> Result<(), GuestTrapError> {
    let (mapping, region) = (mapping.len(), pager.pages() * PAGE_SIZE);
    if mapping == region { Ok(()) } else { Err(GuestTrapError::Length { mapping, region }) }
}
