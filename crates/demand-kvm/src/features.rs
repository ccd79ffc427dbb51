// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What KVM has.

use kvm_ioctls::{Cap, Kvm};
use libc::c_ulong;
use serde::Serialize;

use crate::abi::KVM_CAP_GUEST_MEMFD_FLAGS;
use crate::{Engine, KvmError, Trial, scratch};

/// What KVM has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KvmFeatures {
    /// What `KVM_GET_API_VERSION` says: 12.
    pub api_version: i32,
    /// `KVM_SET_USER_MEMORY_REGION2` is there (`KVM_CAP_USER_MEMORY2`, Linux 6.8).
    pub user_memory2: bool,
    /// Memory faults are exits with an address (`KVM_CAP_MEMORY_FAULT_INFO`, Linux 6.8).
    pub memory_fault_info: bool,
    /// KVM Userfault, by trying it: its capability has had several numbers, and some of them
    /// mean other things in other kernels.
    pub userfault: Trial,
    /// Memory attributes as a trap, by trying them.
    pub attributes: Trial,
    /// What KVM itself reads and writes keeps to the bitmap of KVM Userfault, by trying it: a
    /// string instruction that KVM emulates left `KVM_RUN` at a missing page. Kernels that do
    /// this also keep their prefetch, the return of huge pages and nested guests on SVM to it.
    pub own_accesses: bool,
    /// Memory attributes that a VM can have (`KVM_CAP_MEMORY_ATTRIBUTES`); bit 3 is "private".
    pub memory_attributes: u64,
    /// A VM of type `KVM_X86_SW_PROTECTED_VM` could be made, by trying it.
    pub sw_protected_vm: bool,
    /// `KVM_CREATE_GUEST_MEMFD` is there (`KVM_CAP_GUEST_MEMFD`).
    pub guest_memfd: bool,
    /// Flags that it takes (`KVM_CAP_GUEST_MEMFD_FLAGS`): bit 0 `MMAP`, bit 1 `INIT_SHARED`.
    pub guest_memfd_flags: u32,
}

impl KvmFeatures {
    /// Asks KVM, and tries what cannot be asked.
    pub(crate) fn of(kvm: &Kvm) -> Result<Self, KvmError> {
        // A KVM that gives no virtual machine is of no use, whatever it has.
        drop(Engine::Uffd.create_vm(kvm)?);
        // 0 and below: the kernel does not know the capability.
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

    /// What came of trying an engine.
    pub fn trial(&self, engine: Engine) -> Trial {
        match engine {
            Engine::KvmUserfault => self.userfault,
            Engine::KvmAttributes => self.attributes,
            // To KVM it is a slot like any other.
            Engine::Uffd => Trial::Works,
        }
    }
}
