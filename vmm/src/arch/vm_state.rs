// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The KVM state of a VM other than its vCPUs: the interrupt controllers, the timer, and the clock.
//!
//! Source: `Documentation/virt/kvm/api.rst`, sections `KVM_GET_IRQCHIP`, `KVM_GET_PIT2` and
//! `KVM_GET_CLOCK`.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::arch::error::VmStateError;
use crate::arch::hex;
use crate::arch::tsc::Moment;

/// The state of a VM with KVM's interrupt controllers and timer (`KVM_CREATE_IRQCHIP`,
/// `KVM_CREATE_PIT2`), in JSON or another format of serde. All vCPUs must be paused while it is
/// saved.
///
/// # Examples
///
/// ```
/// use demand_vmm::arch::vm_state::VmState;
/// use kvm_bindings::kvm_pit_config;
///
/// let Ok(kvm) = demand_kvm::open_kvm() else { return };
/// let vm = || {
///     let vm = kvm.create_vm().unwrap();
///     vm.create_irq_chip().unwrap();
///     vm.create_pit2(kvm_pit_config::default()).unwrap();
///     vm
/// };
/// let state = VmState::save(&vm()).unwrap();
/// let json = serde_json::to_string(&state).unwrap();
/// let state: VmState = serde_json::from_str(&json).unwrap();
/// let other = vm();
/// state.restore_clock(&other).unwrap();
/// // Here the vCPUs are restored.
/// state.restore(&other).unwrap();
/// ```
#[derive(Clone, Serialize, Deserialize)]
pub struct VmState {
    /// kvm-clock, in nanoseconds.
    clock: u64,
    /// The host's TSC at the same moment, if KVM reports it.
    host_tsc: Option<u64>,
    /// The host's wall clock at the same moment, in nanoseconds since 1970. Older snapshots do not
    /// have it.
    #[serde(default)]
    realtime: Option<u64>,
    /// Whether the clock advances by as much as the host's wall clock has since.
    #[serde(skip)]
    follows_host: bool,
    #[serde(with = "hex")]
    pic_master: kvm_irqchip,
    #[serde(with = "hex")]
    pic_slave: kvm_irqchip,
    #[serde(with = "hex")]
    ioapic: kvm_irqchip,
    #[serde(with = "hex")]
    pit: kvm_pit_state2,
}

impl fmt::Debug for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmState").field("clock", &self.clock).finish_non_exhaustive()
    }
}

