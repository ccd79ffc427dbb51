// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memslots over demand-paged memory.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use demand_memory::{BackingKind, GuestMapping, Mapping, PAGE_SIZE, PageRange, Pager};
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

use crate::found::{kept_outcome_holds, own_accesses_stop};
use crate::memslot::{Memslot, SlotMemory};
use crate::slot_engine::{EngineGuard, SlotEngine};
use crate::{Engine, SlotError};

/// The parts from which a [`DemandSlot`] is made.
#[derive(Clone)]
pub struct DemandSlotConfig {
    /// The VM. For [`Engine::KvmAttributes`] it must come from [`Engine::create_vm`].
    pub vm: Arc<VmFd>,
    /// The number of the memslot. It must be unused: KVM would take the call as a change of the
    /// slot with that number.
    pub number: u32,
    /// Guest physical address of the slot's first byte.
    pub start: GuestAddress,
    /// The guest's mapping of the region, armed for [`Engine::vcpu_trap`] by demand-uffd's
    /// `FaultService::arm_guest`. Where no page is missing, and for [`Engine::KvmUserfault`] on a
    /// kernel with [`KvmFeatures::own_accesses`](crate::KvmFeatures::own_accesses), it may be
    /// [unarmed](GuestMapping::unarmed).
    pub mapping: GuestMapping,
    /// The way in which the guest's accesses to missing pages are trapped.
    pub engine: Engine,
}

impl fmt::Debug for DemandSlotConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DemandSlotConfig")
            .field("number", &self.number)
            .field("start", &self.start)
            .field("mapping", &self.mapping)
            .field("engine", &self.engine)
            .finish_non_exhaustive()
    }
}

/// A memslot over a demand-paged region.
///
/// With [`Engine::KvmUserfault`] KVM reads the pager's missing bitmap: a vCPU that touches a
/// missing page leaves `KVM_RUN` with `KVM_EXIT_MEMORY_FAULT`, and resumes once a
/// [`FaultHandler`](crate::FaultHandler) has fetched the page. With [`Engine::KvmAttributes`] it
/// leaves `KVM_RUN` because the slot's pages are private to KVM, and the handler also clears the
/// attribute of each page. With [`Engine::Uffd`] the slot is an ordinary one over an armed mapping.
/// With [`Engine::UffdPoison`] that mapping has markers as well, at which a vCPU leaves `KVM_RUN`
/// for a signal: only a [`DemandVcpu`](crate::DemandVcpu) handles these.
///
/// KVM's own accesses pass the first two, except on kernels with
/// [`KvmFeatures::own_accesses`](crate::KvmFeatures::own_accesses). So under every engine the
/// mapping must be armed to match, or KVM must be known to need no armed one. A slot over any other
/// mapping is refused: it would show zeros for missing pages.
///
/// [`finish`](Self::finish) is for control threads: KVM waits for all vCPUs in it, so never call it
/// on a thread that serves faults.
///
/// Dropping the slot first [revokes](Mapping::revoke) the mapping, if it is armed: every thread
/// that is blocked on a page there returns, with an error. Then it deletes the slot, and then it
/// removes the mapping's trap. Until then the slot keeps the mapping, the pager (whose bitmap KVM
/// reads, and which serves pages even if the region is dropped) and the VM. So a VM is never closed
/// while KVM itself waits for one of its pages, a wait that nothing could end, whatever the order
/// in which a program drops its parts.
///
/// # Examples
///
/// ```
/// use demand_kvm::{
///     DemandSlot, DemandSlotConfig, EngineChoice, FaultHandler, open_kvm, probe, resolve,
/// };
/// use demand_memory::{
///     BackingKind, FaultPath, MemfdBacking, PageRange, Pager, PagerConfig, Waiter,
/// };
/// use demand_source::LocalFile;
/// use demand_uffd::{DEFAULT_THREADS, FaultService};
/// use std::sync::Arc;
/// use vm_memory::GuestAddress;
///
/// let Ok(kvm) = open_kvm() else { return };
/// let engine = resolve(EngineChoice::Auto, &probe()).unwrap();
/// let vm = Arc::new(engine.create_vm(&kvm).unwrap());
///
/// let image = tempfile::NamedTempFile::new().unwrap();
/// image.as_file().set_len(1 << 20).unwrap();
/// let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, 1 << 20).unwrap());
/// let source = Arc::new(LocalFile::open(image.path()).unwrap());
/// let pager = Pager::new(PagerConfig::new(backing, source)).unwrap();
/// // The guest's mapping, armed before anything can touch it.
/// let service = FaultService::start(DEFAULT_THREADS).unwrap();
/// let mapping = service.arm_guest([&pager], engine.vcpu_trap()).unwrap().remove(0);
/// let config = DemandSlotConfig { vm, number: 0, start: GuestAddress(0), mapping, engine };
/// let slot = DemandSlot::new(config).unwrap();
/// let handler = FaultHandler::new([&slot]).unwrap();
///
/// // ... the guest runs, its faults go to `handler` ...
///
/// pager.ensure(PageRange::new(0, 256), FaultPath::Fill, &Waiter::new()).unwrap();
/// slot.finish().unwrap();
/// ```
#[must_use = "the memslot is deleted when this is dropped"]
pub struct DemandSlot {
    // Fields are dropped in this order: the slot before its engine, and both before the pager.
    memslot: Memslot,
    guard: EngineGuard,
    mapping: GuestMapping,
    engine: Engine,
    /// Whether the slot is an ordinary one.
    finished: Mutex<bool>,
}

