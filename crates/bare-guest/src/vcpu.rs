// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The parts of a vCPU's state that no mode determines.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_regs};
use kvm_ioctls::Kvm;

/// Returns general registers with which a vCPU executes the instruction at `address` first:
/// interrupts are disabled, the other registers are 0.
///
/// # Examples
///
/// ```
/// use kvm_bindings::kvm_regs;
///
/// let regs = kvm_regs { rsi: 7, ..bare_guest::start_at(0x1000) };
/// assert_eq!((regs.rip, regs.rsi), (0x1000, 7));
/// ```
pub fn start_at(address: u64) -> kvm_regs {
    // Bit 1 of RFLAGS is always set.
    kvm_regs { rip: address, rflags: 1 << 1, ..Default::default() }
}

/// Returns the CPUID that this KVM supports, for vCPU `number`, which is also its APIC ID.
///
/// # Errors
///
/// KVM's error.
pub fn cpuid(kvm: &Kvm, number: u32) -> Result<CpuId, kvm_ioctls::Error> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0xff_ffff | number << 24,
            0xb | 0x1f => entry.edx = number,
            _ => {}
        }
    }
    Ok(cpuid)
}
