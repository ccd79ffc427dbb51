// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vCPU that is stopped in the middle of an instruction: once `complete_pending_io` has completed
//! it, the registers show the instruction as done, and another machine resumes from them.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use demand_kvm::{CompleteIo, DemandVcpu, Engine, MsrFilter, Step, StepError};
use demand_memory::{BackingKind, FaultPath, PAGE_SIZE};
use demand_source::{PageSource, Threaded};
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_sregs};
use kvm_ioctls::{Kvm, VcpuExit};
use test_support::host::skip;
use test_support::wait::until;

const PAGES: u64 = 512;
/// Offset of a word that lies in two pages.
const ACROSS: u64 = PAGE_SIZE - 2;
/// A vCPU's registers.
type Registers = (kvm_regs, kvm_sregs);

/// A machine with a vCPU and its device.
struct Stage {
    // The vCPU is dropped before its machine.
    vcpu: DemandVcpu,
    device: Device,
    rig: Rig,
}

impl Stage {
    fn new(kvm: &Kvm, engine: Engine, source: Arc<dyn PageSource>) -> Self {
        let rig = Rig::new(kvm, engine, BackingKind::Shmem, source);
        let vcpu = DemandVcpu::new(rig.machine.vcpu(0).vcpu).unwrap();
        Stage { vcpu, device: Device::default(), rig }
    }

    fn begin(&mut self, entry: fn(&Entries) -> u64, regs: kvm_regs) {
        let rip = entry(&self.rig.machine.entries);
        self.vcpu.fd().set_regs(&kvm_regs { rip, rflags: 2, ..regs }).unwrap();
    }

    fn registers(&self) -> Registers {
        (self.vcpu.fd().get_regs().unwrap(), self.vcpu.fd().get_sregs().unwrap())
    }

    /// Runs until the guest accesses the device or halts; returns whether it has halted.
    fn until_exit(&mut self) -> bool {
        loop {
            match self.vcpu.step(&self.rig.handler, &self.rig.memory).unwrap() {
                Step::Again => {}
                Step::Exit(VcpuExit::Hlt) => return true,
                Step::Exit(exit) => {
                    serve(&mut self.device, exit);
                    return false;
                }
            }
        }
    }

    /// Completes the pending I/O as far as its pages are present; returns the number of device
    /// accesses, and whether the vCPU's state is consistent.
    fn complete(&mut self) -> (u32, bool) {
        let mut asked = 0;
        loop {
            match self.vcpu.complete_pending_io(&self.rig.handler, &self.rig.memory).unwrap() {
                CompleteIo::Again => {}
                CompleteIo::Done => return (asked, true),
                CompleteIo::Waiting { gpa } => {
                    assert!(gpa >= REGION, "{gpa:#x}");
                    return (asked, false);
                }
                CompleteIo::Exit(exit) => {
                    serve(&mut self.device, exit);
                    asked += 1;
                }
            }
        }
    }
}

fn serve(device: &mut Device, exit: VcpuExit<'_>) {
    match exit {
        VcpuExit::IoOut(PORT, data) => device.written.extend_from_slice(data),
        VcpuExit::MmioWrite(DEVICE.., data) => device.written.extend_from_slice(data),
        VcpuExit::IoIn(PORT, data) | VcpuExit::MmioRead(DEVICE.., data) => device.give(data),
        other => panic!("{other:?}"),
    }
}

/// Returns the first word that the device supplies.
fn given() -> u64 {
    u64::from(u32::from_le_bytes(std::array::from_fn(device_byte)))
}

#[test]
fn device_access_is_done_once_completed() {
    let Some(kvm) = kvm_with(Engine::Uffd) else { return };
    let image = full_image(PAGES);
    let value = 0x0123_4567;
    let port = kvm_regs { rax: value, rdx: u64::from(PORT), ..Default::default() };
    let memory = |at| kvm_regs { rax: value, rsi: at, rdi: at, ..Default::default() };
    for (what, entry, regs, len, rest) in [
        ("out", (|e| e.port_out) as fn(&Entries) -> u64, port, 1, 0),
        ("in", |e| e.port_in, port, 1, 0),
        ("store", |e| e.store, memory(DEVICE), 2, 0),
        ("load", |e| e.load, memory(DEVICE), 2, 0),
        // In two parts.
        ("store across pages", |e| e.store, memory(DEVICE + ACROSS), 2, 1),
        ("load across pages", |e| e.load, memory(DEVICE + ACROSS), 2, 1),
    ] {
        println!("{what}");
        let mut stage = Stage::new(&kvm, Engine::Uffd, source_of(&image));
        stage.begin(entry, regs);
        let begin = stage.registers().0.rip;
        assert!(!stage.until_exit());
        assert_eq!(stage.complete(), (rest, true));
        // A second time: nothing is left to do.
        assert_eq!(stage.complete(), (0, true));
        assert!(!stage.vcpu.kick().is_kicked());
        let (now, sregs) = stage.registers();
        let reads = matches!(what, "in" | "load" | "load across pages");
        assert_eq!(now.rip, begin + len);
        assert_eq!(now.rax, if reads { given() } else { value });
        let written = if reads { vec![] } else { (value as u32).to_le_bytes().to_vec() };
        assert_eq!(stage.device.written, written);

        let mut other = Stage::new(&kvm, Engine::Uffd, source_of(&image));
        other.vcpu.fd().set_sregs(&sregs).unwrap();
        other.vcpu.fd().set_regs(&now).unwrap();
        assert!(other.until_exit(), "the device is asked once more");
        assert_eq!(other.registers().0.rax, now.rax);
        // The first machine does the same.
        assert!(stage.until_exit());
        assert_eq!(stage.registers().0, other.registers().0);
    }
}

