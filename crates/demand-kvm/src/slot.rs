// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memslots over memory whose pages arrive when the guest first uses them.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use demand_memory::{Mapping, PAGE_SIZE, PageRange, Pager, VcpuTrap};
use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

use crate::memslot::Memslot;
use crate::trap::{SetTrap, SlotTrap};
use crate::{Engine, KvmFeatures, SlotError};

/// What [`DemandSlot::finish`] has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// The slot is like any other now.
    Now,
    /// KVM stops looking at the bitmap, which has no bit set any more, when dirty logging is
    /// switched off: the posted series warns where the flag goes before that, and no huge page
    /// could come back earlier anyway.
    WithLogging,
}

struct State {
    /// The slot's `KVM_MEM_` flags, as KVM has them.
    flags: u32,
    /// Whether [`DemandSlot::finish`] was called, for the trap to go as soon as it can.
    finish: bool,
    /// Whether the trap is gone.
    free: bool,
}

/// A memslot over a demand-paged region.
///
/// With [`Engine::KvmUserfault`] KVM reads the pager's missing bitmap: a vCPU that touches a
/// missing page leaves `KVM_RUN` with `KVM_EXIT_MEMORY_FAULT`, and goes on once a
/// [`FaultHandler`](crate::FaultHandler) has brought the page in. With [`Engine::KvmAttributes`]
/// it does so because the slot's pages are private to KVM, and the handler also lets KVM know of
/// each page; the VM must be one of [`Engine::create_vm`]. With [`Engine::Uffd`] the slot is an
/// ordinary one, and `mapping` must be armed by a userfaultfd before the slot is made: nothing else
/// keeps the guest from reading zeros, and so the slot is refused otherwise.
///
/// The methods that change flags are for control threads: KVM waits for all vCPUs in them, so a
/// thread that serves faults must never call them.
///
/// When this is dropped, first the mapping is [revoked](Mapping::revoke), if it is armed: every
/// thread that is blocked on a page there comes out, with an error. Then the slot is deleted, and
/// then the mapping's trap is removed. Until then it keeps the mapping, the pager (whose bitmap KVM
/// reads) and the VM: so a VM is never closed while KVM itself waits for a page of it, which nothing
/// could end.
///
/// # Examples
///
/// ```
/// use demand_kvm::{DemandSlot, Engine, EngineChoice, FaultHandler, open_kvm, probe, resolve};
/// use demand_memory::{
///     BackingKind, MemfdBacking, PageRange, Pager, Path, Retrier, RetryPolicy, Stats, Waiter,
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
/// let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, 1 << 20, true).unwrap());
/// let pager = Pager::new(
///     backing,
///     Arc::new(LocalFile::open(image.path()).unwrap()),
///     0,
///     Arc::new(Stats::new()),
///     Retrier::new(RetryPolicy::default(), |failure| eprintln!("{}", failure.error)),
/// )
/// .unwrap();
/// // The guest's mapping, armed before anything can touch it.
/// let service = FaultService::start(DEFAULT_THREADS).unwrap();
/// let mapping = service.arm_guest([&pager], engine.vcpu_trap()).unwrap().remove(0);
/// let slot = DemandSlot::new(vm, 0, GuestAddress(0), mapping, pager.clone(), engine).unwrap();
/// let handler = FaultHandler::for_slots([&slot]).unwrap();
///
/// // ... the guest runs, its faults go to `handler` ...
///
/// pager.ensure(PageRange::new(0, 256), Path::Fill, &Waiter::new()).unwrap();
/// slot.finish().unwrap();
/// ```
pub struct DemandSlot {
    // Fields are dropped in this order: the slot before what traps it.
    memslot: Memslot,
    trap: SetTrap,
    pager: Arc<Pager>,
    engine: Engine,
    /// Whether KVM is known to keep to the bitmap when dirty logging goes off.
    logging_may_go: bool,
    state: Mutex<State>,
}

impl DemandSlot {
    /// Makes memslot `number`, whose first byte is at guest physical address `start`, over
    /// `mapping`, a mapping of the pager's backing made for the guest alone. The number must not
    /// be in use: to KVM the call would change that slot.
    ///
    /// # Errors
    ///
    /// [`SlotError::Unaligned`], [`SlotError::Size`] if the mapping is not as long as the
    /// pager's region, [`SlotError::Unarmed`] under [`Engine::Uffd`] if nothing traps accesses to
    /// the mapping's missing pages, and [`SlotError::Create`] if KVM refuses the slot, as it does under
    /// [`Engine::KvmUserfault`] where the kernel does not have that; under
    /// [`Engine::KvmAttributes`] also [`SlotError::Attributes`].
    pub fn new(
        vm: Arc<VmFd>,
        number: u32,
        start: GuestAddress,
        mapping: Arc<Mapping>,
        pager: Arc<Pager>,
        engine: Engine,
    ) -> Result<Self, SlotError> {
        let region = pager.pages() * PAGE_SIZE;
        if mapping.len() != region {
            return Err(SlotError::Size { number, mapping: mapping.len(), region });
        }
        if !start.0.is_multiple_of(PAGE_SIZE) {
            return Err(SlotError::Unaligned { number, start: start.0 });
        }
        let trapped = engine.vcpu_trap() == VcpuTrap::Hypervisor || mapping.traps_all();
        if !trapped && !pager.bitmap().is_complete() {
            return Err(SlotError::Unarmed { number });
        }
        let trap = SetTrap::set(engine, &vm, number, start, &pager)?;
        let (flags, bitmap) = (trap.0.slot_flags(), trap.0.bitmap(&pager));
        let memslot = Memslot::new(vm, number, start, mapping, bitmap, flags)?;
        pager.note_memslot(memslot.mapping());
        let state = Mutex::new(State { flags, finish: false, free: false });
        Ok(DemandSlot { memslot, trap, pager, engine, logging_may_go: false, state })
    }

