// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration of fetch-around, and its forms as text and in JSON.

use std::fmt;
use std::str::FromStr;

use serde::de::{Deserializer, Error};
use serde::{Deserialize, Serialize, Serializer};

use crate::config::size::{SizeError, parse_size};

/// The parts of a pushed snapshot that are fetched beside one that a fault needs.
///
/// As text, and in JSON, it is `auto`, `off`, or a number of bytes.
///
/// # Examples
///
/// ```
/// use demand_vmm::config::FetchAroundConfig;
///
/// assert_eq!("256K".parse(), Ok(FetchAroundConfig::Bytes(256 << 10)));
/// assert_eq!(FetchAroundConfig::default().to_string(), "auto");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FetchAroundConfig {
    /// As many as the measured delay is worth, and none while they are of no use.
    #[default]
    Auto,
    /// So many bytes.
    Bytes(u64),
    /// None.
    Off,
}

/// A text that is no configuration of fetch-around.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("choose auto, off or a number of bytes, as in 256K: {source}")]
pub struct FetchAroundError {
    source: SizeError,
}

impl FromStr for FetchAroundConfig {
    type Err = FetchAroundError;

    fn from_str(text: &str) -> Result<Self, FetchAroundError> {
        match text {
            "auto" => Ok(FetchAroundConfig::Auto),
            "off" => Ok(FetchAroundConfig::Off),
            _ => match parse_size(text) {
                Ok(0) => Ok(FetchAroundConfig::Off),
                Ok(bytes) => Ok(FetchAroundConfig::Bytes(bytes)),
                Err(source) => Err(FetchAroundError { source }),
            },
        }
    }
}

impl fmt::Display for FetchAroundConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FetchAroundConfig::Auto => f.write_str("auto"),
            FetchAroundConfig::Bytes(bytes) => bytes.fmt(f),
            FetchAroundConfig::Off => f.write_str("off"),
        }
    }
}

impl Serialize for FetchAroundConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            FetchAroundConfig::Bytes(bytes) => serializer.serialize_u64(*bytes),
            _ => serializer.collect_str(self),
        }
    }
}

/// The forms in JSON.
#[derive(Deserialize)]
#[serde(untagged, expecting = "\"auto\", \"off\" or a number of bytes")]
enum Form {
    Number(u64),
    Text(String),
}

impl<'de> Deserialize<'de> for FetchAroundConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = match Form::deserialize(deserializer)? {
            Form::Number(bytes) => bytes.to_string(),
            Form::Text(text) => text,
        };
        text.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{from_str, to_string};

    use super::*;

    #[test]
    fn fetch_around_in_json() {
        for (text, config, form) in [
            (r#""auto""#, FetchAroundConfig::Auto, r#""auto""#),
            (r#""off""#, FetchAroundConfig::Off, r#""off""#),
            ("0", FetchAroundConfig::Off, r#""off""#),
            (r#""1M""#, FetchAroundConfig::Bytes(1 << 20), "1048576"),
        ] {
            assert_eq!(from_str::<FetchAroundConfig>(text).unwrap(), config);
            assert_eq!(to_string(&config).unwrap(), form);
        }
        for text in [r#""near""#, "-1", "true"] {
            let error = from_str::<FetchAroundConfig>(text).unwrap_err().to_string();
            assert!(error.contains("off") && error.contains("number of bytes"), "{text}: {error}");
        }
    }
}