impl DemandSlot {
    /// Creates the memslot.
    ///
    /// # Errors
    ///
    /// [`SlotError::Unaligned`]; [`SlotError::Revoked`]; [`SlotError::Untrappable`] for memory with
    /// missing pages that only KVM could trap, and does not; [`SlotError::ArmedOtherwise`] if the
    /// mapping was armed for another mechanism than the engine's; [`SlotError::Unarmed`] if nothing
    /// keeps the guest, or KVM itself, from the mapping's missing pages; [`SlotError::Unverified`]
    /// if a [`ProbeCache`](crate::ProbeCache) had a wrong outcome; [`SlotError::Create`] if
    /// KVM refuses the slot, as a kernel without KVM Userfault does under
    /// [`Engine::KvmUserfault`]; and under [`Engine::KvmAttributes`] also
    /// [`SlotError::Attributes`].
    pub fn new(config: DemandSlotConfig) -> Result<Self, SlotError> {
        let DemandSlotConfig { vm, number, start, mapping, engine } = config;
        if !start.0.is_multiple_of(PAGE_SIZE) {
            return Err(SlotError::Unaligned { number, start: start.0 });
        }
        expect_trapped(number, &mapping, engine)?;
        let pager = mapping.pager();
        let guard = EngineGuard::install(engine, &vm, number, start, &mapping)?;
        let of_vm = pager.backing().kind() == BackingKind::GuestMemfd;
        let used = SlotMemory {
            mapping: mapping.mapping().clone(),
            bitmap: guard.engine.bitmap(pager),
            guest_memfd: pager.backing().file().filter(|_| of_vm).cloned(),
        };
        let memslot = Memslot::new(vm, number, start, used, guard.engine.slot_flags())?;
        Ok(DemandSlot { memslot, guard, mapping, engine, finished: Mutex::new(false) })
    }

    /// Returns the number of the memslot.
    pub fn number(&self) -> u32 {
        self.memslot.number()
    }

    /// Returns the guest physical address of the slot's first byte.
    pub fn start(&self) -> GuestAddress {
        self.memslot.start()
    }

    /// Returns the guest's mapping. Its bytes belong to the guest. A page may be missing, and
    /// reading the mapping from here does not fetch it.
    pub fn mapping(&self) -> &Arc<Mapping> {
        self.memslot.mapping()
    }

    /// Returns the pager of the region behind the slot.
    pub fn pager(&self) -> &Arc<Pager> {
        self.mapping.pager()
    }

    /// Returns the engine that traps the guest's accesses to missing pages.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Returns whether vCPUs leave `KVM_RUN` at missing pages.
    pub fn is_trapping(&self) -> bool {
        self.guard.engine.stops_vcpus() && !*self.finished()
    }

    pub(crate) fn slot_engine(&self) -> &SlotEngine {
        &self.guard.engine
    }

    /// Makes the slot an ordinary one: KVM stops reading the bitmap, or treats all pages as shared,
    /// and may use huge pages again. Call it when no page is missing. Further calls change nothing.
    ///
    /// # Errors
    ///
    /// [`SlotError::PagesMissing`]; [`SlotError::Flags`] or [`SlotError::Attributes`] if KVM
    /// refuses.
    pub fn finish(&self) -> Result<(), SlotError> {
        let mut finished = self.finished();
        if *finished {
            return Ok(());
        }
        let number = self.memslot.number();
        if !self.pager().bitmap().is_complete() {
            let missing =
                self.pager().bitmap().count_missing(PageRange::new(0, self.pager().pages()));
            return Err(SlotError::PagesMissing { number, missing });
        }
        if self.guard.engine.slot_flags() != 0 {
            self.memslot.clear_flags()?;
        }
        self.guard.engine.remove()?;
        *finished = true;
        Ok(())
    }

    fn finished(&self) -> MutexGuard<'_, bool> {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Checks that the engine, or the mapping's trap, stops every access to a missing page.
fn expect_trapped(number: u32, mapping: &GuestMapping, engine: Engine) -> Result<(), SlotError> {
    if mapping.mapping().is_revoked() {
        return Err(SlotError::Revoked { number });
    }
    if engine == Engine::KvmUserfault && !kept_outcome_holds() {
        return Err(SlotError::Unverified { number });
    }
    let (kind, complete) =
        (mapping.pager().backing().kind(), mapping.pager().bitmap().is_complete());
    let by_kvm = || engine == Engine::KvmUserfault && own_accesses_stop();
    if !kind.traps_in_mappings() {
        // Memory attributes would make its pages private to the guest.
        let open = complete && engine != Engine::KvmAttributes;
        let kept = open || by_kvm();
        return if kept { Ok(()) } else { Err(SlotError::Untrappable { number, kind, engine }) };
    }
    match mapping.armed_for() {
        Some(armed) if armed != engine.vcpu_trap() => {
            Err(SlotError::ArmedOtherwise { number, engine, armed })
        }
        Some(_) => Ok(()),
        None if complete || by_kvm() => Ok(()),
        None => Err(SlotError::Unarmed { number, engine }),
    }
}

impl fmt::Debug for DemandSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DemandSlot")
            .field("memslot", &self.memslot)
            .field("engine", &self.engine)
            .finish_non_exhaustive()
    }
}
