// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vCPU with all of its demand-paging exits handled.

use std::time::{Duration, Instant};

use demand_memory::{PAGE_SIZE, Waiter};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::changes::pause;
use crate::fault::Fault;
use crate::slot_engine::{Stop, Through};
use crate::{FaultError, FaultHandler, KickError, MarkerFaults, PendingExit, VcpuKick};

/// The outcome of one step of a vCPU.
#[derive(Debug)]
pub enum Step<'a> {
    /// A demand-paging exit was handled, or the vCPU was kicked. Re-check for pending requests,
    /// then step again.
    Again,
    /// An exit for the VMM to handle. A memory fault that is not on missing pages is one too.
    Exit(VcpuExit<'a>),
}

/// The outcome of one step towards a state that can be saved.
#[derive(Debug)]
pub enum CompleteIo<'a> {
    /// A demand-paging exit was handled. Step again.
    Again,
    /// The vCPU's state is consistent and can be saved: no instruction is half done.
    Done,
    /// The guest's instruction caused another exit. Handle it, then step again.
    Exit(VcpuExit<'a>),
    /// The instruction needs a page that is still missing and has been requested. Step again when
    /// the page may be present.
    Waiting {
        /// Guest physical address of the page, or of the bytes needed from it.
        gpa: u64,
    },
}

