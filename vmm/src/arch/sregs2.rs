// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The page-directory pointers (PDPTRs) of PAE paging. A processor loads them once and keeps them,
//! even if the memory that they came from changes. `KVM_SET_SREGS` loads them from memory again.
//!
//! Source: `Documentation/virt/kvm/api.rst`, sections `KVM_GET_SREGS2` and `KVM_SET_SREGS2`.

use kvm_bindings::{KVMIO, kvm_sregs, kvm_sregs2};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);

/// `KVM_SREGS2_FLAGS_PDPTRS_VALID`, which kvm-bindings does not have.
const PDPTRS_VALID: u64 = 1;

/// Returns the loaded pointers, if any.
pub(crate) fn pdptrs(vcpu: &VcpuFd) -> Result<Option<[u64; 4]>, kvm_ioctls::Error> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the call writes one `kvm_sregs2`, and `sregs` is a local variable of that type.
    if unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) } != 0 {
        return Err(kvm_ioctls::Error::last());
    }
    Ok((sregs.flags & PDPTRS_VALID != 0).then_some(sregs.pdptrs))
}

/// Sets the system registers together with these pointers. `KVM_SET_VCPU_EVENTS` sets the rest of
/// `kvm_sregs`, the pending interrupt.
pub(crate) fn set_with_pdptrs(
    vcpu: &VcpuFd,
    sregs: &kvm_sregs,
    pdptrs: [u64; 4],
) -> Result<(), kvm_ioctls::Error> {
    let sregs = kvm_sregs2 {
        cs: sregs.cs,
        ds: sregs.ds,
        es: sregs.es,
        fs: sregs.fs,
        gs: sregs.gs,
        ss: sregs.ss,
        tr: sregs.tr,
        ldt: sregs.ldt,
        gdt: sregs.gdt,
        idt: sregs.idt,
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
        flags: PDPTRS_VALID,
        pdptrs,
    };
    // SAFETY: the call only reads one `kvm_sregs2`, and `sregs` is a local variable of that type.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), &sregs) } {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::last()),
    }
}
