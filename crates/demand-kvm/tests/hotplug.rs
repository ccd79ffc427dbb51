// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Regions that are inserted into a running VM, and removed from it.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use common::*;
use demand_kvm::{
    DemandSlot, DemandVcpu, Engine, FaultHandler, FaultRegion, InsertError, MsrFilter, PendingExit,
    Step, open_kvm,
};
use demand_memory::{
    BackingKind, DemandMemory, DemandRegion, Mapping, MemfdBacking, PAGE_SIZE, Pager, PagerConfig,
    Waiter,
};
use demand_source::PageSource;
use demand_uffd::{DEFAULT_THREADS, FaultService};
use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuExit;
use test_support::host::skip;
use test_support::image::far;
use test_support::wait::until;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic};

const PAGES: u64 = 64;

/// A VM without a demand-paged region, whose handler outlives all of its regions.
struct Plugged {
    machine: Machine,
    handler: FaultHandler,
    service: FaultService,
    engine: Engine,
}

impl Plugged {
    /// Creates a VM for each engine that this host has.
    fn each(test: impl Fn(&Plugged)) {
        for engine in Engine::ALL {
            let Some(kvm) = kvm_with(engine) else { continue };
            println!("{engine}");
            let machine = Machine::new(&kvm, engine);
            let handler = FaultHandler::new::<FaultRegion>([]).unwrap();
            let service = FaultService::start(DEFAULT_THREADS).unwrap();
            test(&Plugged { machine, handler, service, engine });
        }
    }

    fn insert(&self, source: Arc<dyn PageSource>) -> (DemandSlot, DemandMemory) {
        let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, source.size()).unwrap());
        let config = PagerConfig::new(backing, source);
        let region = DemandRegion::new(GuestAddress(REGION), config, ()).unwrap();
        let trap = self.engine.vcpu_trap();
        let guest = self.service.arm_guest([region.pager()], trap).unwrap().remove(0);
        let slot = self.handler.insert(self.machine.slot_config(2, guest, self.engine)).unwrap();
        (slot, DemandMemory::default().insert_region(Arc::new(region)).unwrap())
    }

    /// Runs a vCPU until it halts, and returns the address of its MMIO exit, if any.
    fn run(&self, vcpu: &mut DemandVcpu, memory: &DemandMemory) -> Option<u64> {
        loop {
            match vcpu.step(&self.handler, memory).unwrap() {
                Step::Again => {}
                Step::Exit(VcpuExit::Hlt) => return None,
                Step::Exit(VcpuExit::MmioRead(address, _)) => return Some(address),
                Step::Exit(other) => panic!("{other:?}"),
            }
        }
    }

    fn vcpu(&self, id: u64, program: Program, pages: Pages) -> DemandVcpu {
        let mut cpu = self.machine.vcpu(id);
        self.machine.load(&mut cpu, program, pages);
        DemandVcpu::new(cpu.vcpu).unwrap()
    }
}

/// The guest reads an inserted region, and MMIO where it was removed; then another one there.
#[test]
fn regions_come_and_go() {
    Plugged::each(|vm| {
        let image = full_image(PAGES);
        let mut kept: Vec<(Weak<Pager>, Weak<Mapping>)> = Vec::new();
        let read = |id, memory: &DemandMemory| {
            let mut vcpu = vm.vcpu(id, Program::Copy { out: 0 }, Pages::run(0, PAGES));
            vm.run(&mut vcpu, memory)
        };
        assert_eq!(read(0, &DemandMemory::default()), Some(REGION));
        for round in 0..3 {
            let (slot, memory) = vm.insert(source_of(&image));
            assert_eq!(read(2 * round + 1, &memory), None);
            for page in 0..PAGES {
                assert!(vm.machine.copied(page) == full_page(page), "page {page}");
            }
            kept.push((Arc::downgrade(slot.pager()), Arc::downgrade(slot.mapping())));
            let (memory, region) =
                memory.remove_region(GuestAddress(REGION), PAGES * PAGE_SIZE).unwrap();
            vm.handler.remove(slot);
            assert!(region.pager().bitmap().is_stopped());
            drop(region);
            assert_eq!(read(2 * round + 2, &memory), Some(REGION));
        }
        for (pager, mapping) in kept {
            until("a removed region is freed", || {
                pager.strong_count() == 0 && mapping.strong_count() == 0
            });
        }
    });
}

