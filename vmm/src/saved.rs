// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a snapshot's state holds: all of the VM but its memory.

use demand_memory::BackingKind;
use serde::{Deserialize, Serialize};

use crate::boot_files::SavedBoot;
use crate::device_state::DeviceState;
use crate::error::Error;
use crate::options::{MemoryOption, RestoreMemory};
use crate::registers::SavedRegisters;
use crate::serial::SavedSerial;
use crate::vcpu_state::VcpuState;
use crate::vm_state::VmState;

/// The state of a VM.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedVm {
    /// Its memory.
    pub memory: SavedMemory,
    /// Its processors, by number.
    pub vcpus: Vec<VcpuState>,
    /// Its interrupt controllers, timer and clock.
    pub vm: VmState,
    /// Its serial port.
    pub serial: SavedSerial,
    /// The registers of ACPI and PCI. Older snapshots have none.
    #[serde(default)]
    pub registers: SavedRegisters,
    /// Its virtio devices, by position.
    pub devices: Vec<DeviceState>,
    /// The boot files, for a reset; `None` if the snapshot does not hold it.
    pub boot: Option<SavedBoot>,
}

/// What a snapshot's memory is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMemory {
    /// Bytes.
    pub size: u64,
    /// What it was made of.
    pub backing: String,
    /// Whether it was set aside at once.
    pub reserve: bool,
    /// Whether it could use transparent huge pages.
    pub thp: bool,
    /// The generation of the memory's image, so that it cannot be another snapshot's.
    #[serde(with = "crate::hex::area")]
    pub generation: Vec<u8>,
}

impl SavedMemory {
    /// The memory that a VM is restored with: the snapshot's, made of what the user wants.
    ///
    /// # Errors
    ///
    /// If the user wants another size, or a backing that this size does not go with.
    pub fn option(&self, wanted: &RestoreMemory) -> Result<MemoryOption, Error> {
        if let Some(size) = wanted.size
            && size != self.size
        {
            return Err(Error::usage(format!(
                "--memory: size={size}, and the snapshot's guest has {} bytes of memory; leave \
                 the size out",
                self.size
            )));
        }
        let saved: BackingKind = self
            .backing
            .parse()
            .map_err(|error| Error::failed(format!("restore the snapshot's memory: {error}")))?;
        let backing = wanted.backing.unwrap_or(saved);
        let kept = (self.thp && backing == BackingKind::Shmem).then_some(true);
        let thp = wanted.thp.or(kept);
        let reserve = wanted.reserve.unwrap_or(self.reserve);
        MemoryOption::checked(self.size, backing, reserve, thp).map_err(|error| {
            if wanted.backing.is_some() || wanted.thp.is_some() {
                return Error::usage(error);
            }
            Error::failed(format!(
                "restore the snapshot's memory: {}; the snapshot is damaged, take another",
                error.strip_prefix("--memory: ").unwrap_or(&error)
            ))
        })
    }
}
