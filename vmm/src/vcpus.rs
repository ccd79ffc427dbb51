// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! All vCPUs of a VM: started, paused, resumed and stopped together.

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use demand_kvm::{DemandVcpu, VcpuKick};
use demand_uffd::FaultService;
use kvm_ioctls::VcpuFd;

use crate::gate::{Gate, Place, Settled, Wanted};
use crate::vcpu::{StartError, VcpuContext, VcpuEvent, run};

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

impl StillInside {
    /// The vCPUs, as a message calls them.
    pub(crate) fn names(&self) -> String {
        names(&self.cpus)
    }
}

/// Why something was not done on the vCPUs' threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParkedError {
    /// The VM is not paused, or was resumed or stopped meanwhile.
    #[error("reach vCPU {cpu} while it is paused: it is not; pause the VM, and keep it paused")]
    NotPaused {
        /// The vCPU.
        cpu: u32,
    },
    /// The vCPU's thread has ended.
    #[error("reach vCPU {cpu}: it has come to its end, and has no state any more")]
    Ended {
        /// The vCPU.
        cpu: u32,
    },
    /// The vCPU is in the middle of an instruction that needs a page that has not come.
    #[error(
        "reach vCPU {cpu} between two instructions: it waits for the page at guest address \
         {gpa:#x}, which did not come within {} ms; see that the source answers",
        within.as_millis()
    )]
    Waiting {
        /// The vCPU.
        cpu: u32,
        /// Guest physical address.
        gpa: u64,
        /// How long it was waited for.
        within: Duration,
    },
    /// The vCPU did not come out of the guest, or has not done it in time.
    #[error(
        "reach vCPU {cpu} while it is paused: not within {} ms; see that the source answers",
        within.as_millis()
    )]
    Late {
        /// The vCPU.
        cpu: u32,
        /// How long it was waited for.
        within: Duration,
    },
}

fn names(cpus: &[u32]) -> String {
    let numbers: Vec<_> = cpus.iter().map(ToString::to_string).collect();
    format!("vCPU {}", numbers.join(", "))
}

struct Vcpu {
    cpu: u32,
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
    /// None yet. Those that are started run at once.
    pub fn new(context: Arc<VcpuContext>) -> Self {
        Vcpus::with(context, Wanted::Run)
    }

    /// None yet. Those that are started are paused before their first instruction, so that their
    /// state can be set by [`on_parked`](Self::on_parked), until [`resume`](Self::resume).
    pub fn paused(context: Arc<VcpuContext>) -> Self {
        Vcpus::with(context, Wanted::Pause)
    }

