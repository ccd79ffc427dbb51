// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread of a vCPU, for any kind of guest.

pub mod error;
pub(crate) mod pause_gate;
pub mod set;

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use demand_paging::{CompleteIo, Error as PagingError, LazyVcpu, Step};
use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED};
use kvm_ioctls::VcpuExit;

use crate::vcpu::error::{UnservedExit, VcpuError};
use crate::vcpu::pause_gate::{IoState, ParkAction, PauseGate};

/// The shortest time out of the guest of which the guest is told: well below the limit of any
/// watchdog.
pub(crate) const LONG_ABSENCE: Duration = Duration::from_secs(1);

/// A message from a vCPU's thread to the VMM.
#[derive(Debug)]
pub enum VcpuEvent {
    /// The vCPU's thread has ended, for any reason: its guest ended, or the vCPU was stopped,
    /// failed or panicked.
    Ended {
        /// The vCPU.
        cpu: u32,
    },
    /// The vCPU cannot continue.
    Failed {
        /// The vCPU.
        cpu: u32,
        /// The cause.
        error: VcpuError,
    },
}

/// The outcome of serving an exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Served {
    /// The vCPU continues.
    Continue,
    /// The vCPU cannot continue before it gets another state. It stays parked outside the guest
    /// until [`Vcpus::release`](crate::vcpu::set::Vcpus::release), and can be paused and stopped
    /// meanwhile.
    Hold,
    /// The vCPU has nothing more to do, and its thread ends.
    End,
    /// The vCPU cannot continue.
    Failed(UnservedExit),
}

/// The machine around the vCPUs, as far as their exits need it: its devices, and its end.
///
/// # Examples
///
/// A machine with one port:
///
/// ```
/// use demand_vmm::vcpu::{ServeExit, Served, unserved};
/// use kvm_ioctls::VcpuExit;
///
/// struct Port80;
///
/// impl ServeExit for Port80 {
///     fn serve(&self, cpu: u32, exit: VcpuExit<'_>) -> Served {
///         match exit {
///             VcpuExit::IoOut(0x80, _) => Served::Continue,
///             other => unserved(cpu, &other),
///         }
///     }
/// }
///
/// assert_eq!(Port80.serve(0, VcpuExit::IoOut(0x80, &[1])), Served::Continue);
/// let Served::Failed(why) = Port80.serve(3, VcpuExit::IoOut(0x81, &[1])) else { panic!() };
/// assert_eq!(why.to_string(), "vCPU 3 wrote 1 bytes to port 0x81, where no device is");
/// ```
pub trait ServeExit: Send + Sync {
    /// Serves an exit of vCPU `cpu`, on the vCPU's thread. The answer to a read goes into the
    /// exit's slice. Two kinds of exits do not come here: those at missing pages, and those by
    /// which KVM reports that it cannot run the vCPU. [`unserved`] handles exits that the machine
    /// does not know.
    ///
    /// This may be called while the vCPU is on its way into a pause, so it must not wait for the
    /// pause's end.
    fn serve(&self, cpu: u32, exit: VcpuExit<'_>) -> Served;
}

/// Returns the outcome of an exit that the machine does not serve: a failure. An exit that only
/// means that `KVM_RUN` has returned is not a failure.
pub fn unserved(cpu: u32, exit: &VcpuExit<'_>) -> Served {
    let exit = match exit {
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => return Served::Continue,
        VcpuExit::IoOut(port, data) => {
            format!("wrote {} bytes to port {port:#x}, where no device is", data.len())
        }
        VcpuExit::IoIn(port, data) => {
            format!("read {} bytes from port {port:#x}, where no device is", data.len())
        }
        VcpuExit::MmioWrite(address, data) => {
            format!("wrote {} bytes at {address:#x}, where no device is", data.len())
        }
        VcpuExit::MmioRead(address, data) => {
            format!("read {} bytes at {address:#x}, where no device is", data.len())
        }
        VcpuExit::Hlt => "halted, and no interrupt can wake it".to_owned(),
        VcpuExit::Shutdown => {
            "met a fault while it handled a double fault (a triple fault); the guest has crashed, \
             or restarts in an unsupported way"
                .to_owned()
        }
        VcpuExit::SystemEvent(kind, data) => {
            format!("asked for system event {kind} {data:x?}, which is unsupported")
        }
        VcpuExit::MemoryFault { flags, gpa, size } => format!(
            "accessed {size} bytes at {gpa:#x}, which KVM could not map (flags {flags:#x}); the \
             kernel's log may say more"
        ),
        exit => format!("left the guest with {exit:?}, which is unsupported"),
    };
    Served::Failed(UnservedExit { cpu, exit })
}

/// The context that all vCPUs of a VM share.
pub struct VcpuContext {
    /// The handler of all exits except those at missing pages.
    pub exits: Arc<dyn ServeExit>,
    /// The time at which the first vCPU entered the guest.
    pub first_run: Arc<OnceLock<Instant>>,
}

impl fmt::Debug for VcpuContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut context = f.debug_struct("VcpuContext");
        context.field("first_run", &self.first_run);
        context.finish_non_exhaustive()
    }
}

