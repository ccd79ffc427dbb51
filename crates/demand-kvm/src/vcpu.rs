// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vCPU whose exits at missing pages are served.

use std::sync::Arc;
use std::time::Duration;

use demand_memory::Waiter;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::{FaultError, FaultHandler, KickError, Pending, VcpuKick};

/// What one step of a vCPU came to.
#[derive(Debug)]
pub enum Step<'a> {
    /// An exit of demand paging was served, or the vCPU was called away: look what is wanted, and
    /// take the next step.
    Again,
    /// An exit for the VMM; also a memory fault that is none of missing pages.
    Exit(VcpuExit<'a>),
}

/// What one step towards a whole state came to.
#[derive(Debug)]
pub enum Settle<'a> {
    /// An exit of demand paging was served: take the next step.
    Again,
    /// The vCPU's state is whole: it can be saved. No instruction is half done.
    Done,
    /// What the guest does leads to another exit: serve it, and take the next step.
    Exit(VcpuExit<'a>),
    /// The instruction needs a page that has not come. It was asked for: take the step again
    /// when it may be there.
    Waiting {
        /// Guest physical address of the page, or of what is wanted of it.
        gpa: u64,
    },
}

/// Why a vCPU cannot take another step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StepError {
    /// A page that it needs does not come.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// KVM cannot run it.
    #[error("run a vCPU: {0}; the kernel's log may say more")]
    Run(kvm_ioctls::Error),
}

/// A vCPU on demand-paged memory: runs the guest, and does all that an exit at a missing page
/// takes, on the calling thread.
///
/// That is more than to call the [`FaultHandler`]: an exit that wants an [answer](Pending) is kept
/// until it has one, also over a pause, and a [kick](VcpuKick) is cleared before the caller looks
/// what is wanted, so that none is lost.
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
/// /// Until the guest halts, or `stop` is set and the vCPU kicked.
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
    /// What must be answered before the vCPU runs again.
    pending: Option<Pending>,
    absences: u64,
}

/// A wait for a page that is longer counts as an [absence](DemandVcpu::absences).
const LONG_WAIT: Duration = Duration::from_secs(1);

impl DemandVcpu {
    /// Makes of a vCPU one that can be kicked.
    ///
    /// # Errors
    ///
    /// [`KickError`].
    pub fn new(vcpu: VcpuFd) -> Result<Self, KickError> {
        let kick = VcpuKick::new(&vcpu)?;
        Ok(DemandVcpu { vcpu, kick, pending: None, absences: 0 })
    }

    /// What calls it away. The thread that takes the steps attaches itself first.
    pub fn kick(&self) -> &VcpuKick {
        &self.kick
    }

    /// The vCPU, to look at and to set up. Fetch what KVM reads by itself before it is set: see
    /// [`own_pages`](crate::own_pages).
    pub fn fd(&self) -> &VcpuFd {
        &self.vcpu
    }

    /// The vCPU, for the calls that need it alone, such as those on what it shares with KVM.
    pub fn fd_mut(&mut self) -> &mut VcpuFd {
        &mut self.vcpu
    }

    /// The exit that has no answer yet. The vCPU's state is whole only after
    /// [`settle_step`](Self::settle_step).
    pub fn pending(&self) -> Option<Pending> {
        self.pending
    }

    /// How often the guest was held up for a time that it cannot know of: its thread waited for a
    /// page for more than a second, or left `KVM_RUN` because of a signal that is not a
    /// [kick](VcpuKick), as when the process is stopped (SIGSTOP, the freezer, a debugger). A guest
    /// with kvm-clock should then be told (`KVM_KVMCLOCK_CTRL`), or its watchdogs report a lockup.
    pub fn absences(&self) -> u64 {
        self.absences
    }

    /// Answers what is to be answered, and runs the vCPU until its next exit. `memory` is the
    /// VM's (see [`Pending::answer`]). It waits as long as the source does, unless the vCPU is
    /// kicked.
    ///
    /// # Errors
    ///
    /// [`StepError`]; being called away is none.
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
        match run(&mut self.vcpu, &mut self.pending, handler, self.kick.waiter()) {
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

    /// Takes a step towards a state that can be saved, without running the guest: answers what is
    /// to be answered, and has KVM complete the instruction that the answer belongs to. To be
    /// called until it says [`Settle::Done`], once the exits of [`step`](Self::step) were served.
    ///
    /// KVM completes an access to a port or to MMIO at the next `KVM_RUN` only, and before that
    /// registers and memory are not of one moment. With `immediate_exit` it completes the access
    /// and returns (`Documentation/virt/kvm/api.rst`, section 5, on `KVM_EXIT_IO` and
    /// `KVM_EXIT_MMIO`). An access that is made in several parts leads to an exit for each.
    ///
    /// It never waits for a page. Like [`step`](Self::step) it clears a [kick](VcpuKick) before it
    /// returns, so the caller looks what is wanted afterwards.
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
    /// /// Whether the vCPU's state can be saved.
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
        // Keeps KVM from running the guest, and this thread from waiting for a page.
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
        match run(&mut self.vcpu, &mut self.pending, handler, self.kick.waiter()) {
            Ok(Ran::Served { .. }) => Ok(Settle::Again),
            Ok(Ran::CalledAway) => Ok(Settle::Done),
            Ok(Ran::Exit(exit)) => Ok(Settle::Exit(exit)),
            Err(StepError::Fault(FaultError::Kicked { gpa })) => Ok(Settle::Waiting { gpa }),
            Err(error) => Err(error),
        }
    }

    /// Forgets the instruction that waits for an answer, if there is one, without making its
    /// accesses: for a vCPU that is about to be given another state. Its state is none that a guest
    /// could go on from. It waits for no page.
    ///
    /// # Errors
    ///
    /// [`StepError::Run`].
    pub fn abandon(&mut self) -> Result<(), StepError> {
        let Some(pending) = self.pending.take() else { return Ok(()) };
        pending.refuse(&mut self.vcpu);
        // KVM completes the instruction, maybe part by part, and does not run the guest.
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

/// What came of one `KVM_RUN`.
enum Ran<'a> {
    /// The exit was one of demand paging, and was served or is kept to be answered.
    Served {
        /// How long its page took.
        waited: Duration,
    },
    /// Something called the vCPU away.
    CalledAway,
    /// An exit for the VMM.
    Exit(VcpuExit<'a>),
}

/// Runs a vCPU whose last exit has been answered.
fn run<'a>(
    vcpu: &'a mut VcpuFd,
    pending: &mut Option<Pending>,
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
            match handler.handle_timed(gpa, size, flags, waiter) {
                Ok(waited) => Ok(Ran::Served { waited }),
                // Not of missing pages: somebody else's, if anybody's.
                Err(FaultError::Unexpected { .. }) => Ok(Ran::Exit(exit)),
                Err(error) => Err(error.into()),
            }
        }
        exit => Ok(Ran::Exit(exit)),
    }
}

/// Clears a kick in the end, however that comes.
struct ClearKick<'a>(&'a VcpuKick);

impl Drop for ClearKick<'_> {
    fn drop(&mut self) {
        self.0.clear();
    }
}

impl VcpuKick {
    /// What comes of a wait that has failed.
    fn called_away<'a>(&self, error: FaultError) -> Result<Step<'a>, StepError> {
        if !matches!(error, FaultError::Kicked { .. }) {
            return Err(error.into());
        }
        // Before the caller looks what is wanted. The page still arrives.
        self.clear();
        Ok(Step::Again)
    }
}
