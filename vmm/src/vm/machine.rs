// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual machine: the memory, the VM and the fault service of `demand-paging`, with what this
//! VMM adds: where memory lies in the guest, the vCPUs, and the order of the end.

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use demand_kvm::{
    DemandSlot, Engine, EngineChoice, EngineError, FaultHandler, KvmError, ProbeCache, open_kvm,
};
use demand_memory::{
    BackingError, BackingKind, DemandMemory, FillOptions, MemfdBacking, PAGE_SIZE, Pager,
    PagerError, Retrier, Stats, transparent_huge_pages_of_shmem,
};
use demand_paging::{
    Error as PagingError, Lazy, LazyBuilder, LazyMemory, LazyVcpu, LazyVm, ServiceOptions,
};
use demand_source::PageSource;
use demand_uffd::FaultService;
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::GuestAddress;

use crate::arch::error::PlacementError;
use crate::arch::placement::{Placement, check_places, place};
use crate::config::MemoryConfig;
use crate::error::{Error, Kind};
use crate::limits::warn_of_cgroup;
use crate::patience::{PATIENCE, Wait};
use crate::vcpu::error::StillInside;
use crate::vm::timeouts;

/// Polling interval of the wait for open faults.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Errors of a machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// The memory does not fit the address space of this host's processors.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// This host cannot run the engine.
    #[error("{0}, or use --engine uffd or auto")]
    Engine(#[source] EngineError),
    /// KVM cannot be opened.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// KVM refuses a vCPU.
    #[error("cannot create vCPU {cpu}: {source}; ask for fewer with --cpus")]
    CreateVcpu {
        /// The vCPU.
        cpu: u32,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// The memory cannot be created, given to the VM, or freed of demand paging.
    #[error(transparent)]
    Paging(PagingError),
    /// The VM ends while it waits.
    #[error("cannot reset the guest: the VM is ending")]
    Ending,
}

impl From<PagingError> for MachineError {
    fn from(error: PagingError) -> Self {
        match error {
            PagingError::Kvm(error) => MachineError::Kvm(error),
            PagingError::Engine(error) => MachineError::Engine(error),
            other => MachineError::Paging(other),
        }
    }
}

impl From<MachineError> for Error {
    fn from(error: MachineError) -> Self {
        let kind = match &error {
            MachineError::Paging(error) => kind_of(error),
            MachineError::Placement(_)
            | MachineError::Engine(_)
            | MachineError::Kvm(_)
            | MachineError::CreateVcpu { .. } => Kind::Host,
            MachineError::Ending => Kind::Failed,
        };
        Error::of(kind, error)
    }
}

fn kind_of(error: &PagingError) -> Kind {
    match error {
        PagingError::Backing(BackingError::Size { .. }) => Kind::Usage,
        PagingError::Pager(PagerError::Bitmap { .. })
        | PagingError::Engine(_)
        | PagingError::Kvm(_)
        | PagingError::Backing(_)
        | PagingError::Service(_)
        | PagingError::Map(_)
        | PagingError::Arm(_)
        | PagingError::Slot(_)
        | PagingError::CreateVcpu { .. }
        | PagingError::Kick(_)
        | PagingError::Thread { .. } => Kind::Host,
        _ => Kind::Failed,
    }
}

/// The parts from which a machine is made.
pub struct MachineConfig<'a> {
    /// Size and kind of the memory.
    pub memory: &'a MemoryConfig,
    /// How vCPU accesses to missing pages are trapped.
    pub engine: EngineChoice,
    /// The file that keeps what is found out about the engines.
    pub probes: Option<ProbeCache>,
    /// Whether the memory arrives on demand, or is read before the machine has it.
    pub lazy: Lazy,
    /// The source of the memory's pages.
    pub source: Arc<dyn PageSource>,
    /// The threads that serve faults of userfaultfds.
    pub service: ServiceOptions,
    /// The counters of faults and reads.
    pub stats: Arc<Stats>,
    /// The retrier of failed fetches.
    pub retrier: Retrier,
}

/// A machine without vCPUs: untouched memory in one or two regions, and a VM that has it.
///
/// Dropping it ends the guest: see [`LazyVm`].
pub struct Machine {
    /// The memory: its regions stay.
    memory: DemandMemory,
    lazy: LazyVm,
    kvm: Kvm,
}

