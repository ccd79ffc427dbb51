// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual machine on demand-paged memory, built from `demand-source`, `demand-memory`,
//! `demand-kvm` and `demand-uffd`.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use demand_kvm::{
    DemandSlot, Engine, EngineChoice, FaultHandler, MsrTrap, PlainSlot, open_kvm, resolve,
};
use demand_memory::{
    Backing, BackingKind, DemandMemory, DemandRegion, MemfdBacking, Pager, RegionConfig, Retrier,
    Stats, transparent_huge_pages_of_shmem,
};
use demand_source::PageSource;
use demand_uffd::{ArmGuestError, DEFAULT_THREADS, FaultService};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::arch::placement::{Placement, check_places, place};
use crate::config::MemoryOption;
use crate::error::Error;
use crate::limits::warn_of_cgroup;
use crate::vcpu::set::StillInside;
use crate::vm::timeouts;

/// Polling interval of the wait for open faults.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// The parts from which a machine is made.
pub struct MachineConfig<'a> {
    /// Size and kind of the memory.
    pub memory: &'a MemoryOption,
    /// How vCPU accesses to missing pages are trapped.
    pub engine: EngineChoice,
    /// The source of the memory's pages.
    pub source: Arc<dyn PageSource>,
    /// The counters of faults and reads.
    pub stats: Arc<Stats>,
    /// The retrier of failed fetches.
    pub retrier: Arc<Retrier>,
}

/// A machine without vCPUs: untouched memory in one or two regions, a VM with these as memslots,
/// and the service that handles faults.
pub struct Machine {
    // Fields are dropped in this order. Dropping a slot ends every wait for a page in it, and only
    // then may the VM be closed.
    slots: Vec<DemandSlot>,
    /// Memslots of memory that was never missing.
    _plain: Vec<PlainSlot>,
    /// The trap for the guest's writes to MSRs that name memory for KVM, if KVM supports it.
    msr_trap: Option<MsrTrap>,
    vm: Arc<VmFd>,
    kvm: Kvm,
    /// `None` if no page was ever missing.
    engine: Option<Engine>,
    memory: DemandMemory,
    /// `None` if no page was ever missing.
    retrier: Option<Arc<Retrier>>,
    service: Arc<FaultService>,
}

impl Machine {
    /// Creates a machine. The time does not depend on the size of the memory.
    ///
    /// # Errors
    ///
    /// Returns a one-line error with its exit status.
    pub fn new(config: MachineConfig<'_>) -> Result<Self, Error> {
        let regions = place(config.memory.size);
        Machine::with_regions(config, &regions)
    }

    /// Creates a machine whose memory lies at `regions`, in ascending order. The option's size is
    /// ignored.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn with_regions(config: MachineConfig<'_>, regions: &[Placement]) -> Result<Self, Error> {
        let MachineConfig { memory: option, engine, source, stats, retrier } = config;
        check_places(regions)?;
        let probe = demand_kvm::probe();
        let engine = resolve(engine, &probe).map_err(Error::host)?;
        let kvm = open_kvm().map_err(Error::host)?;

        warn_of_host(option);
        let mut demand_regions = Vec::new();
        for &Placement { start, size, image_offset } in regions {
            let config = RegionConfig {
                start,
                backing: backing(option, size)?,
                source: source.clone(),
                image_offset,
                stats: stats.clone(),
                retrier: retrier.clone(),
            };
            demand_regions.push(DemandRegion::new(config, ()).map_err(pager_error)?);
        }
        let memory = DemandMemory::new(demand_regions).map_err(Error::failed)?;

        let service = Arc::new(FaultService::start(DEFAULT_THREADS).map_err(Error::host)?);
        let guest = service.arm_guest(memory.pagers(), engine.vcpu_trap()).map_err(arm_error)?;

