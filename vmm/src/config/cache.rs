// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration of the host cache, and its form in JSON.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::json::Bytes;

/// The directory in which the VMs of a host share the chunks of snapshots.
///
/// # Examples
///
/// ```
/// use demand_vmm::config::CacheConfig;
///
/// let config: CacheConfig =
///     serde_json::from_str(r#"{"dir": "/var/cache/demand", "size": "10G"}"#).unwrap();
/// assert_eq!(config.size, 10 << 30);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Fields", into = "Fields")]
pub struct CacheConfig {
    /// The directory.
    pub dir: PathBuf,
    /// Maximum size of its files, in bytes.
    pub size: u64,
}

/// Errors from parts that the host cache lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CacheConfigError {
    /// The directory is missing, or empty.
    #[error("the directory of the cache is missing; name it, as in DIR,size=10G")]
    NoDirectory,
    /// The size is missing.
    #[error("the size of the cache is missing; give it, as in DIR,size=10G")]
    NoSize,
}

impl CacheConfig {
    /// Returns the configuration with these parts, if none is missing.
    pub(crate) fn checked(
        dir: Option<PathBuf>,
        size: Option<u64>,
    ) -> Result<Self, CacheConfigError> {
        let dir = dir.filter(|dir| !dir.as_os_str().is_empty());
        let dir = dir.ok_or(CacheConfigError::NoDirectory)?;
        Ok(CacheConfig { dir, size: size.ok_or(CacheConfigError::NoSize)? })
    }
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    dir: PathBuf,
    size: Bytes,
}

impl TryFrom<Fields> for CacheConfig {
    type Error = CacheConfigError;

    fn try_from(Fields { dir, size: Bytes(size) }: Fields) -> Result<Self, CacheConfigError> {
        CacheConfig::checked(Some(dir), Some(size))
    }
}

impl From<CacheConfig> for Fields {
    fn from(CacheConfig { dir, size }: CacheConfig) -> Self {
        Fields { dir, size: Bytes(size) }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{from_str, to_string};

    use super::*;

    #[test]
    fn cache_in_json() {
        let text = r#"{"dir":"/c","size":1048576}"#;
        let config: CacheConfig = from_str(text).unwrap();
        assert_eq!(config, CacheConfig { dir: "/c".into(), size: 1 << 20 });
        assert_eq!(to_string(&config).unwrap(), text);
        assert_eq!(from_str::<CacheConfig>(r#"{"dir":"/c","size":"1M"}"#).unwrap(), config);
        for (text, part) in [
            (r#"{"dir": "", "size": 1}"#, "directory of the cache is missing"),
            (r#"{"dir": "/c"}"#, "size"),
            (r#"{"size": 1}"#, "dir"),
            (r#"{"dir": "/c", "size": "1Q"}"#, "is not a size"),
            (r#"{"dir": "/c", "size": 1, "mode": 7}"#, "mode"),
        ] {
            let error = from_str::<CacheConfig>(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
