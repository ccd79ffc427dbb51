// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration of background fill, and its form in JSON.

use std::fmt;

use demand_memory::{FillOptions, FillOrder, FillRate, InFlight, PAGE_SIZE};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use crate::config::json::Bytes;

/// Background fill: whether pages arrive before they are touched.
///
/// In JSON it is `"on"`, `"off"`, or an object of the options that differ from the defaults:
/// `rate`, `in_flight` and `chunk` in bytes, and `order`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FillConfig {
    /// Pages arrive only when they are touched.
    Off,
    /// The remaining pages are fetched in the background.
    On(FillOptions),
}

impl Default for FillConfig {
    fn default() -> Self {
        FillConfig::On(FillOptions::default())
    }
}

/// Errors from options of the fill that make no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FillError {
    /// A rate at which no page arrives.
    #[error("a rate of 0 fills nothing; use off")]
    NoRate,
    /// Requests that are smaller than a page.
    #[error("a request has at least {PAGE_SIZE} bytes")]
    Chunk,
    /// An order that does not exist.
    #[error("choose ascending, descending or near-fault")]
    Order,
}

/// Checks a rate, in bytes per second.
pub(crate) fn check_rate(rate: u64) -> Result<FillRate, FillError> {
    if rate == 0 { Err(FillError::NoRate) } else { Ok(FillRate::BytesPerSecond(rate)) }
}

/// Checks the number of bytes of a request.
pub(crate) fn check_chunk(bytes: u64) -> Result<u64, FillError> {
    if bytes < PAGE_SIZE { Err(FillError::Chunk) } else { Ok(bytes) }
}

/// Returns the order with this name.
pub(crate) fn parse_order(name: &str) -> Result<FillOrder, FillError> {
    match name {
        "ascending" => Ok(FillOrder::Ascending),
        "descending" => Ok(FillOrder::Descending),
        "near-fault" => Ok(FillOrder::NearLastFault),
        _ => Err(FillError::Order),
    }
}

/// The options that differ from the defaults.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Options {
    #[serde(skip_serializing_if = "Option::is_none")]
    rate: Option<Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    in_flight: Option<Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chunk: Option<Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    order: Option<String>,
}

impl TryFrom<Options> for FillOptions {
    type Error = FillError;

    fn try_from(options: Options) -> Result<Self, FillError> {
        let Options { rate, in_flight, chunk, order } = options;
        let default = FillOptions::default();
        Ok(FillOptions {
            rate: rate.map_or(Ok(default.rate), |Bytes(rate)| check_rate(rate))?,
            in_flight: in_flight.map_or(default.in_flight, |Bytes(bytes)| InFlight::Fixed(bytes)),
            chunk: chunk.map_or(Ok(default.chunk), |Bytes(bytes)| check_chunk(bytes))?,
            order: order.map_or(Ok(default.order), |name| parse_order(&name))?,
        })
    }
}

impl From<&FillOptions> for Options {
    fn from(options: &FillOptions) -> Self {
        Options {
            rate: match options.rate {
                FillRate::Unlimited => None,
                FillRate::BytesPerSecond(rate) => Some(Bytes(rate)),
            },
            in_flight: match options.in_flight {
                InFlight::Adaptive { .. } => None,
                InFlight::Fixed(bytes) => Some(Bytes(bytes)),
            },
            chunk: (options.chunk != FillOptions::CHUNK).then_some(Bytes(options.chunk)),
            order: match options.order {
                // Ranges are the library's only.
                FillOrder::Ascending | FillOrder::RangesFirst(_) | FillOrder::RangesOnly(_) => None,
                FillOrder::Descending => Some("descending".into()),
                FillOrder::NearLastFault => Some("near-fault".into()),
            },
        }
    }
}

impl Serialize for FillConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            FillConfig::Off => serializer.serialize_str("off"),
            FillConfig::On(options) if *options == FillOptions::default() => {
                serializer.serialize_str("on")
            }
            FillConfig::On(options) => Options::from(options).serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for FillConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FillVisitor)
    }
}

struct FillVisitor;

impl<'de> Visitor<'de> for FillVisitor {
    type Value = FillConfig;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"on\", \"off\" or an object of the fill's options")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<FillConfig, E> {
        match text {
            "on" => Ok(FillConfig::default()),
            "off" => Ok(FillConfig::Off),
            _ => Err(E::unknown_variant(text, &["on", "off"])),
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<FillConfig, A::Error> {
        let options = Options::deserialize(MapAccessDeserializer::new(map))?;
        options.try_into().map(FillConfig::On).map_err(A::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{from_str, to_string};

    use super::*;

    #[test]
    fn fill_in_json() {
        for text in [
            r#""on""#,
            r#""off""#,
            r#"{"rate":1048576}"#,
            r#"{"in_flight":8388608,"chunk":1048576,"order":"near-fault"}"#,
        ] {
            let config: FillConfig = from_str(text).unwrap();
            assert_eq!(to_string(&config).unwrap(), text);
        }
        let sizes: FillConfig = from_str(r#"{"rate": "1M"}"#).unwrap();
        assert_eq!(sizes, from_str(r#"{"rate": 1048576}"#).unwrap());
        for (text, part) in [
            (r#""yes""#, "yes"),
            (r#"{"rate": 0}"#, "fills nothing"),
            (r#"{"chunk": 1}"#, "4096"),
            (r#"{"order": "random"}"#, "near-fault"),
            (r#"{"threads": 4}"#, "threads"),
            ("7", "fill's options"),
        ] {
            let error = from_str::<FillConfig>(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
