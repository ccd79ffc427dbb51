// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The offset between a guest's time-stamp counters and the host's, and its adjustment, which keeps
//! the counters in step with kvm-clock. A guest that finds the two apart stops trusting one of
//! them.
//!
//! Source: `Documentation/virt/kvm/devices/vcpu.rst`, group `KVM_VCPU_TSC_CTRL`, which has this
//! algorithm for migration.

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

fn attribute(value: u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value,
        flags: 0,
    }
}

/// Returns the difference between the vCPU's counter and the host's; `None` if KVM does not report
/// it (before Linux 5.16).
pub(crate) fn offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attribute = attribute(&raw mut offset as u64);
    // SAFETY: the call reads `attribute`, and writes 8 bytes to the address in it, which is the
    // local variable `offset`. Nothing else refers to that variable during the call.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) };
    (result == 0).then_some(offset)
}

/// Sets the difference between the vCPU's counter and the host's.
pub(crate) fn set_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), kvm_ioctls::Error> {
    let attribute = attribute(&raw const offset as u64);
    // SAFETY: the call only reads `attribute`, and 8 bytes at the address in it, which is the
    // variable `offset` of this function.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::last()),
    }
}

/// Whether two frequencies, in kHz, count as equal, so that neither counter is scaled. Hosts of the
/// same kind differ by some millionths, because each measures its own frequency. As in KVM
/// (parameter `tsc_tolerance_ppm`), the tolerance is 250 millionths.
pub(crate) fn is_as_fast(its: u32, ours: u32) -> bool {
    u64::from(its.abs_diff(ours)) * 1_000_000 <= u64::from(ours) * 250
}

/// kvm-clock, in nanoseconds, and the host's counter at the same moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
    pub(crate) clock: u64,
    pub(crate) host_tsc: u64,
}

/// Returns the offset with which a counter of `khz` continues at `now`, if its offset was `offset`
/// at `then`. The counter advances by as much as kvm-clock has in between.
#[expect(clippy::cast_possible_truncation, reason = "offsets are numbers modulo 2^64")]
pub(crate) fn offset_since(offset: u64, then: Moment, now: Moment, khz: u32) -> u64 {
    let elapsed = i128::from(now.clock) - i128::from(then.clock);
    // A million nanoseconds have as many ticks as there are kHz.
    let ticks = elapsed * i128::from(khz) / 1_000_000;
    offset.wrapping_add(then.host_tsc).wrapping_add(ticks as u64).wrapping_sub(now.host_tsc)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_within_tolerance_are_equal() {
        assert!(is_as_fast(2_000_000, 2_000_000));
        assert!(is_as_fast(2_000_499, 2_000_000) && is_as_fast(1_999_501, 2_000_000));
        assert!(!is_as_fast(2_000_501, 2_000_000) && !is_as_fast(1_000_000, 2_000_000));
        assert!(is_as_fast(u32::MAX, u32::MAX));
    }

    #[test]
    fn counter_advances_with_the_clock() {
        let khz = 2_000_000;
        let then = Moment { clock: 5_000_000_000, host_tsc: 70_000_000_000 };
        let offset = 3u64.wrapping_sub(60_000_000_000);
        let guest = |offset: u64, moment: Moment| offset.wrapping_add(moment.host_tsc);
        assert_eq!(guest(offset, then), 10_000_000_003);
        // Another host with a young counter, one millisecond later for the guest.
        let now = Moment { clock: 5_001_000_000, host_tsc: 1_000 };
        let moved = offset_since(offset, then, now, khz);
        assert_eq!(guest(moved, now), 10_002_000_003);
        // The way back leads to the same offset.
        assert_eq!(offset_since(moved, now, then, khz), offset);
    }
}