/// A vCPU that waits for a page of the region, whose source does not answer, ends in MMIO.
#[test]
fn removal_ends_a_vcpus_wait() {
    Plugged::each(|vm| {
        let (source, control) = far(PAGES * PAGE_SIZE);
        let _end = control.release_at_the_end();
        control.hold(0..PAGES);
        let (slot, memory) = vm.insert(Arc::new(source));
        let mut vcpu = vm.vcpu(0, Program::Check, Pages::run(3, 1));
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            let exit = scope.spawn(|| {
                let exit = vm.run(&mut vcpu, &memory);
                ended.store(true, Ordering::Release);
                exit
            });
            a_while();
            assert!(!ended.load(Ordering::Acquire), "the source answers");
            vm.handler.remove(slot);
            assert_eq!(exit.join().unwrap(), Some(REGION + 3 * PAGE_SIZE));
        });
        assert!(!vm.service.has_open_faults());
    });
}

/// vCPUs that read one region notice nothing of changes of another.
#[test]
fn changes_do_not_disturb_a_running_guest() {
    Plugged::each(|vm| {
        let image = full_image(PAGES);
        let mut vcpu = vm.vcpu(0, Program::Check, Pages::run(0, PAGES));
        let (slot, memory) = vm.insert(source_of(&image));
        let (number, start) = (3, GuestAddress(REGION + 16 * PAGES * PAGE_SIZE));
        thread::scope(|scope| {
            let exit = scope.spawn(|| vm.run(&mut vcpu, &memory));
            for _ in 0..8 {
                let backing = MemfdBacking::new(BackingKind::Shmem, PAGES * PAGE_SIZE).unwrap();
                let config = PagerConfig::new(Arc::new(backing), source_of(&image));
                let region = DemandRegion::new(start, config, ()).unwrap();
                let trap = vm.engine.vcpu_trap();
                let guest = vm.service.arm_guest([region.pager()], trap).unwrap().remove(0);
                let config = vm.machine.slot_config(number, guest, vm.engine);
                let other =
                    vm.handler.insert(demand_kvm::DemandSlotConfig { start, ..config }).unwrap();
                vm.handler.remove(other);
            }
            assert_eq!(exit.join().unwrap(), None);
        });
        // A region where another one is leaves everything as it was.
        let backing = Arc::new(MemfdBacking::new(BackingKind::Shmem, PAGE_SIZE).unwrap());
        let pager = Pager::new(PagerConfig::new(backing, source_of(&image))).unwrap();
        let guest = vm.service.arm_guest([&pager], vm.engine.vcpu_trap()).unwrap().remove(0);
        let error = vm.handler.insert(vm.machine.slot_config(4, guest, vm.engine)).unwrap_err();
        assert!(matches!(error, InsertError::Overlap(_)), "{error}");
        assert!(!slot.mapping().is_revoked());
    });
}

#[test]
fn removal_spares_another_region_at_its_address() {
    Plugged::each(|vm| {
        let image = full_image(PAGES);
        let (slot, _memory) = vm.insert(source_of(&image));
        // A slot of another VM.
        let pager = pager(BackingKind::Shmem, PAGES, source_of(&image));
        let other = Machine::new(&open_kvm().unwrap(), vm.engine);
        vm.handler.remove(other.slot(&pager, vm.engine));
        assert!(pager.bitmap().is_stopped() && !slot.pager().bitmap().is_stopped());
        vm.handler.fetch(REGION + 7 * PAGE_SIZE, 1, &Waiter::new()).unwrap();
        assert!(!slot.pager().bitmap().is_missing(7));
        vm.handler.remove(slot);
    });
}

/// Bytes of an access that KVM leaves to user space.
const BYTES: u64 = 4;

impl Plugged {
    /// Runs a vCPU with a device at every address until it halts or shuts down.
    fn run_with(&self, vcpu: &mut DemandVcpu, memory: &DemandMemory, device: &mut Device) -> bool {
        loop {
            match vcpu.step(&self.handler, memory).unwrap() {
                Step::Again => {}
                Step::Exit(VcpuExit::Hlt) => return true,
                Step::Exit(VcpuExit::Shutdown) => return false,
                Step::Exit(exit) => serve(device, exit),
            }
        }
    }

