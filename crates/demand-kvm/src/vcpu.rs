// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vCPU with all of its demand-paging exits handled.

use std::sync::Arc;
use std::time::{Duration, Instant};

use demand_memory::Waiter;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::fault::Fault;
use crate::{FaultError, FaultHandler, KickError, Pending, VcpuKick};

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
pub enum Settle<'a> {
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
    Run(kvm_ioctls::Error),
}

/// A vCPU on demand-paged memory: runs the guest and handles every exit at a missing page, on the
/// calling thread.
///
/// It does more than call the [`FaultHandler`]. It keeps a [pending exit](Pending) until it is
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
///     vcpu.kick().attach();
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
    /// Faults whose wait a kick has ended, and that are not resolved yet.
    open: Vec<Fault>,
    absences: u64,
}

/// Longest wait for a page that does not count as an [absence](DemandVcpu::absences).
const LONG_WAIT: Duration = Duration::from_secs(1);

impl DemandVcpu {
    /// Wraps a vCPU and makes it kickable.
    ///
    /// # Errors
    ///
    /// [`KickError`].
    pub fn new(vcpu: VcpuFd) -> Result<Self, KickError> {
        let kick = VcpuKick::new(&vcpu)?;
        Ok(DemandVcpu { vcpu, kick, pending: None, open: Vec::new(), absences: 0 })
    }

    /// Returns the handle that kicks the vCPU. The thread that steps the vCPU attaches itself
    /// first.
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
    /// [`settle_step`](Self::settle_step).
    pub fn pending(&self) -> Option<Pending> {
        self.pending
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
    /// memory (see [`Pending::answer`]). It waits as long as the source does, unless the vCPU is
    /// kicked.
    ///
    /// # Errors
    ///
    /// [`StepError`]. A kick is not an error.
    pub fn step(
        &mut self,
        handler: &FaultHandler,
        memory: &impl Bytes<GuestAddress>,
    ) -> Result<Step<'_>, StepError> {
        if let Some(exit) = self.pending {
            match exit.answer(&mut self.vcpu, handler, memory, self.kick.waiter()) {
                Ok(()) => self.pending = None,
                Err(error) => return self.kick.called_away(error),
            }
        }
        self.count_resolved(handler);
        let (pending, open) = (&mut self.pending, &mut self.open);
        match run(&mut self.vcpu, pending, open, handler, self.kick.waiter()) {
            Ok(Ran::Served { waited }) => {
                self.absences += u64::from(waited > LONG_WAIT);
                Ok(Step::Again)
            }
            Ok(Ran::CalledAway) => {
                self.absences += u64::from(!self.kick.is_kicked());
                self.kick.clear();
                Ok(Step::Again)
            }
            Ok(Ran::Exit(exit)) => Ok(Step::Exit(exit)),
            Err(StepError::Fault(error)) => self.kick.called_away(error),
            Err(error) => Err(error),
        }
    }