/// Reports the end of a vCPU's thread, even after a panic.
struct TellEnd<'a>(u32, &'a PauseGate, &'a dyn Fn(VcpuEvent));

impl Drop for TellEnd<'_> {
    fn drop(&mut self) {
        self.1.ended(self.0);
        (self.2)(VcpuEvent::Ended { cpu: self.0 });
    }
}

/// The reason for the end of a vCPU's thread.
enum End {
    /// A reason that needs no message.
    Quiet,
    /// A failure.
    Failed(VcpuError),
}

/// Runs the guest on a vCPU's thread and serves its exits, until the vCPU halts, fails or is told
/// to stop.
pub(crate) fn run(
    cpu: u32,
    vcpu: LazyVcpu,
    context: &VcpuContext,
    gate: &PauseGate,
    tell: &dyn Fn(VcpuEvent),
) {
    let _ended = TellEnd(cpu, gate, tell);
    let mut runner = Runner {
        cpu,
        vcpu,
        context,
        gate,
        has_run: false,
        held: false,
        absences: (0, 0),
        looks: 0,
    };
    if let End::Failed(error) = runner.run() {
        tell(VcpuEvent::Failed { cpu, error });
    }
}

struct Runner<'a> {
    cpu: u32,
    vcpu: LazyVcpu,
    context: &'a VcpuContext,
    gate: &'a PauseGate,
    /// Whether the vCPU stays out of the guest until the VM is reset.
    held: bool,
    /// Whether the vCPU may have an incomplete I/O or MMIO exit.
    has_run: bool,
    /// Absences that the guest knows of: those of this vCPU, and those of all vCPUs.
    absences: (u64, u64),
    /// The last halt check that was answered.
    looks: u64,
}

