// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that no VM has yet.

use std::fmt;
use std::sync::Arc;

use demand_kvm::{
    DemandSlot, DemandSlotConfig, Engine, EngineChoice, GUEST_MEMFD_LIMITS, MsrFilter, Probe,
    open_kvm, probe_for, resolve,
};
use demand_memory::{
    Backing, BackingKind, DemandMemory, DemandRegion, Fill, FillOptions, FillRate, GuestMapping,
    PageRange, Pager, PagerConfig, Retrier, Stats, Wait, Waiter,
};
use demand_source::ZeroPadded;
use demand_uffd::{ArmGuestError, FaultService, OpenError};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::builder::{Finish, MakeBacking, Placed};
use crate::current::{AddressSpace, Current};
use crate::vm::Parts;
use crate::{Error, Lazy, LazyBuilder, LazyVm};

/// Stops memory that no VM gets, so that no access waits for it any more.
struct StopOnDrop(Option<DemandMemory>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        if let Some(memory) = &self.0 {
            memory.stop();
        }
    }
}

/// The way in which memory gets its content.
enum Arrival {
    /// On demand, trapped by this engine through these mappings, one for each region.
    Lazy { engine: Engine, mappings: Vec<GuestMapping> },
    /// All of it before the VM gets it.
    First,
    /// It is zero.
    Zeroed,
}

/// Guest memory that no VM has yet, made by a [`LazyBuilder`]. It can be accessed through
/// vm-memory's traits at once: [`memory`](Self::memory).
///
/// Whatever traps the guest's accesses exists already, so no order of accesses and
/// [`attach`](Self::attach) shows zeros. Dropping it ends all accesses that wait for pages, and
/// releases the memory once the last clone of [`memory`](Self::memory) is dropped.
///
/// # Examples
///
/// See [`LazyVm`].
#[must_use = "the guest gets its memory by `attach`"]
pub struct LazyMemory {
    memory: DemandMemory,
    current: Arc<Current>,
    unattached: StopOnDrop,
    arrival: Arrival,
    probe: Option<Probe>,
    stats: Arc<Stats>,
    retrier: Option<Retrier>,
    service: Arc<FaultService>,
    first_slot: u32,
    fill: Option<FillOptions>,
    finish: Finish,
    backing: MakeBacking,
    /// The VM that the memory belongs to, if it belongs to one.
    vm: Option<Arc<VmFd>>,
    lazy: Lazy,
}

impl LazyMemory {
    pub(crate) fn new(builder: LazyBuilder) -> Result<Self, Error> {
        let LazyBuilder { source, backing, engine, probes, lazy, .. } = &builder;
        let (probe, engine) = match (source, lazy) {
            (None, _) | (_, Lazy::Off) => (None, None),
            (Some(_), Lazy::Auto | Lazy::Require) => {
                let probe = match probes {
                    Some(cache) => cache.probe_for(*engine),
                    None => probe_for(*engine),
                };
                let engine = resolve(*engine, &probe)?;
                (Some(probe), Some(engine))
            }
        };
        let regions = match (&source, &builder.regions[..]) {
            (Some(source), []) => {
                // The pager, too, pads the last page of an image.
                let size = ZeroPadded::to_pages(source.clone()).size();
                if size == 0 {
                    return Err(Error::Empty);
                }
                vec![Placed { start: GuestAddress(0), size, image_offset: 0 }]
            }
            (_, regions) => regions.to_vec(),
        };
        if regions.is_empty() {
            return Err(Error::NoRegion);
        }
        let vm = backing.is_of_vm().then(|| create_vm(engine, &open_kvm()?)).transpose()?;
        let make = |placed: Placed| -> Result<DemandRegion, Error> {
            let backing = backing.make(vm.as_deref(), placed.size)?;
            let (stats, retrier) = (builder.stats.clone(), builder.retrier.clone());
            let config = source.clone().map(|source| PagerConfig {
                backing: backing.clone(),
                source,
                image_offset: placed.image_offset,
                stats: stats.clone(),
                retrier,
            });
            create_region(placed.start, config, backing, stats)
        };
        let regions = regions.into_iter().map(make).collect::<Result<_, _>>()?;
        let memory = DemandMemory::new(regions).map_err(Error::Regions)?;
        let service = Arc::new(FaultService::start(builder.service).map_err(Error::Service)?);
        let arrival = match (source, engine, &probe) {
            (None, ..) => Arrival::Zeroed,
            (Some(_), Some(engine), Some(probe)) => {
                match arm(memory.pagers(), &service, engine, probe) {
                    Ok(mappings) => Arrival::Lazy { engine, mappings },
                    Err(error) if builder.may_read_first() && is_of_host(&error) => {
                        log::warn!("all guest memory is read before the guest runs: {error}");
                        Arrival::First
                    }
                    Err(error) => return Err(error),
                }
            }
            (Some(_), ..) => Arrival::First,
        };
        let unattached = StopOnDrop(Some(memory.clone()));
        Ok(LazyMemory {
            current: Current::new(memory.clone()),
            memory,
            unattached,
            arrival,
            probe,
            retrier: builder.source.as_ref().map(|_| builder.retrier.clone()),
            stats: builder.stats,
            service,
            first_slot: builder.first_slot,
            fill: builder.fill,
            finish: builder.finish,
            backing: builder.backing,
            vm,
            lazy: builder.lazy,
        })
    }

