// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests in 32-bit protected mode without paging, so that guest virtual addresses are physical
//! ones.

use std::sync::LazyLock;

use demand_memory::GuestMapping;
use demand_uffd::{DEFAULT_THREADS, FaultService};

use super::*;

/// Guest physical address of the memory that guests copy pages to.
const OUT: u64 = 0x1000_0000;
/// Number of pages in that memory.
pub const OUT_PAGES: u64 = 512;

/// A VM with code, and memory for copies.
pub struct Machine {
    pub vm: Arc<VmFd>,
    _code: PlainSlot,
    out: PlainSlot,
    pub entries: Entries,
}

fn plain_memory(size: u64) -> (File, Arc<Mapping>) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    let mapping = Arc::new(Mapping::shared(&file, size).unwrap());
    (file, mapping)
}

impl Machine {
    pub fn new(kvm: &Kvm, engine: Engine) -> Self {
        Machine::of(Arc::new(engine.create_vm(kvm).unwrap()))
    }

    /// Creates a machine with interrupts: a halted guest does not leave `KVM_RUN` then.
    pub fn with_interrupts(kvm: &Kvm, engine: Engine) -> Self {
        let vm = engine.create_vm(kvm).unwrap();
        vm.create_irq_chip().unwrap();
        Machine::of(Arc::new(vm))
    }

    fn of(vm: Arc<VmFd>) -> Self {
        let entries = assemble().unwrap();
        let (file, mapping) = plain_memory(PAGE_SIZE);
        file.write_all_at(&entries.code, 0).unwrap();
        let code = PlainSlot::read_only(vm.clone(), 0, GuestAddress(CODE), mapping).unwrap();
        let (_, mapping) = plain_memory(OUT_PAGES * PAGE_SIZE);
        let out = PlainSlot::new(vm.clone(), 1, GuestAddress(OUT), mapping).unwrap();
        Machine { vm, _code: code, out, entries }
    }

    /// Creates a demand-paged slot at [`REGION`].
    pub fn slot(&self, pager: &Arc<Pager>, engine: Engine) -> DemandSlot {
        self.slot_over(guest_mapping(pager, engine), engine)
    }

    /// Creates a demand-paged slot at [`REGION`] over this mapping.
    pub fn slot_over(&self, mapping: GuestMapping, engine: Engine) -> DemandSlot {
        DemandSlot::new(self.slot_config(2, mapping, engine)).unwrap()
    }

    /// Returns the configuration of a slot at [`REGION`].
    pub fn slot_config(
        &self,
        number: u32,
        mapping: GuestMapping,
        engine: Engine,
    ) -> DemandSlotConfig {
        let start = GuestAddress(REGION);
        DemandSlotConfig { vm: self.vm.clone(), number, start, mapping, engine }
    }

    /// Creates a vCPU, without a program.
    pub fn vcpu(&self, id: u64) -> Cpu {
        let vcpu = self.vm.create_vcpu(id).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        Mode::Protected.apply(&mut sregs);
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, GDT_LIMIT);
        (sregs.idt.base, sregs.idt.limit) = (IDT, IDT_LIMIT);
        vcpu.set_sregs(&sregs).unwrap();
        let kick = VcpuKick::new(&vcpu).unwrap();
        Cpu { vcpu, kick, markers: MarkerFaults::default(), stops: 0 }
    }

    /// Loads the program that a vCPU runs next.
    pub fn load(&self, cpu: &mut Cpu, program: Program, pages: Pages) {
        let mut regs = kvm_bindings::kvm_regs {
            rsi: REGION + pages.first * PAGE_SIZE,
            rbx: pages.count,
            rdx: u64::from((pages.stride * PAGE_SIZE as i64) as u32),
            ..Default::default()
        };
        let entry = match program {
            Program::Copy { out } => {
                assert!(out + pages.count <= OUT_PAGES);
                regs.rdi = OUT + out * PAGE_SIZE;
                self.entries.copy
            }
            Program::Write { value } => {
                regs.rax = u64::from(value);
                self.entries.write
            }
            Program::Check => self.entries.check,
            Program::Spin => self.entries.spin,
        };
        self.begin(cpu, entry, regs);
    }

    /// Makes a vCPU start at one of the entries, with these registers.
    pub fn begin(&self, cpu: &mut Cpu, entry: u64, regs: kvm_bindings::kvm_regs) {
        let rsp = OUT + OUT_PAGES * PAGE_SIZE;
        let start = start_at(entry);
        let (rip, rflags) = (start.rip, regs.rflags | start.rflags);
        let regs = kvm_bindings::kvm_regs { rip, rsp, rflags, ..regs };
        cpu.vcpu.set_regs(&regs).unwrap();
    }

    /// Returns a page that a guest has copied.
    pub fn copied(&self, out: u64) -> Vec<u8> {
        look(self.out.mapping(), out * PAGE_SIZE, PAGE_SIZE)
    }

    /// Makes a vCPU copy pages, and compares each byte with the result of `expected`.
    pub fn copy_and_compare(
        &self,
        cpu: &mut Cpu,
        handler: &FaultHandler,
        pages: Pages,
        out: u64,
        expected: impl Fn(u64) -> Vec<u8>,
    ) {
        self.load(cpu, Program::Copy { out }, pages);
        cpu.run(handler).unwrap();
        for (index, page) in pages.iter().enumerate() {
            let copied = self.copied(out + index as u64);
            let wrong = copied.iter().zip(expected(page)).position(|(a, b)| *a != b);
            assert_eq!(wrong, None, "byte of page {page} that is not what it should be");
        }
    }
}

