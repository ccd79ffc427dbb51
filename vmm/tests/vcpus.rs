// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Jobs on the threads of paused vCPUs, which run only between two instructions.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use demand_kvm::{DemandVcpu, Engine, EngineChoice, Virtualization, probe, resolve};
use demand_memory::{
    BackingKind, Fill, FillRate, PAGE_SIZE, PageRange, Retrier, RetryPolicy, Stats,
};
use demand_paging::{Lazy, ServiceOptions};
use demand_source::LocalFile;
use demand_vmm::config::MemoryConfig;
use demand_vmm::vcpu::error::ParkedError;
use demand_vmm::vcpu::set::Vcpus;
use demand_vmm::vcpu::{ServeExit, Served, VcpuContext, VcpuEvent, unserved};
use demand_vmm::vm::machine::{Machine, MachineConfig};
use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuExit;
use test_support::host::skip;
use test_support::wait::until;

const SIZE: u64 = 2 << 20;
const SOON: Duration = Duration::from_secs(10);

/// Guest physical addresses of the guests' code, in real mode.
const SPIN: u64 = 0x1000;
const OUTS: u64 = 0x1010;
const TRIPLE_FAULT: u64 = 0x1020;
/// The bytes that a guest writes to the port.
const DATA: u64 = 8 * PAGE_SIZE;
const LEN: u64 = 64;
const PORT: u16 = 0x90;

fn image() -> Vec<u8> {
    let mut image = vec![0; SIZE as usize];
    let mut put = |at: u64, code: &[u8]| image[at as usize..][..code.len()].copy_from_slice(code);
    put(SPIN, &[0xeb, 0xfe]); // jmp $
    put(OUTS, &[0xf3, 0x6e, 0xf4]); // rep outsb; hlt
    // lidt [0x1028], which holds zeros, so there is no interrupt table; ud2
    put(TRIPLE_FAULT, &[0x0f, 0x01, 0x1e, 0x28, 0x10, 0x0f, 0x0b]);
    put(DATA, &std::array::from_fn::<u8, { LEN as usize }, _>(|index| index as u8 ^ 0x5a));
    image
}

#[derive(Default)]
struct Port {
    written: Mutex<Vec<u8>>,
    held: AtomicBool,
    shutdowns: AtomicU32,
}

impl ServeExit for Port {
    fn serve(&self, cpu: u32, exit: VcpuExit<'_>) -> Served {
        match exit {
            VcpuExit::IoOut(PORT, data) => {
                self.written.lock().unwrap().extend_from_slice(data);
                while self.held.load(Ordering::Acquire) {
                    thread::yield_now();
                }
                Served::Continue
            }
            VcpuExit::Shutdown if self.held.load(Ordering::Acquire) => {
                self.shutdowns.fetch_add(1, Ordering::AcqRel);
                Served::Hold
            }
            VcpuExit::Hlt => Served::End,
            other => unserved(cpu, &other),
        }
    }
}

struct Rig {
    // In the order in which they are dropped.
    vcpus: Vcpus,
    machine: Machine,
    port: Arc<Port>,
    stats: Arc<Stats>,
    file: tempfile::NamedTempFile,
}

impl Rig {
    fn new() -> Option<Self> {
        let engine = EngineChoice::Only(Engine::Uffd);
        if let Err(error) = resolve(engine, &probe()) {
            skip(&error.to_string());
            return None;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&image(), 0).unwrap();
        let stats = Arc::new(Stats::new());
        let backing = BackingKind::Shmem;
        let machine = Machine::new(MachineConfig {
            memory: &MemoryConfig { size: SIZE, backing, reserve: true, thp: false },
            engine,
            probes: None,
            lazy: Lazy::Require,
            source: Arc::new(LocalFile::open(file.path()).unwrap()),
            service: ServiceOptions::default(),
            stats: stats.clone(),
            retrier: Retrier::new(RetryPolicy::default(), |_| {}),
        })
        .unwrap();
        let port = Arc::new(Port::default());
        let context = Arc::new(VcpuContext { exits: port.clone(), first_run: Arc::default() });
        Some(Rig { vcpus: Vcpus::paused(context), machine, port, stats, file })
    }