    /// Returns the memory, for all accesses through vm-memory. Exactly the pages that are accessed
    /// are fetched.
    pub fn memory(&self) -> &DemandMemory {
        &self.memory
    }

    /// Returns the memory as it is at each access, for devices of a VM whose regions will
    /// [change](LazyVm::insert_region): as [`LazyVm::address_space`] does.
    pub fn address_space(&self) -> &AddressSpace {
        self.current.space()
    }

    /// Returns the engine that will trap the vCPUs' accesses to missing pages; `None` if no page
    /// will be missing when the guest runs.
    pub fn engine(&self) -> Option<Engine> {
        match &self.arrival {
            Arrival::Lazy { engine, .. } => Some(*engine),
            Arrival::First | Arrival::Zeroed => None,
        }
    }

    /// Returns the limits of the engine on this host, and of the memory: sentences, without full
    /// stops.
    pub fn limits(&self) -> Vec<&'static str> {
        let known = self.probe.as_ref().zip(self.engine());
        let mut limits = known.map_or_else(Vec::new, |(probe, engine)| probe.limits(engine));
        if self.memory.pagers().any(|pager| pager.backing().kind() == BackingKind::GuestMemfd) {
            limits.extend(GUEST_MEMFD_LIMITS);
        }
        limits
    }

    /// Returns the statistics of the memory.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Creates a VM that can have this memory: an ordinary one, except with
    /// [`Engine::KvmAttributes`]. Memory that belongs to a VM ([`BackingKind::GuestMemfd`]) can have
    /// no other: that one is returned.
    ///
    /// # Errors
    ///
    /// [`Error::Kvm`].
    pub fn create_vm(&self, kvm: &Kvm) -> Result<Arc<VmFd>, Error> {
        self.vm.clone().map_or_else(|| create_vm(self.engine(), kvm), Ok)
    }

    /// Gives the memory to a VM: creates its memslots, traps the guest's writes to MSRs that name
    /// memory to KVM, and starts background fill, if it was chosen. Call it before the first vCPU
    /// runs.
    ///
    /// Memory that is [not lazy](Lazy::Off) is read here, as a whole. That waits as long as the
    /// source is unavailable; [`DemandMemory::stop`] ends it.
    ///
    /// # Errors
    ///
    /// [`Error::Slot`], if KVM refuses a memslot, as it does with [`Engine::KvmAttributes`] in a VM
    /// that is not from [`create_vm`](Self::create_vm); [`Error::Ended`], if the memory is stopped;
    /// [`Error::Thread`].
    pub fn attach(mut self, vm: impl Into<Arc<VmFd>>) -> Result<LazyVm, Error> {
        let (vm, engine) = (vm.into(), self.engine());
        let mappings = match self.arrival {
            Arrival::Lazy { mappings, .. } => mappings,
            Arrival::First | Arrival::Zeroed => {
                if matches!(self.arrival, Arrival::First) {
                    read_all(self.memory.pagers().cloned())?;
                }
                self.memory.pagers().map(GuestMapping::unarmed).collect::<Result<_, _>>()?
            }
        };
        // Before the memslots: KVM waits for a grace period in both, and right after another one it
        // takes the slow way, except for memslots.
        let msr_filter = engine.and_then(|_| {
            MsrFilter::new(&vm)
                .inspect_err(|error| log::warn!("{error}; the guest must not enable kvm-clock"))
                .ok()
        });
        let slot = |((number, region), mapping): ((u32, &DemandRegion), GuestMapping)| {
            let (vm, start) = (vm.clone(), region.start_addr());
            // To KVM, memory that is present is like that of this engine.
            let engine = engine.unwrap_or(Engine::Uffd);
            let config = DemandSlotConfig { vm, number, start, mapping, engine };
            Ok(Arc::new(DemandSlot::new(config).map_err(Error::Slot)?))
        };
        let numbered = (self.first_slot..).zip(self.memory.iter());
        let slots = numbered.zip(mappings).map(slot).collect::<Result<_, Error>>()?;
        let parts = Parts {
            vm,
            current: self.current,
            engine,
            probe: self.probe,
            stats: self.stats,
            retrier: self.retrier,
            service: self.service,
            slots,
            msr_filter,
            backing: self.backing,
            lazy: self.lazy,
        };
        let vm = LazyVm::new(parts, self.finish)?;
        // From here on the VM's handle ends them.
        self.unattached.0 = None;
        if let Some(options) = self.fill.filter(|_| engine.is_some()) {
            vm.start_fill(options)?;
        }
        Ok(vm)
    }
}

