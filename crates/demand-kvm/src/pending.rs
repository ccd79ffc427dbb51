// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Exits that want an answer, which takes pages that may be missing.

use std::sync::Arc;

use demand_memory::Waiter;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::{FaultError, FaultHandler};

/// The most that KVM asks of user space in one MMIO exit, in bytes.
const MMIO_BYTES: usize = 8;

/// An exit of `KVM_RUN` that touches demand-paged memory and must be answered before the vCPU
/// runs again.
///
/// There are two kinds:
///
/// - KVM asks user space to read or write memory as if it were a device's, at an address that has
///   RAM: operands of an instruction that KVM emulates, where the slot's mapping is closed or the
///   kernel keeps to the missing bitmap. It reads a byte at a time and writes up to 8, which may
///   lie in two pages.
/// - The guest writes one of KVM's MSRs that name memory, which [`MsrTrap`](crate::MsrTrap) leaves
///   to user space.
///
/// Answering waits for pages and can be called away. The exit is then still to be answered, and
/// **running the vCPU without an answer loses it**: KVM takes whatever is in the shared page for
/// what was read, and the MSR for written. So this is a value that is kept until
/// [`answer`](Self::answer) has returned `Ok`, also over a pause. A snapshot that is taken
/// meanwhile is right about an MSR, which the guest writes anew. With MMIO the instruction may be
/// half done, so it is answered and completed before: see
/// [`DemandVcpu::settle_step`](crate::DemandVcpu::settle_step).
///
/// [`DemandVcpu`](crate::DemandVcpu) does so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pending {
    /// `KVM_EXIT_MMIO`, a read.
    Read {
        /// Guest physical address.
        gpa: u64,
        /// Bytes to read, 8 at most.
        len: usize,
    },
    /// `KVM_EXIT_MMIO`, a write.
    Write {
        /// Guest physical address.
        gpa: u64,
        /// What to write: the first `len` bytes.
        data: [u8; MMIO_BYTES],
        /// Bytes to write, 8 at most.
        len: usize,
    },
    /// `KVM_EXIT_X86_WRMSR`, because of a filter.
    #[cfg(target_arch = "x86_64")]
    Msr {
        /// Number of the MSR.
        index: u32,
        /// What the guest writes to it.
        data: u64,
    },
}

impl Pending {
    /// What an exit of `KVM_RUN` wants, if it is one of these. Accesses to addresses without
    /// demand-paged memory are none: they are a device's.
    pub fn of(exit: &VcpuExit<'_>, handler: &FaultHandler) -> Option<Self> {
        match exit {
            VcpuExit::MmioRead(gpa, data) => handler
                .covers(*gpa, data.len() as u64)
                .then_some(Pending::Read { gpa: *gpa, len: data.len() }),
            VcpuExit::MmioWrite(gpa, written) if handler.covers(*gpa, written.len() as u64) => {
                let mut data = [0; MMIO_BYTES];
                data[..written.len()].copy_from_slice(written);
                Some(Pending::Write { gpa: *gpa, data, len: written.len() })
            }
            #[cfg(target_arch = "x86_64")]
            VcpuExit::X86Wrmsr(write)
                if write.reason == kvm_ioctls::MsrExitReason::Filter
                    && crate::own_pages::own_msrs().any(|own| own == write.index) =>
            {
                Some(Pending::Msr { index: write.index, data: write.data })
            }
            _ => None,
        }
    }

    /// Whether the guest's instruction is half done as long as this has no answer. KVM shows the
    /// state before a write of an MSR.
    pub(crate) fn is_half_done(&self) -> bool {
        matches!(self, Pending::Read { .. } | Pending::Write { .. })
    }

    /// Has a write of an MSR fault in the guest. What else waits completes with whatever KVM finds in
    /// the exit: only for a vCPU whose state is thrown away.
    pub(crate) fn refuse(&self, vcpu: &mut VcpuFd) {
        #[cfg(target_arch = "x86_64")]
        if let Pending::Msr { .. } = self {
            let run = vcpu.get_kvm_run();
            run.__bindgen_anon_1.msr.error = 1;
        }
    }

    /// Fetches what is missing and answers the exit: the vCPU can be run again when this returns
    /// `Ok`. `memory` is the VM's, of which the accesses are made; it may be a
    /// [`DemandMemory`](demand_memory::DemandMemory), and must not fault. Called on the vCPU's
    /// thread; it waits as long as the source does.
    ///
    /// # Errors
    ///
    /// [`FaultError::Kicked`]: nothing was answered, call it again.
    /// [`FaultError::Stopped`], [`FaultError::NoMemory`] and [`FaultError::Msr`] are final.
    pub fn answer(
        &self,
        vcpu: &mut VcpuFd,
        handler: &FaultHandler,
        memory: &impl Bytes<GuestAddress>,
        waiter: &Arc<Waiter>,
    ) -> Result<(), FaultError> {
        match *self {
            Pending::Read { gpa, len } => {
                handler.fetch(gpa, len as u64, waiter)?;
                let mut data = [0; MMIO_BYTES];
                memory
                    .read_slice(&mut data[..len], GuestAddress(gpa))
                    .map_err(|_| FaultError::NoMemory { gpa, len })?;
                let run = vcpu.get_kvm_run();
                // SAFETY: the vCPU's last exit was KVM_EXIT_MMIO, and any bytes are a value of
                // this member.
                let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
                mmio.data[..len].copy_from_slice(&data[..len]);
                Ok(())
            }
            Pending::Write { gpa, data, len } => {
                handler.fetch(gpa, len as u64, waiter)?;
                memory
                    .write_slice(&data[..len], GuestAddress(gpa))
                    .map_err(|_| FaultError::NoMemory { gpa, len })
            }
            #[cfg(target_arch = "x86_64")]
            Pending::Msr { index, data } => {
                if let Some((gpa, len)) = crate::own_pages::named_by_msr(index, data) {
                    handler.fetch(gpa, len, waiter)?;
                }
                let refused = !set_msr(vcpu, index, data)?;
                let run = vcpu.get_kvm_run();
                // SAFETY: the vCPU's last exit was KVM_EXIT_X86_WRMSR, and any bytes are a value
                // of this member.
                let msr = unsafe { &mut run.__bindgen_anon_1.msr };
                // A general protection fault, as the guest would have met without the filter.
                msr.error = u8::from(refused);
                Ok(())
            }
        }
    }
}

/// Sets an MSR; false if KVM does not take the value.
#[cfg(target_arch = "x86_64")]
fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) -> Result<bool, FaultError> {
    let entry = kvm_bindings::kvm_msr_entry { index, data, ..Default::default() };
    let msrs = kvm_bindings::Msrs::from_entries(&[entry]).expect("one entry is few enough");
    let set = vcpu.set_msrs(&msrs).map_err(|error| FaultError::Msr { index, data, error })?;
    Ok(set == 1)
}