impl fmt::Debug for MachineConfig<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut config = f.debug_struct("MachineConfig");
        config.field("memory", &self.memory).field("engine", &self.engine);
        config.finish_non_exhaustive()
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut machine = f.debug_struct("Machine");
        machine.field("lazy", &self.lazy).finish_non_exhaustive()
    }
}

/// Returns a builder of the memory that `option` describes, at `regions`.
fn builder(
    begin: LazyBuilder,
    option: &MemoryConfig,
    regions: &[Placement],
) -> Result<LazyBuilder, MachineError> {
    check_places(regions)?;
    warn_of_host(option);
    let &MemoryConfig { backing, reserve, thp, .. } = option;
    let begin = begin.finish_by_caller();
    let begin = if backing == BackingKind::GuestMemfd {
        begin.backing(backing)
    } else {
        begin.backing_from(move |size| {
            let memory = MemfdBacking::new(backing, size)?.with_reservation(reserve);
            Ok(Arc::new(memory.with_transparent_huge_pages(thp)))
        })
    };
    let placed = |builder: LazyBuilder, &Placement { start, size, image_offset }: &Placement| {
        builder.region_at(start, size, image_offset)
    };
    Ok(regions.iter().fold(begin, placed))
}

/// Creates the memory of a machine, which [`Machine::attach`] makes of it. The time does not depend
/// on the size of the memory.
///
/// # Errors
///
/// [`MachineError`], with the step that this host refuses.
pub(crate) fn guest_memory(config: MachineConfig<'_>) -> Result<LazyMemory, MachineError> {
    let regions = place(config.memory.size);
    memory_at(config, &regions)
}

/// Creates the memory of a machine whose pages are all present and zero, for a guest that boots.
///
/// # Errors
///
/// [`MachineError`], with the step that this host refuses.
pub(crate) fn zeroed_memory(
    option: &MemoryConfig,
    stats: &Arc<Stats>,
) -> Result<LazyMemory, MachineError> {
    let begin = LazyBuilder::zeroed().stats(stats.clone());
    Ok(builder(begin, option, &place(option.size))?.build()?)
}

fn memory_at(config: MachineConfig<'_>, regions: &[Placement]) -> Result<LazyMemory, MachineError> {
    let MachineConfig { memory, engine, probes, lazy, source, service, stats, retrier } = config;
    let begin = LazyBuilder::new(source).engine(engine).lazy(lazy).fault_service(service);
    let begin = begin.stats(stats).retrier(retrier);
    let begin = match probes {
        Some(cache) => begin.probe_cache(cache),
        None => begin,
    };
    Ok(builder(begin, memory, regions)?.build()?)
}

/// Begins the wait for KVM to take memory. KVM then allocates tables, in proportion to the memory's
/// size: some bytes for each page of it, present or not.
fn wait_for_tables(memory: &DemandMemory) -> Wait {
    let pages: u64 = memory.pagers().map(|pager| pager.pages()).sum();
    let gib = (pages * PAGE_SIZE) >> 30;
    Wait::begin(PATIENCE, move || {
        log::warn!("waiting for KVM to allocate its tables for {gib} GiB of guest memory");
    })
}

impl Machine {
    /// Creates a machine. The time does not depend on the size of the memory, unless the memory is
    /// read first.
    ///
    /// # Errors
    ///
    /// [`MachineError`], with the step that this host refuses.
    pub fn new(config: MachineConfig<'_>) -> Result<Self, MachineError> {
        Machine::attach(guest_memory(config)?)
    }

