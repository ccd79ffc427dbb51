// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device's state in a snapshot, and the check that a back-end can take it over.

use serde::{Deserialize, Serialize};

use crate::config::device::is_name;
use crate::config::device_kind::DeviceKind;
use crate::config::device_kind::MAX_QUEUE_SIZE;
use crate::virtio::error::DeviceStateError;
use crate::virtio::mmio::Registers;

/// The state of a device that has stopped with nothing in flight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// The device's kind.
    pub kind: DeviceKind,
    /// The device's name in messages.
    pub name: String,
    /// The registers: features, queues with their positions, and the config space that the guest
    /// has read.
    pub registers: Registers,
}

impl DeviceState {
    /// Checks that a device of this kind can have this state: the file may have been altered.
    pub(crate) fn check(&self) -> Result<(), DeviceStateError> {
        let (kind, registers) = (self.kind, &self.registers);
        let queues = registers.queues().len();
        let right = is_name(&self.name)
            && registers.device_id() == kind.virtio_id()
            && registers.is_coherent()
            && registers.config().len() == kind.config_len()
            && kind
                .fixed_queues()
                .map_or((1..=256).contains(&queues), |n| usize::from(n) == queues)
            && registers.queue_size_max() <= MAX_QUEUE_SIZE
            && registers.queues().iter().all(|queue| queue.size <= registers.queue_size_max());
        if right {
            return Ok(());
        }
        Err(DeviceStateError::Damaged { kind })
    }

    /// Checks that a back-end with these features and this config space can continue for the old
    /// one.
    pub(crate) fn check_successor(
        &self,
        features: u64,
        config: &[u8],
    ) -> Result<(), DeviceStateError> {
        if !self.registers.has_agreed() {
            return Ok(());
        }
        let accepted = self.registers.driver_features();
        let lacking = accepted & !features;
        if lacking != 0 {
            let lacking = self.kind.name_features(lacking);
            return Err(DeviceStateError::Features { lacking });
        }
        for field in self.kind.fixed_fields(accepted) {
            let (before, now) = (field.value(self.registers.config()), field.value(config));
            if !field.fits(before, now) {
                let (name, before, now) = (field.name, field.show(before), field.show(now));
                return Err(DeviceStateError::Field { name, before, now });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::device_kind::NET_F_MAC;

    const FEATURES: u64 = 1 << 32 | 1 << 9 | 1 << 2;

    fn agreed(kind: DeviceKind, config: Vec<u8>) -> DeviceState {
        agreed_on(FEATURES, kind, config)
    }

    #[expect(clippy::cast_possible_truncation, reason = "the register takes the lower half")]
    fn agreed_on(features: u64, kind: DeviceKind, config: Vec<u8>) -> DeviceState {
        let mut registers = Registers::new(kind.virtio_id(), features, 1, 64, config);
        for (offset, value) in
            [(0x24, 0), (0x20, features as u32), (0x24, 1), (0x20, 1), (0x70, 11)]
        {
            let _ = registers.write(offset, &u32::to_le_bytes(value));
        }
        DeviceState { kind, name: "disk".into(), registers }
    }

    #[test]
    fn a_successor_must_be_as_good() {
        let mut config = vec![0; 60];
        (config[0], config[12]) = (100, 30);
        let state = agreed(DeviceKind::Blk, config.clone());
        assert!(state.registers.has_agreed());
        assert_eq!(state.check(), Ok(()));
        assert_eq!(state.check_successor(FEATURES | 1 << 29, &config), Ok(()));
        let error = state.check_successor(FEATURES & !(1 << 9), &config).unwrap_err().to_string();
        assert!(error.contains("FLUSH"), "{error}");
        config[12] = 31;
        assert_eq!(state.check_successor(FEATURES, &config), Ok(()));
        config[0] = 99;
        let error = state.check_successor(FEATURES, &config).unwrap_err().to_string();
        assert!(error.contains("capacity 100") && error.contains("99"), "{error}");
        config[..13].copy_from_slice(&[100, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 29]);
        assert!(
            state.check_successor(FEATURES, &config).unwrap_err().to_string().contains("seg_max")
        );
    }

    #[test]
    fn a_card_keeps_its_address() {
        let config = |last| [&[2, 0, 0, 0, 0, last][..], &[0; 6]].concat();
        let mut state = agreed(DeviceKind::Net, config(1));
        // The guest does not read a field whose feature it did not accept.
        assert_eq!(state.check_successor(FEATURES, &config(0xa)), Ok(()));
        state = agreed_on(FEATURES | 1 << NET_F_MAC, DeviceKind::Net, config(1));
        let error = state.check_successor(u64::MAX, &config(0xa)).unwrap_err().to_string();
        let both = ["02:00:00:00:00:01", "02:00:00:00:00:0a"];
        assert!(both.iter().all(|mac| error.contains(mac)), "{error}");
    }

    #[test]
    fn state_survives_json() {
        let state = agreed(DeviceKind::Blk, vec![7; 60]);
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<DeviceState>(&text).unwrap(), state);
        assert!(agreed(DeviceKind::Blk, vec![]).check().is_err());
        assert!(
            agreed(DeviceKind::Vsock, vec![0; 8])
                .check()
                .unwrap_err()
                .to_string()
                .contains("damaged")
        );
    }
}
