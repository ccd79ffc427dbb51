// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Inserts and removes regions of a running VM, in step with its memslots.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::{
    DemandSlot, DemandSlotConfig, Engine, FaultHandler, FaultRegion, RegionsOverlap, SlotError,
};

/// Errors from inserting a region into a running VM. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InsertError {
    /// The memslot could not be created.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The region overlaps another one.
    #[error(transparent)]
    Overlap(#[from] RegionsOverlap),
}

impl FaultHandler {
    /// Creates a memslot, and handles its faults from now on, while the VM's vCPUs run. Then give
    /// the region to the VMM's own accesses ([`DemandMemory::insert_region`]), and announce it to
    /// the guest. Back-ends that share the memory get it before (demand-vhost's
    /// `BackEnd::insert_region`): they may have to touch it before anything else can. Never call it
    /// on a thread that serves faults.
    ///
    /// [`DemandMemory::insert_region`]: demand_memory::DemandMemory::insert_region
    ///
    /// # Errors
    ///
    /// [`InsertError`]; the VM is then as before.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::sync::Arc;
    ///
    /// use demand_kvm::{DemandSlot, DemandSlotConfig, Engine, FaultHandler};
    /// use demand_memory::{DemandMemory, DemandRegion, PagerConfig};
    /// use demand_uffd::FaultService;
    /// use kvm_ioctls::VmFd;
    /// use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic};
    ///
    /// type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
    ///
    /// fn insert(
    ///     (vm, engine): (Arc<VmFd>, Engine),
    ///     (handler, service): (&FaultHandler, &FaultService),
    ///     memory: &GuestMemoryAtomic<DemandMemory>,
    ///     (number, start, config): (u32, GuestAddress, PagerConfig),
    /// ) -> Result<DemandSlot> {
    ///     let region = Arc::new(DemandRegion::new(start, config, ())?);
    ///     let mapping = service.arm_guest([region.pager()], engine.vcpu_trap())?.remove(0);
    ///     let slot = handler.insert(DemandSlotConfig { vm, number, start, mapping, engine })?;
    ///     let with_region = memory.memory().insert_region(region)?;
    ///     memory.lock().expect("no holder panics").replace(with_region);
    ///     Ok(slot)
    /// }
    ///
    /// /// The guest has given the region back.
    /// fn remove(
    ///     handler: &FaultHandler,
    ///     memory: &GuestMemoryAtomic<DemandMemory>,
    ///     slot: DemandSlot,
    /// ) -> Result<()> {
    ///     let (start, len) = (slot.start(), slot.mapping().len());
    ///     handler.remove(slot);
    ///     let (without_region, _region) = memory.memory().remove_region(start, len)?;
    ///     memory.lock().expect("no holder panics").replace(without_region);
    ///     Ok(())
    /// }
    /// ```
    pub fn insert(&self, config: DemandSlotConfig) -> Result<DemandSlot, InsertError> {
        let _changing = self.changes.begin();
        let mut regions = self.regions.load().to_vec();
        let (start, len) = (config.start.0, config.mapping.mapping().len());
        let last = start.saturating_add(len - 1);
        // Before the slot exists: undoing it would revoke the mapping.
        if let Some(other) = regions.iter().find(|r| r.start <= last && start <= r.last()) {
            let (first, second) = (start.min(other.start), start.max(other.start));
            return Err(RegionsOverlap { first, second }.into());
        }
        let at = regions.partition_point(|region| region.start < start);
        let before = self.regions.load_full();
        if config.engine == Engine::KvmUserfault {
            // KVM may wait for a page as soon as the slot exists, and says so once.
            let pager = config.mapping.pager().clone();
            let mut with_region = regions.clone();
            with_region.insert(at, FaultRegion::userfault(config.start, pager));
            self.regions.store(Arc::new(with_region));
        }
        let slot = DemandSlot::new(config).inspect_err(|_| self.regions.store(before))?;
        regions.insert(at, FaultRegion::from(&slot));
        if slot.slot_engine().marked_base().is_some() {
            self.marked.store(true, Ordering::Relaxed);
        }
        self.regions.store(Arc::new(regions));
        Ok(slot)
    }

    /// Deletes a memslot while the VM's vCPUs run, and handles its faults no longer. It stops the
    /// region's pager: every wait for its pages ends, in the VMM with an error. A vCPU that waits
    /// for one runs again, and its access becomes an MMIO exit, like each later one. Then the slot
    /// is [dropped](DemandSlot): its mapping is revoked, the slot deleted, its trap removed. Never
    /// call it on a thread that serves faults, nor while a back-end has the region
    /// (demand-vhost's `BackEnd::remove_region`): its faults there would stay open. A region of
    /// this handler that has the slot's address, but is not the slot's, stays.
    ///
    /// Afterwards take the region from the VMM's own accesses ([`DemandMemory::remove_region`]), not
    /// before: an exit that KVM leaves to user space is completed through them as long as the
    /// region is here.
    ///
    /// [`DemandMemory::remove_region`]: demand_memory::DemandMemory::remove_region
    ///
    /// A VMM with its own run loop must expect, while this runs, that `KVM_RUN` fails with
    /// `EFAULT`, and that a memory fault is in no region: it enters `KVM_RUN` again.
    /// [`DemandVcpu`](crate::DemandVcpu) does so. For exits that are pending, see
    /// [`PendingExit`](crate::PendingExit).
    pub fn remove(&self, slot: DemandSlot) {
        let _changing = self.changes.begin();
        let mut regions = self.regions.load().to_vec();
        regions.retain(|region| !region.is_of(&slot));
        self.regions.store(Arc::new(regions));
        slot.pager().stop();
        drop(slot);
    }
}
