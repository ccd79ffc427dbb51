// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine whose guest mapping is armed, as in a VMM, with a device for its guests.

use super::*;
use demand_kvm::{KvmFeatures, PendingExit};
use demand_memory::{Backing, DemandMemory, DemandRegion, FaultPath, PagerConfig, Waiter};
use demand_uffd::{DEFAULT_THREADS, FaultService};
use vm_memory::Bytes;

/// The port that guests read from and write to. Unlike many others it has no device in KVM.
pub const PORT: u16 = 0x90;
/// Guest physical address of the device's registers, where there is no memory.
pub const DEVICE: u64 = 0x8000_0000;

/// Returns the `index`th byte that the device supplies.
pub fn device_byte(index: usize) -> u8 {
    (index * 7 + 1) as u8
}

/// A machine with a demand-paged region whose guest mapping is armed.
pub struct Rig {
    pub handler: FaultHandler,
    pub slot: DemandSlot,
    pub memory: DemandMemory,
    pub machine: Machine,
    _service: FaultService,
}

impl Rig {
    pub fn new(kvm: &Kvm, engine: Engine, kind: BackingKind, source: Arc<dyn PageSource>) -> Self {
        Rig::with(Machine::new(kvm, engine), engine, kind, source)
    }

    pub fn with(
        machine: Machine,
        engine: Engine,
        kind: BackingKind,
        source: Arc<dyn PageSource>,
    ) -> Self {
        let backing = MemfdBacking::new(kind, source.size()).unwrap();
        let config = PagerConfig {
            backing: Arc::new(backing),
            source,
            image_offset: 0,
            stats: Arc::new(Stats::new()),
            retrier: Retrier::new(RetryPolicy::default(), |failure| panic!("{}", failure.error)),
        };
        let region = DemandRegion::new(GuestAddress(REGION), config, ()).unwrap();
        let pager = region.pager().clone();
        let memory = DemandMemory::new(vec![region]).unwrap();
        let service = FaultService::start(DEFAULT_THREADS).unwrap();
        let guest = service.arm_guest([&pager], engine.vcpu_trap()).unwrap().remove(0);
        let slot = machine.slot_over(guest, engine);
        let handler = handler(&slot);
        Rig { handler, slot, memory, machine, _service: service }
    }

    pub fn pager(&self) -> &Arc<Pager> {
        self.slot.pager()
    }

    /// Fetches a page, as another thread might.
    pub fn arrive(&self, page: u64) {
        let page = PageRange::page(page);
        self.pager().ensure(page, FaultPath::Fill, &Waiter::new()).unwrap();
    }

    /// Runs the vCPU until it halts, as a VMM with the device does.
    pub fn run(&self, cpu: &mut Cpu, device: &mut Device) -> Result<(), Stopped> {
        cpu.kick.attach();
        loop {
            if let Some(exit) = device.pending {
                exit.complete(&mut cpu.vcpu, &self.handler, &self.memory, cpu.kick.waiter())
                    .map_err(Stopped::Fault)?;
                device.pending = None;
            }
            cpu.markers.prepare(&cpu.vcpu, &self.handler).unwrap();
            let (memory, waiter) = (&self.memory, cpu.kick.waiter());
            cpu.markers.fetch_tables(&cpu.vcpu, &self.handler, memory, waiter).unwrap();
            match cpu.vcpu.run() {
                Ok(exit) => {
                    device.pending = PendingExit::of(&exit, &self.handler);
                    if device.pending.is_some() {
                        device.answered += 1;
                        continue;
                    }
                    match exit {
                        VcpuExit::Hlt => return Ok(()),
                        VcpuExit::Shutdown => return Err(Stopped::Shutdown),
                        VcpuExit::MemoryFault { flags, gpa, size } => {
                            let waiter = cpu.kick.waiter();
                            let handled = self.handler.handle(gpa, size, flags, waiter);
                            handled.map_err(Stopped::Fault)?;
                        }
                        VcpuExit::IoOut(PORT, data) => device.written.extend_from_slice(data),
                        VcpuExit::IoIn(PORT, data) => device.give(data),
                        VcpuExit::IoOut(DONE, _) => return Ok(()),
                        VcpuExit::MmioRead(DEVICE.., data) => device.give(data),
                        other => panic!("{other:?}"),
                    }
                }
                Err(error) if error.errno() == libc::EINTR => {
                    let resolved = cpu.markers.resolve(&self.handler, cpu.kick.waiter());
                    if !resolved.map_err(Stopped::Fault)? {
                        return Err(Stopped::Kicked);
                    }
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Fetches all pages, and compares the memory with the expected bytes.
    pub fn check(&self, expected: &[u8]) {
        fill(self.pager());
        let mut seen = vec![0; expected.len()];
        self.memory.read_slice(&mut seen, GuestAddress(REGION)).unwrap();
        let wrong = seen.iter().zip(expected).position(|(a, b)| a != b);
        if let Some(at) = wrong {
            let (page, within) = (at / PAGE_SIZE as usize, at % PAGE_SIZE as usize);
            panic!(
                "byte {within:#x} of page {page} is {:#x}, and should be {:#x}",
                seen[at], expected[at]
            );
        }
    }

    /// Returns the bytes at an offset of the region, whose page is present.
    pub fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        assert!(!self.pager().bitmap().is_missing(offset / PAGE_SIZE));
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(REGION + offset)).unwrap();
        bytes
    }
}

/// The device that guests talk to.
#[derive(Default)]
pub struct Device {
    /// The bytes that guests have written to the port.
    pub written: Vec<u8>,
    /// Number of bytes that it has supplied.
    given: usize,
    /// The exit that must be completed.
    pub pending: Option<PendingExit>,
    /// Number of pending exits so far, this one included.
    pub answered: u64,
}

impl Device {
    /// Supplies the next bytes.
    pub fn give(&mut self, data: &mut [u8]) {
        for byte in data {
            *byte = device_byte(self.given);
            self.given += 1;
        }
    }
}

/// Returns the features of this host's KVM.
pub fn features() -> KvmFeatures {
    demand_kvm::probe().kvm.unwrap()
}

/// Runs a test for each engine and backing where KVM's own accesses are trapped. `image` is the
/// content of the region.
pub fn where_own_accesses_are_trapped(image: &[u8], test: impl Fn(Rig)) {
    for engine in Engine::ALL {
        let Some(kvm) = kvm_with(engine) else { continue };
        for kind in backings(image.len() as u64) {
            let by_kvm = engine == Engine::KvmUserfault && features().own_accesses;
            if kind != BackingKind::Shmem && !engine.faults_by_unit() && !by_kvm {
                let why = format!("{engine} on {kind}: this KVM's own accesses pass its trap");
                match engine {
                    // The lab cannot help it, so this is not `skip`.
                    Engine::KvmUserfault => println!("SKIPPED: {why}"),
                    // No kernel does better: see `an_untrapped_operand_reads_as_zeros`.
                    _ => println!("{why}"),
                }
                continue;
            }
            println!("{engine} on {kind}");
            test(Rig::new(&kvm, engine, kind, source_of(image)));
        }
    }
}

/// Creates a source of these bytes.
pub fn source_of(image: &[u8]) -> Arc<dyn PageSource> {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().write_all_at(image, 0).unwrap();
    // The open file outlives its name.
    Arc::new(LocalFile::open(file.path()).unwrap())
}

/// Returns an image without holes.
pub fn full_image(pages: u64) -> Vec<u8> {
    (0..pages).flat_map(full_page).collect()
}