    /// Removes a region while a vCPU's pending exit waits for one of its pages. KVM itself cannot
    /// access the region: it leaves emulated accesses to user space. Returns whether the guest
    /// halted, and the device.
    fn remove_below(&self, entry: u64, regs: kvm_regs) -> Option<(bool, Device)> {
        let (source, control) = far(PAGES * PAGE_SIZE);
        let _end = control.release_at_the_end();
        control.hold(0..PAGES);
        let (slot, memory) = self.insert(Arc::new(source));
        close(slot.mapping());
        let mut cpu = self.machine.vcpu(0);
        self.machine.begin(&mut cpu, entry, regs);
        let mut vcpu = DemandVcpu::new(cpu.vcpu).unwrap();
        let mut device = Device::default();
        // Runs the guest, but waits for no page.
        let waiter = vcpu.kick().waiter().clone();
        waiter.kick();
        while let Step::Exit(exit) = vcpu.step(&self.handler, &memory).unwrap() {
            serve(&mut device, exit);
        }
        vcpu.pending()?;
        waiter.clear_kick();
        thread::scope(|scope| {
            let run = scope.spawn(|| (self.run_with(&mut vcpu, &memory, &mut device), device));
            until("the vCPU waits", || waiter.is_waiting());
            self.handler.remove(slot);
            Some(run.join().unwrap())
        })
    }
}

/// Serves an access to the port or to any address of the region.
fn serve(device: &mut Device, exit: VcpuExit<'_>) {
    match exit {
        VcpuExit::IoOut(PORT, data) | VcpuExit::MmioWrite(REGION.., data) => {
            device.written.extend_from_slice(data);
        }
        VcpuExit::IoIn(PORT, data) | VcpuExit::MmioRead(REGION.., data) => device.give(data),
        other => panic!("{other:?}"),
    }
}

/// The device's first bytes.
fn given() -> Vec<u8> {
    (0..BYTES as usize).map(device_byte).collect()
}

#[test]
fn pending_access_to_removed_region_is_mmio() {
    // The region's bytes to the port, and the port's to the region.
    for entry in [(|e| e.outs) as fn(&Entries) -> u64, |e| e.ins] {
        Plugged::each(|vm| {
            let (at, port) = (REGION + 3 * PAGE_SIZE, u64::from(PORT));
            let regs = kvm_regs { rcx: BYTES, rdx: port, rsi: at, rdi: at, ..Default::default() };
            match vm.remove_below(entry(&vm.machine.entries), regs) {
                Some((halted, device)) => {
                    assert!(halted);
                    assert_eq!(device.written, given());
                }
                // This KVM respects the bitmap.
                None => assert_eq!(vm.engine, Engine::KvmUserfault),
            }
        });
    }
}

/// As in a VM that never had the region, and whose guest's writes are not trapped.
#[test]
fn pending_msr_of_removed_region_is_kvms() {
    let wall_clock = (0x4b56_4d00u64, 0);
    let (system_time, async_pf) = ((0x4b56_4d01, 1), (0x4b56_4d02, 1));
    let (steal_time, end_of_interrupt) = ((0x4b56_4d03, 1), (0x4b56_4d04, 1));
    for (msr, enable) in [wall_clock, system_time, async_pf, steal_time, end_of_interrupt] {
        Plugged::each(|vm| {
            let data = (REGION + 3 * PAGE_SIZE) | enable;
            let regs = kvm_regs { rcx: msr, rax: data, ..Default::default() };
            let entry = vm.machine.entries.wrmsr;
            let mut cpu = vm.machine.vcpu(1);
            vm.machine.begin(&mut cpu, entry, regs);
            let mut without = Device::default();
            let mut vcpu = DemandVcpu::new(cpu.vcpu).unwrap();
            let accepted = vm.run_with(&mut vcpu, &DemandMemory::default(), &mut without);
            let trap = match MsrFilter::new(&vm.machine.vm) {
                Ok(trap) => trap,
                Err(error) => return skip(&error.to_string()),
            };
            match vm.remove_below(entry, regs) {
                Some((halted, device)) => {
                    assert_eq!(halted, accepted, "MSR {msr:#x}");
                    assert_eq!(device.written, without.written, "MSR {msr:#x}");
                }
                None => skip(&format!("this KVM does not leave MSR {msr:#x} to user space")),
            }
            println!("MSR {msr:#x}: {}", if accepted { "accepted" } else { "refused" });
            drop(trap);
        });
    }
}

