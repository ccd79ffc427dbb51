// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Regions that come to a running VM, and go.

use std::fmt;
use std::sync::Arc;

use demand_kvm::{DemandSlotConfig, Engine, RegionsOverlap};
use demand_memory::{
    Backing, BackingError, BackingKind, DemandMemory, GuestMapping, Pager, PagerConfig,
};
use demand_source::PageSource;
use demand_uffd::UnitLoader;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::builder::MakeBacking;
use crate::memory::{arm, create_region, read_all};
use crate::vm::{Inner, Removed, lock};
use crate::{Error, Lazy, LazyVm};

/// A region of memory for a running VM: see [`LazyVm::insert_region`].
pub struct LazyRegion {
    slot: u32,
    start: GuestAddress,
    size: u64,
    source: Option<(Arc<dyn PageSource>, u64)>,
    backing: Option<MakeBacking>,
}

impl LazyRegion {
    /// Describes a region of `size` bytes at guest physical address `start` whose pages come from
    /// `source`. `slot` is the number of its memslot, which must be unused: KVM would change the
    /// memslot that has it.
    pub fn new(slot: u32, start: GuestAddress, size: u64, source: Arc<dyn PageSource>) -> Self {
        let source = Some((source, 0));
        LazyRegion { slot, start, size, source, backing: None }
    }

    /// Describes a region like [`new`](Self::new) whose pages are all present, and zero, as those
    /// of memory that is plugged in.
    pub fn zeroed(slot: u32, start: GuestAddress, size: u64) -> Self {
        LazyRegion { slot, start, size, source: None, backing: None }
    }

    /// Sets the offset of the region's first byte in the source, in bytes: a multiple of 4096. The
    /// default is 0.
    #[must_use]
    pub fn image_offset(mut self, offset: u64) -> Self {
        if let Some((_, from)) = &mut self.source {
            *from = offset;
        }
        self
    }

    /// Sets the kind of memory behind the region. The default is what the
    /// [`LazyBuilder`](crate::LazyBuilder) has chosen.
    #[must_use]
    pub fn backing(self, kind: BackingKind) -> Self {
        LazyRegion { backing: Some(MakeBacking::Kind(kind)), ..self }
    }

    /// Sets the function that creates the memory object, as
    /// [`LazyBuilder::backing_from`](crate::LazyBuilder::backing_from) does.
    #[must_use]
    pub fn backing_from(
        self,
        make: impl Fn(u64) -> Result<Arc<dyn Backing>, BackingError> + Send + 'static,
    ) -> Self {
        LazyRegion { backing: Some(MakeBacking::By(Box::new(make))), ..self }
    }
}

/// A region that is being inserted: the VM's end stops its pager, so that nothing waits for it.
struct Inserting<'a>(&'a Inner);

impl<'a> Inserting<'a> {
    fn begin(inner: &'a Inner, pager: &Arc<Pager>) -> Result<Self, Error> {
        *lock(&inner.inserting) = Some(pager.clone());
        let this = Inserting(inner);
        // The end either sees the pager, or is seen here.
        inner.check().map(|()| this)
    }
}

impl Drop for Inserting<'_> {
    fn drop(&mut self) {
        *lock(&self.0.inserting) = None;
    }
}