/// Errors from stepping a vCPU.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StepError {
    /// A fault was not resolved, or an exit was not completed.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// `KVM_RUN` failed.
    #[error("cannot run the vCPU: {0}; check the kernel log")]
    Run(#[source] kvm_ioctls::Error),
    /// The thread could not be prepared for the signals of
    /// [`Engine::UffdPoison`](crate::Engine::UffdPoison).
    #[error("cannot prepare the vCPU's thread for signals at missing pages: {0}")]
    Signal(#[source] std::io::Error),
}

/// A vCPU on demand-paged memory: runs the guest and handles every exit at a missing page, on the
/// calling thread.
///
/// It does more than call the [`FaultHandler`]. It keeps a [pending exit](PendingExit) until it is
/// completed, even across a pause, and it clears a [kick](VcpuKick) before the caller checks for
/// requests, so that no kick is lost.
///
/// # Examples
///
/// The loop of a vCPU's thread:
///
/// ```
/// use std::sync::atomic::{AtomicBool, Ordering};
///
/// use demand_kvm::{DemandVcpu, FaultHandler, Step, StepError};
/// use demand_memory::DemandMemory;
/// use kvm_ioctls::VcpuExit;
///
/// /// Runs until the guest halts, or until `stop` is set and the vCPU kicked.
/// fn run(
///     vcpu: &mut DemandVcpu,
///     handler: &FaultHandler,
///     memory: &DemandMemory,
///     stop: &AtomicBool,
/// ) -> Result<(), StepError> {
///     while !stop.load(Ordering::Acquire) {
///         match vcpu.step(handler, memory)? {
///             Step::Again => {}
///             Step::Exit(VcpuExit::Hlt) => break,
///             Step::Exit(other) => panic!("{other:?}"),
///         }
///     }
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct DemandVcpu {
    vcpu: VcpuFd,
    kick: VcpuKick,
    /// The exit that must be completed before the vCPU runs again.
    pending: Option<Pending>,
    faults: Faults,
    stuck: StuckExit,
    absences: u64,
}

/// The faults of a vCPU.
#[derive(Debug, Default)]
struct Faults {
    open: OpenFaults,
    markers: MarkerFaults,
}

/// Faults whose wait a kick has ended, and that are not resolved yet.
#[derive(Debug, Default)]
struct OpenFaults(Vec<Fault>);

/// An exit that must be completed.
#[derive(Clone, Copy, Debug)]
struct Pending {
    exit: PendingExit,
    /// The [number](crate::changes::Changes::number) of the handler's changes when the vCPU entered
    /// the guest.
    changes: u64,
}

impl Pending {
    /// Returns whether a failed completion means that the regions were changed since the exit, and
    /// that the access is one to a device.
    fn is_device_now(&self, error: &FaultError, handler: &FaultHandler) -> bool {
        matches!(error, FaultError::NoMemory { .. }) && handler.changes.since(self.changes)
    }
}

/// Longest wait for a page that does not count as an [absence](DemandVcpu::absences).
const LONG_WAIT: Duration = Duration::from_secs(1);

/// Time after which exits that the VMM does not resolve are reported.
const STUCK_AFTER: Duration = Duration::from_secs(5);

/// Number of exits in that time that shows that the VMM does not resolve them.
const STUCK_TIMES: u64 = 20;

/// Memory faults outside of all regions, at one guest address again and again.
#[derive(Debug, Default)]
struct StuckExit {
    /// The address and time of the first of the current series, and their number.
    series: Option<(u64, Instant, u64)>,
}

impl StuckExit {
    /// Notes such an exit. Returns the number of exits if the series must be reported now.
    fn note(&mut self, gpa: u64, now: Instant) -> Option<u64> {
        let (since, times) = match self.series {
            Some((known, since, times)) if known == gpa => (since, times + 1),
            _ => (now, 1),
        };
        let due = now.duration_since(since) >= STUCK_AFTER;
        // A series that is too thin begins again: the guest has passed between its exits.
        let since = if due { now } else { since };
        self.series = Some((gpa, since, if due { 0 } else { times }));
        (due && times >= STUCK_TIMES).then_some(times)
    }
}

impl DemandVcpu {
    /// Wraps a vCPU and makes it kickable.
    ///
    /// # Errors
    ///
    /// [`KickError`].
    pub fn new(vcpu: VcpuFd) -> Result<Self, KickError> {
        let kick = VcpuKick::new(&vcpu)?;
        let stuck = StuckExit::default();
        let faults = Faults::default();
        Ok(DemandVcpu { vcpu, kick, pending: None, faults, stuck, absences: 0 })
    }

    /// Returns the handle that kicks the vCPU, wherever it is stepped: each [`step`](Self::step)
    /// attaches its thread.
    pub fn kick(&self) -> &VcpuKick {
        &self.kick
    }

    /// Returns the vCPU, to inspect it and to set its state. Before setting its state, fetch the
    /// pages that KVM itself reads: see [`own_pages`](crate::own_pages).
    pub fn fd(&self) -> &VcpuFd {
        &self.vcpu
    }

    /// Returns the vCPU for calls that need exclusive access, such as those on its `kvm_run` page.
    pub fn fd_mut(&mut self) -> &mut VcpuFd {
        &mut self.vcpu
    }

    /// Returns the exit that is not completed yet. The vCPU's state is consistent only after
    /// [`complete_pending_io`](Self::complete_pending_io).
    pub fn pending(&self) -> Option<PendingExit> {
        self.pending.map(|pending| pending.exit)
    }

    /// Returns how often the guest was held up for a time that it cannot detect: its thread waited
    /// for a page for more than a second, or left `KVM_RUN` because of a signal that is not a
    /// [kick](VcpuKick), for example when the process is stopped (SIGSTOP, the freezer, a
    /// debugger). The VMM should then notify a guest with kvm-clock (`KVM_KVMCLOCK_CTRL`), or the
    /// guest's watchdogs report a lockup.
    pub fn absences(&self) -> u64 {
        self.absences
    }

    /// Completes the pending exit, then runs the vCPU until its next exit. `memory` is the VM's
    /// memory (see [`PendingExit::complete`]). It waits as long as the source does, unless the vCPU
    /// is kicked.
    ///
    /// An MMIO exit at an address whose region was removed or inserted meanwhile is handled as
    /// [`PendingExit`] says: the caller gets it if the address is no longer memory, or not yet.
    ///
    /// A memory fault that lies in none of the handler's regions is an exit for the caller. If the
    /// guest stays at it for 5 seconds, a line in the log says so.
    ///
    /// # Errors
    ///
    /// [`StepError`]. A kick is not an error.
    pub fn step(
        &mut self,
        handler: &FaultHandler,
        memory: &impl Bytes<GuestAddress>,
    ) -> Result<Step<'_>, StepError> {
        self.expect_signal(handler)?;
        match self.faults.markers.fetch_tables(&self.vcpu, handler, memory, self.kick.waiter()) {
            Err(StepError::Fault(error)) => return self.kick.again_if_kicked(error),
            fetched => fetched?,
        }
        if let Some(pending) = self.pending {
            match pending.exit.complete(&mut self.vcpu, handler, memory, self.kick.waiter()) {
                Ok(()) => self.pending = None,
                Err(error) if pending.is_device_now(&error, handler) => {
                    self.pending = None;
                    let mmio = pending.exit.into_mmio(&mut self.vcpu);
                    return mmio.map(Step::Exit).ok_or(error.into());
                }
                Err(error) => return self.kick.again_if_kicked(error),
            }
        }
        self.count_resolved(handler);
        let (pending, faults) = (&mut self.pending, &mut self.faults);
        match run(&mut self.vcpu, pending, faults, handler, self.kick.waiter()) {
            Ok(RunOutcome::Handled { waited }) => {
                self.absences += u64::from(waited > LONG_WAIT);
                Ok(Step::Again)
            }
            Ok(RunOutcome::Interrupted) => {
                self.absences += u64::from(!self.kick.is_kicked());
                self.kick.clear();
                Ok(Step::Again)
            }
            Ok(RunOutcome::Exit(exit)) => {
                if let VcpuExit::MemoryFault { gpa, .. } = exit
                    && let Some(times) = self.stuck.note(gpa, Instant::now())
                {
                    log::error!(
                        "the guest does not get past guest address {gpa:#x}: its vCPU has left \
                         KVM_RUN there {times} times in {} s, for a memory fault in no region of \
                         its fault handler; add the region, or end the guest",
                        STUCK_AFTER.as_secs()
                    );
                }
                Ok(Step::Exit(exit))
            }
            Err(StepError::Fault(error)) => self.kick.again_if_kicked(error),
            Err(error) => Err(error),
        }
    }

    /// Takes a step towards a state that can be saved, without running the guest: completes the
    /// pending exit, and lets KVM finish the instruction that caused it. After handling the exits
    /// of [`step`](Self::step), call this until it returns [`CompleteIo::Done`].
    ///
    /// KVM finishes an access to a port or to MMIO only at the next `KVM_RUN`. Before that the
    /// registers and memory are inconsistent with each other. With `immediate_exit` set, `KVM_RUN`
    /// finishes the access and returns (`Documentation/virt/kvm/api.rst`, section 5, on
    /// `KVM_EXIT_IO` and `KVM_EXIT_MMIO`). An access in several parts causes an exit for each part.
    ///
    /// It never waits for a page. Like [`step`](Self::step) it clears a [kick](VcpuKick) before it
    /// returns, so the caller checks for requests afterwards.
    ///
    /// A guest's write to one of KVM's MSRs that waits for its page is [`CompleteIo::Done`]: KVM
    /// shows the state before the instruction.
    ///
    /// # Errors
    ///
    /// [`StepError`].
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_kvm::{CompleteIo, DemandVcpu, FaultHandler, StepError};
    /// use demand_memory::DemandMemory;
    /// use kvm_ioctls::VcpuExit;
    ///
    /// /// Returns whether the vCPU's state can be saved.
    /// fn complete(
    ///     vcpu: &mut DemandVcpu,
    ///     handler: &FaultHandler,
    ///     memory: &DemandMemory,
    ///     serve: impl Fn(VcpuExit<'_>),
    /// ) -> Result<bool, StepError> {
    ///     loop {
    ///         match vcpu.complete_pending_io(handler, memory)? {
    ///             CompleteIo::Again => {}
    ///             CompleteIo::Done => return Ok(true),
    ///             CompleteIo::Exit(exit) => serve(exit),
    ///             CompleteIo::Waiting { .. } => return Ok(false),
    ///         }
    ///     }
    /// }
    /// ```
    pub fn complete_pending_io(
        &mut self,
        handler: &FaultHandler,
        memory: &impl Bytes<GuestAddress>,
    ) -> Result<CompleteIo<'_>, StepError> {
        self.expect_signal(handler)?;
        // With the kick set, KVM does not run the guest and this thread does not wait for pages.
        self.kick.kick_self();
        let _clear = ClearKick(&self.kick);
        if let Some(pending) = self.pending {
            match pending.exit.complete(&mut self.vcpu, handler, memory, self.kick.waiter()) {
                Ok(()) => self.pending = None,
                Err(FaultError::Kicked { gpa }) if pending.exit.is_half_done() => {
                    return Ok(CompleteIo::Waiting { gpa });
                }
                Err(FaultError::Kicked { .. }) => return Ok(CompleteIo::Done),
                Err(error) if pending.is_device_now(&error, handler) => {
                    self.pending = None;
                    let mmio = pending.exit.into_mmio(&mut self.vcpu);
                    return mmio.map(CompleteIo::Exit).ok_or(error.into());
                }
                Err(error) => return Err(error.into()),
            }
        }
        let (pending, faults) = (&mut self.pending, &mut self.faults);
        match run(&mut self.vcpu, pending, faults, handler, self.kick.waiter()) {
            Ok(RunOutcome::Handled { .. }) => Ok(CompleteIo::Again),
            Ok(RunOutcome::Interrupted) => Ok(CompleteIo::Done),
            Ok(RunOutcome::Exit(exit)) => Ok(CompleteIo::Exit(exit)),
            Err(StepError::Fault(FaultError::Kicked { gpa })) => Ok(CompleteIo::Waiting { gpa }),
            Err(error) => Err(error),
        }
    }

    /// Prepares the calling thread for kicks, and for signals where the mapping has markers.
    #[inline]
    fn expect_signal(&mut self, handler: &FaultHandler) -> Result<(), StepError> {
        self.kick.attach_once();
        self.faults.markers.prepare(&self.vcpu, handler).map_err(StepError::Signal)
    }

    /// Counts the open faults whose pages have arrived since: the guest does not exit there again.
    fn count_resolved(&mut self, handler: &FaultHandler) {
        let (waiter, absences) = (self.kick.waiter(), &mut self.absences);
        self.faults.open.0.retain(|fault| {
            if !handler.has_pages_of(fault) {
                return true;
            }
            match handler.resolve(fault, waiter) {
                Ok((waited, _)) => *absences += u64::from(waited > LONG_WAIT),
                // The guest exits there again.
                Err(error) => log::debug!("{error}"),
            }
            false
        });
    }

    /// Drops the pending exit, if any, without making its accesses: for a vCPU whose state is about
    /// to be replaced. The guest could not resume from the state this leaves. It never waits for a
    /// page.
    ///
    /// # Errors
    ///
    /// [`StepError::Run`].
    pub fn abandon(&mut self) -> Result<(), StepError> {
        self.faults.open.0.clear();
        let Some(pending) = self.pending.take() else { return Ok(()) };
        pending.exit.refuse(&mut self.vcpu);
        // KVM finishes the instruction, possibly part by part, and does not run the guest.
        self.kick.kick_self();
        let _clear = ClearKick(&self.kick);
        loop {
            match self.vcpu.run() {
                Ok(_) => {}
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return Ok(()),
                Err(error) => return Err(StepError::Run(error)),
            }
        }
    }
}