    /// Tells the slot what this host's KVM is known to do right, from
    /// [`Probe::kvm`](crate::Probe::kvm): where KVM's own accesses keep to the bitmap, dirty
    /// logging can be switched off while pages are missing.
    pub fn with_features(mut self, kvm: &KvmFeatures) -> Self {
        self.logging_may_go = kvm.own_accesses;
        self
    }

    /// Number of the memslot.
    pub fn number(&self) -> u32 {
        self.memslot.number()
    }

    /// Guest physical address of the slot's first byte.
    pub fn start(&self) -> GuestAddress {
        self.memslot.start()
    }

    /// Length of the slot, in bytes.
    pub fn size(&self) -> u64 {
        self.memslot.mapping().len()
    }

    /// The guest's mapping. Its bytes are the guest's: a page may be missing, and is not fetched
    /// by a look at it from here.
    pub fn mapping(&self) -> &Arc<Mapping> {
        self.memslot.mapping()
    }

    /// The pager of the region behind the slot.
    pub fn pager(&self) -> &Arc<Pager> {
        &self.pager
    }

    /// How the guest's accesses to missing pages are caught.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Whether vCPUs leave `KVM_RUN` at missing pages.
    pub fn is_trapping(&self) -> bool {
        self.trap.0.exit_flags().is_some() && !self.lock().free
    }

    pub(crate) fn trap(&self) -> &SlotTrap {
        &self.trap.0
    }

    /// Switches KVM's dirty logging for this slot on or off.
    ///
    /// Under [`Engine::KvmUserfault`] it cannot be switched off while pages are missing: KVM
    /// brings huge pages back then, and a kernel that does not look at the bitmap as it does maps
    /// pages that have not arrived. Kernels that are known to look can be told of by
    /// [`with_features`](Self::with_features).
    ///
    /// # Errors
    ///
    /// [`SlotError::LoggingStaysOn`] in the case above, [`SlotError::Flags`] if KVM refuses.
    pub fn set_dirty_logging(&self, on: bool) -> Result<(), SlotError> {
        let mut state = self.lock();
        if on {
            return self.set_flags(&mut state, KVM_MEM_LOG_DIRTY_PAGES, 0);
        }
        let by_flag = state.flags & self.trap.0.slot_flags() != 0;
        if by_flag && !self.logging_may_go && !self.pager.bitmap().is_complete() {
            let (number, missing) = (self.number(), self.missing());
            return Err(SlotError::LoggingStaysOn { number, missing });
        }
        self.set_flags(&mut state, 0, KVM_MEM_LOG_DIRTY_PAGES)?;
        // One after the other: kernels of the series warn about both at once.
        if state.finish { self.free(&mut state) } else { Ok(()) }
    }

    /// Reads and clears KVM's dirty log: bit i of the words is page i of the slot, 1 if the guest
    /// or KVM wrote it since the last call. Pages that arrive are not written in this sense.
    /// Source: `KVM_GET_DIRTY_LOG`, `Documentation/virt/kvm/api.rst`, section 4.8.
    ///
    /// # Errors
    ///
    /// [`SlotError::DirtyLog`], as long as dirty logging is off or KVM refuses.
    pub fn dirty_log(&self) -> Result<Vec<u64>, SlotError> {
        let number = self.number();
        let size = usize::try_from(self.size()).expect("a mapping's length is a usize");
        self.memslot
            .vm()
            .get_dirty_log(number, size)
            .map_err(|error| SlotError::DirtyLog { number, error })
    }

    /// Makes the slot like any other: KVM stops looking at the bitmap, or takes all pages for
    /// shared ones, and is free to use huge pages again. To be called when no page is missing; calling it again changes nothing.
    ///
    /// # Errors
    ///
    /// [`SlotError::PagesMissing`], and [`SlotError::Flags`] or [`SlotError::Attributes`] if KVM
    /// refuses.
    pub fn finish(&self) -> Result<Finished, SlotError> {
        let mut state = self.lock();
        if !self.pager.bitmap().is_complete() {
            let (number, missing) = (self.number(), self.missing());
            return Err(SlotError::PagesMissing { number, missing });
        }
        state.finish = true;
        let by_flag = state.flags & self.trap.0.slot_flags() != 0;
        if by_flag && state.flags & KVM_MEM_LOG_DIRTY_PAGES != 0 {
            return Ok(Finished::WithLogging);
        }
        self.free(&mut state)?;
        Ok(Finished::Now)
    }

    /// Takes the trap away.
    fn free(&self, state: &mut State) -> Result<(), SlotError> {
        self.set_flags(state, 0, self.trap.0.slot_flags())?;
        self.trap.0.remove()?;
        state.free = true;
        Ok(())
    }

    fn missing(&self) -> u64 {
        self.pager.bitmap().count_missing(PageRange::new(0, self.pager.pages()))
    }

    fn set_flags(&self, state: &mut State, on: u32, off: u32) -> Result<(), SlotError> {
        let flags = (state.flags | on) & !off;
        if flags != state.flags {
            self.memslot.set_flags(flags)?;
            state.flags = flags;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