    /// Makes the data page inaccessible, so that KVM asks user space for it.
    fn close_data(&self) {
        let slots = self.machine.slots();
        let mapping = slots[0].mapping();
        let address = mapping.at(DATA).as_ptr().cast();
        // SAFETY: the page belongs to the mapping, and no code of this process accesses it.
        assert_eq!(unsafe { libc::mprotect(address, PAGE_SIZE as usize, libc::PROT_NONE) }, 0);
    }

    fn set_source_len(&self, len: u64) {
        OpenOptions::new().write(true).open(self.file.path()).unwrap().set_len(len).unwrap();
    }

    fn written(&self) -> Vec<u8> {
        self.port.written.lock().unwrap().clone()
    }
}

/// Makes a vCPU begin at `rip`.
fn begin(vcpu: &mut DemandVcpu, rip: u64) {
    let mut sregs = vcpu.fd().get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.fd().set_sregs(&sregs).unwrap();
    let (rsi, rcx, rdx) = (DATA, LEN, u64::from(PORT));
    let regs = kvm_regs { rip, rsi, rcx, rdx, rflags: 2, ..Default::default() };
    vcpu.fd().set_regs(&regs).unwrap();
}

fn rip(_: u32, vcpu: &mut DemandVcpu) -> u64 {
    vcpu.fd().get_regs().unwrap().rip
}

#[test]
fn paused_vcpus_run_from_their_given_state() {
    let Some(mut rig) = Rig::new() else { return };
    let (said, events) = channel();
    // The order of the starts does not matter.
    for cpu in [1, 0] {
        let (vcpu, said) = (rig.machine.create_vcpu(cpu).unwrap(), said.clone());
        rig.vcpus.start(cpu, vcpu, move |event| drop(said.send(event))).unwrap();
    }
    let threads = rig.vcpus.on_parked(SOON, |cpu, vcpu| {
        begin(vcpu, if cpu == 0 { SPIN } else { OUTS });
        (cpu, thread::current().name().map(str::to_owned))
    });
    let expected = [0, 1].map(|cpu| (cpu, Some(format!("vcpu-{cpu}"))));
    assert_eq!(threads.unwrap(), expected);
    assert!(rig.vcpus.context().first_run.get().is_none() && rig.written().is_empty());
    rig.vcpus.resume();
    // vCPU 1 runs to its end.
    let event = events.recv_timeout(SOON).unwrap();
    assert!(matches!(event, VcpuEvent::Ended { cpu: 1 }), "{event:?}");
    assert!(rig.vcpus.context().first_run.get().is_some());
    assert!(rig.written() == image()[DATA as usize..(DATA + LEN) as usize]);
    // vCPU 0 still runs.
    let running = rig.vcpus.on_parked(SOON, rip).unwrap_err();
    assert_eq!(running, ParkedError::NotPaused { cpu: 0 });
    rig.vcpus.pause(SOON).unwrap();
    assert_eq!(rig.vcpus.on_parked(SOON, rip).unwrap_err(), ParkedError::Ended { cpu: 1 });
    rig.vcpus.stop(SOON).unwrap();
}

