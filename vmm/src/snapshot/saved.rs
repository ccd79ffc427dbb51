// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The content of a snapshot's state file: the whole VM except its memory.

use demand_memory::{BackingKind, ParseBackingKindError};
use serde::{Deserialize, Serialize};

use crate::arch::vcpu_state::VcpuState;
use crate::arch::vm_state::VmState;
use crate::config::{MemoryConfig, MemoryError, RestoreMemory};
use crate::devices::registers::SavedRegisters;
use crate::devices::serial::SavedSerial;
use crate::error::{Error, Kind};
use crate::snapshot::boot_files::SavedBoot;
use crate::virtio::state::DeviceState;

/// The saved state of a VM.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedVm {
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

/// The reason for which a snapshot's memory cannot be restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SavedMemoryError {
    /// The user wants another size.
    #[error(
        "--memory: size={wanted} differs from the {saved} bytes of the snapshot's guest; leave the \
         size out"
    )]
    Size {
        /// The size that the user wants, in bytes.
        wanted: u64,
        /// The snapshot's size, in bytes.
        saved: u64,
    },
    /// The backing in the state is unknown.
    #[error("cannot restore the snapshot's memory: {0}")]
    Backing(#[from] ParseBackingKindError),
    /// The user's choice does not fit the snapshot's size.
    #[error("--memory: {0}")]
    Option(#[source] MemoryError),
    /// The properties in the state do not fit each other.
    #[error("cannot restore the snapshot's memory: {0}; the snapshot is damaged, use another")]
    Unfit(#[source] MemoryError),
}

impl From<SavedMemoryError> for Error {
    fn from(error: SavedMemoryError) -> Self {
        let kind = match error {
            SavedMemoryError::Size { .. } | SavedMemoryError::Option(_) => Kind::Usage,
            SavedMemoryError::Backing(_) | SavedMemoryError::Unfit(_) => Kind::Failed,
        };
        Error::of(kind, error)
    }
}

/// The properties of a snapshot's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedMemory {
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
    pub(crate) fn option(&self, wanted: &RestoreMemory) -> Result<MemoryConfig, SavedMemoryError> {
        if let Some(size) = wanted.size
            && size != self.size
        {
            return Err(SavedMemoryError::Size { wanted: size, saved: self.size });
        }
        let saved: BackingKind = self.backing.parse()?;
        let backing = wanted.backing.unwrap_or(saved);
        let kept = (self.thp && backing == BackingKind::Shmem).then_some(true);
        let thp = wanted.thp.or(kept);
        let reserve = wanted.reserve.unwrap_or(self.reserve);
        MemoryConfig::checked(self.size, backing, reserve, thp).map_err(|error| {
            if wanted.backing.is_some() || wanted.thp.is_some() {
                SavedMemoryError::Option(error)
            } else {
                SavedMemoryError::Unfit(error)
            }
        })
    }
}