impl LazyBuilder {
    /// Returns whether all memory may be read first because this host cannot page it. A named
    /// engine is never replaced.
    fn may_read_first(&self) -> bool {
        self.lazy == Lazy::Auto && self.engine == EngineChoice::Auto
    }
}

/// Creates a VM for memory under this engine.
fn create_vm(engine: Option<Engine>, kvm: &Kvm) -> Result<Arc<VmFd>, Error> {
    // To KVM, memory that is present is like that of this engine.
    Ok(Arc::new(engine.unwrap_or(Engine::Uffd).create_vm(kvm)?))
}

/// Creates a region whose pages come as `config` says, or are all present and zero.
pub(crate) fn create_region(
    start: GuestAddress,
    config: Option<PagerConfig>,
    backing: Arc<dyn Backing>,
    stats: Arc<Stats>,
) -> Result<DemandRegion, Error> {
    Ok(match config {
        Some(config) => DemandRegion::new(start, config, ())?,
        None => DemandRegion::new_present(start, backing, stats, ())?,
    })
}

/// Creates the guest's mappings. They are armed, unless the engine traps every access to a missing
/// page: then no mapping needs a userfaultfd.
pub(crate) fn arm<'a>(
    pagers: impl IntoIterator<Item = &'a Arc<Pager>>,
    service: &FaultService,
    engine: Engine,
    probe: &Probe,
) -> Result<Vec<GuestMapping>, Error> {
    if probe.traps_own_accesses(engine) {
        let unarmed = pagers.into_iter().map(GuestMapping::unarmed);
        return Ok(unarmed.collect::<Result<_, _>>()?);
    }
    Ok(service.arm_guest(pagers, engine.vcpu_trap())?)
}

/// Returns whether an error from arming means that this host does not let this process use
/// userfaultfd, or has none for this kind of memory, and not that it lacks a resource at present.
fn is_of_host(error: &Error) -> bool {
    match error {
        Error::Arm(ArmGuestError::Open(error)) => !matches!(error, OpenError::Failed(_)),
        Error::Arm(ArmGuestError::Untrappable { .. }) => true,
        _ => false,
    }
}

/// Reads all pages, and waits for them.
pub(crate) fn read_all(pagers: impl IntoIterator<Item = Arc<Pager>>) -> Result<(), Error> {
    let pagers: Vec<_> = pagers.into_iter().collect();
    if pagers.iter().all(|pager| pager.bitmap().is_complete()) {
        return Ok(());
    }
    let fill = Fill::start(pagers.clone(), FillRate::Unlimited);
    let _fill = fill.map_err(|source| Error::Thread { duty: "read memory", source })?;
    let waiter = Waiter::new();
    for pager in pagers {
        let all = PageRange::new(0, pager.pages());
        if pager.bitmap().wait(all, &waiter) != Wait::Present {
            return Err(Error::Ended);
        }
    }
    Ok(())
}

impl fmt::Debug for LazyMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyMemory")
            .field("memory", &self.memory)
            .field("engine", &self.engine())
            .finish_non_exhaustive()
    }
}