/// A vCPU and its kick.
pub struct Cpu {
    pub vcpu: VcpuFd,
    pub kick: VcpuKick,
    pub markers: MarkerFaults,
    /// Number of faults that were resolved on its thread.
    pub stops: u64,
}

/// The reason why a vCPU stopped before it halted.
#[derive(Debug, PartialEq)]
pub enum Stopped {
    /// It was kicked out of `KVM_RUN`.
    Kicked,
    /// Its fault was not resolved.
    Fault(FaultError),
    /// It read an address without memory.
    Mmio(u64),
    /// It shut down: a fault in a guest without fault handlers.
    Shutdown,
}

impl Cpu {
    /// Runs the vCPU until it halts, as a VMM does.
    pub fn run(&mut self, handler: &FaultHandler) -> Result<(), Stopped> {
        self.kick.attach();
        loop {
            self.markers.prepare(&self.vcpu, handler).unwrap();
            match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => return Ok(()),
                Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                    handler.handle(gpa, size, flags, self.kick.waiter()).map_err(Stopped::Fault)?;
                    self.stops += 1;
                }
                Ok(VcpuExit::IoOut(port, _)) if port == u16::from(WRONG) => {
                    let regs = self.vcpu.get_regs().unwrap();
                    panic!("the word at {:#x} reads {:#x}", regs.rsi, regs.rax as u32 ^ MIX);
                }
                Ok(VcpuExit::MmioRead(address, _)) => return Err(Stopped::Mmio(address)),
                Ok(other) => panic!("{other:?}"),
                Err(error) if error.errno() == libc::EINTR => {
                    let resolved = self.markers.resolve(handler, self.kick.waiter());
                    if !resolved.map_err(Stopped::Fault)? {
                        return Err(Stopped::Kicked);
                    }
                    self.stops += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// Serves the mappings of all tests of this process.
static SERVICE: LazyLock<FaultService> =
    LazyLock::new(|| FaultService::start(DEFAULT_THREADS).unwrap());

/// Returns the guest's mapping of a region: unarmed, unless the engine needs it armed.
pub fn guest_mapping(pager: &Arc<Pager>, engine: Engine) -> GuestMapping {
    let by_kvm = engine == Engine::KvmUserfault && features().own_accesses;
    if by_kvm || pager.bitmap().is_complete() {
        return GuestMapping::unarmed(pager).unwrap();
    }
    SERVICE.arm_guest([pager], engine.vcpu_trap()).unwrap().remove(0)
}

/// Creates a handler for one slot's region.
pub fn handler(slot: &DemandSlot) -> FaultHandler {
    FaultHandler::new([slot]).unwrap()
}

/// Creates a handler for guests that reach no missing page.
pub fn no_faults() -> FaultHandler {
    FaultHandler::new::<FaultRegion>([]).unwrap()
}

/// Fetches all pages.
pub fn fill(pager: &Arc<Pager>) {
    let all = PageRange::new(0, pager.pages());
    pager.ensure(all, demand_memory::FaultPath::Fill, &demand_memory::Waiter::new()).unwrap();
}

/// Sleeps long enough for any thread that is not blocked to make progress.
pub fn a_while() {
    thread::sleep(Duration::from_millis(50));
}
