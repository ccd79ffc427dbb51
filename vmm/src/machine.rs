// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual machine on demand-paged memory: the five crates, put together.

use std::sync::Arc;

use demand_kvm::{DemandSlot, Engine, EngineChoice, FaultHandler, open_kvm, resolve};
use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, MemfdBacking, Pager, Path, RegionConfig, Retrier,
    Stats, transparent_huge_pages_of_shmem,
};
use demand_source::LocalFile;
use demand_uffd::{ArmedMapping, DEFAULT_THREADS, FaultService, Features, Userfaultfd};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::GuestAddress;

use crate::error::Error;
use crate::options::MemoryOption;

/// What a machine is made from.
pub struct MachineConfig<'a> {
    /// Memory.
    pub memory: &'a MemoryOption,
    /// How vCPU accesses to missing pages are trapped.
    pub engine: EngineChoice,
    /// The image that the memory's pages come from.
    pub source: &'a std::path::Path,
    /// Counts what happens.
    pub stats: Arc<Stats>,
    /// Tries failed fetches again.
    pub retrier: Arc<Retrier>,
}

/// A machine without vCPUs: memory that nobody has touched, a VM that has it as a memslot, and
/// the service that answers faults.
pub struct Machine {
    // Fields are dropped in this order: the guest's slot before the traps under it.
    slot: DemandSlot,
    vm: Arc<VmFd>,
    kvm: Kvm,
    engine: Engine,
    memory: DemandMemory,
    service: Arc<FaultService>,
}

/// Memslot of the demand-paged memory.
const MEMORY_SLOT: u32 = 0;

impl Machine {
    /// Makes the machine. Nothing here depends on the size of the memory.
    ///
    /// # Errors
    ///
    /// One line, with the exit status that belongs to it.
    pub fn new(config: MachineConfig<'_>) -> Result<Self, Error> {
        let MachineConfig { memory: option, engine, source, stats, retrier } = config;
        let engine = resolve(engine, &demand_kvm::probe()).map_err(Error::host)?;
        let kvm = open_kvm().map_err(Error::host)?;

        let source = LocalFile::open(source).map_err(Error::failed)?;
        let backing = MemfdBacking::new(option.backing, option.size, option.reserve)
            .map_err(backing_error)?
            .with_transparent_huge_pages(option.thp);
        if option.thp
            && let Err(why) = transparent_huge_pages_of_shmem()
        {
            log::warn!("transparent huge pages for guest memory: there will be none: {why}");
        }
        let start = GuestAddress(0);
        let region = DemandRegion::new(
            RegionConfig {
                start,
                backing: Arc::new(backing),
                source: Arc::new(source),
                image_offset: 0,
                stats,
                retrier,
            },
            (),
        )
        .map_err(pager_error)?;
        let pager = region.pager().clone();
        let memory = DemandMemory::new(vec![region]).map_err(Error::failed)?;

        let service = Arc::new(FaultService::start(DEFAULT_THREADS).map_err(Error::host)?);
        let guest = Arc::new(pager.backing().map().map_err(backing_error)?);
        arm_guest(&service, &pager, &guest, engine)?;

        let vm = Arc::new(kvm.create_vm().map_err(|error| {
            Error::host(format!("make a virtual machine: {error}; is another hypervisor running?"))
        })?);
        let slot = DemandSlot::new(vm.clone(), MEMORY_SLOT, start, guest, pager, engine)
            .map_err(Error::host)?;
        Ok(Machine { slot, vm, kvm, engine, memory, service })
    }

    /// The virtual machine.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// The KVM that it is one of.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// How vCPU accesses to missing pages are trapped.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// The guest's memory, for everybody who goes through vm-memory.
    pub fn memory(&self) -> &DemandMemory {
        &self.memory
    }

    /// The memory's pager.
    pub fn pager(&self) -> &Arc<Pager> {
        self.slot.pager()
    }

    /// Who answers faults, also those of back-ends.
    pub fn service(&self) -> &Arc<FaultService> {
        &self.service
    }

    /// Where the guest's memory begins in this process: the name by which vhost-user back-ends
    /// are told of it. Nothing may be read there before it has arrived.
    pub fn guest_mapping(&self) -> &Arc<demand_memory::Mapping> {
        self.slot.mapping()
    }

    /// Resolves the vCPUs' exits at missing pages.
    ///
    /// # Errors
    ///
    /// None that a machine of one region can have.
    pub fn fault_handler(&self) -> Result<FaultHandler, Error> {
        FaultHandler::for_slots([&self.slot]).map_err(Error::failed)
    }

    /// Takes everything away that demand paging needed, when the last page is present and the
    /// back-ends have been told: the VM runs on as if it had never been demand-paged.
    ///
    /// # Errors
    ///
    /// If pages are missing, or the kernel refuses.
    pub fn finish(&self) -> Result<(), Error> {
        self.service.finish().map_err(Error::failed)?;
        self.slot.finish().map_err(Error::failed)?;
        Ok(())
    }
}

/// Arms the guest's mapping, as the backing and the engine need it.
fn arm_guest(
    service: &FaultService,
    pager: &Arc<Pager>,
    guest: &Arc<demand_memory::Mapping>,
    engine: Engine,
) -> Result<(), Error> {
    let uffd = Arc::new(Userfaultfd::open(Features::GUEST_MEMORY).map_err(Error::host)?);
    // Under KVM Userfault the vCPUs leave the guest before they look at the mapping: who still
    // gets there is KVM itself.
    let path = match engine {
        Engine::Uffd => Path::Guest,
        _ => Path::KvmInternal,
    };
    let by_unit = pager.backing().kind() != BackingKind::Shmem && engine != Engine::Uffd;
    let armed = if by_unit {
        ArmedMapping::own_missing_units(&uffd, guest.clone(), pager, path)
    } else {
        ArmedMapping::own(&uffd, guest.clone(), pager, path)
    }
    .map_err(Error::host)?;
    pager.set_guest_trap(armed.clone());
    service.serve(&[armed]).map_err(Error::host)
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