        let vm = Arc::new(engine.create_vm(&kvm).map_err(Error::host)?);
        let msr_trap = MsrTrap::new(&vm)
            .inspect_err(|error| log::warn!("{error}; the guest must not enable kvm-clock"))
            .ok();
        let guest = guest.into_iter().zip(memory.pagers());
        let slots = (0..).zip(regions).zip(guest).map(|((number, region), (mapping, pager))| {
            DemandSlot::new(vm.clone(), number, region.start, mapping, pager.clone(), engine)
        });
        let mut slots = slots.collect::<Result<Vec<_>, _>>().map_err(Error::host)?;
        if let Ok(known) = &probe.kvm {
            slots = slots.into_iter().map(|slot| slot.with_features(known)).collect();
        }
        let (_plain, engine, retrier) = (Vec::new(), Some(engine), Some(retrier));
        Ok(Machine { slots, _plain, msr_trap, vm, kvm, engine, memory, retrier, service })
    }

    /// Creates a machine whose pages are all present and zero, for a guest that boots.
    ///
    /// # Errors
    ///
    /// Returns a one-line error with its exit status.
    pub fn present(option: &MemoryOption, stats: &Arc<Stats>) -> Result<Self, Error> {
        let regions = place(option.size);
        check_places(&regions)?;
        warn_of_host(option);
        let kvm = open_kvm().map_err(Error::host)?;
        let vm = Arc::new(kvm.create_vm().map_err(|error| {
            Error::host(format!("cannot create a VM: {error}; the kernel's log may say more"))
        })?);
        let (mut _plain, mut present) = (Vec::new(), Vec::new());
        for (number, &Placement { start, size, .. }) in (0..).zip(&regions) {
            let backing = backing(option, size)?;
            let mapping = Arc::new(backing.map().map_err(backing_error)?);
            let slot = PlainSlot::new(vm.clone(), number, start, mapping, false);
            _plain.push(slot.map_err(Error::host)?);
            let region = DemandRegion::present(start, backing, stats.clone(), ());
            present.push(region.map_err(pager_error)?);
        }
        let memory = DemandMemory::new(present).map_err(Error::failed)?;
        let service = Arc::new(FaultService::start(DEFAULT_THREADS).map_err(Error::host)?);
        let (slots, msr_trap, engine, retrier) = (Vec::new(), None, None, None);
        Ok(Machine { slots, _plain, msr_trap, vm, kvm, engine, memory, retrier, service })
    }

    /// Returns the VM.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// Returns the handle of `/dev/kvm` from which the VM was created.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Returns how vCPU accesses to missing pages are trapped, or `None` if no page was ever
    /// missing.
    pub fn engine(&self) -> Option<Engine> {
        self.engine
    }

    /// Returns the engine's name, or "none".
    pub fn engine_name(&self) -> &'static str {
        self.engine.map_or("none", Engine::name)
    }

    /// Creates vCPU `cpu`.
    ///
    /// # Errors
    ///
    /// If KVM refuses.
    pub fn create_vcpu(&self, cpu: u32) -> Result<VcpuFd, Error> {
        self.vm.create_vcpu(cpu.into()).map_err(|error| {
            Error::host(format!("cannot create vCPU {cpu}: {error}; ask for fewer with --cpus"))
        })
    }

    /// Returns the guest's memory, for all accesses through vm-memory.
    pub fn memory(&self) -> &DemandMemory {
        &self.memory
    }

    /// Returns the memslots of the demand-paged memory, by guest address and numbered from 0 on.
    /// There are none if no page was ever missing.
    pub fn slots(&self) -> &[DemandSlot] {
        &self.slots
    }

    /// Returns the pagers of the regions, by guest address.
    pub fn pagers(&self) -> impl Iterator<Item = &Arc<Pager>> {
        self.memory.pagers()
    }

    /// Returns the number of pages in all regions.
    pub fn pages(&self) -> u64 {
        self.pagers().map(|pager| pager.pages()).sum()
    }

    /// Returns whether fetches of some pages have failed and are being retried.
    pub fn is_source_failing(&self) -> bool {
        self.retrier.as_ref().is_some_and(|retrier| retrier.is_failing())
    }

    /// Calls `callback` when the last page of all regions becomes present: at once if it already
    /// is, else on the thread that publishes it. The callback must not block.
    pub fn on_complete(&self, callback: impl FnOnce() + Send + 'static) {
        self.memory.on_complete(callback);
    }

    /// Returns the service that handles faults, including those of back-ends.
    pub fn service(&self) -> &Arc<FaultService> {
        &self.service
    }

    /// Returns a handler that resolves the vCPUs' exits at missing pages.
    ///
    /// # Errors
    ///
    /// None for a machine, because KVM has checked that its slots do not overlap.
    pub fn fault_handler(&self) -> Result<FaultHandler, Error> {
        FaultHandler::for_slots(&self.slots).map_err(Error::failed)
    }

    /// Ends the guest, for any reason. First `stop_vcpus`, which gets a time limit, makes the vCPUs
    /// leave the guest; then the guest's memory is [revoked](DemandMemory::revoke). After that
    /// neither a vCPU nor KVM itself waits for a page, and the machine can be dropped.
    ///
    /// # Errors
    ///
    /// [`StillInside`] if a vCPU is blocked on anything other than a page. The caller must not drop
    /// the machine then, because KVM would wait for that vCPU; it may leave the machine to the end
    /// of the process.
    pub fn end_guest(
        &self,
        mut stop_vcpus: impl FnMut(Duration) -> Result<(), StillInside>,
    ) -> Result<(), StillInside> {
        // While pages can still become present: a vCPU may be blocked on one inside KVM, where a
        // kick does not reach it.
        let stopped = stop_vcpus(timeouts::VCPUS);
        self.memory.revoke();
        stopped.or_else(|stuck| {
            log::warn!("{stuck}; the guest is stopped in the middle of an instruction");
            stop_vcpus(timeouts::VCPUS)
        })
    }

    /// Waits until KVM itself is not blocked on a page of the guest. The caller must do this while
    /// all vCPUs are outside the guest, before it sets their MSRs: to set some of them, KVM waits
    /// for its own faults, and no signal interrupts that.
    ///
    /// # Errors
    ///
    /// If the VM is going away.
    pub fn wait_open_faults(&self) -> Result<(), Error> {
        // Two checks, because a kernel thread may be between two faults.
        let mut quiet = 0;
        while quiet < 2 {
            if self.memory.is_stopped() {
                return Err(Error::failed("cannot reset the guest: the VM is ending"));
            }
            quiet = if self.service.has_open_faults() { 0 } else { quiet + 1 };
            if quiet < 2 {
                thread::sleep(LOOK_EVERY);
            }
        }
        Ok(())
    }

    /// Removes all that demand paging needed. The last page must be present, and the back-ends must
    /// have been told. The VM then runs as if it had never been demand-paged.
    ///
    /// # Errors
    ///
    /// If pages are missing, or the kernel refuses.
    pub fn finish(&self) -> Result<(), Error> {
        self.service.finish().map_err(Error::failed)?;
        for slot in &self.slots {
            slot.finish().map_err(Error::failed)?;
        }
        self.msr_trap.iter().try_for_each(MsrTrap::remove).map_err(Error::failed)
    }
}

