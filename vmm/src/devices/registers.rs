// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The chipset registers that keep values written by the guest, as a snapshot holds them.

use serde::{Deserialize, Serialize};

/// The values of the registers. The default is that of a machine that has just started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedRegisters {
    /// The ACPI events that the guest has enabled.
    pub pm1_enable: u16,
    /// The ACPI control register.
    pub pm1_control: u16,
    /// The address that PCI's configuration data ports refer to.
    pub pci_address: u32,
    /// The reset control register.
    pub reset_control: u8,
}