/// A vCPU that has shut down does not run on from there, in any state that KVM leaves it in.
#[test]
fn held_vcpu_runs_from_another_state() {
    if probe().virtualization == Virtualization::Emulated {
        return skip("this KVM emulates, and knows of no triple fault in real mode");
    }
    let Some(mut rig) = Rig::new() else { return };
    rig.port.held.store(true, Ordering::Release);
    let (said, events) = channel();
    let vcpu = rig.machine.create_vcpu(0).unwrap();
    rig.vcpus.start(0, vcpu, move |event| drop(said.send(event))).unwrap();
    rig.vcpus.on_parked(SOON, |_, vcpu| begin(vcpu, TRIPLE_FAULT)).unwrap();
    rig.vcpus.resume();
    let shut_down = || rig.port.shutdowns.load(Ordering::Acquire) > 0;
    until("it shuts down", shut_down);
    // A pause does not release it.
    for _ in 0..2 {
        thread::sleep(Duration::from_millis(50));
        rig.vcpus.pause(SOON).unwrap();
        assert!(rig.vcpus.is_held());
        rig.vcpus.resume();
    }
    thread::sleep(Duration::from_millis(50));
    assert_eq!(rig.port.shutdowns.load(Ordering::Acquire), 1);
    let event = events.try_recv();
    assert!(event.is_err(), "{event:?}");

    rig.vcpus.pause(SOON).unwrap();
    rig.port.held.store(false, Ordering::Release);
    let begun = rig.vcpus.on_parked(SOON, |_, vcpu| {
        begin(vcpu, OUTS);
        // KVM with SVM drops its page tables in a shutdown without paging, until CR0 changes.
        let mut sregs = vcpu.fd().get_sregs().unwrap();
        sregs.cr0 &= !0x6000_0000;
        vcpu.fd().set_sregs(&sregs).unwrap();
    });
    begun.unwrap();
    rig.vcpus.release();
    rig.vcpus.resume();
    let event = events.recv_timeout(SOON).unwrap();
    assert!(matches!(event, VcpuEvent::Ended { cpu: 0 }), "{event:?}");
    assert!(rig.written() == image()[DATA as usize..(DATA + LEN) as usize]);
    rig.vcpus.stop(SOON).unwrap();
}

#[test]
fn vcpu_mid_instruction_parks_once_its_page_arrives() {
    let Some(mut rig) = Rig::new() else { return };
    rig.close_data();
    rig.set_source_len(DATA);
    let (said, events) = channel();
    for cpu in 0..2 {
        let (vcpu, said) = (rig.machine.create_vcpu(cpu).unwrap(), said.clone());
        rig.vcpus.start(cpu, vcpu, move |event| drop(said.send(event))).unwrap();
    }
    let set = |cpu, vcpu: &mut DemandVcpu| begin(vcpu, if cpu == 0 { SPIN } else { OUTS });
    rig.vcpus.on_parked(SOON, set).unwrap();
    rig.vcpus.resume();
    until("nobody wants the page", || rig.stats.source().errors > 0);
    rig.vcpus.pause(SOON).unwrap();
    let within = Duration::from_millis(100);
    let error = rig.vcpus.on_parked(within, rip).unwrap_err();
    assert_eq!(error, ParkedError::Waiting { cpu: 1, gpa: DATA, within });
    assert!(!error.to_string().contains('\n') && error.to_string().contains("0x8000"), "{error}");
    // The vCPU is unchanged, and the job that was too late never runs.
    std::fs::write(rig.file.path(), image()).unwrap();
    let regs = rig.vcpus.on_parked(SOON, |_, vcpu| vcpu.fd().get_regs().unwrap()).unwrap();
    assert_eq!(regs[0].rip, SPIN);
    let done = LEN - regs[1].rcx;
    assert_eq!((regs[1].rsi, rig.written().len() as u64), (DATA + done, done));
    rig.vcpus.resume();
    let event = events.recv_timeout(SOON).unwrap();
    assert!(matches!(event, VcpuEvent::Ended { cpu: 1 }), "{event:?}");
    assert!(rig.written() == image()[DATA as usize..(DATA + LEN) as usize]);
    rig.vcpus.stop(SOON).unwrap();
}