/// Creates a stage whose pages can be fetched once the gate is opened, and whose mapping is
/// inaccessible, so that KVM leaves emulated accesses to user space.
fn closed(kvm: &Kvm, engine: Engine) -> (Stage, Gate) {
    let gate = Gate::new(PAGES);
    let source = Arc::new(Threaded::new(gate.clone(), 2).unwrap());
    let stage = Stage::new(kvm, engine, source);
    close(stage.rig.slot.mapping());
    (stage, gate)
}

/// Runs the guest into a missing page that is not served, and kicks the vCPU out of the wait.
fn until_it_waits(stage: &mut Stage) {
    // Kicks the waiter alone, so that the guest runs.
    stage.vcpu.kick().waiter().kick();
    let step = stage.vcpu.step(&stage.rig.handler, &stage.rig.memory).unwrap();
    assert!(matches!(step, Step::Again), "{step:?}");
}

#[test]
fn waiting_access_completes_once_its_page_arrives() {
    let image = full_image(PAGES);
    const LEN: u64 = 3 * PAGE_SIZE;
    let strings =
        kvm_regs { rsi: REGION + ACROSS, rcx: LEN, rdx: u64::from(PORT), ..Default::default() };
    for engine in [Engine::Uffd, Engine::KvmUserfault] {
        let Some(kvm) = kvm_with(engine) else { continue };
        println!("{engine}");
        let (mut stage, gate) = closed(&kvm, engine);
        stage.begin(|entries| entries.outs, strings);
        until_it_waits(&mut stage);
        // A KVM that respects the bitmap shows the state before the instruction.
        let asks = engine == Engine::KvmUserfault && features().own_accesses;
        assert_eq!(stage.complete(), (0, asks));
        assert_eq!(stage.complete(), (0, asks));
        assert!(stage.rig.pager().bitmap().is_missing(0));
        gate.open();
        until("the page does not come", || stage.complete().1);
        let (regs, sregs) = stage.registers();
        let done = LEN - regs.rcx;
        assert_eq!(regs.rsi, REGION + ACROSS + done);
        assert_eq!(stage.device.written.len() as u64, done);
        assert!(done > 0 || asks);

        let mut other = Stage::new(&kvm, engine, source_of(&image));
        other.vcpu.fd().set_sregs(&sregs).unwrap();
        other.vcpu.fd().set_regs(&regs).unwrap();
        while !other.until_exit() {}
        let all = [&stage.device.written[..], &other.device.written].concat();
        assert!(all == image[ACROSS as usize..(ACROSS + LEN) as usize]);
        // The first machine does the same.
        while !stage.until_exit() {}
        assert!(stage.device.written == all);
    }
}

#[test]
fn latency_counts_from_the_first_exit() {
    let Some(kvm) = kvm_with(Engine::KvmUserfault) else { return };
    for comes_while_waiting in [true, false] {
        let gate = Gate::new(PAGES);
        let source = Arc::new(Threaded::new(gate.clone(), 2).unwrap());
        let mut stage = Stage::new(&kvm, Engine::KvmUserfault, source);
        stage.begin(|entries| entries.load, kvm_regs { rsi: REGION, ..Default::default() });
        until_it_waits(&mut stage);
        let first_exit = Instant::now();
        for _ in 0..2 {
            a_while();
            until_it_waits(&mut stage);
        }
        // As in a pause.
        assert_eq!(stage.complete(), (0, true));
        let waited = first_exit.elapsed();
        let counted = stage.rig.pager().stats().path(FaultPath::Guest).faults;
        assert_eq!(counted, 0, "a fault is counted once it is resolved");
        gate.open();
        if !comes_while_waiting {
            until("the page does not come", || !stage.rig.pager().bitmap().is_missing(0));
        }
        assert!(stage.until_exit());
        let guest = stage.rig.pager().stats().path(FaultPath::Guest);
        assert_eq!(guest.faults, 1);
        let latency = Duration::from_secs_f64(guest.latency_us.max / 1e6);
        assert!(latency >= waited, "{latency:?} of {waited:?}");
    }
}

