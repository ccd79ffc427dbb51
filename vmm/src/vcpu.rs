// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vCPU on its thread, whatever its guest is.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use demand_kvm::{DemandVcpu, FaultError, FaultHandler, KickError, Settle, Step, StepError};
use demand_memory::DemandMemory;
use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED};
use kvm_ioctls::VcpuExit;

use crate::gate::{Gate, Settled, Turn};

/// What a vCPU's thread tells the VMM.
#[derive(Debug)]
pub enum VcpuEvent {
    /// The vCPU's thread has ended, for whatever reason: its guest came to an end, it was stopped,
    /// has failed or panicked.
    Ended {
        /// The vCPU.
        cpu: u32,
    },
    /// The vCPU cannot go on.
    Failed {
        /// The vCPU.
        cpu: u32,
        /// Why: one line.
        message: String,
    },
}

/// What came of serving an exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Served {
    /// The vCPU runs on.
    Continue,
    /// The vCPU cannot run on before it was given another state: it is kept out of the guest until
    /// [`Vcpus::release`](crate::vcpus::Vcpus::release). It can be paused and stopped meanwhile.
    Hold,
    /// The vCPU has nothing more to do: its thread ends.
    End,
    /// The vCPU cannot go on, and why: one line that names the vCPU.
    Failed(String),
}

/// The machine around the vCPUs, as far as they leave the guest for it: its devices, and its end.
///
/// # Examples
///
/// A machine of one port:
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
/// assert_eq!(why, "vCPU 3 wrote 1 bytes to port 0x81, where nothing is");
/// ```
pub trait ServeExit: Send + Sync {
    /// Serves an exit of vCPU `cpu`, on its thread: reads are answered in the exit's slice. It
    /// is called for all exits but those at missing pages, and those by which KVM says that it
    /// cannot run the vCPU; [`unserved`] is for what it does not know.
    ///
    /// It may be called while the vCPU is on its way into a pause, so it must not wait for the
    /// pause's end.
    fn serve(&self, cpu: u32, exit: VcpuExit<'_>) -> Served;
}

/// What comes of an exit that nobody serves: a failure of one line. Exits that only say that
/// `KVM_RUN` was left are none.
pub fn unserved(cpu: u32, exit: &VcpuExit<'_>) -> Served {
    let what = match exit {
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => return Served::Continue,
        VcpuExit::IoOut(port, data) => {
            format!("wrote {} bytes to port {port:#x}, where nothing is", data.len())
        }
        VcpuExit::IoIn(port, data) => {
            format!("read {} bytes from port {port:#x}, where nothing is", data.len())
        }
        VcpuExit::MmioWrite(address, data) => {
            format!("wrote {} bytes at {address:#x}, where nothing is", data.len())
        }
        VcpuExit::MmioRead(address, data) => {
            format!("read {} bytes at {address:#x}, where nothing is", data.len())
        }
        VcpuExit::Hlt => "halted, and no interrupt will come".to_owned(),
        VcpuExit::Shutdown => {
            "met a fault while it handled a double fault (a triple fault); the guest has crashed, \
             or restarts in a way that is not known here"
                .to_owned()
        }
        VcpuExit::SystemEvent(kind, data) => {
            format!("asked for system event {kind} {data:x?}, which is not known here")
        }
        VcpuExit::MemoryFault { flags, gpa, size } => format!(
            "touched {size} bytes at {gpa:#x}, which KVM could not map (flags {flags:#x}); see \
             the kernel's log"
        ),
        exit => format!("left the guest with {exit:?}, which is not known here"),
    };
    Served::Failed(format!("vCPU {cpu} {what}"))
}

/// What all vCPUs of a VM share.
pub struct VcpuContext {
    /// Resolves exits at missing pages.
    pub faults: FaultHandler,
    /// The guest's memory, for what KVM asks the VMM to read and write there.
    pub memory: DemandMemory,
    /// Serves all other exits.
    pub exits: Arc<dyn ServeExit>,
    /// When the first vCPU entered the guest.
    pub first_run: OnceLock<Instant>,
}

/// Why a vCPU's thread could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The vCPU cannot be kicked.
    #[error(transparent)]
    Kick(#[from] KickError),
    /// There is no thread to be had.
    #[error("start a thread for a vCPU: {0}; raise the limit of threads (ulimit -u)")]
    Thread(#[from] io::Error),
}

/// Tells that a vCPU's thread has ended, also by a panic.
struct TellEnd<'a>(u32, &'a Gate, &'a dyn Fn(VcpuEvent));

impl Drop for TellEnd<'_> {
    fn drop(&mut self) {
        self.1.ended(self.0);
        (self.2)(VcpuEvent::Ended { cpu: self.0 });
    }
}

/// Why a vCPU's thread ends.
enum End {
    /// There is nothing to say about it.
    Quiet,
    /// One line.
    Failed(String),
}

/// What a vCPU's thread does: runs the guest, and serves its exits, until it halts, fails, or is
/// told to stop.
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
    /// Whether it is to stay out of the guest until the VM was reset.
    held: bool,
    /// Whether there can be an instruction that is half done.
    has_run: bool,
    /// Absences that the guest was told of: this vCPU's, and those of all vCPUs.
    absences: (u64, u64),
    /// The last look that was answered.
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

    /// Stays out of the guest as long as that is wanted, and does meanwhile what is asked of it.
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
        // Released, or held once more while it was on its way in.
        self.held = self.held && gate.is_held(self.cpu);
        // However short: a pause without a job is one turn.
        self.tell_absence();
        Ok(())
    }

    /// Tells the guest by its clock that it was held up, so that its watchdogs do not take that for
    /// a hang (`KVM_KVMCLOCK_CTRL`, `Documentation/virt/kvm/api.rst`).
    fn tell_absence(&self) {
        match self.vcpu.fd().kvmclock_ctrl() {
            // EINVAL: the guest has no such clock.
            Err(error) if error.errno() != libc::EINVAL => {
                log::debug!("cannot tell vCPU {} that it was held up: {error}", self.cpu);
            }
            _ => {}
        }
    }

    /// Whether no interrupt can make it run: it is halted with interrupts off, or was never started.
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

    /// Makes the vCPU's state whole, as far as that goes without waiting for a page.
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

    /// KVM cannot go on, mostly because it cannot emulate an instruction.
    fn internal_error(&mut self) -> End {
        let cpu = self.cpu;
        // SAFETY: the vCPU's last exit was KVM_EXIT_INTERNAL_ERROR, whose member this is, and any
        // bytes are a value of it.
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

/// Serves an exit; whether the vCPU is held from now on.
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
