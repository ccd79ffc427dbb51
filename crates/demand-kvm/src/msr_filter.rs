// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Traps a guest's writes to the MSRs through which it names memory to KVM.
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

/// Errors from setting or removing the filter of a VM's MSRs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MsrFilterError {
    /// KVM does not leave MSRs to user space.
    #[error(
        "cannot trap the guest's writes to MSRs: {0}; use Linux 5.10 or later, with MSR filters \
         enabled"
    )]
    Capability(#[source] kvm_ioctls::Error),
    /// KVM refused the filter.
    #[error("cannot filter the guest's writes to KVM's MSRs: {0}; free memory")]
    Filter(#[source] kvm_ioctls::Error),
}

/// Makes a guest's writes to those of KVM's MSRs that name memory leave `KVM_RUN`, so that the
/// memory can be fetched before KVM touches it: [`PendingExit`](crate::PendingExit) does the rest.
/// Reads are not trapped.
///
/// Create it before the first vCPU runs, and [`remove`](Self::remove) it once no page is missing.
/// It is the VM's only MSR filter: a VMM with its own filter adds `KVM_MSR_FILTER_WRITE` for 0x11,
/// 0x12 and 0x4b564d00 to 0x4b564d04 to that filter instead.
///
/// Hyper-V's MSRs are not trapped, because a write from user space does not have all the effects in
/// KVM of a write by the guest. A VMM may offer these MSRs only to guests that start after paging
/// is complete, or that are restored with the MSRs already set.
#[derive(Clone)]
pub struct MsrFilter {
    vm: Arc<VmFd>,
}

impl MsrFilter {
    /// Sets the filter.
    ///
    /// # Errors
    ///
    /// [`MsrFilterError`].
    pub fn new(vm: &Arc<VmFd>) -> Result<Self, MsrFilterError> {
        user_space_msrs(vm, MsrExitReason::Filter)?;
        // One bit for each MSR, all 0: denied, which means left to user space.
        const DENIED: [u8; 1] = [0];
        let ranges: Vec<_> = own_msrs()
            .map(|base| MsrFilterRange {
                flags: MsrFilterRangeFlags::WRITE,
                base,
                msr_count: 1,
                bitmap: &DENIED,
            })
            .collect();
        vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
            .map_err(MsrFilterError::Filter)?;
        Ok(MsrFilter { vm: vm.clone() })
    }

    /// Restores direct writes of the MSRs by the guest. Call it when no page is missing, from a
    /// control thread. A pending exit must still be completed.
    ///
    /// # Errors
    ///
    /// [`MsrFilterError`]. The filter then stays as it was, which does no harm except for its cost.
    pub fn remove(&self) -> Result<(), MsrFilterError> {
        self.vm
            .set_msr_filter(MsrFilterDefaultAction::ALLOW, &[])
            .map_err(MsrFilterError::Filter)?;
        user_space_msrs(&self.vm, MsrExitReason::empty())
    }
}

fn user_space_msrs(vm: &VmFd, reasons: MsrExitReason) -> Result<(), MsrFilterError> {
    let args = [u64::from(reasons.bits()), 0, 0, 0];
    let cap = kvm_enable_cap { cap: Cap::X86UserSpaceMsr as u32, args, ..Default::default() };
    vm.enable_cap(&cap).map_err(MsrFilterError::Capability)
}

impl fmt::Debug for MsrFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MsrFilter").finish_non_exhaustive()
    }
}