/// Only a wait of a vCPU is an absence: background fill can wait forever.
#[test]
fn only_waits_of_vcpus_count_for_the_guest() {
    for outside_kvm in [false, true] {
        let Some(mut rig) = Rig::new() else { return };
        if outside_kvm {
            rig.close_data();
        }
        rig.set_source_len(DATA);
        let pagers = rig.machine.pagers().cloned().collect();
        let fill = Fill::start(pagers, FillRate::Unlimited).unwrap();
        until("fill meets the page", || rig.stats.source().errors > 0);
        // A vCPU waits for no other page.
        let code = PageRange::page(SPIN / PAGE_SIZE);
        let missing = || rig.machine.pagers().map(|pager| pager.bitmap().count_missing(code));
        until("the code is present", || missing().sum::<u64>() == 0);
        thread::sleep(Duration::from_millis(100));
        assert!(!rig.vcpus.wait_for_pages(rig.machine.service()), "fill waits, and no vCPU");
        let vcpu = rig.machine.create_vcpu(0).unwrap();
        rig.vcpus.start(0, vcpu, |_| {}).unwrap();
        rig.vcpus.on_parked(SOON, |_, vcpu| begin(vcpu, OUTS)).unwrap();
        rig.vcpus.resume();
        until("the vCPU waits", || rig.vcpus.wait_for_pages(rig.machine.service()));
        assert_eq!(rig.machine.service().has_open_faults(), !outside_kvm);
        std::fs::write(rig.file.path(), image()).unwrap();
        until("its page comes", || !rig.vcpus.wait_for_pages(rig.machine.service()));
        drop(fill);
        rig.vcpus.stop(SOON).unwrap();
    }
}

#[test]
fn late_or_revoked_job_never_runs() {
    let Some(mut rig) = Rig::new() else { return };
    let vcpu = rig.machine.create_vcpu(0).unwrap();
    rig.vcpus.start(0, vcpu, |_| {}).unwrap();
    rig.vcpus.on_parked(SOON, |_, vcpu| begin(vcpu, OUTS)).unwrap();
    // The device is slow, so the vCPU does not leave it in time.
    rig.port.held.store(true, Ordering::Release);
    rig.vcpus.resume();
    until("it writes", || !rig.written().is_empty());
    let within = Duration::from_millis(50);
    rig.vcpus.pause(within).unwrap_err();
    let done = Arc::new(AtomicBool::new(false));
    let job = {
        let done = done.clone();
        move |_, _: &mut DemandVcpu| done.store(true, Ordering::Release)
    };
    let late = rig.vcpus.on_parked(within, job.clone()).unwrap_err();
    assert_eq!(late, ParkedError::Late { cpu: 0, within });
    // The vCPU is resumed before it is parked.
    let called_back = thread::scope(|scope| {
        let asked = scope.spawn(|| rig.vcpus.on_parked(SOON, job));
        thread::sleep(within);
        rig.vcpus.resume();
        rig.port.held.store(false, Ordering::Release);
        asked.join().unwrap().unwrap_err()
    });
    assert!(matches!(called_back, ParkedError::NotPaused { .. } | ParkedError::Ended { .. }));
    assert!(!done.load(Ordering::Acquire));
    rig.vcpus.stop(SOON).unwrap();
}

#[test]
fn failed_guest_is_reported_in_one_line() {
    let Some(mut rig) = Rig::new() else { return };
    if probe().virtualization == Virtualization::Emulated {
        return skip("this KVM emulates, and knows of no triple fault in real mode");
    }
    let (said, events) = channel();
    let vcpu = rig.machine.create_vcpu(0).unwrap();
    rig.vcpus.start(0, vcpu, move |event| drop(said.send(event))).unwrap();
    rig.vcpus.on_parked(SOON, |_, vcpu| begin(vcpu, TRIPLE_FAULT)).unwrap();
    rig.vcpus.resume();
    match events.recv_timeout(SOON).unwrap() {
        VcpuEvent::Failed { cpu: 0, error } => {
            let message = error.to_string();
            assert!(message.starts_with("vCPU 0 ") && message.contains("triple"), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
        event => panic!("{event:?}"),
    }
    rig.vcpus.stop(SOON).unwrap();
}
