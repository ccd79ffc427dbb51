// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread of a vCPU, for any kind of guest.

pub(crate) mod gate;
pub mod set;

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use demand_kvm::{DemandVcpu, FaultError, FaultHandler, KickError, Settle, Step, StepError};
use demand_memory::DemandMemory;
use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED};
use kvm_ioctls::VcpuExit;

use crate::vcpu::gate::{Gate, Settled, Turn};

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
        /// The cause: one line.
        message: String,
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
    /// The vCPU cannot continue. One line names the vCPU and the cause.
    Failed(String),
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
/// assert_eq!(why, "vCPU 3 wrote 1 bytes to port 0x81, where no device is");
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

/// Returns the outcome of an exit that the machine does not serve: a failure of one line. An exit
/// that only means that `KVM_RUN` has returned is not a failure.
pub fn unserved(cpu: u32, exit: &VcpuExit<'_>) -> Served {
    let what = match exit {
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
    Served::Failed(format!("vCPU {cpu} {what}"))
}

/// The context that all vCPUs of a VM share.
pub struct VcpuContext {
    /// The handler of exits at missing pages.
    pub faults: FaultHandler,
    /// The guest's memory, for accesses that KVM leaves to the VMM.
    pub memory: DemandMemory,
    /// The handler of all other exits.
    pub exits: Arc<dyn ServeExit>,
    /// The time at which the first vCPU entered the guest.
    pub first_run: OnceLock<Instant>,
}

/// Errors from starting a vCPU's thread.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The vCPU cannot be kicked.
    #[error(transparent)]
    Kick(#[from] KickError),
    /// The host has no more threads.
    #[error("cannot start a vCPU thread: {0}; raise the limit of threads (ulimit -u)")]
    Thread(#[from] io::Error),
}

/// Reports the end of a vCPU's thread, even after a panic.
struct TellEnd<'a>(u32, &'a Gate, &'a dyn Fn(VcpuEvent));

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
    /// A failure: one line.
    Failed(String),
}

/// Runs the guest on a vCPU's thread and serves its exits, until the vCPU halts, fails or is told
/// to stop.
pub(crate) fn run(
    cpu: u32,
    vcpu: DemandVcpu,
    context: &VcpuContext,
    gate: &Gate,
    tell: &dyn Fn(VcpuEvent),
) {
    let _ended = TellEnd(cpu, gate, tell);
    vcpu.kick().attach();
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
    if let End::Failed(message) = runner.run() {
        tell(VcpuEvent::Failed { cpu, message });
    }
}

struct Runner<'a> {
    cpu: u32,
    vcpu: DemandVcpu,
    context: &'a VcpuContext,
    gate: &'a Gate,
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
            let absences = (self.vcpu.absences(), gate.absences());
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
        match self.vcpu.step(&self.context.faults, &self.context.memory) {
            Ok(Step::Again) => Ok(()),
            Ok(Step::Exit(VcpuExit::InternalError)) => Err(self.internal_error()),
            Ok(Step::Exit(exit)) => {
                self.held = serve(self.cpu, self.context, self.gate, exit)?;
                Ok(())
            }
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Parks the vCPU for as long as the gate is closed or the vCPU is held, and runs jobs
    /// meanwhile.
    fn pause(&mut self, gate: &Gate) -> Result<(), End> {
        let settle = self.has_run && gate.is_pausing();
        let mut settled = if settle { self.settle()? } else { Settled::Yes };
        loop {
            match gate.wait(self.cpu, settled) {
                Turn::Go => break,
                Turn::Stop => return Err(End::Quiet),
                Turn::Settle => settled = self.settle()?,
                Turn::Do(job) => job(&mut self.vcpu),
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
    fn settle(&mut self) -> Result<Settled, End> {
        loop {
            match self.vcpu.settle_step(&self.context.faults, &self.context.memory) {
                Ok(Settle::Again) => {}
                Ok(Settle::Done) => return Ok(Settled::Yes),
                Ok(Settle::Waiting { gpa }) => return Ok(Settled::Waiting { gpa }),
                Ok(Settle::Exit(VcpuExit::InternalError)) => return Err(self.internal_error()),
                Ok(Settle::Exit(exit)) => {
                    self.held |= serve(self.cpu, self.context, self.gate, exit)?;
                }
                Err(error) => return Err(self.failed(error)),
            }
        }
    }

    fn failed(&self, error: StepError) -> End {
        match error {
            StepError::Fault(FaultError::Stopped { .. }) => End::Quiet,
            error => End::Failed(format!("vCPU {}: {error}", self.cpu)),
        }
    }

    /// Returns the error for KVM's internal errors, most of which are instructions that it cannot
    /// emulate.
    fn internal_error(&mut self) -> End {
        let cpu = self.cpu;
        // SAFETY: the vCPU's last exit was KVM_EXIT_INTERNAL_ERROR, so `internal` is the union's
        // member in use, and all bytes are valid values of it.
        let suberror =
            unsafe { self.vcpu.fd_mut().get_kvm_run().__bindgen_anon_1.internal.suberror };
        let why = match suberror {
            kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "cannot emulate an instruction",
            _ => "has met an internal error",
        };
        let at = self.vcpu.fd().get_regs().map_or(String::new(), |r| format!(" at {:#x}", r.rip));
        End::Failed(format!(
            "vCPU {cpu}{at}: KVM {why} (suberror {suberror}); the kernel's log may say more"
        ))
    }
}

/// Serves an exit. Returns whether the vCPU is held from now on.
fn serve(cpu: u32, context: &VcpuContext, gate: &Gate, exit: VcpuExit<'_>) -> Result<bool, End> {
    if let VcpuExit::FailEntry(reason, _) = exit {
        let why = format!(
            "vCPU {cpu}: the processor refused to enter the guest (reason {reason:#x}); the \
             kernel's log may say more"
        );
        return Err(End::Failed(why));
    }
    match context.exits.serve(cpu, exit) {
        Served::Continue => Ok(false),
        Served::Hold => {
            gate.hold(cpu);
            Ok(true)
        }
        Served::End => Err(End::Quiet),
        Served::Failed(message) => Err(End::Failed(message)),
    }
}
