// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Exits that the VMM must complete, with accesses to pages that may be missing.

use demand_memory::Waiter;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::changes::pause;
use crate::{FaultError, FaultHandler};

/// The most bytes that KVM transfers in one MMIO exit.
const MMIO_BYTES: usize = 8;

/// An exit of `KVM_RUN` that touches demand-paged memory and must be completed before the vCPU runs
/// again.
///
/// There are two kinds:
///
/// - KVM asks user space to read or write RAM as if it were a device: operands of an instruction
///   that KVM emulates, where the slot's mapping is inaccessible or the kernel respects the missing
///   bitmap. KVM reads a byte at a time and writes up to 8 bytes, which may lie in two pages.
/// - The guest writes one of KVM's MSRs that name memory, which [`MsrFilter`](crate::MsrFilter)
///   leaves to user space.
///
/// Completing the exit waits for pages, and a kick can interrupt it. The exit is then still
/// pending, and **running the vCPU without completing it loses it**: KVM takes the content of the
/// shared page for the data read, and considers the MSR written. So keep this value until
/// [`complete`](Self::complete) has returned `Ok`, even across a pause. A snapshot taken meanwhile
/// is correct for an MSR, because the guest repeats the write. An MMIO access may leave the
/// instruction half done, so complete it before the snapshot: see
/// [`DemandVcpu::complete_pending_io`](crate::DemandVcpu::complete_pending_io).
///
/// The regions may change between the exit and its completion (see
/// [`FaultHandler::insert`] and [`FaultHandler::remove`]). The exit is completed with the regions
/// that exist then:
///
/// - An access to memory that was removed, or that the VMM's memory does not have yet, is the
///   access to a device that KVM took it for. [`FaultError::NoMemory`] says so, and the VMM handles
///   the exit like any other MMIO exit.
/// - An access to an address where a region was inserted meanwhile is made in that region.
/// - An MSR that names removed memory is left to KVM. KVM accepts the value, or refuses it, which
///   the guest sees as a general protection fault, as in a VM without a filter.
///
/// [`DemandVcpu`](crate::DemandVcpu) does all of this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PendingExit {
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
        /// The data to write: the first `len` bytes.
        data: [u8; MMIO_BYTES],
        /// Bytes to write, 8 at most.
        len: usize,
    },
    /// `KVM_EXIT_X86_WRMSR`, caused by an MSR filter.
    #[cfg(target_arch = "x86_64")]
    Msr {
        /// Number of the MSR.
        index: u32,
        /// The value that the guest writes.
        data: u64,
    },
}

impl PendingExit {
    /// Returns the pending exit that an exit of `KVM_RUN` stands for, if it is one. Accesses to
    /// addresses without demand-paged memory belong to devices and return `None`.
    pub fn of(exit: &VcpuExit<'_>, handler: &FaultHandler) -> Option<Self> {
        match exit {
            VcpuExit::MmioRead(gpa, data) => handler
                .covers(*gpa, data.len() as u64)
                .then_some(PendingExit::Read { gpa: *gpa, len: data.len() }),
            VcpuExit::MmioWrite(gpa, written) if handler.covers(*gpa, written.len() as u64) => {
                let mut data = [0; MMIO_BYTES];
                data[..written.len()].copy_from_slice(written);
                Some(PendingExit::Write { gpa: *gpa, data, len: written.len() })
            }
            #[cfg(target_arch = "x86_64")]
            VcpuExit::X86Wrmsr(write)
                if write.reason == kvm_ioctls::MsrExitReason::Filter
                    && crate::own_pages::own_msrs().any(|own| own == write.index) =>
            {
                Some(PendingExit::Msr { index: write.index, data: write.data })
            }
            _ => None,
        }
    }

    /// Returns whether the guest's instruction is half done until this is completed. Before a write
    /// of an MSR, KVM shows the state before the instruction.
    pub(crate) fn is_half_done(&self) -> bool {
        matches!(self, PendingExit::Read { .. } | PendingExit::Write { .. })
    }

