// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! All vCPUs of a VM: started, paused, resumed and stopped together.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use demand_kvm::{DemandVcpu, VcpuKick};
use kvm_ioctls::VcpuFd;

use crate::vcpu::{StartError, VcpuContext, VcpuEvent, run};

/// What the vCPUs are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

/// Where a vCPU's thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In the guest, or serving an exit.
    Running,
    /// At the gate, until it is told to go on.
    Parked,
    /// Its thread has nothing more to do.
    Ended,
}

/// What each vCPU passes before it enters the guest. While nobody wants anything this is one
/// load of a word that nobody writes.
#[derive(Debug)]
pub(crate) struct Gate {
    wanted: AtomicU8,
    places: Mutex<BTreeMap<u32, Place>>,
    changed: Condvar,
}

impl Gate {
    fn new() -> Self {
        Gate {
            wanted: AtomicU8::new(Wanted::Run as u8),
            places: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn wants(&self, what: Wanted) -> bool {
        self.wanted.load(Ordering::Acquire) == what as u8
    }

    fn places(&self) -> MutexGuard<'_, BTreeMap<u32, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what is wanted. Under the lock, so that nobody who has just looked goes to sleep.
    fn want(&self, what: Wanted) {
        let places = self.places();
        // A VM that is going away is not called back.
        if !self.wants(Wanted::Stop) {
            self.wanted.store(what as u8, Ordering::Release);
        }
        drop(places);
        self.changed.notify_all();
    }

    /// Waits as long as a pause lasts; false if the vCPU is to stop.
    pub(crate) fn pass(&self, cpu: u32) -> bool {
        if self.wants(Wanted::Run) {
            return true;
        }
        let mut places = self.places();
        while self.wants(Wanted::Pause) {
            places.insert(cpu, Place::Parked);
            self.changed.notify_all();
            places = self.changed.wait(places).unwrap_or_else(PoisonError::into_inner);
        }
        places.insert(cpu, Place::Running);
        self.wants(Wanted::Run)
    }

    /// Notes that a vCPU's thread has nothing more to do.
    pub(crate) fn ended(&self, cpu: u32) {
        self.places().insert(cpu, Place::Ended);
        self.changed.notify_all();
    }

    /// Waits until all vCPUs are where they are wanted; those that are not after `within` are
    /// returned.
    fn until(&self, within: Duration, there: impl Fn(Place) -> bool) -> Vec<u32> {
        let due = Instant::now() + within;
        let mut places = self.places();
        loop {
            let others = places.iter().filter(|(_, place)| !there(**place));
            let others: Vec<u32> = others.map(|(cpu, _)| *cpu).collect();
            let left = due.saturating_duration_since(Instant::now());
            if others.is_empty() || left.is_zero() {
                return others;
            }
            let woken = self.changed.wait_timeout(places, left);
            places = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// vCPUs that did not come out of the guest in time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "call {} out of the guest: not within {} ms; KVM itself waits there for a page, which no kick \
     ends: see that the source answers",
    names(cpus),
    within.as_millis()
)]
pub struct StillInside {
    /// The vCPUs.
    pub cpus: Vec<u32>,
    /// How long they were waited for.
    pub within: Duration,
}

fn names(cpus: &[u32]) -> String {
    let numbers: Vec<_> = cpus.iter().map(ToString::to_string).collect();
    format!("vCPU {}", numbers.join(", "))
}

struct Vcpu {
    kick: VcpuKick,
    thread: JoinHandle<()>,
}

/// The running vCPUs of a VM. A vCPU that waits for a page is paused and stopped like any other:
/// the page still arrives, and the vCPU finds it, or waits again, when it goes on.
pub struct Vcpus {
    vcpus: Vec<Vcpu>,
    context: Arc<VcpuContext>,
    gate: Arc<Gate>,
}

impl Vcpus {
    /// None yet.
    pub fn new(context: Arc<VcpuContext>) -> Self {
        Vcpus { vcpus: Vec::new(), context, gate: Arc::new(Gate::new()) }
    }

    /// What they share.
    pub fn context(&self) -> &VcpuContext {
        &self.context
    }

    /// Starts vCPU `cpu` on a thread of its own. What it has to say it says through `tell`, on
    /// that thread.
    ///
    /// # Errors
    ///
    /// If the thread cannot be started, or the vCPU cannot be made one that can be kicked.
    pub fn start(
        &mut self,
        cpu: u32,
        vcpu: VcpuFd,
        tell: impl Fn(VcpuEvent) + Send + 'static,
    ) -> Result<(), StartError> {
        let vcpu = DemandVcpu::new(vcpu)?;
        let kick = vcpu.kick().clone();
        self.gate.places().insert(cpu, Place::Running);
        let (context, gate) = (self.context.clone(), self.gate.clone());
        let body = move || run(cpu, vcpu, &context, &gate, &tell);
        let thread = thread::Builder::new().name(format!("vcpu-{cpu}")).spawn(body);
        match thread {
            Ok(thread) => self.vcpus.push(Vcpu { kick, thread }),
            Err(error) => {
                self.gate.ended(cpu);
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Calls all vCPUs out of the guest, and keeps them out until they are resumed.
    ///
    /// # Errors
    ///
    /// [`StillInside`] after `within`. The others are out by then; those that are not stay out as
    /// soon as they come. Call it again to wait longer.
    pub fn pause(&self, within: Duration) -> Result<(), StillInside> {
        self.call_out(Wanted::Pause, within)
    }

    /// Lets all vCPUs go on.
    pub fn resume(&self) {
        self.gate.want(Wanted::Run);
    }

    /// Ends all vCPUs: they never enter the guest again.
    ///
    /// # Errors
    ///
    /// [`StillInside`] after `within`. Those vCPUs may wait in the kernel for a page. What traps
    /// their accesses must not be taken away from under them: they would see zeros.
    pub fn stop(&mut self, within: Duration) -> Result<(), StillInside> {
        self.call_out(Wanted::Stop, within)?;
        for vcpu in self.vcpus.drain(..) {
            // A panic there has printed what it has to say.
            let _ = vcpu.thread.join();
        }
        Ok(())
    }

    fn call_out(&self, wanted: Wanted, within: Duration) -> Result<(), StillInside> {
        self.gate.want(wanted);
        self.vcpus.iter().for_each(|vcpu| vcpu.kick.kick());
        // A vCPU that is to stop has to come out of a pause, too.
        let cpus = self.gate.until(within, |place| match wanted {
            Wanted::Stop => place == Place::Ended,
            Wanted::Pause | Wanted::Run => place != Place::Running,
        });
        if cpus.is_empty() { Ok(()) } else { Err(StillInside { cpus, within }) }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        // Without a word, for want of somebody to say it to. Threads that do not come end with
        // the process, or when their page arrives.
        let _ = self.stop(Duration::from_secs(2));
    }
}
