// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opens `/dev/kvm`.

use kvm_ioctls::Kvm;

use crate::abi::KVM_API_VERSION;

/// Errors from opening KVM or creating a virtual machine.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KvmError {
    /// The host has no KVM.
    #[error(
        "cannot open /dev/kvm: {0}; load the module kvm_intel or kvm_amd, or give this container \
         or machine access to KVM"
    )]
    Absent(#[source] kvm_ioctls::Error),
    /// This user may not open `/dev/kvm`.
    #[error(
        "cannot open /dev/kvm: {0}; join the group that owns /dev/kvm, usually 'kvm', and log in \
         again"
    )]
    Permission(#[source] kvm_ioctls::Error),
    /// `/dev/kvm` cannot be opened for another reason.
    #[error("cannot open /dev/kvm: {0}; check the kernel log")]
    Open(#[source] kvm_ioctls::Error),
    /// KVM has another version of its API.
    #[error("cannot use KVM: its API has version {0}, not 12; use Linux 2.6.22 or later")]
    ApiVersion(i32),
    /// KVM is open, but refuses to create a virtual machine.
    #[error("cannot create a VM: {0}; check whether another hypervisor uses the hardware")]
    CreateVm(#[source] kvm_ioctls::Error),
    /// KVM refuses to create a virtual machine of the type that memory attributes need.
    #[error(
        "cannot create a VM of type KVM_X86_SW_PROTECTED_VM: {0}; use a kernel with \
         CONFIG_KVM_SW_PROTECTED_VM and nested paging, or another engine"
    )]
    CreateProtectedVm(#[source] kvm_ioctls::Error),
}

/// Opens `/dev/kvm` and checks the version of its API.
///
/// # Errors
///
/// [`KvmError`] says whether KVM is absent, forbidden to this user or unusable, and suggests a
/// remedy.
///
/// # Examples
///
/// ```
/// match demand_kvm::open_kvm() {
///     Ok(kvm) => assert_eq!(kvm.get_api_version(), 12),
///     Err(error) => eprintln!("{error}"),
/// }
/// ```
pub fn open_kvm() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(refused)?;
    match kvm.get_api_version() {
        KVM_API_VERSION => Ok(kvm),
        other => Err(KvmError::ApiVersion(other)),
    }
}

fn refused(error: kvm_ioctls::Error) -> KvmError {
    match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Absent(error),
        libc::EACCES | libc::EPERM => KvmError::Permission(error),
        _ => KvmError::Open(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_advice() {
        for (errno, advice) in [
            (libc::ENOENT, "load the module"),
            (libc::EACCES, "join the group"),
            (libc::EMFILE, "kernel log"),
        ] {
            let text = refused(kvm_ioctls::Error::new(errno)).to_string();
            assert!(text.contains(advice) && text.contains("/dev/kvm"), "{text}");
            assert!(!text.contains('\n'), "{text}");
        }
    }
}
