// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stopping a guest that is about to name memory to KVM.
//!
//! Source: `Documentation/virt/kvm/api.rst`, sections `KVM_X86_SET_MSR_FILTER`,
//! `KVM_CAP_X86_USER_SPACE_MSR` and `KVM_EXIT_X86_WRMSR`.

use std::fmt;
use std::sync::Arc;

use kvm_bindings::kvm_enable_cap;
use kvm_ioctls::{
    Cap, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd,
};

use crate::own_pages::own_msrs;

/// Why a VM's MSRs could not be trapped, or set free again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MsrTrapError {
    /// KVM does not leave MSRs to user space.
    #[error(
        "have KVM leave filtered MSRs to user space: {0}; this needs Linux 5.10, and an MSR \
         filter that is not switched off"
    )]
    Capability(kvm_ioctls::Error),
    /// KVM refused the filter.
    #[error("filter what a guest writes to KVM's MSRs: {0}; free memory")]
    Filter(kvm_ioctls::Error),
}

/// Has a guest's writes to those of KVM's MSRs that name memory leave `KVM_RUN`, so that the
/// memory can be fetched before KVM touches it: [`Pending`](crate::Pending) does the rest. Reads
/// go on as ever.
///
/// To be made before the first vCPU runs, and [`remove`](Self::remove)d once no page is missing.
/// It is the VM's one MSR filter: a VMM with a filter of its own adds
/// `KVM_MSR_FILTER_WRITE` for 0x11, 0x12 and 0x4b564d00 to 0x4b564d04 to that instead.
///
/// Hyper-V's MSRs are not trapped, as KVM does not do for user space all that it does for a guest
/// that writes them. A VMM that offers them to guests does so after paging is done, or restores
/// guests that have them set.
#[derive(Clone)]
pub struct MsrTrap {
    vm: Arc<VmFd>,
}

impl MsrTrap {
    /// Sets the trap.
    ///
    /// # Errors
    ///
    /// [`MsrTrapError`].
    pub fn new(vm: &Arc<VmFd>) -> Result<Self, MsrTrapError> {
        user_space_msrs(vm, MsrExitReason::Filter)?;
        // One bit for each MSR, all 0: denied, that is, left to user space.
        const DENIED: [u8; 1] = [0];
        let ranges: Vec<_> = own_msrs()
            .map(|base| MsrFilterRange {
                flags: MsrFilterRangeFlags::WRITE,
                base,
                msr_count: 1,
                bitmap: &DENIED,
            })
            .collect();
        vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges).map_err(MsrTrapError::Filter)?;
        Ok(MsrTrap { vm: vm.clone() })
    }

    /// Lets the guest write the MSRs itself again. To be called when no page is missing, from a
    /// control thread; an exit that is under way still has to be answered.
    ///
    /// # Errors
    ///
    /// [`MsrTrapError`]. The trap is then as it was, which is of no harm but for its cost.
    pub fn remove(&self) -> Result<(), MsrTrapError> {
        self.vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[]).map_err(MsrTrapError::Filter)?;
        user_space_msrs(&self.vm, MsrExitReason::empty())
    }
}

fn user_space_msrs(vm: &VmFd, reasons: MsrExitReason) -> Result<(), MsrTrapError> {
    let args = [u64::from(reasons.bits()), 0, 0, 0];
    let cap = kvm_enable_cap { cap: Cap::X86UserSpaceMsr as u32, args, ..Default::default() };
    vm.enable_cap(&cap).map_err(MsrTrapError::Capability)
}

impl fmt::Debug for MsrTrap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MsrTrap").finish_non_exhaustive()
    }
}
