// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The vCPUs of a VM, which are started, paused, resumed and stopped together.

use std::fmt;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use demand_kvm::{DemandVcpu, VcpuKick};
use demand_paging::LazyVcpu;
use demand_uffd::FaultService;

use crate::vcpu::error::{ParkedError, StartError, StillInside};
use crate::vcpu::pause_gate::{IoState, PauseGate, Place, Wanted};
use crate::vcpu::{VcpuContext, VcpuEvent, run};

struct Vcpu {
    cpu: u32,
    kick: VcpuKick,
    thread: JoinHandle<()>,
}

/// The running vCPUs of a VM. A vCPU that waits for a page is paused and stopped like any other:
/// the page still arrives, and the vCPU finds it, or waits again, when it resumes.
pub struct Vcpus {
    vcpus: Vec<Vcpu>,
    context: Arc<VcpuContext>,
    gate: Arc<PauseGate>,
}

impl fmt::Debug for Vcpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cpus: Vec<u32> = self.vcpus.iter().map(|vcpu| vcpu.cpu).collect();
        f.debug_struct("Vcpus").field("cpus", &cpus).finish_non_exhaustive()
    }
}

impl Vcpus {
    /// Creates an empty set. vCPUs run as soon as they are started.
    pub fn new(context: Arc<VcpuContext>) -> Self {
        Vcpus::with(context, Wanted::Run)
    }

    /// Creates an empty set. vCPUs are started in a pause before their first instruction, so that
    /// [`on_parked`](Self::on_parked) can set their state, until [`resume`](Self::resume).
    pub fn paused(context: Arc<VcpuContext>) -> Self {
        Vcpus::with(context, Wanted::Pause)
    }

    fn with(context: Arc<VcpuContext>, wanted: Wanted) -> Self {
        Vcpus { vcpus: Vec::new(), context, gate: Arc::new(PauseGate::new(wanted)) }
    }

    /// Returns the context that the vCPUs share.
    pub fn context(&self) -> &VcpuContext {
        &self.context
    }

