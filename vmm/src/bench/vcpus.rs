// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The vCPUs of the measured machine, which start together and report their times.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use demand_kvm::{FaultHandler, VcpuKick};
use demand_memory::DemandMemory;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::guest::PORT_READY;
use crate::error::Error;
use crate::vm::machine::Machine;

/// The result of one vCPU.
#[derive(Clone, Copy)]
pub struct Outcome {
    /// Time before the first touch.
    pub begun: Instant,
    /// Time after the last touch.
    pub ended: Instant,
    /// Hash of the words that the vCPU read.
    pub hash: u32,
}

enum Event {
    Ready,
    Done(u32, Outcome),
    Failed(String),
}

/// Reports to [`Vcpus::run`] that a page cannot be fetched.
#[derive(Clone)]
pub struct Complaint(Sender<Event>);

impl Complaint {
    pub fn send(&self, message: String) {
        // This fails only if the measurement is over.
        let _ = self.0.send(Event::Failed(message));
    }
}

/// vCPUs on their threads. Dropping this ends the threads.
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<(VcpuKick, JoinHandle<()>)>,
    memory: Option<DemandMemory>,
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
        Vcpus { shared, threads, memory: None, go, events, tell }
    }

    /// Returns the handle through which failures of the source are reported.
    pub fn complaint(&self) -> Complaint {
        Complaint(self.tell.clone())
    }

    /// Runs all vCPUs at the same time, and waits until they end.
    pub fn run(&mut self, machine: &Machine, vcpus: Vec<VcpuFd>) -> Result<Vec<Outcome>, Error> {
        self.memory = Some(machine.memory().clone());
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
                .map_err(|error| Error::host(format!("cannot start a vCPU thread: {error}")))?;
            self.threads.push((kick, thread));
            self.go.push(go);
        }
        for _ in 0..count {
            match self.next()? {
                Event::Ready => {}
                _ => return Err(Error::failed("bench: a vCPU ended before the measurement")),
            }
        }
        for go in self.go.drain(..) {
            // A thread that has ended has reported the reason.
            let _ = go.send(());
        }
        let mut outcomes = vec![None; count];
        for _ in 0..count {
            if let Event::Done(cpu, outcome) = self.next()? {
                outcomes[cpu as usize] = Some(outcome);
            }
        }
        outcomes
            .into_iter()
            .collect::<Option<_>>()
            .ok_or_else(|| Error::failed("bench: a vCPU ended without a result"))
    }

    fn next(&self) -> Result<Event, Error> {
        match self.events.recv() {
            Ok(Event::Failed(message)) => Err(Error::failed(format!("bench: {message}"))),
            Ok(event) => Ok(event),
            Err(_) => Err(Error::failed("bench: all vCPU threads ended without a report")),
        }
    }

    /// Returns the time when the first vCPU entered the guest.
    pub fn first_run(&self) -> Option<Instant> {
        self.shared.first_run.get().copied()
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.go.clear();
        if let Some(memory) = &self.memory
            && self.threads.iter().any(|(_, thread)| !thread.is_finished())
        {
            memory.stop();
        }
        for (kick, thread) in self.threads.drain(..) {
            kick.kick();
            // A panicked thread has printed its message.
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
    go.recv().map_err(|_| "the measurement was cancelled".to_string())?;
    let begun = Instant::now();
    while run(vcpu, kick, faults, shared)? {}
    let ended = Instant::now();
    let regs = vcpu.get_regs().map_err(|error| format!("cannot read its registers: {error}"))?;
    Ok(Outcome { begun, ended, hash: regs.rbx as u32 })
}

/// Runs the vCPU until it reports that it is ready (true), or halts (false).
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
            Ok(exit) => return Err(format!("unexpected exit {exit:?}")),
            Err(error) => match error.errno() {
                libc::EINTR | libc::EAGAIN if !shared.stop.load(Ordering::Acquire) => kick.clear(),
                _ => return Err(format!("cannot run it: {error}; the kernel's log may say more")),
            },
        }
    }
}
