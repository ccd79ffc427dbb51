// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vCPU whose exits at missing pages are served.

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
}

impl DemandVcpu {
    /// Makes of a vCPU one that can be kicked.
    ///
    /// # Errors
    ///
    /// [`KickError`].
    pub fn new(vcpu: VcpuFd) -> Result<Self, KickError> {
        let kick = VcpuKick::new(&vcpu)?;
        Ok(DemandVcpu { vcpu, kick, pending: None })
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

    /// The exit that has no answer yet. The vCPU's state is whole only without one.
    pub fn pending(&self) -> Option<Pending> {
        self.pending
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
        let exit = match self.vcpu.run() {
            Ok(exit) => exit,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                self.kick.clear();
                return Ok(Step::Again);
            }
            Err(error) => return Err(StepError::Run(error)),
        };
        self.pending = Pending::of(&exit, handler);
        if self.pending.is_some() {
            return Ok(Step::Again);
        }
        match exit {
            VcpuExit::MemoryFault { flags, gpa, size } => {
                match handler.handle(gpa, size, flags, self.kick.waiter()) {
                    Ok(()) => Ok(Step::Again),
                    // Not of missing pages: somebody else's, if anybody's.
                    Err(FaultError::Unexpected { .. }) => Ok(Step::Exit(exit)),
                    Err(error) => self.kick.called_away(error),
                }
            }
            exit => Ok(Step::Exit(exit)),
        }
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
