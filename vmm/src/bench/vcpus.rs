// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The vCPUs of the measured machine, which start together and report their times.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use demand_kvm::{FaultHandler, MarkerFaults, VcpuKick};
use demand_memory::DemandMemory;
use kvm_ioctls::{VcpuExit, VcpuFd};
use rustix::time::{ClockId, clock_gettime};

use super::error::{BenchError, VcpuError};
use super::guest::PORT_READY;
use crate::error::Error;
use crate::vcpu::error::StartError;
use crate::vm::machine::Machine;

/// The result of one vCPU.
#[derive(Clone, Copy)]
pub(super) struct Outcome {
    /// Time before the first touch.
    pub(super) begun: Instant,
    /// Time after the last touch.
    pub(super) ended: Instant,
    /// Processor time of this process by `begun`.
    pub(super) cpu_begun: Duration,
    /// Processor time of this process by `ended`.
    pub(super) cpu_ended: Duration,
    /// Hash of the words that the vCPU read.
    pub(super) hash: u32,
}

/// A vCPU thread's report, or the source's.
enum Event {
    /// A vCPU waits for the start.
    Ready,
    /// The vCPU with this number has halted.
    Done(u32, Outcome),
    Failed(BenchError),
}

/// Reports to [`Vcpus::run`] that a page cannot be fetched.
#[derive(Clone)]
pub(super) struct Complaint(Sender<Event>);

impl Complaint {
    pub(super) fn send(&self, message: String) {
        // This fails only if the measurement is over.
        let _ = self.0.send(Event::Failed(BenchError::Source(message)));
    }
}

/// vCPUs on their threads. Dropping this ends the threads.
pub(super) struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<(VcpuKick, JoinHandle<()>)>,
    memory: Option<DemandMemory>,
    go: Vec<Sender<()>>,
    events: Receiver<Event>,
    /// The senders' end of `events`.
    sender: Sender<Event>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    first_run: OnceLock<Instant>,
}

impl Vcpus {
    pub(super) fn new() -> Self {
        let (sender, events) = channel();
        let (shared, threads, go) = Default::default();
        Vcpus { shared, threads, memory: None, go, events, sender }
    }

    /// Returns the handle through which failures of the source are reported.
    pub(super) fn complaint(&self) -> Complaint {
        Complaint(self.sender.clone())
    }

    /// Runs all vCPUs at the same time, and waits until they end.
    pub(super) fn run(
        &mut self,
        machine: &Machine,
        vcpus: Vec<VcpuFd>,
    ) -> Result<Vec<Outcome>, Error> {
        self.memory = Some(machine.memory().clone());
        let faults = machine.fault_handler().clone();
        let count = vcpus.len();
        for (cpu, vcpu) in (0..).zip(vcpus) {
            let kick = VcpuKick::new(&vcpu).map_err(StartError::Kick)?;
            let (go, start) = channel();
            let events = self.sender.clone();
            let (shared, faults) = (self.shared.clone(), faults.clone());
            let (kick_here, markers) = (kick.clone(), MarkerFaults::default());
            let mut vcpu = Vcpu { vcpu, kick: kick_here, faults, markers, shared };
            let body = move || {
                let ready = || drop(events.send(Event::Ready));
                let _ = events.send(match vcpu.measure(ready, &start) {
                    Ok(outcome) => Event::Done(cpu, outcome),
                    Err(source) => Event::Failed(BenchError::Vcpu { cpu, source }),
                });
            };
            let thread = thread::Builder::new().name(format!("vcpu-{cpu}")).spawn(body);
            self.threads.push((kick, thread.map_err(StartError::Thread)?));
            self.go.push(go);
        }
        for _ in 0..count {
            match self.next()? {
                Event::Ready => {}
                _ => return Err(BenchError::EndedEarly.into()),
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
        outcomes.into_iter().collect::<Option<_>>().ok_or_else(|| BenchError::NoResult.into())
    }

    fn next(&self) -> Result<Event, BenchError> {
        match self.events.recv() {
            Ok(Event::Failed(error)) => Err(error),
            Ok(event) => Ok(event),
            Err(_) => Err(BenchError::NoReport),
        }
    }

    /// Returns the time when the first vCPU entered the guest.
    pub(super) fn first_run(&self) -> Option<Instant> {
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

/// A vCPU on its thread.
struct Vcpu {
    vcpu: VcpuFd,
    kick: VcpuKick,
    faults: Arc<FaultHandler>,
    markers: MarkerFaults,
    shared: Arc<Shared>,
}

impl Vcpu {
    /// Runs the vCPU until it is ready, reports that, and measures its touches from `start` on.
    fn measure(&mut self, ready: impl Fn(), start: &Receiver<()>) -> Result<Outcome, VcpuError> {
        self.kick.attach();
        self.shared.first_run.get_or_init(Instant::now);
        if !self.run()? {
            return Err(VcpuError::Halted);
        }
        ready();
        start.recv().map_err(|_| VcpuError::Cancelled)?;
        let (cpu_begun, begun) = (cpu_time(), Instant::now());
        while self.run()? {}
        let (ended, cpu_ended) = (Instant::now(), cpu_time());
        let regs = self.vcpu.get_regs().map_err(|source| VcpuError::Registers { source })?;
        let hash = (regs.rbx & 0xffff_ffff) as u32;
        Ok(Outcome { begun, ended, cpu_begun, cpu_ended, hash })
    }

    /// Runs the vCPU until it reports that it is ready (true), or halts (false).
    fn run(&mut self) -> Result<bool, VcpuError> {
        loop {
            let prepared = self.markers.prepare(&self.vcpu, &self.faults);
            prepared.map_err(|source| VcpuError::Signals { source })?;
            match self.vcpu.run() {
                Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                    self.faults.handle(gpa, size, flags, self.kick.waiter())?;
                }
                Ok(VcpuExit::IoOut(PORT_READY, _)) => return Ok(true),
                Ok(VcpuExit::Hlt) => return Ok(false),
                Ok(exit) => return Err(VcpuError::Exit(format!("{exit:?}"))),
                Err(source) => match source.errno() {
                    libc::EINTR if self.markers.resolve(&self.faults, self.kick.waiter())? => {}
                    libc::EINTR | libc::EAGAIN if !self.shared.stop.load(Ordering::Acquire) => {
                        self.kick.clear();
                    }
                    _ => return Err(VcpuError::Run { source }),
                },
            }
        }
    }
}

/// Returns the processor time of this process so far.
fn cpu_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default()
}