/// KVM leaves an access to RAM to user space in two parts, in both directions.
#[test]
fn access_across_missing_pages_is_completed() {
    let image = full_image(PAGES);
    let Some(kvm) = kvm_with(Engine::Uffd) else { return };
    let at = |at| kvm_regs { rdi: REGION + at, rsi: DEVICE, rcx: 4, ..Default::default() };
    let (mut stage, gate) = closed(&kvm, Engine::Uffd);
    // From the device to RAM, a byte at a time: the last two lie in the next page.
    stage.begin(|entries| entries.movs, at(ACROSS));
    for index in 0..4u64 {
        assert!(!stage.until_exit());
        if index == 0 {
            // The guest has read from the device, and its write needs a missing page.
            assert_eq!(stage.complete(), (0, false));
            gate.open();
        }
        until("the page does not come", || stage.complete().1);
        let (regs, _) = stage.registers();
        assert_eq!((regs.rcx, regs.rdi), (3 - index, REGION + ACROSS + index + 1));
    }
    assert!(stage.until_exit());
    let mut expected = image;
    for (index, byte) in expected[ACROSS as usize..][..4].iter_mut().enumerate() {
        *byte = device_byte(index);
    }
    stage.rig.check(&expected);
}

/// One of KVM's MSRs, which names a page.
const STEAL_TIME: u64 = 0x4b56_4d03;

/// Creates a stage whose pages can be fetched once the gate is opened, and whose guest's writes to
/// KVM's MSRs are left to user space. Returns `None` where KVM cannot do that.
fn trapping_msrs() -> Option<(Stage, Gate, MsrFilter)> {
    let kvm = kvm_with(Engine::Uffd)?;
    let gate = Gate::new(PAGES);
    let source = Arc::new(Threaded::new(gate.clone(), 2).unwrap());
    let stage = Stage::new(&kvm, Engine::Uffd, source);
    let trap = MsrFilter::new(&stage.rig.machine.vm);
    let trap = trap.map_err(|error| skip(&error.to_string())).ok()?;
    Some((stage, gate, trap))
}

/// Until it is completed, a guest's write to one of KVM's MSRs has no effect.
#[test]
fn waiting_msr_write_has_no_effect() {
    let Some((mut stage, gate, trap)) = trapping_msrs() else { return };
    let regs = kvm_regs { rax: REGION | 1, rcx: STEAL_TIME, ..Default::default() };
    stage.begin(|entries| entries.wrmsr, regs);
    let begin = stage.registers().0;
    stage.vcpu.step(&stage.rig.handler, &stage.rig.memory).unwrap();
    if stage.vcpu.pending().is_none() {
        return skip("this KVM does not leave such an MSR to user space");
    }
    assert_eq!(stage.complete(), (0, true));
    assert_eq!(stage.registers().0, begin);
    assert!(stage.vcpu.pending().is_some());
    gate.open();
    until("it goes on", || {
        stage.complete();
        stage.registers().0.rip > begin.rip
    });
    drop(trap);
}

/// The vCPU can get another state, which the old instruction does not affect.
#[test]
fn waiting_msr_write_can_be_abandoned() {
    let Some((mut stage, gate, trap)) = trapping_msrs() else { return };
    stage.vcpu.abandon().unwrap();
    let before = stage.vcpu.fd().get_vcpu_events().unwrap();
    let regs = kvm_regs { rax: REGION | 1, rcx: STEAL_TIME, ..Default::default() };
    stage.begin(|entries| entries.wrmsr, regs);
    stage.vcpu.step(&stage.rig.handler, &stage.rig.memory).unwrap();
    if stage.vcpu.pending().is_none() {
        return skip("this KVM does not leave such an MSR to user space");
    }
    stage.vcpu.abandon().unwrap();
    assert!(stage.vcpu.pending().is_none() && stage.rig.pager().bitmap().is_missing(0));
    // The state of another guest, which is kicked before its first instruction.
    stage.begin(|entries| entries.outs, kvm_regs { rsi: REGION, rcx: 8, ..Default::default() });
    stage.vcpu.fd().set_vcpu_events(&before).unwrap();
    let begin = stage.registers().0;
    assert_eq!(stage.complete(), (0, true));
    assert_eq!(stage.registers().0, begin);
    let entry = kvm_msr_entry { index: STEAL_TIME as u32, ..Default::default() };
    let mut msrs = Msrs::from_entries(&[entry]).unwrap();
    assert_eq!(stage.vcpu.fd().get_msrs(&mut msrs).unwrap(), 1);
    assert_eq!(msrs.as_slice()[0].data, 0, "the guest's word is known to KVM");
    gate.open();
    drop(trap);
}

#[test]
fn vcpu_reports_stopped_memory() {
    let Some(kvm) = kvm_with(Engine::Uffd) else { return };
    let (mut stage, _gate) = closed(&kvm, Engine::Uffd);
    let regs = kvm_regs { rsi: REGION, rcx: 8, rdx: u64::from(PORT), ..Default::default() };
    stage.begin(|entries| entries.outs, regs);
    until_it_waits(&mut stage);
    assert!(!stage.complete().1);
    stage.rig.memory.stop();
    let error = stage.vcpu.complete_pending_io(&stage.rig.handler, &stage.rig.memory).unwrap_err();
    assert!(matches!(error, StepError::Fault(demand_kvm::FaultError::Stopped { .. })), "{error}");
}
