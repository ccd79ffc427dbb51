// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The features of this host's KVM.

use kvm_ioctls::{Cap, Kvm};
use libc::c_ulong;
use serde::Serialize;

use crate::abi::KVM_CAP_GUEST_MEMFD_FLAGS;
use crate::{Engine, KvmError, Trial, scratch};

/// The features of this host's KVM, queried or tried.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KvmFeatures {
    /// The answer of `KVM_GET_API_VERSION`: 12.
    pub api_version: i32,
    /// Whether `KVM_SET_USER_MEMORY_REGION2` exists (`KVM_CAP_USER_MEMORY2`, Linux 6.8).
    pub user_memory2: bool,
    /// Whether memory faults are exits with an address (`KVM_CAP_MEMORY_FAULT_INFO`, Linux 6.8).
    pub memory_fault_info: bool,
    /// The outcome of trying KVM Userfault. Its capability number is not queried: it has changed
    /// between versions of the series, and some of those numbers have other meanings in other
    /// kernels.
    pub userfault: Trial,
    /// The outcome of trying memory attributes as a trap.
    pub attributes: Trial,
    /// Whether KVM's own accesses respect the KVM Userfault bitmap. Tried with a string instruction
    /// that KVM emulates, which must leave `KVM_RUN` at a missing page. Kernels that do this also
    /// respect the bitmap in their prefetch, when they restore huge pages, and for nested guests on
    /// SVM.
    pub own_accesses: bool,
    /// The memory attributes that a VM can have (`KVM_CAP_MEMORY_ATTRIBUTES`); bit 3 is "private".
    pub memory_attributes: u64,
    /// Whether KVM created a VM of type `KVM_X86_SW_PROTECTED_VM` when tried.
    pub sw_protected_vm: bool,
    /// Whether `KVM_CREATE_GUEST_MEMFD` exists (`KVM_CAP_GUEST_MEMFD`).
    pub guest_memfd: bool,
    /// The flags of `KVM_CREATE_GUEST_MEMFD` (`KVM_CAP_GUEST_MEMFD_FLAGS`): bit 0 `MMAP`, bit 1
    /// `INIT_SHARED`.
    pub guest_memfd_flags: u32,
}

impl KvmFeatures {
    /// Queries KVM, and tries the features that no capability describes.
    pub(crate) fn of(kvm: &Kvm) -> Result<Self, KvmError> {
        // A KVM that creates no virtual machine is useless, whatever its features.
        drop(Engine::Uffd.create_vm(kvm)?);
        // 0 or less: the kernel does not know the capability.
        let value =
            |cap: u32| u32::try_from(kvm.check_extension_raw(c_ulong::from(cap))).unwrap_or(0);
        let userfault = scratch::try_userfault(kvm);
        Ok(KvmFeatures {
            api_version: kvm.get_api_version(),
            user_memory2: value(Cap::UserMemory2 as u32) != 0,
            memory_fault_info: value(kvm_bindings::KVM_CAP_MEMORY_FAULT_INFO) != 0,
            userfault,
            attributes: scratch::try_attributes(kvm),
            own_accesses: userfault.works() && scratch::try_own_accesses(kvm),
            memory_attributes: u64::from(value(Cap::MemoryAttributes as u32)),
            sw_protected_vm: Engine::KvmAttributes.create_vm(kvm).is_ok(),
            guest_memfd: value(Cap::GuestMemfd as u32) != 0,
            guest_memfd_flags: value(KVM_CAP_GUEST_MEMFD_FLAGS),
        })
    }

    /// Returns the outcome of trying an engine.
    pub fn trial(&self, engine: Engine) -> Trial {
        match engine {
            Engine::KvmUserfault => self.userfault,
            Engine::KvmAttributes => self.attributes,
            // To KVM this is an ordinary slot.
            Engine::Uffd => Trial::Works,
        }
    }
}
