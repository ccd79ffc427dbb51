// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The engines: the ways to trap a guest's access to a missing page.

use std::fmt;

use demand_memory::VcpuTrap;
use kvm_ioctls::{Kvm, VmFd};
use serde::{Deserialize, Serialize};

use crate::KvmError;

/// A way to trap a guest's access to a missing page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Engine {
    /// KVM reads the missing bitmap and returns from `KVM_RUN` on the vCPU's thread, 4096 bytes at
    /// a time on any backing. Needs a kernel with the KVM Userfault series.
    KvmUserfault,
    /// A userfaultfd on the guest's mapping, served by another thread, one unit of the backing at a
    /// time. Works with any kernel; to KVM the memslot is an ordinary one.
    Uffd,
    /// Poison markers in the guest's mapping, which a userfaultfd sets: KVM sends SIGBUS to the
    /// vCPU's own thread, and `KVM_RUN` returns there, one unit of the backing at a time. Works on
    /// Linux 6.6 or later where KVM uses VMX or SVM; to KVM the memslot is an ordinary one. Chosen
    /// only by name.
    ///
    /// The first access to each 512 units goes through the userfaultfd, as under
    /// [`Uffd`](Self::Uffd).
    ///
    /// Its weakness is KVM's own accesses, which fail at a marker instead of waiting. Operands of
    /// instructions that KVM emulates are completed like MMIO. But where only the emulator walks a
    /// page of the guest's page tables that is missing, the guest gets a page fault that it did not
    /// cause: see "uffd-poison" in the [README](crate).
    UffdPoison,
    /// Missing pages are private pages without a guest_memfd: KVM returns from `KVM_RUN` on the
    /// vCPU's thread, 4096 bytes at a time on any backing. Experimental, and chosen only by name.
    /// Needs Linux 6.8 with `CONFIG_KVM_SW_PROTECTED_VM`, nested paging in the processor, and a VM
    /// from [`create_vm`](Engine::create_vm).
    ///
    /// Its weaknesses:
    ///
    /// - The kernel documents this type of VM as meant for development and testing.
    /// - Setting up costs KVM a step for each page, and each page that a vCPU reaches costs an
    ///   ioctl that stops all other vCPUs.
    /// - Accesses by KVM itself are not trapped. On shared memory a userfaultfd traps them instead;
    ///   on huge pages it cannot.
    KvmAttributes,
}

impl Engine {
    /// All engines, in order of preference.
    pub const ALL: [Engine; 4] =
        [Engine::KvmUserfault, Engine::Uffd, Engine::UffdPoison, Engine::KvmAttributes];

    /// Returns the engine's name, as in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Engine::KvmUserfault => "kvm-userfault",
            Engine::Uffd => "uffd",
            Engine::UffdPoison => "uffd-poison",
            Engine::KvmAttributes => "kvm-attributes",
        }
    }

    /// Returns the feature that KVM must accept for the engine to work.
    pub(crate) const fn needs(self) -> &'static str {
        match self {
            Engine::KvmUserfault => "a memslot with KVM_MEM_USERFAULT",
            Engine::Uffd => "a memslot",
            Engine::UffdPoison => "a memslot over marked pages",
            Engine::KvmAttributes => "private pages in a VM of type KVM_X86_SW_PROTECTED_VM",
        }
    }

    /// Returns whether a vCPU's fault fetches and maps a whole unit of the backing, and not 4096
    /// bytes.
    pub const fn faults_by_unit(self) -> bool {
        match self {
            Engine::Uffd | Engine::UffdPoison => true,
            Engine::KvmUserfault | Engine::KvmAttributes => false,
        }
    }

    /// Returns the mechanism that keeps vCPUs from missing pages: KVM, or the guest's mapping,
    /// which must be armed to match before the slot is created.
    pub const fn vcpu_trap(self) -> VcpuTrap {
        match self {
            Engine::KvmUserfault | Engine::KvmAttributes => VcpuTrap::Hypervisor,
            Engine::Uffd => VcpuTrap::Mapping,
            Engine::UffdPoison => VcpuTrap::Markers,
        }
    }

    /// Creates a virtual machine whose slots this engine can trap: an ordinary one, except with
    /// [`Engine::KvmAttributes`].
    ///
    /// # Errors
    ///
    /// [`KvmError::CreateVm`] and [`KvmError::CreateProtectedVm`].
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_kvm::{Engine, open_kvm};
    ///
    /// let Ok(kvm) = open_kvm() else { return };
    /// let _vm = Engine::Uffd.create_vm(&kvm).unwrap();
    /// ```
    pub fn create_vm(self, kvm: &Kvm) -> Result<VmFd, KvmError> {
        match self {
            Engine::KvmUserfault | Engine::Uffd | Engine::UffdPoison => {
                kvm.create_vm().map_err(KvmError::CreateVm)
            }
            Engine::KvmAttributes => create_protected_vm(kvm).map_err(KvmError::CreateProtectedVm),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn create_protected_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    kvm.create_vm_with_type(u64::from(kvm_bindings::KVM_X86_SW_PROTECTED_VM))
}

#[cfg(not(target_arch = "x86_64"))]
fn create_protected_vm(_: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    Err(kvm_ioctls::Error::new(libc::EINVAL))
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
