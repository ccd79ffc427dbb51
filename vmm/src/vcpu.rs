// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vCPU on its thread.

use std::io;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Instant;

use demand_kvm::{DemandVcpu, FaultError, FaultHandler, KickError, Step, StepError};
use demand_memory::DemandMemory;
use kvm_ioctls::VcpuExit;
use test_guest::guest_code::PORT_WAIT;

use crate::notify::Notify;
use crate::vcpus::Gate;

/// What a vCPU's thread tells the VMM.
#[derive(Debug)]
pub enum VcpuEvent {
    /// The guest wrote a byte to an I/O port: the test guest's word for "done" or "failed".
    Port {
        /// The vCPU.
        cpu: u32,
        /// The port.
        port: u16,
        /// The byte.
        value: u8,
    },
    /// The vCPU's thread has ended, for whatever reason: it halted, was stopped, has failed or
    /// panicked.
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

/// What all vCPUs of a VM share.
pub struct VcpuContext {
    /// Resolves exits at missing pages.
    pub faults: FaultHandler,
    /// The guest's memory, for what KVM asks the VMM to read and write there.
    pub memory: DemandMemory,
    /// The device's register for kicks, where KVM does not serve it by itself.
    pub notify: Option<Arc<Notify>>,
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

/// What a vCPU's thread does: runs the guest, and serves its exits, until it halts, fails, or is
/// told to stop.
pub(crate) fn run(
    cpu: u32,
    mut vcpu: DemandVcpu,
    context: &VcpuContext,
    gate: &Gate,
    tell: &dyn Fn(VcpuEvent),
) {
    let _ended = TellEnd(cpu, gate, tell);
    vcpu.kick().attach();
    let failed = |message: String| tell(VcpuEvent::Failed { cpu, message });
    context.first_run.get_or_init(Instant::now);
    while gate.pass(cpu) {
        let exit = match vcpu.step(&context.faults, &context.memory) {
            Ok(Step::Again) => continue,
            Ok(Step::Exit(exit)) => exit,
            Err(StepError::Fault(FaultError::Stopped { .. })) => return,
            Err(error) => return failed(format!("vCPU {cpu}: {error}")),
        };
        match exit {
            VcpuExit::IoOut(PORT_WAIT, _) => thread::yield_now(),
            VcpuExit::IoOut(port, data) => {
                let value = data.first().copied().unwrap_or_default();
                tell(VcpuEvent::Port { cpu, port, value });
            }
            VcpuExit::MmioWrite(address, data) => {
                let served =
                    context.notify.as_ref().is_some_and(|notify| notify.write(address, data));
                if !served {
                    return failed(format!(
                        "vCPU {cpu} wrote {} bytes at {address:#x}, where nothing is",
                        data.len()
                    ));
                }
            }
            // The test guest has nothing more to do, and no interrupt will come.
            VcpuExit::Hlt => return,
            exit => return failed(format!("vCPU {cpu} left the guest with {exit:?}")),
        }
    }
}
