// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! ACPI's power management timer: a counter of fixed frequency, which kernels without a paravirtual
//! clock use to calibrate their other timers.
//!
//! The counter derives from kvm-clock. It therefore agrees with the TSC and kvm-clock across a
//! pause, a snapshot and a restore, and needs no state in a snapshot.
//!
//! Source: ACPI 6.5, section 4.8.2.1.

use std::sync::Weak;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_ioctls::VmFd;

/// Ticks per second.
const FREQUENCY: u64 = 3_579_545;
const NANOSECONDS: u64 = 1_000_000_000;

/// The power management timer of a VM.
pub(crate) struct PmTimer {
    /// Weak, so that the devices on the buses do not keep the VM open.
    vm: Weak<VmFd>,
    /// The latest time that the guest has seen, in nanoseconds. KVM corrects its clock by small
    /// amounts in both directions, and the count must not go back.
    latest: AtomicU64,
}

impl PmTimer {
    /// Creates the timer of a VM.
    pub(crate) fn new(vm: Weak<VmFd>) -> Self {
        PmTimer { vm, latest: AtomicU64::new(0) }
    }

    /// Returns the count. The count stands still if KVM cannot read its clock.
    pub(crate) fn count(&self) -> u32 {
        let now = self.vm.upgrade().and_then(|vm| vm.get_clock().ok());
        ticks(self.advance(now.map_or(0, |now| now.clock)))
    }

    /// Restarts the timer with the clock of a VM that was reset.
    pub(crate) fn reset(&self) {
        self.latest.store(0, Ordering::Relaxed);
    }

    /// Records `now`, and returns the latest time so far.
    fn advance(&self, now: u64) -> u64 {
        self.latest.fetch_max(now, Ordering::Relaxed).max(now)
    }
}

/// Converts nanoseconds to ticks, modulo 2^32.
#[expect(clippy::cast_possible_truncation, reason = "the counter has 32 bits")]
fn ticks(nanoseconds: u64) -> u32 {
    (u128::from(nanoseconds) * u128::from(FREQUENCY) / u128::from(NANOSECONDS)) as u32
}

#[cfg(test)]
mod tests {
    #![expect(clippy::cast_possible_truncation, reason = "the values are small")]

    use super::*;
    use std::sync::Arc;
    use std::thread;
    use std::time::Duration;

    use test_support::host::skip;

    #[test]
    fn ticks_have_the_frequency_and_wrap() {
        assert_eq!(ticks(0), 0);
        assert_eq!(ticks(NANOSECONDS), FREQUENCY as u32);
        // The counter wraps after 20 minutes.
        assert_eq!(ticks(1200 * NANOSECONDS), (1200 * FREQUENCY - (1 << 32)) as u32);
        // The clock of a VM that has run for a century.
        let century = 100 * 365 * 86_400;
        assert_eq!(ticks(century * NANOSECONDS), (century * FREQUENCY) as u32);
    }

    #[test]
    fn count_never_goes_back() {
        let timer = PmTimer::new(Weak::new());
        assert_eq!(timer.advance(5_000), 5_000);
        assert_eq!(timer.advance(4_000), 5_000);
        assert_eq!(timer.count(), ticks(5_000));
        timer.reset();
        assert_eq!(timer.count(), 0);
    }

    #[test]
    fn count_follows_the_clock() {
        let Ok(kvm) = demand_kvm::open_kvm() else {
            return skip("there is no usable /dev/kvm");
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        vm.create_irq_chip().unwrap();
        let timer = PmTimer::new(Arc::downgrade(&vm));
        let mut clock = vm.get_clock().unwrap();
        (clock.clock, clock.flags) = (700 * NANOSECONDS, 0);
        vm.set_clock(&clock).unwrap();
        let first = timer.count();
        thread::sleep(Duration::from_millis(20));
        let passed = timer.count() - first;
        assert!(first >= ticks(700 * NANOSECONDS), "{first}");
        assert!(passed >= ticks(20_000_000), "{passed}");
    }
}
