// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration of a VM: plain data, and its form in JSON, which the API and the file of
//! `--config` have. `cli` parses the texts of the command line.

pub(crate) mod around;
pub(crate) mod cache;
pub(crate) mod device;
pub mod device_kind;
pub(crate) mod fill;
mod json;
pub(crate) mod names;
pub(crate) mod pager;
pub mod size;
pub mod source;
pub mod vm;
pub(crate) mod working_set;

use std::path::PathBuf;

use demand_kvm::GUEST_MEMFD_LIMITS;
use demand_memory::BackingKind;
use serde::{Deserialize, Serialize};

use crate::config::json::{Bytes, optional_text, text};

pub use crate::config::around::{FetchAroundConfig, FetchAroundError};
pub use crate::config::cache::{CacheConfig, CacheConfigError};
pub use crate::config::device::{DeviceConfigError, Lazy, VhostUserConfig};
pub use crate::config::fill::{FillConfig, FillError};
pub use crate::config::working_set::{WorkingSetConfig, WorkingSetMode};

/// Size and backing of a VM's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RestoreMemory")]
pub struct MemoryConfig {
    /// Size of the memory, in bytes.
    pub size: u64,
    /// The backing of the memory.
    #[serde(with = "text")]
    pub backing: BackingKind,
    /// Whether huge pages are reserved before they are used.
    pub reserve: bool,
    /// Whether shared memory may use transparent huge pages.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub thp: bool,
}

/// Errors from properties of memory that are incompatible.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The memory has no size.
    #[error("the size is missing; give it, as in 1G")]
    NoSize,
    /// Transparent huge pages of a backing that cannot have them.
    #[error("thp= applies to shmem only, and not to {backing}; leave it out")]
    NoThp {
        /// The backing.
        backing: BackingKind,
    },
    /// A size of zero.
    #[error("size=0 leaves the guest without memory; give more, as in 1G")]
    Zero,
    /// A size that is not a whole number of pages.
    #[error(
        "size={size} is not a multiple of the {} bytes of a page of {backing}",
        backing.unit()
    )]
    Size {
        /// The size in bytes.
        size: u64,
        /// The backing.
        backing: BackingKind,
    },
}

impl MemoryConfig {
    /// Returns the memory with these parts, if they are compatible.
    ///
    /// # Errors
    ///
    /// [`MemoryError`], with the incompatible part.
    pub fn checked(
        size: u64,
        backing: BackingKind,
        reserve: bool,
        thp: Option<bool>,
    ) -> Result<Self, MemoryError> {
        if thp.is_some() && backing != BackingKind::Shmem {
            return Err(MemoryError::NoThp { backing });
        }
        if size == 0 {
            return Err(MemoryError::Zero);
        }
        if !size.is_multiple_of(backing.unit()) {
            return Err(MemoryError::Size { size, backing });
        }
        Ok(MemoryConfig { size, backing, reserve, thp: thp.unwrap_or(false) })
    }

    /// Returns the limits of the backing on every host: sentences, without full stops.
    pub(crate) fn limits(&self) -> &'static [&'static str] {
        if self.backing == BackingKind::GuestMemfd { &GUEST_MEMFD_LIMITS } else { &[] }
    }
}

impl TryFrom<RestoreMemory> for MemoryConfig {
    type Error = MemoryError;

    /// Fills in the defaults: shared memory, with huge pages reserved.
    fn try_from(memory: RestoreMemory) -> Result<Self, MemoryError> {
        let RestoreMemory { size, backing, reserve, thp } = memory;
        let size = size.ok_or(MemoryError::NoSize)?;
        let backing = backing.unwrap_or(BackingKind::Shmem);
        MemoryConfig::checked(size, backing, reserve.unwrap_or(true), thp)
    }
}

impl From<MemoryConfig> for RestoreMemory {
    fn from(memory: MemoryConfig) -> Self {
        let MemoryConfig { size, backing, reserve, thp } = memory;
        let thp = (backing == BackingKind::Shmem).then_some(thp);
        RestoreMemory { size: Some(size), backing: Some(backing), reserve: Some(reserve), thp }
    }
}

/// The properties of a restored guest's memory that differ from the snapshot's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreMemory {
    /// Size in bytes, which must equal the snapshot's.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "optional_bytes")]
    pub size: Option<u64>,
    /// The backing of the memory.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "optional_text")]
    pub backing: Option<BackingKind>,
    /// Whether huge pages are reserved before they are used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserve: Option<bool>,
    /// Whether shared memory may use transparent huge pages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thp: Option<bool>,
}

fn optional_bytes<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    Ok(Option::<Bytes>::deserialize(from)?.map(|Bytes(bytes)| bytes))
}

/// The destination of the guest's serial port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SerialConfig {
    /// Output to standard output, input from standard input.
    #[default]
    #[serde(rename = "tty")]
    Terminal,
    /// Output to a file, without input.
    File(PathBuf),
    /// Neither output nor input.
    Off,
}

/// The point from which a restored guest's clocks continue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClockConfig {
    /// Where they stopped: to the guest, no time has passed, and its wall clock is late.
    #[default]
    Keep,
    /// Where they would be if the guest had only been paused: its wall clock stays right.
    Host,
}

/// The action when the guest's kernel panics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnPanic {
    /// The panic is logged, and the guest's kernel proceeds as its `panic=` parameter says.
    #[default]
    Ignore,
    /// The VM is paused.
    Pause,
    /// The run ends with an error.
    Shutdown,
    /// The guest is reset.
    Reset,
}
