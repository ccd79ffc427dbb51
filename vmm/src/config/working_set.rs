// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration of a VM's working set, and its form in JSON.

use serde::{Deserialize, Serialize};

use crate::config::source::SnapshotPlace;

/// The use of a snapshot's working set: the pages that its guests touch first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkingSetMode {
    /// It is neither recorded nor replayed.
    Off,
    /// The first touches of this run are recorded, and merged with those of earlier runs.
    Record,
    /// The recorded pages are fetched first.
    Replay,
    /// It is replayed if one exists, and this run is recorded, too.
    Auto,
}

impl WorkingSetMode {
    /// Returns the name of the mode.
    pub fn name(self) -> &'static str {
        match self {
            WorkingSetMode::Off => "off",
            WorkingSetMode::Record => "record",
            WorkingSetMode::Replay => "replay",
            WorkingSetMode::Auto => "auto",
        }
    }

    /// Returns whether this run's touches are recorded.
    #[cfg(feature = "remote")]
    pub(crate) fn records(self) -> bool {
        matches!(self, WorkingSetMode::Record | WorkingSetMode::Auto)
    }

    /// Returns whether a recorded set is replayed.
    #[cfg(feature = "remote")]
    pub(crate) fn replays(self) -> bool {
        matches!(self, WorkingSetMode::Replay | WorkingSetMode::Auto)
    }
}

/// The working set of a VM that continues from a snapshot.
///
/// # Examples
///
/// ```
/// use demand_vmm::config::{WorkingSetConfig, WorkingSetMode};
///
/// let config: WorkingSetConfig = serde_json::from_str(r#"{"mode": "auto"}"#).unwrap();
/// assert_eq!((config.mode, config.seconds), (WorkingSetMode::Auto, 30));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkingSetConfig {
    /// The use of the working set.
    pub mode: WorkingSetMode,
    /// File or URL of the working set; by default it is beside the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<SnapshotPlace>,
    /// Time for which first touches are noted, in seconds from the guest's start.
    #[serde(default = "default_seconds")]
    pub seconds: u64,
}

/// The default of [`WorkingSetConfig::seconds`].
pub(crate) const DEFAULT_SECONDS: u64 = 30;

fn default_seconds() -> u64 {
    DEFAULT_SECONDS
}

#[cfg(test)]
mod tests {
    use serde_json::{from_str, to_string};

    use super::*;

    #[test]
    fn working_set_in_json() {
        let config: WorkingSetConfig = from_str(r#"{"mode":"replay"}"#).unwrap();
        assert_eq!((config.mode, config.at.clone()), (WorkingSetMode::Replay, None));
        let text = r#"{"mode":"record","at":"s3://bucket/set","seconds":5}"#;
        let config: WorkingSetConfig = from_str(text).unwrap();
        assert_eq!(to_string(&config).unwrap(), text);
        for (text, part) in [
            (r#"{"mode":"on"}"#, "unknown variant `on`"),
            (r#"{"at":"/a"}"#, "mode"),
            (r#"{"mode":"auto","seconds":-1}"#, "-1"),
            (r#"{"mode":"auto","for":1}"#, "for"),
        ] {
            let error = from_str::<WorkingSetConfig>(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
