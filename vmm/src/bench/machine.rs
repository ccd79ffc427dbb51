// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine that is measured: memory, slot and traps as a real one has them, vCPUs on threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use demand_kvm::{DemandSlot, Engine, EngineChoice, FaultHandler, VcpuKick, open_kvm, resolve};
use demand_memory::{
    DemandMemory, DemandRegion, MemfdBacking, Pager, RegionConfig, Retrier, Stats,
};
use demand_source::PageSource;
use demand_uffd::{DEFAULT_THREADS, FaultService};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::GuestAddress;

use super::guest::{MEMORY_ADDRESS, PORT_READY};
use crate::error::Error;
use crate::machine::{arm_guest, backing_error, pager_error};
use crate::options::MemoryOption;

/// Memslot of the demand-paged memory.
const MEMORY_SLOT: u32 = 0;

/// A machine without vCPUs.
pub struct BenchMachine {
    // Fields are dropped in this order: the guest's slot before the traps under it.
    slot: DemandSlot,
    pub(super) vm: Arc<VmFd>,
    pub(super) kvm: Kvm,
    pub(super) memory: DemandMemory,
    service: FaultService,
}

impl BenchMachine {
    /// Makes a machine with `memory`. Nothing here depends on the size of the memory.
    pub fn new(
        memory: &MemoryOption,
        engine: EngineChoice,
        source: Arc<dyn PageSource>,
        stats: Arc<Stats>,
        retrier: Arc<Retrier>,
    ) -> Result<Self, Error> {
        let engine = resolve(engine, &demand_kvm::probe()).map_err(Error::host)?;
        let kvm = open_kvm().map_err(Error::host)?;
        let backing = MemfdBacking::new(memory.backing, memory.size, memory.reserve)
            .map_err(backing_error)?;
        let start = GuestAddress(MEMORY_ADDRESS);
        let config = RegionConfig {
            start,
            backing: Arc::new(backing),
            source,
            image_offset: 0,
            stats,
            retrier,
        };
        let region = DemandRegion::new(config, ()).map_err(pager_error)?;
        let pager = region.pager().clone();
        let memory = DemandMemory::new(vec![region]).map_err(Error::failed)?;
        let service = FaultService::start(DEFAULT_THREADS).map_err(Error::host)?;
        let guest = Arc::new(pager.backing().map().map_err(backing_error)?);
        arm_guest(&service, &pager, &guest, engine)?;
        let vm = Arc::new(kvm.create_vm().map_err(|error| {
            Error::host(format!("make a virtual machine: {error}; is another hypervisor running?"))
        })?);
        let slot = DemandSlot::new(vm.clone(), MEMORY_SLOT, start, guest, pager, engine)
            .map_err(Error::host)?;
        Ok(BenchMachine { slot, vm, kvm, memory, service })
    }

    pub fn engine(&self) -> Engine {
        self.slot.engine()
    }

    pub fn pager(&self) -> &Arc<Pager> {
        self.slot.pager()
    }

    /// Ends the threads that serve faults. All of them are counted then: the last one is counted
    /// after the guest goes on.
    pub fn stop_service(&self) {
        self.service.stop();
    }

    pub fn fault_handler(&self) -> Result<FaultHandler, Error> {
        FaultHandler::for_slots([&self.slot]).map_err(Error::failed)
    }
}

/// What one vCPU did.
#[derive(Clone, Copy)]
pub struct Outcome {
    /// Before its first touch.
    pub begun: Instant,
    /// After its last.
    pub ended: Instant,
    /// What it made of the words that it read.
    pub hash: u32,
}

enum Event {
    Ready,
    Done(u32, Outcome),
    Failed(String),
}

/// Tells whoever waits for the vCPUs that a page cannot be had.
#[derive(Clone)]
pub struct Complaint(Sender<Event>);

impl Complaint {
    pub fn send(&self, message: String) {
        // Nobody waits any more: then nobody needs it.
        let _ = self.0.send(Event::Failed(message));
    }
}

/// vCPUs on their threads. Dropping it ends them.
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<(VcpuKick, JoinHandle<()>)>,
    pager: Option<Arc<Pager>>,
    go: Vec<Sender<()>>,
    events: Receiver<Event>,
    tell: Sender<Event>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    first_run: OnceLock<Instant>,
}

impl Vcpus {
    pub fn new() -> Self {
        let (tell, events) = channel();
        let (shared, threads, go) = Default::default();
        Vcpus { shared, threads, pager: None, go, events, tell }
    }