    fn with(context: Arc<VcpuContext>, wanted: Wanted) -> Self {
        Vcpus { vcpus: Vec::new(), context, gate: Arc::new(Gate::new(wanted)) }
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
        self.gate.begins(cpu);
        let (context, gate) = (self.context.clone(), self.gate.clone());
        let body = move || run(cpu, vcpu, &context, &gate, &tell);
        let thread = thread::Builder::new().name(format!("vcpu-{cpu}")).spawn(body);
        match thread {
            Ok(thread) => self.vcpus.push(Vcpu { cpu, kick, thread }),
            Err(error) => {
                self.gate.ended(cpu);
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Calls all vCPUs out of the guest, and keeps them out until they are resumed. A vCPU
    /// finishes the instruction that it is in the middle of, so that its state is whole, unless
    /// that takes a page that is not there: it is paused all the same, and
    /// [`on_parked`](Self::on_parked) tells.
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

    /// Whether a vCPU waits for a page: on its thread outside KVM, or inside KVM in a fault that
    /// `service` serves. Waits of back-ends and of background fill hold up no vCPU.
    pub fn wait_for_pages(&self, service: &FaultService) -> bool {
        self.vcpus.iter().any(|vcpu| vcpu.kick.waiter().is_waiting()) || service.has_open_faults()
    }

    /// Tells the guest, on each vCPU before it runs on, that it was held up for a time that it cannot
    /// know of; a vCPU that still waits learns of it when its wait is over. It does not wait.
    pub(crate) fn tell_absence(&self) {
        self.gate.note_absence();
        self.vcpus.iter().for_each(|vcpu| vcpu.kick.kick());
    }

    /// Asks each vCPU whether it is halted for good, which it answers once it has left the guest for
    /// that; returns what to ask [`are_halted`](Self::are_halted) a moment later.
    pub(crate) fn look(&self) -> u64 {
        let look = self.gate.look();
        self.vcpus.iter().for_each(|vcpu| vcpu.kick.kick());
        look
    }

    /// Whether at that look each vCPU was halted with interrupts off, or had never been started.
    pub(crate) fn are_halted(&self, look: u64) -> bool {
        self.gate.are_halted(look)
    }

    /// Processor time that the vCPUs' threads have used.
    pub(crate) fn cpu_time(&self) -> Duration {
        self.vcpus.iter().map(|vcpu| cpu_time(&vcpu.thread)).sum()
    }

    /// Whether some vCPU is [held](crate::vcpu::Served::Hold).
    pub fn is_held(&self) -> bool {
        self.gate.holds_any()
    }

    /// Lets vCPUs that are [held](crate::vcpu::Served::Hold) into the guest again: they have another
    /// state. To be called while all are paused.
    pub fn release(&self) {
        self.gate.release();
    }

    /// Calls `f` with each vCPU and its number, on the vCPU's own thread as KVM wants it, one after
    /// the other in the order of their numbers; returns what it returned. The vCPUs must be
    /// paused, and each is between two instructions when `f` gets it. `within` is how long all of
    /// that may take; a vCPU that waits for a page has as long for it to come.
    ///
    /// # Errors
    ///
    /// [`ParkedError`], with the first vCPU that cannot be reached. `f` was then called for those
    /// before it, and if it took too long is still at work for that one.
    pub fn on_parked<T: Send + 'static>(
        &self,
        within: Duration,
        f: impl Fn(u32, &mut DemandVcpu) -> T + Send + Sync + 'static,
    ) -> Result<Vec<T>, ParkedError> {
        let due = Instant::now() + within;
        let f = Arc::new(f);
        let mut cpus: Vec<u32> = self.vcpus.iter().map(|vcpu| vcpu.cpu).collect();
        cpus.sort_unstable();
        cpus.into_iter()
            .map(|cpu| {
                let (sender, result) = channel();
                let f = f.clone();
                // Nobody listens any more once the time is up.
                let job = move |vcpu: &mut DemandVcpu| drop(sender.send(f(cpu, vcpu)));
                if !self.gate.ask(cpu, Box::new(job)) {
                    return Err(self.unreachable(cpu, None));
                }
                match result.recv_timeout(due.saturating_duration_since(Instant::now())) {
                    Ok(result) => Ok(result),
                    Err(RecvTimeoutError::Disconnected) => Err(self.unreachable(cpu, None)),
                    Err(RecvTimeoutError::Timeout) => {
                        self.gate.take_back(cpu);
                        Err(self.unreachable(cpu, Some(within)))
                    }
                }
            })
            .collect()
    }

    /// Why a vCPU has not done what it was asked; `late` is how long it had.
    fn unreachable(&self, cpu: u32, late: Option<Duration>) -> ParkedError {
        match (self.gate.place(cpu), late) {
            (Some(Place::Ended) | None, _) => ParkedError::Ended { cpu },
            (Some(Place::Parked(Settled::Waiting { gpa })), Some(within)) => {
                ParkedError::Waiting { cpu, gpa, within }
            }
            (_, Some(within)) => ParkedError::Late { cpu, within },
            (_, None) => ParkedError::NotPaused { cpu },
        }
    }

    /// Ends all vCPUs: they never enter the guest again.
    ///
    /// # Errors
    ///
    /// [`StillInside`] after `within`. Those vCPUs may wait in the kernel for a page;
    /// [`DemandMemory::revoke`](demand_memory::DemandMemory::revoke) ends that.
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

/// Processor time that a thread has used; none if it has ended.
fn cpu_time(thread: &JoinHandle<()>) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut clock = 0;
    // SAFETY: the thread was not joined, as its handle is there, so its id is valid; both calls write
    // to a variable of this function.
    let known = unsafe {
        libc::pthread_getcpuclockid(thread.as_pthread_t(), &mut clock) == 0
            && libc::clock_gettime(clock, &mut time) == 0
    };
    if known { Duration::new(time.tv_sec as u64, time.tv_nsec as u32) } else { Duration::ZERO }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        // Without a word, for want of somebody to say it to. Threads that do not come end with
        // the process, or when their page arrives.
        let _ = self.stop(Duration::from_secs(2));
    }
}
