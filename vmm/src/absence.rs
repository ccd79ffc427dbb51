// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Times in which a guest is held up without a pause: its process is stopped, or it waits for a page.
//!
//! A guest that is not told of them sees its clock jump, and its watchdogs report a lockup. Where a
//! vCPU's own thread sees it, that thread tells the guest
//! ([`DemandVcpu::absences`](demand_kvm::DemandVcpu::absences)); this module covers the rest.

use std::time::{Duration, Instant};

use crate::vm::Vm;

/// From when on a time counts: well below what any watchdog allows.
const LONG: Duration = Duration::from_secs(1);

/// Looks for such times, now and then, and tells the guest.
pub(crate) struct AbsenceWatch {
    looked: Instant,
    /// Since when a vCPU has waited for a page whenever this looked.
    waiting: Option<Instant>,
}

impl AbsenceWatch {
    pub(crate) fn new() -> Self {
        AbsenceWatch { looked: Instant::now(), waiting: None }
    }

    /// To be called several times a second. It does not wait.
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

    /// Whether the guest is to be told at `now`, when a vCPU waits for a page or not. While a wait
    /// lasts it is so once in a while: a vCPU that does not wait spins for one that does, and its
    /// watchdog, which it runs, forgets.
    fn was_absent(&mut self, now: Instant, waited_for: bool) -> bool {
        // Nothing here takes as long by itself: the process did not run.
        let stopped = now.duration_since(std::mem::replace(&mut self.looked, now)) > LONG;
        let since = *self.waiting.get_or_insert(now);
        let waited = waited_for && now.duration_since(since) >= LONG;
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