/// The outcome of one `KVM_RUN`.
enum RunOutcome<'a> {
    /// A demand-paging exit, which was resolved or is now pending.
    Handled {
        /// Time taken to resolve the fault; zero for an exit that is pending.
        waited: Duration,
    },
    /// A kick or another signal interrupted the vCPU.
    Interrupted,
    /// An exit for the VMM.
    Exit(VcpuExit<'a>),
}

/// Runs a vCPU that has no pending exit.
fn run<'a>(
    vcpu: &'a mut VcpuFd,
    pending: &mut Option<Pending>,
    faults: &mut Faults,
    handler: &FaultHandler,
    waiter: &Waiter,
) -> Result<RunOutcome<'a>, StepError> {
    let changes = handler.changes.number();
    let exit = match vcpu.run() {
        Ok(exit) => exit,
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
            let Faults { open, markers } = faults;
            let resolve = |gpa| open.resolve(gpa, PAGE_SIZE, Stop::Marker, handler, waiter);
            return Ok(match markers.resolve_by(handler, changes, resolve)? {
                Some(waited) => RunOutcome::Handled { waited },
                None => RunOutcome::Interrupted,
            });
        }
        // The mapping of a region that is being removed is inaccessible before its slot is gone.
        Err(error) if error.errno() == libc::EFAULT && handler.changes.since(changes) => {
            return Ok(met_change());
        }
        Err(error) => return Err(StepError::Run(error)),
    };
    *pending = PendingExit::of(&exit, handler).map(|exit| Pending { exit, changes });
    if pending.is_some() {
        return Ok(RunOutcome::Handled { waited: Duration::ZERO });
    }
    match exit {
        VcpuExit::MemoryFault { flags, gpa, size } => {
            match faults.open.resolve(gpa, size, Stop::Exit { flags }, handler, waiter) {
                Ok((waited, _)) => Ok(RunOutcome::Handled { waited }),
                Err(FaultError::Unexpected { .. } | FaultError::Stopped { .. })
                    if handler.changes.since(changes) =>
                {
                    Ok(met_change())
                }
                // Not a fault on missing pages: the VMM decides.
                Err(FaultError::Unexpected { .. }) => Ok(RunOutcome::Exit(exit)),
                Err(error) => Err(error.into()),
            }
        }
        exit => Ok(RunOutcome::Exit(exit)),
    }
}

