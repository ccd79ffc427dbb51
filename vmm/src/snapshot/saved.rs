// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The content of a snapshot's state file: the whole VM except its memory.

use demand_memory::BackingKind;
use serde::{Deserialize, Serialize};

use crate::arch::vcpu_state::VcpuState;
use crate::arch::vm_state::VmState;
use crate::config::{MemoryOption, RestoreMemory};
use crate::devices::registers::SavedRegisters;
use crate::devices::serial::SavedSerial;
use crate::error::Error;
use crate::snapshot::boot_files::SavedBoot;
use crate::virtio::state::DeviceState;

/// The saved state of a VM.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedVm {
    /// The memory's properties.
    pub memory: SavedMemory,
    /// The vCPUs, by number.
    pub vcpus: Vec<VcpuState>,
    /// The interrupt controllers, the timer and the clock.
    pub vm: VmState,
    /// The serial port.
    pub serial: SavedSerial,
    /// The registers of ACPI and PCI. Older snapshots have none.
    #[serde(default)]
    pub registers: SavedRegisters,
    /// The virtio devices, by position.
    pub devices: Vec<DeviceState>,
    /// The boot files, for a reset; `None` if the snapshot does not hold them.
    pub boot: Option<SavedBoot>,
}

/// The properties of a snapshot's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMemory {
    /// Size, in bytes.
    pub size: u64,
    /// The name of its backing.
    pub backing: String,
    /// Whether huge pages were reserved before they were used.
    pub reserve: bool,
    /// Whether it could use transparent huge pages.
    pub thp: bool,
    /// The generation of the memory's image, which tells it from another snapshot's.
    #[serde(with = "crate::arch::hex::area")]
    pub generation: Vec<u8>,
}

impl SavedMemory {
    /// Returns the properties of a restored VM's memory: the snapshot's, except for the user's
    /// choices.
    ///
    /// # Errors
    ///
    /// If the user wants another size, or a backing that does not fit the size.
    pub fn option(&self, wanted: &RestoreMemory) -> Result<MemoryOption, Error> {
        if let Some(size) = wanted.size
            && size != self.size
        {
            return Err(Error::usage(format!(
                "--memory: size={size} differs from the {} bytes of the snapshot's guest; leave \
                 the size out",
                self.size
            )));
        }
        let saved: BackingKind = self.backing.parse().map_err(|error| {
            Error::failed(format!("cannot restore the snapshot's memory: {error}"))
        })?;
        let backing = wanted.backing.unwrap_or(saved);
        let kept = (self.thp && backing == BackingKind::Shmem).then_some(true);
        let thp = wanted.thp.or(kept);
        let reserve = wanted.reserve.unwrap_or(self.reserve);
        MemoryOption::checked(self.size, backing, reserve, thp).map_err(|error| {
            if wanted.backing.is_some() || wanted.thp.is_some() {
                return Error::usage(error);
            }
            Error::failed(format!(
                "cannot restore the snapshot's memory: {}; the snapshot is damaged, use another",
                error.strip_prefix("--memory: ").unwrap_or(&error)
            ))
        })
    }
}
