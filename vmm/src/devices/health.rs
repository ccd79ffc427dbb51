// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's condition, and the device through which its kernel reports a panic.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

use crate::api::GuestCondition;
use crate::devices::power::{OnPower, PowerRequest};

/// Bits of the panic device's port (QEMU's `docs/specs/pvpanic.rst`): the kernel has panicked; the
/// kernel has panicked and boots a second one that dumps its memory.
const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;

/// The guest's condition, as far as the VMM can see it.
#[derive(Debug, Default)]
pub(crate) struct GuestHealth {
    panicked: AtomicBool,
    pub(crate) halted: AtomicBool,
}

impl GuestHealth {
    /// Returns the guest's condition, or `None` if it seems to run normally.
    pub(crate) fn condition(&self) -> Option<GuestCondition> {
        if self.panicked.load(Ordering::Acquire) {
            Some(GuestCondition::Panicked)
        } else {
            self.halted.load(Ordering::Acquire).then_some(GuestCondition::Halted)
        }
    }

    /// Clears the condition after a reset.
    pub(crate) fn reset(&self) {
        self.panicked.store(false, Ordering::Release);
        self.halted.store(false, Ordering::Release);
    }
}

/// The device through which a kernel reports a panic ("pvpanic"): a port of one byte.
pub(crate) struct PanicPort {
    health: Arc<GuestHealth>,
    tell: OnPower,
}

impl PanicPort {
    /// Returns a port that records a panic, and reports it once until the next reset.
    pub(crate) fn new(health: Arc<GuestHealth>, tell: OnPower) -> Self {
        PanicPort { health, tell }
    }
}

impl DevicePio for PanicPort {
    fn pio_read(&self, _base: PioAddress, _offset: PioAddressOffset, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn pio_write(&self, _base: PioAddress, _offset: PioAddressOffset, data: &[u8]) {
        // With only the other bit set, the guest continues by itself and dumps its memory.
        if data.first().is_some_and(|event| event & PANICKED != 0)
            && !self.health.panicked.swap(true, Ordering::AcqRel)
        {
            (self.tell)(PowerRequest::Panicked);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn panic_is_reported_once() {
        let told = Arc::new(Mutex::new(0));
        let tell: OnPower = {
            let told = told.clone();
            Arc::new(move |request| {
                assert_eq!(request, PowerRequest::Panicked);
                *told.lock().unwrap() += 1;
            })
        };
        let health = Arc::new(GuestHealth::default());
        let port = PanicPort::new(health.clone(), tell);
        let mut byte = [0];
        port.pio_read(PioAddress(0), 0, &mut byte);
        assert_eq!(byte, [3]);
        for event in [0, CRASH_LOADED, 4] {
            port.pio_write(PioAddress(0), 0, &[event]);
        }
        assert_eq!((*told.lock().unwrap(), health.condition()), (0, None));
        for _ in 0..3 {
            port.pio_write(PioAddress(0), 0, &[PANICKED]);
        }
        assert_eq!(*told.lock().unwrap(), 1);
        assert_eq!(health.condition(), Some(GuestCondition::Panicked));
        health.reset();
        assert_eq!(health.condition(), None);
        port.pio_write(PioAddress(0), 0, &[PANICKED]);
        assert_eq!(*told.lock().unwrap(), 2);
    }
}