    /// Creates a machine whose memory lies at `regions`, in ascending order. The option's size is
    /// ignored.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn with_regions(
        config: MachineConfig<'_>,
        regions: &[Placement],
    ) -> Result<Self, MachineError> {
        Machine::attach(memory_at(config, regions)?)
    }

    /// Creates a machine that has this memory. If the memory is to be read first, this reads all of
    /// it; [`DemandMemory::stop`] ends that.
    ///
    /// # Errors
    ///
    /// [`MachineError`], with the step that this host refuses.
    pub fn attach(lazy: LazyMemory) -> Result<Self, MachineError> {
        let kvm = open_kvm()?;
        let (vm, memory) = (lazy.create_vm(&kvm)?, lazy.memory().clone());
        // Reading all of the memory has its own progress.
        let complete = memory.pagers().all(|pager| pager.bitmap().is_complete());
        let reads = lazy.engine().is_none() && !complete;
        let wait = (!reads).then(|| wait_for_tables(&memory));
        let lazy = lazy.attach(vm)?;
        drop(wait);
        Ok(Machine { memory, lazy, kvm })
    }

    /// Returns the VM.
    pub fn vm(&self) -> &Arc<VmFd> {
        self.lazy.fd()
    }

    /// Returns the handle of `/dev/kvm` from which the VM was created.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Returns how vCPU accesses to missing pages are trapped, or `None` if no page was ever
    /// missing.
    pub fn engine(&self) -> Option<Engine> {
        self.lazy.engine()
    }

    /// Returns the engine's name, or "none".
    pub fn engine_name(&self) -> &'static str {
        self.engine().map_or("none", Engine::name)
    }

    /// Creates vCPU `cpu`.
    ///
    /// # Errors
    ///
    /// If KVM refuses.
    pub fn create_vcpu(&self, cpu: u32) -> Result<LazyVcpu, MachineError> {
        self.lazy.create_vcpu(cpu.into()).map_err(|error| match error {
            PagingError::CreateVcpu { source, .. } => MachineError::CreateVcpu { cpu, source },
            other => other.into(),
        })
    }

    /// Returns the guest's memory, for all accesses through vm-memory.
    pub fn memory(&self) -> &DemandMemory {
        &self.memory
    }

    /// Returns the memslots of the memory, by guest address and numbered from 0 on.
    pub fn slots(&self) -> Vec<Arc<DemandSlot>> {
        self.lazy.slots()
    }

    /// Returns the pagers of the regions, by guest address.
    pub fn pagers(&self) -> impl Iterator<Item = &Arc<Pager>> {
        self.memory().pagers()
    }

    /// Returns the number of pages in all regions.
    pub fn pages(&self) -> u64 {
        self.pagers().map(|pager| pager.pages()).sum()
    }

    /// Returns whether fetches of some pages have failed and are being retried.
    pub(crate) fn is_source_failing(&self) -> bool {
        self.lazy.is_source_failing()
    }

    /// Makes the next attempt for pages whose fetch has failed now, even if the source has said that
    /// it would be useless.
    pub(crate) fn retry_source(&self) {
        if let Some(retrier) = self.lazy.retrier() {
            retrier.retry_now();
        }
    }

    /// Calls `callback` when the last page of all regions becomes present: at once if it already
    /// is, else on the thread that publishes it. The callback must not block.
    pub fn on_complete(&self, callback: impl FnOnce() + Send + 'static) {
        self.lazy.on_complete(callback);
    }

    /// Returns the service that handles faults, including those of back-ends.
    pub fn service(&self) -> &Arc<FaultService> {
        self.lazy.service()
    }

    /// Returns the handler that resolves the vCPUs' exits at missing pages, for a run loop of one's
    /// own.
    pub fn fault_handler(&self) -> &Arc<FaultHandler> {
        self.lazy.handler()
    }

    /// Returns the VM's memory and its life, for all that this type does not do. Its regions must
    /// stay: [`memory`](Self::memory) has them.
    pub fn lazy(&self) -> &LazyVm {
        &self.lazy
    }

    /// Fetches pages that KVM is about to touch on its own, and waits for them.
    ///
    /// # Errors
    ///
    /// If the VM is going away.
    pub(crate) fn fetch_pages(&self, pages: &[GuestAddress]) -> Result<(), MachineError> {
        Ok(self.lazy.fetch_pages(pages)?)
    }

    /// Fetches the pages that nothing asks for in the background.
    ///
    /// # Errors
    ///
    /// If the host has no more threads.
    pub(crate) fn start_fill(&self, options: FillOptions) -> Result<(), MachineError> {
        Ok(self.lazy.start_fill(options)?)
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
        self.memory().revoke();
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
    pub(crate) fn wait_open_faults(&self) -> Result<(), MachineError> {
        // Two checks, because a kernel thread may be between two faults.
        let mut quiet = 0;
        while quiet < 2 {
            if self.memory().is_stopped() {
                return Err(MachineError::Ending);
            }
            quiet = if self.service().has_open_faults() { 0 } else { quiet + 1 };
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
    pub fn finish(&self) -> Result<(), MachineError> {
        Ok(self.lazy.finish()?)
    }
}

/// Warns about properties of the host that do not suit the memory but do not prevent its creation.
fn warn_of_host(option: &MemoryConfig) {
    if option.backing == BackingKind::Shmem {
        warn_of_cgroup(option.size);
    }
    if option.thp
        && let Err(why) = transparent_huge_pages_of_shmem()
    {
        log::warn!("guest memory gets no transparent huge pages: {why}");
    }
}