impl VmState {
    /// Reads the state.
    ///
    /// # Errors
    ///
    /// KVM's refusal: one line.
    pub fn save(vm: &VmFd) -> Result<Self, VmStateError> {
        let chip = |chip_id, what| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(|error| failed("save", what, error))?;
            Ok::<_, VmStateError>(chip)
        };
        let clock = vm.get_clock().map_err(|error| failed("save", CLOCK, error))?;
        Ok(VmState {
            clock: clock.clock,
            host_tsc: host_tsc(&clock),
            realtime: Some(realtime(&clock)),
            follows_host: false,
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER, PIC)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE, PIC)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC, IOAPIC)?,
            pit: vm.get_pit2().map_err(|error| failed("save", PIT, error))?,
        })
    }

    /// Makes the restored clock advance by as much as the host's wall clock has since the state was
    /// saved, as if the guest had been paused. If the host's clock shows an earlier time, the
    /// guest's stays where it was: a clock never goes back.
    ///
    /// # Errors
    ///
    /// If the snapshot does not hold the time at which it was taken.
    pub fn follow_host(&mut self) -> Result<(), VmStateError> {
        let Some(then) = self.realtime else {
            return Err(VmStateError::NoTime);
        };
        if let Some(behind) = Duration::from_nanos(then).checked_sub(since_1970()) {
            log::warn!(
                "the host's clock is {} s behind the moment of the snapshot; the guest's clock is \
                 kept",
                behind.as_secs()
            );
        }
        self.follows_host = true;
        Ok(())
    }

    /// Sets the guest's clock to the value at which it stopped, so that no time has passed for the
    /// guest, or [further](Self::follow_host). Call it **before** the vCPUs are restored: when one
    /// of their MSRs is set, KVM tells the guest the wall clock, which it computes as the host's
    /// time minus this clock.
    ///
    /// # Errors
    ///
    /// KVM's refusal: one line.
    pub fn restore_clock(&self, vm: &VmFd) -> Result<(), VmStateError> {
        // KVM_CLOCK_REALTIME adds the time since then; the other flags are only answers.
        let mut clock = kvm_clock_data { clock: self.clock, ..Default::default() };
        if let Some(realtime) = self.realtime.filter(|_| self.follows_host) {
            clock.realtime = realtime;
            clock.flags = KVM_CLOCK_REALTIME;
        }
        vm.set_clock(&clock).map_err(|error| failed("restore", CLOCK, error))
    }

    /// Sets the guest's clock once more, as the last step, so that the restore takes no time for
    /// the guest. Returns the moment at which the clock stopped and the present one, by which the
    /// vCPUs' TSCs can be [aligned](crate::arch::vcpu_state::VcpuState); `None` if KVM did not
    /// report the host's TSC with the clock, either then or now.
    ///
    /// # Errors
    ///
    /// KVM's refusal: one line.
    pub(crate) fn align_clock(&self, vm: &VmFd) -> Result<Option<(Moment, Moment)>, VmStateError> {
        self.restore_clock(vm)?;
        let now = vm.get_clock().map_err(|error| failed("restore", CLOCK, error))?;
        let moment = |clock, host_tsc: Option<u64>| Some(Moment { clock, host_tsc: host_tsc? });
        let (then, now) = (moment(self.clock, self.host_tsc), moment(now.clock, host_tsc(&now)));
        Ok(then.zip(now))
    }

    /// Sets the interrupt controllers and the timer. Call it **after** the vCPUs are restored,
    /// because a pending interrupt goes to their local APICs at once.
    ///
    /// # Errors
    ///
    /// KVM's refusal: one line.
    pub fn restore(&self, vm: &VmFd) -> Result<(), VmStateError> {
        // The timer first, because the state of the controllers includes the effect of its output.
        vm.set_pit2(&self.pit).map_err(|error| refused(PIT, error))?;
        for (chip, what) in
            [(&self.pic_master, PIC), (&self.pic_slave, PIC), (&self.ioapic, IOAPIC)]
        {
            vm.set_irqchip(chip).map_err(|error| refused(what, error))?;
        }
        Ok(())
    }

    /// Returns the saved value of kvm-clock, in nanoseconds.
    pub fn clock(&self) -> u64 {
        self.clock
    }
}

/// Returns the host's wall clock at the moment of the clock's value, from KVM if KVM reports it.
fn realtime(clock: &kvm_clock_data) -> u64 {
    match clock.flags & KVM_CLOCK_REALTIME {
        0 => u64::try_from(since_1970().as_nanos()).unwrap_or(u64::MAX),
        _ => clock.realtime,
    }
}

fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Returns the host's TSC at the moment of the clock's value, if KVM reports it.
fn host_tsc(clock: &kvm_clock_data) -> Option<u64> {
    (clock.flags & KVM_CLOCK_HOST_TSC != 0).then_some(clock.host_tsc)
}

const CLOCK: &str = "clock";
const PIC: &str = "interrupt controller (PIC)";
const IOAPIC: &str = "interrupt controller (IOAPIC)";
const PIT: &str = "timer (PIT)";

fn failed(verb: &'static str, part: &'static str, source: kvm_ioctls::Error) -> VmStateError {
    VmStateError::Access { verb, part, source }
}

/// Returns the error for a part of the state that KVM refuses.
fn refused(part: &'static str, source: kvm_ioctls::Error) -> VmStateError {
    VmStateError::Refused { part, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_pit_config;
    use test_support::host::skip;

    #[test]
    fn refused_state_may_be_damaged() {
        let kvm = match demand_kvm::open_kvm() {
            Ok(kvm) => kvm,
            Err(error) => return skip(&error.to_string()),
        };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        vm.create_pit2(kvm_pit_config::default()).unwrap();
        let mut state = VmState::save(&vm).unwrap();
        state.restore(&vm).unwrap();
        state.ioapic.chip_id = 77;
        let error = state.restore(&vm).unwrap_err().to_string();
        assert!(error.contains("restore the VM's interrupt controller (IOAPIC)"), "{error}");
        assert!(error.contains("; the snapshot may be damaged"), "{error}");
    }
}
