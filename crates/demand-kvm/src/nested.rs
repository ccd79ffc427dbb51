// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hides nested virtualization from a guest while pages are missing.

use kvm_bindings::CpuId;

/// CPUID leaf 1, ECX: the processor has VMX.
const VMX: u32 = 1 << 5;
/// CPUID leaf 0x80000001, ECX: the processor has SVM.
const SVM: u32 = 1 << 2;
/// The CPUID leaf that describes SVM.
const SVM_LEAF: u32 = 0x8000_000a;

/// Removes nested virtualization, SVM and VMX, from the CPUID leaves for `KVM_SET_CPUID2`.
///
/// For nested guests KVM builds page tables, and fills them ahead of the guest's accesses: a
/// missing neighbour would be mapped and read as zeros. KVM itself also reads the structures that
/// describe nested guests. Call this where [`Probe::hides_nested`](crate::Probe::hides_nested)
/// returns true.
///
/// A guest keeps the CPUID that it was started with, so decide before its first start. A snapshot
/// of a guest that had nested virtualization can be restored without this only where `hides_nested`
/// returns false.
///
/// # Examples
///
/// ```
/// use demand_kvm::hide_nested;
/// use kvm_bindings::{CpuId, kvm_cpuid_entry2};
///
/// let leaf = |function, ecx| kvm_cpuid_entry2 { function, ecx, ..Default::default() };
/// let mut cpuid = CpuId::from_entries(&[leaf(1, 0x21), leaf(0x8000_0001, 0x5)]).unwrap();
/// hide_nested(&mut cpuid);
/// assert!(cpuid.as_slice().iter().all(|leaf| leaf.ecx == 1));
/// ```
pub fn hide_nested(cpuid: &mut CpuId) {
    for leaf in cpuid.as_mut_slice() {
        match leaf.function {
            1 => leaf.ecx &= !VMX,
            0x8000_0001 => leaf.ecx &= !SVM,
            SVM_LEAF => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::open_kvm;
    use kvm_bindings::KVM_MAX_CPUID_ENTRIES;

    #[test]
    fn nothing_but_nested_virtualization_is_hidden() {
        let Ok(kvm) = open_kvm() else { return };
        let before = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let mut after = before.clone();
        hide_nested(&mut after);
        for (before, after) in before.as_slice().iter().zip(after.as_slice()) {
            let hidden = match before.function {
                1 => VMX,
                0x8000_0001 => SVM,
                SVM_LEAF => {
                    assert_eq!((after.eax, after.ebx, after.ecx, after.edx), (0, 0, 0, 0));
                    continue;
                }
                _ => 0,
            };
            let mut expected = *before;
            expected.ecx &= !hidden;
            assert_eq!(expected, *after);
        }
    }
}