    /// Returns the exit as KVM reported it, for a device; `None` for an MSR.
    pub(crate) fn into_mmio<'a>(self, vcpu: &'a mut VcpuFd) -> Option<VcpuExit<'a>> {
        if !self.is_half_done() {
            return None;
        }
        let run = vcpu.get_kvm_run();
        // SAFETY: the vCPU's last exit was KVM_EXIT_MMIO, and any bytes are a valid value of this
        // member.
        let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
        match self {
            PendingExit::Read { gpa, len } => Some(VcpuExit::MmioRead(gpa, &mut mmio.data[..len])),
            PendingExit::Write { gpa, len, .. } => {
                Some(VcpuExit::MmioWrite(gpa, &mmio.data[..len]))
            }
            #[cfg(target_arch = "x86_64")]
            PendingExit::Msr { .. } => None,
        }
    }

    /// Makes a pending MSR write fault in the guest. Other pending exits complete with the data
    /// that KVM finds in the shared page, so this is only for a vCPU whose state is about to be
    /// replaced.
    pub(crate) fn refuse(&self, vcpu: &mut VcpuFd) {
        #[cfg(target_arch = "x86_64")]
        if let PendingExit::Msr { .. } = self {
            let run = vcpu.get_kvm_run();
            run.__bindgen_anon_1.msr.error = 1;
        }
    }

    /// Fetches the missing pages and completes the exit: the vCPU can run again when this returns
    /// `Ok`. `memory` is the VM's memory, through which the accesses are made. It may be a
    /// [`DemandMemory`](demand_memory::DemandMemory), and accesses to it must not fault. Call this
    /// on the vCPU's thread. It waits as long as the source does.
    ///
    /// # Errors
    ///
    /// [`FaultError::Kicked`]: the exit is still pending; call this again. [`FaultError::NoMemory`]:
    /// not all of the bytes are guest memory; if regions were changed meanwhile, handle the exit as
    /// an access to a device. [`FaultError::Stopped`] and [`FaultError::Msr`] are final.
    pub fn complete(
        &self,
        vcpu: &mut VcpuFd,
        handler: &FaultHandler,
        memory: &impl Bytes<GuestAddress>,
        waiter: &Waiter,
    ) -> Result<(), FaultError> {
        match *self {
            PendingExit::Read { gpa, len } => {
                fetch(handler, gpa, len as u64, waiter)?;
                let mut data = [0; MMIO_BYTES];
                memory
                    .read_slice(&mut data[..len], GuestAddress(gpa))
                    .map_err(|_| FaultError::NoMemory { gpa, len })?;
                let run = vcpu.get_kvm_run();
                // SAFETY: the vCPU's last exit was KVM_EXIT_MMIO, and any bytes are a valid value
                // of this member.
                let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
                mmio.data[..len].copy_from_slice(&data[..len]);
                Ok(())
            }
            PendingExit::Write { gpa, data, len } => {
                fetch(handler, gpa, len as u64, waiter)?;
                memory
                    .write_slice(&data[..len], GuestAddress(gpa))
                    .map_err(|_| FaultError::NoMemory { gpa, len })
            }
            #[cfg(target_arch = "x86_64")]
            PendingExit::Msr { index, data } => {
                if let Some((gpa, len)) = crate::own_pages::named_by_msr(index, data) {
                    fetch(handler, gpa, len, waiter)?;
                    // KVM looks the pages up in its memslots: a removed region must have left them.
                    handler.changes.settle();
                }
                let refused = !set_msr(vcpu, index, data)?;
                let run = vcpu.get_kvm_run();
                // SAFETY: the vCPU's last exit was KVM_EXIT_X86_WRMSR, and any bytes are a valid
                // value of this member.
                let msr = unsafe { &mut run.__bindgen_anon_1.msr };
                // A general protection fault, which the guest would also get without the filter.
                msr.error = u8::from(refused);
                Ok(())
            }
        }
    }
}

/// Fetches pages like [`FaultHandler::fetch`], from the regions as they are at the end: if a region
/// is removed during the wait, its pages are not needed any more.
fn fetch(handler: &FaultHandler, gpa: u64, len: u64, waiter: &Waiter) -> Result<(), FaultError> {
    loop {
        let changes = handler.changes.number();
        match handler.fetch(gpa, len, waiter) {
            // A removed region leaves the handler before its memory is stopped. If it is other
            // memory that was stopped, the change ends soon.
            Err(FaultError::Stopped { .. }) if handler.changes.since(changes) => pause(),
            outcome => return outcome,
        }
    }
}

/// Sets an MSR; returns false if KVM rejects the value.
#[cfg(target_arch = "x86_64")]
fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) -> Result<bool, FaultError> {
    let entry = kvm_bindings::kvm_msr_entry { index, data, ..Default::default() };
    let msrs = kvm_bindings::Msrs::from_entries(&[entry]).expect("one entry fits");
    let set = vcpu.set_msrs(&msrs).map_err(|source| FaultError::Msr { index, data, source })?;
    Ok(set == 1)
}
