// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The chipset's registers that keep what the guest has written, as a snapshot holds them.

use serde::{Deserialize, Serialize};

/// The values of the registers. The default is that of a machine that was just started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedRegisters {
    /// ACPI's events that the guest has enabled.
    pub pm1_enable: u16,
    /// ACPI's control register.
    pub pm1_control: u16,
    /// The address that PCI's configuration data refers to.
    pub pci_address: u32,
    /// The reset control register.
    pub reset_control: u8,
}
