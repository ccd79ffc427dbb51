// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memslots over demand-paged memory.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use demand_memory::{Mapping, PAGE_SIZE, PageRange, Pager, VcpuTrap};
use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

use crate::memslot::Memslot;
use crate::trap::{SetTrap, SlotTrap};
use crate::{Engine, KvmFeatures, SlotError};

/// The effect of [`DemandSlot::finish`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// The slot is an ordinary one now.
    Now,
    /// Deferred until dirty logging is turned off, because the posted series WARNs if the flag is
    /// cleared first. Nothing is lost by this: KVM cannot restore huge pages while it logs, and no
    /// bit of the bitmap is set any more.
    WithLogging,
}

struct State {
    /// The slot's `KVM_MEM_` flags, as set in KVM.
    flags: u32,
    /// Whether [`DemandSlot::finish`] was called, so that the trap is removed as soon as possible.
    finish: bool,
    /// Whether the trap is removed.
    free: bool,
}

/// A memslot over a demand-paged region.
///
/// With [`Engine::KvmUserfault`] KVM reads the pager's missing bitmap: a vCPU that touches a
/// missing page leaves `KVM_RUN` with `KVM_EXIT_MEMORY_FAULT`, and resumes once a
/// [`FaultHandler`](crate::FaultHandler) has fetched the page. With [`Engine::KvmAttributes`] it
/// leaves `KVM_RUN` because the slot's pages are private to KVM, and the handler also clears the
/// attribute of each page; the VM must come from [`Engine::create_vm`]. With [`Engine::Uffd`] the
/// slot is an ordinary one, and `mapping` must be armed with a userfaultfd before the slot is
/// created. Nothing else would keep the guest from reading zeros, so a slot over an unarmed mapping
/// is refused.
///
/// The methods that change flags are for control threads: KVM waits for all vCPUs in them, so never
/// call them on a thread that serves faults.
///
/// Dropping the slot first [revokes](Mapping::revoke) the mapping, if it is armed: every thread
/// that is blocked on a page there returns, with an error. Then it deletes the slot, and then it
/// removes the mapping's trap. Until then the slot keeps the mapping, the pager (whose bitmap KVM
/// reads) and the VM. So a VM is never closed while KVM itself waits for one of its pages, a wait
/// that nothing could end.
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
    // Fields are dropped in this order: the slot before its trap.
    memslot: Memslot,
    trap: SetTrap,
    pager: Arc<Pager>,
    engine: Engine,
    /// Whether KVM is known to respect the bitmap when dirty logging is turned off.
    logging_may_go: bool,
    state: Mutex<State>,
}

impl DemandSlot {
    /// Creates memslot `number`, whose first byte is at guest physical address `start`, over
    /// `mapping`, a mapping of the pager's backing for the guest alone. The number must be unused:
    /// KVM would take the call as a change of the slot with that number.
    ///
    /// # Errors
    ///
    /// [`SlotError::Unaligned`]; [`SlotError::Size`] if the length of the mapping differs from the
    /// pager's region; [`SlotError::Unarmed`] under [`Engine::Uffd`] if nothing traps accesses to
    /// the mapping's missing pages; [`SlotError::Create`] if KVM refuses the slot, as a kernel
    /// without KVM Userfault does under [`Engine::KvmUserfault`]; and under
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

    /// Takes the features of this host's KVM into account, from [`Probe::kvm`](crate::Probe::kvm):
    /// where KVM's own accesses respect the bitmap, dirty logging can be turned off while pages are
    /// missing.
    pub fn with_features(mut self, kvm: &KvmFeatures) -> Self {
        self.logging_may_go = kvm.own_accesses;
        self
    }

    /// Returns the number of the memslot.
    pub fn number(&self) -> u32 {
        self.memslot.number()
    }

    /// Returns the guest physical address of the slot's first byte.
    pub fn start(&self) -> GuestAddress {
        self.memslot.start()
    }

    /// Returns the length of the slot, in bytes.
    pub fn size(&self) -> u64 {
        self.memslot.mapping().len()
    }

    /// Returns the guest's mapping. Its bytes belong to the guest. A page may be missing, and
    /// reading the mapping from here does not fetch it.
    pub fn mapping(&self) -> &Arc<Mapping> {
        self.memslot.mapping()
    }

    /// Returns the pager of the region behind the slot.
    pub fn pager(&self) -> &Arc<Pager> {
        &self.pager
    }

    /// Returns the engine that traps the guest's accesses to missing pages.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Returns whether vCPUs leave `KVM_RUN` at missing pages.
    pub fn is_trapping(&self) -> bool {
        self.trap.0.exit_flags().is_some() && !self.lock().free
    }

    pub(crate) fn trap(&self) -> &SlotTrap {
        &self.trap.0
    }

    /// Turns KVM's dirty logging for this slot on or off.
    ///
    /// Under [`Engine::KvmUserfault`] it cannot be turned off while pages are missing: KVM then
    /// restores huge pages, and a kernel that ignores the bitmap while it does so maps missing
    /// pages. For kernels that are known to respect the bitmap use
    /// [`with_features`](Self::with_features).
    ///
    /// # Errors
    ///
    /// [`SlotError::LoggingStaysOn`] in the case above; [`SlotError::Flags`] if KVM refuses.
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
        // In a second call: kernels with the series WARN if one call clears both flags.
        if state.finish { self.free(&mut state) } else { Ok(()) }
    }

    /// Reads and clears KVM's dirty log: bit i of the words is page i of the slot, 1 if the guest
    /// or KVM wrote it since the last call. Populating a page does not make it dirty. Source:
    /// `KVM_GET_DIRTY_LOG`, `Documentation/virt/kvm/api.rst`, section 4.8.
    ///
    /// # Errors
    ///
    /// [`SlotError::DirtyLog`] if dirty logging is off or KVM refuses.
    pub fn dirty_log(&self) -> Result<Vec<u64>, SlotError> {
        let number = self.number();
        let size = usize::try_from(self.size()).expect("a mapping's length is a usize");
        self.memslot
            .vm()
            .get_dirty_log(number, size)
            .map_err(|error| SlotError::DirtyLog { number, error })
    }

    /// Makes the slot an ordinary one: KVM stops reading the bitmap, or treats all pages as shared,
    /// and may use huge pages again. Call it when no page is missing. Further calls change nothing.
    ///
    /// # Errors
    ///
    /// [`SlotError::PagesMissing`]; [`SlotError::Flags`] or [`SlotError::Attributes`] if KVM
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

    /// Removes the trap.
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
