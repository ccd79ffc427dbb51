// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guests in 32-bit protected mode without paging, so that guest virtual addresses are physical
//! ones.

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
    let mapping = Arc::new(Mapping::shared(&file, size, false).unwrap());
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
        let entries = assemble();
        let (file, mapping) = plain_memory(PAGE_SIZE);
        file.write_all_at(&entries.code, 0).unwrap();
        let code = PlainSlot::new(vm.clone(), 0, GuestAddress(CODE), mapping, true).unwrap();
        let (_, mapping) = plain_memory(OUT_PAGES * PAGE_SIZE);
        let out = PlainSlot::new(vm.clone(), 1, GuestAddress(OUT), mapping, false).unwrap();
        Machine { vm, _code: code, out, entries }
    }

    /// Creates a demand-paged slot at [`REGION`].
    pub fn slot(&self, pager: &Arc<Pager>, engine: Engine) -> DemandSlot {
        let mapping = Arc::new(pager.backing().map().unwrap());
        DemandSlot::new(self.vm.clone(), 2, GuestAddress(REGION), mapping, pager.clone(), engine)
            .unwrap()
    }

    /// Creates a vCPU, without a program.
    pub fn vcpu(&self, id: u64) -> Cpu {
        let vcpu = self.vm.create_vcpu(id).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.cr0 = 0x11; // PE, ET
        let flat = |type_| kvm_bindings::kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector: 8,
            type_,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = flat(0xb);
        (sregs.ds, sregs.es, sregs.ss) = (flat(3), flat(3), flat(3));
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, 15);
        (sregs.idt.base, sregs.idt.limit) = (IDT, IDT_LIMIT);
        vcpu.set_sregs(&sregs).unwrap();
        let kick = VcpuKick::new(&vcpu).unwrap();
        Cpu { vcpu, kick }
    }

    /// Loads the program that a vCPU runs next.
    pub fn load(&self, cpu: &mut Cpu, program: Program, pages: Pages) {
        let mut regs = kvm_bindings::kvm_regs {
            rsi: REGION + pages.first * PAGE_SIZE,
            rbx: pages.count,
            rdx: u64::from((pages.stride * PAGE_SIZE as i64) as u32),
            rflags: 2,
            ..Default::default()
        };
        regs.rip = match program {
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
        cpu.vcpu.set_regs(&regs).unwrap();
    }

    /// Makes a vCPU start at one of the entries, with these registers.
    pub fn begin(&self, cpu: &mut Cpu, entry: u64, regs: kvm_bindings::kvm_regs) {
        let rsp = OUT + OUT_PAGES * PAGE_SIZE;
        let rflags = regs.rflags | 2;
        let regs = kvm_bindings::kvm_regs { rip: entry, rsp, rflags, ..regs };
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
            match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => return Ok(()),
                Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                    handler.handle(gpa, size, flags, self.kick.waiter()).map_err(Stopped::Fault)?;
                }
                Ok(VcpuExit::IoOut(port, _)) if port == u16::from(WRONG) => {
                    let regs = self.vcpu.get_regs().unwrap();
                    panic!("the word at {:#x} reads {:#x}", regs.rsi, regs.rax as u32 ^ MIX);
                }
                Ok(VcpuExit::MmioRead(address, _)) => return Err(Stopped::Mmio(address)),
                Ok(other) => panic!("{other:?}"),
                Err(error) if error.errno() == libc::EINTR => return Err(Stopped::Kicked),
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// Creates a handler for one slot's region.
pub fn handler(slot: &DemandSlot) -> FaultHandler {
    FaultHandler::for_slots([slot]).unwrap()
}

/// Fetches all pages.
pub fn fill(pager: &Arc<Pager>) {
    let all = PageRange::new(0, pager.pages());
    pager.ensure(all, demand_memory::Path::Fill, &demand_memory::Waiter::new()).unwrap();
}

/// Sleeps long enough for any thread that is not blocked to make progress.
pub fn a_while() {
    thread::sleep(Duration::from_millis(50));
}
