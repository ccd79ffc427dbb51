// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The page-directory pointers of PAE paging, which a processor loads once and keeps, whatever
//! becomes of the memory that they were in. `KVM_SET_SREGS` loads them anew, from memory.
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

/// The pointers that are loaded, if any are.
pub(crate) fn pdptrs(vcpu: &VcpuFd) -> Result<Option<[u64; 4]>, kvm_ioctls::Error> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the call writes a structure of this type.
    if unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) } != 0 {
        return Err(kvm_ioctls::Error::last());
    }
    Ok((sregs.flags & PDPTRS_VALID != 0).then_some(sregs.pdptrs))
}

/// Sets the system registers, and these pointers with them. What `kvm_sregs` has beyond that, the
/// interrupt under way, is among what `KVM_SET_VCPU_EVENTS` sets.
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
    // SAFETY: the call reads a structure of this type.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), &sregs) } {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::last()),
    }
}