impl LazyVm {
    /// Gives the VM a further region while it runs: first back-ends that share the memory get it,
    /// then the guest, then all who use the memory through vm-memory. Then announce it to the
    /// guest. The region is like those that the VM began with: its pages arrive as they are used,
    /// background fill fetches them if it runs, and demand paging is removed only when they are
    /// present, too.
    ///
    /// Where no page can be missing any more, because demand paging was removed or never existed,
    /// the region is read as a whole first. That waits as long as the source is unavailable, unless
    /// the VM ends.
    ///
    /// It waits for back-ends, and for KVM. So never call it on a thread that serves faults, nor
    /// while holding the lock of a back-end.
    ///
    /// # Errors
    ///
    /// The VM is then as before, except that a back-end that does not answer is disconnected.
    /// [`Error::SlotUsed`], [`Error::Overlap`] and [`Error::Insert`] for a number or a place that
    /// is taken; [`Error::Share`], among others for a back-end without CONFIGURE_MEM_SLOTS;
    /// [`Error::Removed`] under [`Lazy::Require`] in place of reading; those of
    /// [`LazyBuilder::build`](crate::LazyBuilder::build); and [`Error::Ended`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use demand_paging::{LazyRegion, LazyVm};
    /// use vm_memory::GuestAddress;
    ///
    /// # fn plug(vm: &LazyVm) -> Result<(), demand_paging::Error> {
    /// let start = GuestAddress(8 << 30);
    /// vm.insert_region(LazyRegion::zeroed(4, start, 1 << 30))?;
    /// // ... the guest is told, uses it, and gives it back ...
    /// vm.remove_region(start)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn insert_region(&self, region: LazyRegion) -> Result<(), Error> {
        self.before_removal(|removed| self.insert(region, removed))
    }

    fn insert(&self, region: LazyRegion, removed: Removed) -> Result<(), Error> {
        let inner = self.inner();
        let LazyRegion { slot: number, start, size, source, backing } = region;
        inner.check()?;
        if lock(&inner.slots).iter().any(|slot| slot.number() == number) {
            return Err(Error::SlotUsed { number });
        }
        let lazily = self.engine().filter(|_| source.is_some() && removed == Removed::NotYet);
        if source.is_some() && lazily.is_none() && inner.lazy == Lazy::Require {
            return Err(Error::Removed { start: start.0 });
        }
        self.expect_changeable()?;
        let backing = match backing {
            Some(backing) => backing.make(Some(&inner.vm), size)?,
            None => lock(&inner.backing).make(Some(&inner.vm), size)?,
        };
        let config = source.map(|(source, image_offset)| {
            let config = PagerConfig::new(backing.clone(), source);
            let retrier = inner.retrier.clone().unwrap_or(config.retrier);
            PagerConfig { image_offset, stats: inner.stats.clone(), retrier, ..config }
        });
        let region = Arc::new(create_region(start, config, backing, inner.stats.clone())?);
        let memory = inner.current.get();
        let larger =
            memory.insert_region(region.clone()).map_err(|_| overlap(&memory, start, size))?;
        drop(memory);
        let pager = region.pager();
        let inserting = Inserting::begin(inner, pager)?;
        let (mapping, engine) = match lazily.zip(inner.probe.as_ref()) {
            Some((engine, probe)) => {
                let mapping = arm([pager], &inner.service, engine, probe)?.remove(0);
                if inner.expects_back_ends() && probe.traps_own_accesses(engine) {
                    install_loader(pager);
                }
                (mapping, engine)
            }
            None => {
                read_all([pager.clone()])?;
                // To KVM, memory that is present is like that of this engine.
                (GuestMapping::unarmed(pager)?, Engine::Uffd)
            }
        };
        self.insert_into_back_ends(&region)?;
        let config = DemandSlotConfig { vm: inner.vm.clone(), number, start, mapping, engine };
        let slot = inner.handler.insert(config).inspect_err(|_| {
            if let Err(error) = self.remove_from_back_ends(start) {
                log::warn!("{error}");
            }
        })?;
        {
            let mut slots = lock(&inner.slots);
            let at = slots.partition_point(|slot| slot.start() < start);
            slots.insert(at, Arc::new(slot));
            inner.current.replace(larger);
        }
        drop(inserting);
        if let Err(ended) = inner.check() {
            // The end may have passed over the region.
            inner.current.get().revoke();
            lock(&inner.slots).retain(|slot| slot.start() != start);
            return Err(ended);
        }
        if let Err(error) = inner.fill_again() {
            log::warn!("{error}; the region is not filled in the background");
        }
        Ok(())
    }

    /// Takes the region at guest address `start` from the running VM, in the same order: first from
    /// back-ends, then from the guest, then from all who use the memory through vm-memory. The
    /// guest must have given it back: a vCPU that still uses it gets MMIO exits, and a back-end's
    /// request in flight there may never be answered. Each wait for one of its pages ends. Its
    /// memory is released once the last user of the [memory](Self::memory) as it was before has
    /// dropped that.
    ///
    /// It waits for back-ends, also for the requests in flight that wait for a page there, and for
    /// KVM. So never call it on a thread that serves faults, nor while holding the lock of a
    /// back-end.
    ///
    /// # Errors
    ///
    /// With nothing changed: [`Error::NoRegionAt`]; [`Error::SlotHeld`], if the caller holds the
    /// region's memslot; [`Error::Share`] for a back-end without CONFIGURE_MEM_SLOTS; and
    /// [`Error::Ended`].
    ///
    /// [`Error::Share`] also if a back-end does not answer, and [`Error::Thread`]: the region is
    /// removed all the same.
    pub fn remove_region(&self, start: GuestAddress) -> Result<(), Error> {
        self.before_removal(|_| self.remove(start))
    }

    fn remove(&self, start: GuestAddress) -> Result<(), Error> {
        let inner = self.inner();
        inner.check()?;
        let memory = inner.current.get();
        let region = memory.find_region(start).filter(|region| region.start_addr() == start);
        let len = region.ok_or(Error::NoRegionAt { start: start.0 })?.len();
        self.expect_changeable()?;
        let slot = {
            let mut slots = lock(&inner.slots);
            let at = slots.iter().position(|slot| slot.start() == start).ok_or(Error::Ended)?;
            let slot = slots.remove(at);
            match Arc::try_unwrap(slot) {
                Ok(slot) => slot,
                Err(held) => {
                    slots.insert(at, held);
                    return Err(Error::SlotHeld { start: start.0 });
                }
            }
        };
        let (smaller, region) = memory.remove_region(start, len).map_err(Error::Regions)?;
        drop(memory);
        let taken = self.remove_from_back_ends(start);
        inner.handler.remove(slot);
        // After that: until then, exits left to the VMM are completed through the memory.
        inner.current.replace(smaller);
        // vCPUs that run hold the memory as it was.
        inner.vcpus.kick_all();
        drop(region);
        taken.and(inner.fill_again())
    }
}

/// Makes a pager of huge pages create them with their content, where this host allows that.
pub(crate) fn install_loader(pager: &Arc<Pager>) {
    if let Err(error) = UnitLoader::install(pager) {
        log::debug!("huge pages are zeroed before they are filled: {error}");
    }
}

/// Returns the error for a region that overlaps one of the memory.
fn overlap(memory: &DemandMemory, start: GuestAddress, size: u64) -> Error {
    let last = start.0.saturating_add(size - 1);
    let other =
        memory.iter().find(|other| other.start_addr().0 <= last && start <= other.last_addr());
    let other = other.map_or(start.0, |other| other.start_addr().0);
    RegionsOverlap { first: start.0.min(other), second: start.0.max(other) }.into()
}

impl fmt::Debug for LazyRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyRegion")
            .field("slot", &self.slot)
            .field("start", &self.start)
            .field("size", &self.size)
            .field("zeroed", &self.source.is_none())
            .finish_non_exhaustive()
    }
}