/// The guest reads the address before there is a region, and is answered after that.
#[test]
fn mmio_at_inserted_region_reads_its_memory() {
    Plugged::each(|vm| {
        let image = full_image(PAGES);
        let mut cpu = vm.machine.vcpu(0);
        let regs = kvm_regs { rsi: REGION + 5 * PAGE_SIZE, ..Default::default() };
        vm.machine.begin(&mut cpu, vm.machine.entries.load, regs);
        let exit = cpu.vcpu.run().unwrap();
        assert!(PendingExit::of(&exit, &vm.handler).is_none());
        let (slot, memory) = vm.insert(source_of(&image));
        let pending = PendingExit::of(&exit, &vm.handler).expect("the address is a region's");
        pending.complete(&mut cpu.vcpu, &vm.handler, &memory, &Waiter::new()).unwrap();
        assert!(!slot.pager().bitmap().is_missing(5));
        assert!(matches!(cpu.vcpu.run(), Ok(VcpuExit::Hlt)));
        let word = cpu.vcpu.get_regs().unwrap().rax;
        assert_eq!(word.to_le_bytes()[..4], full_page(5)[..4]);
    });
}

/// A guest that reads where a region comes and goes gets the region's bytes or the device's, and
/// never an error.
#[test]
fn reads_of_changing_regions_never_fail() {
    const ROUNDS: usize = 300;
    Plugged::each(|vm| {
        let image = full_image(PAGES);
        let word = u32::from_le_bytes(full_page(5)[..4].try_into().unwrap());
        let memory = GuestMemoryAtomic::new(DemandMemory::default());
        let replace = |new: DemandMemory| memory.lock().unwrap().replace(new);
        let ended = AtomicBool::new(false);
        let cpu = vm.machine.vcpu(0);
        let mut vcpu = DemandVcpu::new(cpu.vcpu).unwrap();
        let [from_region, from_device] = [0, 0].map(AtomicU64::new);
        let some = |reads: &AtomicU64| reads.load(Ordering::Relaxed) > 0;
        thread::scope(|scope| {
            let changes = scope.spawn(|| {
                for round in 0..ROUNDS {
                    let (slot, with_region) = vm.insert(source_of(&image));
                    replace(with_region);
                    thread::sleep(Duration::from_micros(200));
                    if round + 1 == ROUNDS {
                        until("a read of the region", || some(&from_region));
                    }
                    vm.handler.remove(slot);
                    replace(DemandMemory::default());
                }
                until("a read of the device", || some(&from_device));
                ended.store(true, Ordering::Release);
            });
            while !ended.load(Ordering::Acquire) {
                let regs = kvm_regs {
                    rip: vm.machine.entries.load,
                    rflags: 2,
                    rsi: REGION + 5 * PAGE_SIZE,
                    ..Default::default()
                };
                vcpu.fd().set_regs(&regs).unwrap();
                loop {
                    match vcpu.step(&vm.handler, &*memory.memory()).unwrap() {
                        Step::Again => {}
                        Step::Exit(VcpuExit::Hlt) => break,
                        Step::Exit(VcpuExit::MmioRead(_, data)) => data.fill(0xff),
                        Step::Exit(other) => panic!("{other:?}"),
                    }
                }
                let read = vcpu.fd().get_regs().unwrap().rax as u32;
                let reads = if read == u32::MAX { &from_device } else { &from_region };
                assert!(read == u32::MAX || read == word, "{read:#x}");
                reads.fetch_add(1, Ordering::Relaxed);
            }
            changes.join().unwrap();
        });
        println!("{from_region:?} reads of the region, {from_device:?} of the device");
    });
}