    /// Takes a step towards a state that can be saved, without running the guest: completes the
    /// pending exit, and lets KVM finish the instruction that caused it. After handling the exits
    /// of [`step`](Self::step), call this until it returns [`Settle::Done`].
    ///
    /// KVM finishes an access to a port or to MMIO only at the next `KVM_RUN`. Before that the
    /// registers and memory are inconsistent with each other. With `immediate_exit` set, `KVM_RUN`
    /// finishes the access and returns (`Documentation/virt/kvm/api.rst`, section 5, on
    /// `KVM_EXIT_IO` and `KVM_EXIT_MMIO`). An access in several parts causes an exit for each part.
    ///
    /// It never waits for a page. Like [`step`](Self::step) it clears a [kick](VcpuKick) before it
    /// returns, so the caller checks for requests afterwards.
    ///
    /// A guest's write to one of KVM's MSRs that waits for its page is [`Settle::Done`]: KVM shows
    /// the state before the instruction.
    ///
    /// # Errors
    ///
    /// [`StepError`].
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_kvm::{DemandVcpu, FaultHandler, Settle, StepError};
    /// use demand_memory::DemandMemory;
    /// use kvm_ioctls::VcpuExit;
    ///
    /// /// Returns whether the vCPU's state can be saved.
    /// fn settle(
    ///     vcpu: &mut DemandVcpu,
    ///     handler: &FaultHandler,
    ///     memory: &DemandMemory,
    ///     serve: impl Fn(VcpuExit<'_>),
    /// ) -> Result<bool, StepError> {
    ///     loop {
    ///         match vcpu.settle_step(handler, memory)? {
    ///             Settle::Again => {}
    ///             Settle::Done => return Ok(true),
    ///             Settle::Exit(exit) => serve(exit),
    ///             Settle::Waiting { .. } => return Ok(false),
    ///         }
    ///     }
    /// }
    /// ```
    pub fn settle_step(
        &mut self,
        handler: &FaultHandler,
        memory: &impl Bytes<GuestAddress>,
    ) -> Result<Settle<'_>, StepError> {
        // With the kick set, KVM does not run the guest and this thread does not wait for pages.
        self.kick.kick_self();
        let _clear = ClearKick(&self.kick);
        if let Some(exit) = self.pending {
            match exit.answer(&mut self.vcpu, handler, memory, self.kick.waiter()) {
                Ok(()) => self.pending = None,
                Err(FaultError::Kicked { gpa }) if exit.is_half_done() => {
                    return Ok(Settle::Waiting { gpa });
                }
                Err(FaultError::Kicked { .. }) => return Ok(Settle::Done),
                Err(error) => return Err(error.into()),
            }
        }
        let (pending, open) = (&mut self.pending, &mut self.open);
        match run(&mut self.vcpu, pending, open, handler, self.kick.waiter()) {
            Ok(Ran::Served { .. }) => Ok(Settle::Again),
            Ok(Ran::CalledAway) => Ok(Settle::Done),
            Ok(Ran::Exit(exit)) => Ok(Settle::Exit(exit)),
            Err(StepError::Fault(FaultError::Kicked { gpa })) => Ok(Settle::Waiting { gpa }),
            Err(error) => Err(error),
        }
    }

    /// Counts the open faults whose pages have arrived since: the guest does not exit there again.
    fn count_resolved(&mut self, handler: &FaultHandler) {
        let (waiter, absences) = (self.kick.waiter(), &mut self.absences);
        self.open.retain(|fault| {
            if !handler.has_pages_of(fault) {
                return true;
            }
            match handler.resolve(fault, waiter) {
                Ok(waited) => *absences += u64::from(waited > LONG_WAIT),
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
        self.open.clear();
        let Some(pending) = self.pending.take() else { return Ok(()) };
        pending.refuse(&mut self.vcpu);
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
enum Ran<'a> {
    /// A demand-paging exit, which was resolved or is now pending.
    Served {
        /// Time taken to resolve the fault; zero for an exit that is pending.
        waited: Duration,
    },
    /// A kick or another signal interrupted the vCPU.
    CalledAway,
    /// An exit for the VMM.
    Exit(VcpuExit<'a>),
}

/// Runs a vCPU that has no pending exit.
fn run<'a>(
    vcpu: &'a mut VcpuFd,
    pending: &mut Option<Pending>,
    open: &mut Vec<Fault>,
    handler: &FaultHandler,
    waiter: &Arc<Waiter>,
) -> Result<Ran<'a>, StepError> {
    let exit = match vcpu.run() {
        Ok(exit) => exit,
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
            return Ok(Ran::CalledAway);
        }
        Err(error) => return Err(StepError::Run(error)),
    };
    *pending = Pending::of(&exit, handler);
    if pending.is_some() {
        return Ok(Ran::Served { waited: Duration::ZERO });
    }
    match exit {
        VcpuExit::MemoryFault { flags, gpa, size } => {
            let known = open.iter().position(|fault| fault.gpa == gpa);
            let known = known.map(|index| open.swap_remove(index));
            let begun = known.map_or_else(Instant::now, |fault| fault.begun);
            let fault = Fault { gpa, size, flags, begun };
            match handler.resolve(&fault, waiter) {
                Ok(waited) => Ok(Ran::Served { waited }),
                // Not a fault on missing pages: the VMM decides.
                Err(FaultError::Unexpected { .. }) => Ok(Ran::Exit(exit)),
                Err(error) => {
                    if matches!(error, FaultError::Kicked { .. }) {
                        open.push(fault);
                    }
                    Err(error.into())
                }
            }
        }
        exit => Ok(Ran::Exit(exit)),
    }
}

/// Clears a kick when dropped, on every path out of the function.
struct ClearKick<'a>(&'a VcpuKick);

impl Drop for ClearKick<'_> {
    fn drop(&mut self) {
        self.0.clear();
    }
}

impl VcpuKick {
    /// Turns a kicked wait into another step, and passes on all other errors.
    fn called_away<'a>(&self, error: FaultError) -> Result<Step<'a>, StepError> {
        if !matches!(error, FaultError::Kicked { .. }) {
            return Err(error.into());
        }
        // Before the caller checks for requests. The page is still being fetched.
        self.clear();
        Ok(Step::Again)
    }
}
