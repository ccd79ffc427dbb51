// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tells the guest of times when it was held up without a pause: its process was stopped, or a vCPU
//! was blocked on a page.
//!
//! Without that the guest sees its clock jump, and its watchdogs report a lockup. Where a vCPU's
//! own thread notices the delay, that thread tells the guest
//! ([`DemandVcpu::absences`](demand_kvm::DemandVcpu::absences), or while it serves an exit); this
//! module covers the other cases.

use std::time::Instant;

use crate::vcpu::LONG_ABSENCE;
use crate::vm::Vm;

/// Polls for such times and tells the guest.
pub(crate) struct AbsenceWatch {
    looked: Instant,
    /// Since when every poll has seen a vCPU blocked on a page.
    waiting: Option<Instant>,
}

impl AbsenceWatch {
    pub(crate) fn new() -> Self {
        AbsenceWatch { looked: Instant::now(), waiting: None }
    }

    /// Polls once, without blocking. The caller repeats this several times a second.
    pub(crate) fn look(&mut self, vm: &Vm) {
        let vcpus = vm.try_vcpus();
        let service = vm.machine.service();
        let waiting = vcpus.as_ref().is_some_and(|vcpus| vcpus.wait_for_pages(service));
        if self.was_absent(Instant::now(), waiting)
            && let Some(vcpus) = vcpus
        {
            vcpus.tell_absence();
        }
    }

    /// Returns whether the guest must be told at `now`; `waited_for` says whether a vCPU is blocked
    /// on a page. While a wait lasts, this returns true about once a second: another vCPU that
    /// spins for the blocked one runs its own watchdog, and a notice lasts for only one check of
    /// it.
    fn was_absent(&mut self, now: Instant, waited_for: bool) -> bool {
        // Nothing in this process takes that long by itself, so the process was stopped.
        let stopped = now.duration_since(std::mem::replace(&mut self.looked, now)) > LONG_ABSENCE;
        let since = *self.waiting.get_or_insert(now);
        let waited = waited_for && now.duration_since(since) >= LONG_ABSENCE;
        if !waited_for {
            self.waiting = None;
        } else if waited {
            self.waiting = Some(now);
        }
        stopped || waited
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_long_waits_and_stops_count() {
        let mut watch = AbsenceWatch::new();
        let mut now = watch.looked;
        let mut after = |ms, waited_for| {
            now += Duration::from_millis(ms);
            watch.was_absent(now, waited_for)
        };
        for _ in 0..20 {
            assert!(!after(200, false));
        }
        let told = (0..11).filter(|_| after(200, true)).count();
        assert_eq!(told, 2, "once a second");
        for _ in 0..20 {
            assert!(!after(200, true) && !after(200, false), "short waits");
        }
        assert!(after(1100, false), "the process was stopped");
        assert!(!after(200, false));
    }
}