/// Warns about properties of the host that do not suit the memory but do not prevent its creation.
fn warn_of_host(option: &MemoryOption) {
    if option.backing == BackingKind::Shmem {
        warn_of_cgroup(option.size);
    }
    if option.thp
        && let Err(why) = transparent_huge_pages_of_shmem()
    {
        log::warn!("guest memory gets no transparent huge pages: {why}");
    }
}

fn backing(option: &MemoryOption, size: u64) -> Result<Arc<dyn Backing>, Error> {
    let backing = MemfdBacking::new(option.backing, size, option.reserve).map_err(backing_error)?;
    Ok(Arc::new(backing.with_transparent_huge_pages(option.thp)))
}

fn arm_error(error: ArmGuestError) -> Error {
    match error {
        ArmGuestError::Map(error) => backing_error(error),
        _ => Error::host(error),
    }
}

fn backing_error(error: demand_memory::BackingError) -> Error {
    match error {
        demand_memory::BackingError::Size { .. } => Error::usage(error),
        _ => Error::host(error),
    }
}

fn pager_error(error: demand_memory::PagerError) -> Error {
    match error {
        demand_memory::PagerError::Backing(error) => backing_error(error),
        demand_memory::PagerError::Bitmap { .. } => Error::host(error),
        _ => Error::failed(error),
    }
}