impl OpenFaults {
    /// Resolves a fault. If a kick ends its wait, it stays open.
    fn resolve(
        &mut self,
        gpa: u64,
        size: u64,
        stop: Stop,
        handler: &FaultHandler,
        waiter: &Waiter,
    ) -> Result<(Duration, Through), FaultError> {
        let known = self.0.iter().position(|fault| fault.gpa == gpa);
        let known = known.map(|index| self.0.swap_remove(index));
        let begun = known.map_or_else(Instant::now, |fault| fault.begun);
        let fault = Fault { gpa, size, stop, begun };
        let resolved = handler.resolve(&fault, waiter);
        if matches!(resolved, Err(FaultError::Kicked { .. })) {
            self.0.push(fault);
        }
        resolved
    }
}

/// The outcome of a run that met a change of the VM's regions: the vCPU runs again, after a moment.
fn met_change<'a>() -> RunOutcome<'a> {
    pause();
    RunOutcome::Handled { waited: Duration::ZERO }
}

/// Clears a kick when dropped, on every path out of the function.
struct ClearKick<'a>(&'a VcpuKick);

impl Drop for ClearKick<'_> {
    fn drop(&mut self) {
        self.0.clear();
    }
}

impl VcpuKick {
    /// Turns a kicked wait into another step, and returns all other errors.
    fn again_if_kicked<'a>(&self, error: FaultError) -> Result<Step<'a>, StepError> {
        if !matches!(error, FaultError::Kicked { .. }) {
            return Err(error.into());
        }
        // Before the caller checks for requests. The page is still being fetched.
        self.clear();
        Ok(Step::Again)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_at_one_address_are_reported() {
        let (mut stuck, begun) = (StuckExit::default(), Instant::now());
        let at = |tenths: u32| begun + tenths * Duration::from_millis(100);
        for tenths in 0..50 {
            assert_eq!(stuck.note(0x5000, at(tenths)), None);
        }
        assert_eq!(stuck.note(0x5000, at(50)), Some(51));
        assert_eq!(stuck.note(0x5000, at(51)), None, "once in 5 seconds");
        assert_eq!(stuck.note(0x6000, at(101)), None, "another address");
        assert_eq!(stuck.note(0x6000, at(152)), None, "two exits in 5 seconds");
    }
}