    /// Through which failures of the source arrive here.
    pub fn complaint(&self) -> Complaint {
        Complaint(self.tell.clone())
    }

    /// Runs the vCPUs, all at the same time, and waits for their ends.
    pub fn run(
        &mut self,
        machine: &BenchMachine,
        vcpus: Vec<VcpuFd>,
    ) -> Result<Vec<Outcome>, Error> {
        self.pager = Some(machine.pager().clone());
        let faults = Arc::new(machine.fault_handler()?);
        let count = vcpus.len();
        for (cpu, mut vcpu) in vcpus.into_iter().enumerate() {
            let kick = VcpuKick::new(&vcpu).map_err(Error::host)?;
            let (go, gone) = channel();
            let (tell, faults) = (self.tell.clone(), faults.clone());
            let (shared, own_kick) = (self.shared.clone(), kick.clone());
            let cpu = cpu as u32;
            let body = move || {
                let outcome = thread_of(&mut vcpu, &own_kick, &faults, &shared, &tell, &gone);
                let _ = tell.send(match outcome {
                    Ok(outcome) => Event::Done(cpu, outcome),
                    Err(message) => Event::Failed(format!("vCPU {cpu}: {message}")),
                });
            };
            let thread = thread::Builder::new().name(format!("vcpu-{cpu}")).spawn(body);
            let thread = thread
                .map_err(|error| Error::host(format!("start a thread for a vCPU: {error}")))?;
            self.threads.push((kick, thread));
            self.go.push(go);
        }
        for _ in 0..count {
            match self.next()? {
                Event::Ready => {}
                _ => return Err(Error::failed("a vCPU ended before the measurement")),
            }
        }
        for go in self.go.drain(..) {
            // A thread that is gone has said why.
            let _ = go.send(());
        }
        let mut outcomes = vec![None; count];
        for _ in 0..count {
            if let Event::Done(cpu, outcome) = self.next()? {
                outcomes[cpu as usize] = Some(outcome);
            }
        }
        outcomes.into_iter().collect::<Option<_>>().ok_or_else(|| Error::failed("a vCPU is gone"))
    }

    fn next(&self) -> Result<Event, Error> {
        match self.events.recv() {
            Ok(Event::Failed(message)) => Err(Error::failed(format!("bench: {message}"))),
            Ok(event) => Ok(event),
            Err(_) => Err(Error::failed("bench: all vCPUs ended without a word")),
        }
    }

    /// When the first vCPU entered the guest.
    pub fn first_run(&self) -> Option<Instant> {
        self.shared.first_run.get().copied()
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.go.clear();
        if let Some(pager) = &self.pager
            && self.threads.iter().any(|(_, thread)| !thread.is_finished())
        {
            pager.stop();
        }
        for (kick, thread) in self.threads.drain(..) {
            kick.kick();
            // A panic there has printed what it has to say.
            let _ = thread.join();
        }
    }
}

fn thread_of(
    vcpu: &mut VcpuFd,
    kick: &VcpuKick,
    faults: &FaultHandler,
    shared: &Shared,
    tell: &Sender<Event>,
    go: &Receiver<()>,
) -> Result<Outcome, String> {
    kick.attach();
    shared.first_run.get_or_init(Instant::now);
    if !run(vcpu, kick, faults, shared)? {
        return Err("it halted before it was ready".into());
    }
    let _ = tell.send(Event::Ready);
    go.recv().map_err(|_| "the measurement was called off".to_string())?;
    let begun = Instant::now();
    while run(vcpu, kick, faults, shared)? {}
    let ended = Instant::now();
    let regs = vcpu.get_regs().map_err(|error| format!("read its registers: {error}"))?;
    Ok(Outcome { begun, ended, hash: regs.rbx as u32 })
}

/// Runs the vCPU until it says that it is ready (true), or halts.
fn run(
    vcpu: &mut VcpuFd,
    kick: &VcpuKick,
    faults: &FaultHandler,
    shared: &Shared,
) -> Result<bool, String> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                faults
                    .handle(gpa, size, flags, kick.waiter())
                    .map_err(|error| error.to_string())?;
            }
            Ok(VcpuExit::IoOut(PORT_READY, _)) => return Ok(true),
            Ok(VcpuExit::Hlt) => return Ok(false),
            Ok(exit) => return Err(format!("it left the guest with {exit:?}")),
            Err(error) => match error.errno() {
                libc::EINTR | libc::EAGAIN if !shared.stop.load(Ordering::Acquire) => kick.clear(),
                _ => return Err(format!("run it: {error}; the kernel's log may say more")),
            },
        }
    }
}
