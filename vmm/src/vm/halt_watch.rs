// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Detects a guest whose vCPUs are all halted for good.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::api::State;
use crate::api::events::EventKind;
use crate::vm::Vm;

/// How long the vCPUs must have used no processor time before the watch examines them.
const QUIET: Duration = Duration::from_secs(2);

/// Detects that all vCPUs are halted with interrupts off. It leaves alone a guest that uses its
/// processors. It examines an idle one at most every two seconds; each vCPU leaves the guest once
/// for that.
pub(crate) struct HaltWatch {
    /// Processor time of the vCPUs, and since when it has not changed.
    used: Duration,
    since: Instant,
    /// The check whose outcome is not known yet.
    look: Option<u64>,
    /// Whether the outcome is known and the vCPUs have been idle since.
    known: bool,
}

impl HaltWatch {
    pub(crate) fn new() -> Self {
        HaltWatch { used: Duration::ZERO, since: Instant::now(), look: None, known: false }
    }

    /// Polls once, without blocking. The caller repeats this several times a second.
    pub(crate) fn look(&mut self, vm: &Vm) {
        let Some(vcpus) = vm.try_vcpus() else { return };
        if vm.lifecycle.state() != State::Running {
            self.look = None;
            self.known = false;
            return;
        }
        let used = vcpus.cpu_time();
        if let Some(look) = self.look.take() {
            let halted = vcpus.are_halted(look);
            let before = vm.chipset.health.halted.swap(halted, Ordering::AcqRel);
            if halted && !before {
                vm.log.add(EventKind::GuestHalted);
                log::warn!(
                    "all vCPUs of the guest are halted with interrupts off: it cannot continue; \
                     demand-vmm shutdown ends the VM"
                );
            }
            (self.used, self.known) = (used, true);
        } else if used != self.used {
            (self.used, self.since, self.known) = (used, Instant::now(), false);
        } else if !self.known && self.since.elapsed() >= QUIET {
            self.look = Some(vcpus.look());
        }
    }
}