impl Runner<'_> {
    fn run(&mut self) -> End {
        let gate = self.gate;
        loop {
            if (!gate.is_open() || self.held)
                && let Err(end) = self.pause(gate)
            {
                return end;
            }
            let absences = (self.vcpu.demand().absences(), gate.absences());
            if absences != self.absences {
                self.absences = absences;
                self.tell_absence();
            }
            let looks = gate.looks();
            if looks != self.looks {
                self.looks = looks;
                gate.note_halted(self.cpu, looks, self.is_halted());
            }
            self.context.first_run.get_or_init(Instant::now);
            self.has_run = true;
            if let Err(end) = self.step() {
                return end;
            }
        }
    }

    fn step(&mut self) -> Result<(), End> {
        match self.vcpu.step() {
            Ok(Step::Again) => Ok(()),
            Ok(Step::Exit(VcpuExit::InternalError)) => Err(self.internal_error()),
            Ok(Step::Exit(exit)) => {
                let begun = Instant::now();
                self.held = serve(self.cpu, self.context, self.gate, exit)?;
                // A device takes no such time: the process was stopped meanwhile, as a rule. The
                // guest must hear of it before it runs, and the main loop may notice only later.
                if begun.elapsed() >= LONG_ABSENCE {
                    self.tell_absence();
                }
                Ok(())
            }
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Parks the vCPU for as long as the gate is closed or the vCPU is held, and runs jobs
    /// meanwhile.
    fn pause(&mut self, gate: &PauseGate) -> Result<(), End> {
        let complete_io = self.has_run && gate.is_pausing();
        let mut io = if complete_io { self.complete_io()? } else { IoState::Complete };
        loop {
            match gate.wait(self.cpu, io) {
                ParkAction::Enter => break,
                ParkAction::End => return Err(End::Quiet),
                ParkAction::CompleteIo => io = self.complete_io()?,
                ParkAction::Run(job) => job(self.vcpu.demand_mut()),
            }
        }
        // The vCPU was released, or it was held again on its way into the pause.
        self.held = self.held && gate.is_held(self.cpu);
        // Even after a short pause: a pause without a job is a single turn.
        self.tell_absence();
        Ok(())
    }

    /// Tells the guest through its clock that the vCPU was held up, so that the guest's watchdogs
    /// do not report a lockup (`KVM_KVMCLOCK_CTRL`, `Documentation/virt/kvm/api.rst`).
    fn tell_absence(&self) {
        match self.vcpu.fd().kvmclock_ctrl() {
            // EINVAL: the guest does not use this clock.
            Err(error) if error.errno() != libc::EINVAL => {
                log::debug!("cannot tell the guest that vCPU {} was paused: {error}", self.cpu);
            }
            _ => {}
        }
    }

    /// Whether no interrupt can wake the vCPU: it is halted with interrupts off, or was never
    /// started.
    fn is_halted(&self) -> bool {
        const INTERRUPTS: u64 = 1 << 9;
        let fd = self.vcpu.fd();
        match fd.get_mp_state().map(|state| state.mp_state) {
            Ok(KVM_MP_STATE_HALTED) => {
                fd.get_regs().is_ok_and(|registers| registers.rflags & INTERRUPTS == 0)
            }
            Ok(state) => matches!(state, KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED),
            Err(_) => false,
        }
    }

    /// Completes pending I/O, as far as that does not need a missing page.
    fn complete_io(&mut self) -> Result<IoState, End> {
        loop {
            match self.vcpu.complete_pending_io() {
                Ok(CompleteIo::Again) => {}
                Ok(CompleteIo::Done) => return Ok(IoState::Complete),
                Ok(CompleteIo::Waiting { gpa }) => return Ok(IoState::Waiting { gpa }),
                Ok(CompleteIo::Exit(VcpuExit::InternalError)) => return Err(self.internal_error()),
                Ok(CompleteIo::Exit(exit)) => {
                    self.held |= serve(self.cpu, self.context, self.gate, exit)?;
                }
                Err(error) => return Err(self.failed(error)),
            }
        }
    }

    fn failed(&self, error: PagingError) -> End {
        match error {
            PagingError::Ended => End::Quiet,
            source => End::Failed(VcpuError::Step { cpu: self.cpu, source }),
        }
    }

    /// Returns the error for KVM's internal errors, most of which are instructions that it cannot
    /// emulate.
    fn internal_error(&mut self) -> End {
        // SAFETY: the vCPU's last exit was KVM_EXIT_INTERNAL_ERROR, so `internal` is the union's
        // member in use, and all bytes are valid values of it.
        let suberror = unsafe {
            self.vcpu.demand_mut().fd_mut().get_kvm_run().__bindgen_anon_1.internal.suberror
        };
        let rip = self.vcpu.fd().get_regs().ok().map(|registers| registers.rip);
        End::Failed(VcpuError::Internal { cpu: self.cpu, rip, suberror })
    }
}

/// Serves an exit. Returns whether the vCPU is held from now on.
fn serve(
    cpu: u32,
    context: &VcpuContext,
    gate: &PauseGate,
    exit: VcpuExit<'_>,
) -> Result<bool, End> {
    if let VcpuExit::FailEntry(reason, _) = exit {
        return Err(End::Failed(VcpuError::Entry { cpu, reason }));
    }
    match context.exits.serve(cpu, exit) {
        Served::Continue => Ok(false),
        Served::Hold => {
            gate.hold(cpu);
            Ok(true)
        }
        Served::End => Err(End::Quiet),
        Served::Failed(exit) => Err(End::Failed(exit.into())),
    }
}
