// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The parts of the KVM Userfault ABI that kvm-bindings lacks.
//!
//! Source: the series "KVM: Introduce KVM Userfault" of 2025-06-18 (message id
//! 20250618042424.330664-1), `Documentation/virt/kvm/api.rst`, sections
//! `KVM_SET_USER_MEMORY_REGION2` and `KVM_EXIT_MEMORY_FAULT`.

use kvm_bindings::kvm_userspace_memory_region2;

/// Memslot flag: a vCPU that touches a page whose bit is set in the slot's userfault bitmap leaves
/// `KVM_RUN`. Only `KVM_SET_USER_MEMORY_REGION2` accepts it.
pub(crate) const KVM_MEM_USERFAULT: u32 = 1 << 3;

/// Flag of the exit `KVM_EXIT_MEMORY_FAULT`: the page's bit is set in the userfault bitmap.
pub const KVM_MEMORY_EXIT_FLAG_USERFAULT: u64 = 1 << 4;

/// Flag of the exit `KVM_EXIT_MEMORY_FAULT`: the page's memory attribute is "private", or the guest
/// accessed it as private. Source: `Documentation/virt/kvm/api.rst`, section
/// `KVM_EXIT_MEMORY_FAULT`.
pub(crate) const KVM_MEMORY_EXIT_FLAG_PRIVATE: u64 = 1 << 3;

/// The version that `KVM_GET_API_VERSION` must answer (same document, section 4.1).
pub(crate) const KVM_API_VERSION: i32 = 12;

/// `KVM_CAP_GUEST_MEMFD_FLAGS`: the flags that `KVM_CREATE_GUEST_MEMFD` accepts.
pub(crate) const KVM_CAP_GUEST_MEMFD_FLAGS: u32 = 244;

/// Flag of `KVM_CREATE_GUEST_MEMFD`: the file can be mapped. Source:
/// `Documentation/virt/kvm/api.rst`, section `KVM_CREATE_GUEST_MEMFD`, as for the next.
pub(crate) const GUEST_MEMFD_FLAG_MMAP: u64 = 1 << 0;

/// Flag of `KVM_CREATE_GUEST_MEMFD`: all of the file is shared with the guest at first.
pub(crate) const GUEST_MEMFD_FLAG_INIT_SHARED: u64 = 1 << 1;

/// Argument of [`KVM_SET_USERFAULT_FD`].
#[repr(C)]
#[allow(non_camel_case_types, reason = "the kernel's name")]
pub(crate) struct kvm_userfault_fd {
    /// A userfaultfd, or -1 for none.
    pub(crate) fd: i32,
    /// 0.
    pub(crate) flags: u32,
}

// Source: this project's kernel patches (`rust-vmm-ci/kernel`), api.rst, `KVM_SET_USERFAULT_FD`.
vmm_sys_util::ioctl_iow_nr!(KVM_SET_USERFAULT_FD, 0xae, 0xd7, kvm_userfault_fd);

/// Writes the bitmap's address into its field, `userfault_bitmap`: the first word of the field that
/// kvm-bindings calls padding.
pub(crate) fn set_userfault_bitmap(region: &mut kvm_userspace_memory_region2, address: u64) {
    region.pad2[0] = address;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn bitmap_field_has_the_kernels_offset() {
        assert_eq!(offset_of!(kvm_userspace_memory_region2, pad2), 48);
        assert_eq!(size_of::<kvm_userspace_memory_region2>(), 160);
    }
}