    /// Starts vCPU `cpu` on its own thread. The thread reports events through `tell`.
    ///
    /// # Errors
    ///
    /// If the thread cannot be started.
    pub fn start(
        &mut self,
        cpu: u32,
        vcpu: LazyVcpu,
        tell: impl Fn(VcpuEvent) + Send + 'static,
    ) -> Result<(), StartError> {
        let kick = vcpu.demand().kick().clone();
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

    /// Kicks all vCPUs out of the guest, and parks them until they are resumed. A vCPU first
    /// completes its pending I/O, unless that needs a missing page. It is paused in that case, too,
    /// and [`on_parked`](Self::on_parked) reports it.
    ///
    /// # Errors
    ///
    /// [`StillInside`] after `within`. The other vCPUs are parked by then, and the late ones park
    /// as soon as they leave the guest. Call it again to wait longer.
    pub fn pause(&self, within: Duration) -> Result<(), StillInside> {
        self.call_out(Wanted::Pause, within)
    }

    /// Resumes all vCPUs.
    pub fn resume(&self) {
        self.gate.want(Wanted::Run);
    }

    /// Whether a vCPU waits for a page, on its thread outside KVM, or inside KVM in a fault that
    /// `service` serves. Waits of back-ends and of background fill do not count, because they hold
    /// up no vCPU.
    pub fn wait_for_pages(&self, service: &FaultService) -> bool {
        self.vcpus.iter().any(|vcpu| vcpu.kick.waiter().is_waiting()) || service.has_open_faults()
    }

    /// Makes each vCPU tell the guest, before it next enters it, that it was held up for a time
    /// that the guest cannot know of; a vCPU that still waits does so after its wait. Does not
    /// block.
    pub(crate) fn tell_absence(&self) {
        self.gate.note_absence();
        self.vcpus.iter().for_each(|vcpu| vcpu.kick.kick());
    }

    /// Asks each vCPU whether it is halted for good; the vCPU leaves the guest to answer. Returns
    /// the number of this check, for a call of [`are_halted`](Self::are_halted) a moment later.
    pub(crate) fn look(&self) -> u64 {
        let look = self.gate.look();
        self.vcpus.iter().for_each(|vcpu| vcpu.kick.kick());
        look
    }

    /// Whether each vCPU has answered this check that it is halted with interrupts off, or was
    /// never started.
    pub(crate) fn are_halted(&self, look: u64) -> bool {
        self.gate.are_halted(look)
    }

    /// Returns the processor time that the vCPUs' threads have used.
    pub(crate) fn cpu_time(&self) -> Duration {
        self.vcpus.iter().map(|vcpu| cpu_time(&vcpu.thread)).sum()
    }

    /// Whether a vCPU is [held](crate::vcpu::Served::Hold).
    pub fn is_held(&self) -> bool {
        self.gate.holds_any()
    }

    /// Releases the vCPUs that are [held](crate::vcpu::Served::Hold), which must have another state
    /// by now. Call it while all vCPUs are paused.
    pub fn release(&self) {
        self.gate.release();
    }

    /// Calls `f` with each vCPU and its number, on the vCPU's own thread as KVM requires, one after
    /// the other in the order of their numbers, and returns the results. The vCPUs must be paused,
    /// and each is between two instructions when `f` runs. `within` limits the total time, which
    /// includes the time for which a vCPU waits for a page.
    ///
    /// # Errors
    ///
    /// [`ParkedError`], with the first vCPU that cannot be reached. `f` has then run for the vCPUs
    /// before it; if it took too long, it still runs for that one.
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
                // The receiver is gone once the time is up.
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

    /// Returns the reason for which a vCPU has not done its job; `late` is the time that it had.
    fn unreachable(&self, cpu: u32, late: Option<Duration>) -> ParkedError {
        match (self.gate.place(cpu), late) {
            (Some(Place::Ended) | None, _) => ParkedError::Ended { cpu },
            (Some(Place::Parked(IoState::Waiting { gpa })), Some(within)) => {
                ParkedError::Waiting { cpu, gpa, within }
            }
            (_, Some(within)) => ParkedError::Late { cpu, within },
            (_, None) => ParkedError::NotPaused { cpu },
        }
    }

    /// Stops all vCPUs for good: they never enter the guest again.
    ///
    /// # Errors
    ///
    /// [`StillInside`] after `within`. Those vCPUs may be blocked in the kernel on a page;
    /// [`DemandMemory::revoke`](demand_memory::DemandMemory::revoke) ends that.
    pub fn stop(&mut self, within: Duration) -> Result<(), StillInside> {
        self.call_out(Wanted::Stop, within)?;
        for vcpu in self.vcpus.drain(..) {
            // A thread that panicked has printed its message.
            let _ = vcpu.thread.join();
        }
        Ok(())
    }

    fn call_out(&self, wanted: Wanted, within: Duration) -> Result<(), StillInside> {
        self.gate.want(wanted);
        self.vcpus.iter().for_each(|vcpu| vcpu.kick.kick());
        // A vCPU that must stop has to leave a pause, too.
        let cpus = self.gate.until(within, |place| match wanted {
            Wanted::Stop => place == Place::Ended,
            Wanted::Pause | Wanted::Run => place != Place::Running,
        });
        if cpus.is_empty() { Ok(()) } else { Err(StillInside { cpus, within }) }
    }
}

/// Returns the processor time that a thread has used; zero if it has ended.
fn cpu_time(thread: &JoinHandle<()>) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut clock = 0;
    // SAFETY: the thread's id is valid, because its handle exists, so it was not joined. Both calls
    // write only to local variables.
    let known = unsafe {
        libc::pthread_getcpuclockid(thread.as_pthread_t(), &mut clock) == 0
            && libc::clock_gettime(clock, &mut time) == 0
    };
    if !known {
        return Duration::ZERO;
    }
    let nanoseconds = u32::try_from(time.tv_nsec).expect("the kernel returns less than a second");
    Duration::new(time.tv_sec as u64, nanoseconds)
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        // An error cannot be reported here. Late threads end with the process, or when their page
        // arrives.
        let _ = self.stop(Duration::from_secs(2));
    }
}
