// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The state file of a snapshot: a header line, and the state of the VM as JSON.
//!
//! The header is `demand-vmm-snapshot VERSION LENGTH SHA256 CHECK`: the number of bytes after the
//! header line, their SHA-256, and the SHA-256 of the header itself up to the space before it. The
//! first two words and the last keep their places in all versions, so that an altered header can be
//! told from a newer version.

use std::fmt::Write as _;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// The version of the format that this program writes.
pub const VERSION: u32 = 2;

/// The oldest version that this program reads.
pub const OLDEST: u32 = 1;

/// The first word of a state file.
const MAGIC: &str = "demand-vmm-snapshot";

/// Largest size of a state file, in bytes: far more than a VM with 16 vCPUs needs.
pub(crate) const MAX_STATE: u64 = 64 << 20;

/// Largest size of a header of any version, in bytes.
const MAX_HEADER: usize = 512;

/// The name of the file.
pub(crate) const STATE: &str = "state";

/// The position of an error that is in no field.
const AT_TOP: &str = "at its top";

const ALTERED: &str = "was altered after it was written; use another copy of the snapshot";

/// An error from encoding a state.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The state cannot be written as JSON.
    #[error("{0}")]
    Json(#[source] serde_json::Error),
    /// The file would be longer than a reader accepts.
    #[error("it has {bytes} bytes, and the limit is {MAX_STATE}")]
    TooLong {
        /// Length of the JSON, in bytes.
        bytes: usize,
    },
}

/// An error from decoding a state file: the cause and the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The file is something else.
    #[error("it is not a snapshot: the file '{STATE}' does not begin with '{MAGIC}'")]
    NotAState,
    /// The header line has no end.
    #[error("the file '{STATE}' ends in its first line; use another copy of the snapshot")]
    ShortHeader,
    /// The header does not have the digest that it states.
    #[error("the first line of '{STATE}' {ALTERED}")]
    AlteredHeader,
    /// The version is not one that this program reads.
    #[error(
        "it has version {version}, and this program reads {OLDEST} to {VERSION}; use {}",
        if *version > VERSION { "a newer demand-vmm" } else { "the demand-vmm that wrote it" }
    )]
    Version {
        /// The version.
        version: u32,
    },
    /// The file is shorter than its header states.
    #[error(
        "the file '{STATE}' is truncated: it has {len} of {stated} bytes; use another copy of the \
         snapshot"
    )]
    Truncated {
        /// Number of bytes after the header.
        len: usize,
        /// The number that the header states.
        stated: usize,
    },
    /// The JSON does not have the digest that the header states.
    #[error("the file '{STATE}' {ALTERED}")]
    Altered,
    /// The JSON does not describe a VM.
    #[error(
        "the file '{STATE}' is complete, but not in the format of this demand-vmm: {place}: \
         {source}; use the one that wrote it"
    )]
    Format {
        /// The position in the JSON, as in `at vcpus[1].regs.rax`.
        place: String,
        /// The cause.
        source: serde_json::Error,
    },
}

/// Encodes a state as the bytes of a state file.
///
/// # Errors
///
/// If the state cannot be written as JSON, or the file would be longer than 64 MiB.
pub fn encode<T: Serialize>(state: &T) -> Result<Vec<u8>, EncodeError> {
    let json = serde_json::to_vec(state).map_err(EncodeError::Json)?;
    let mut header = format!("{MAGIC} {VERSION} {} {}", json.len(), sha256(&json));
    let check = sha256(header.as_bytes());
    let _ = writeln!(header, " {check}");
    if (header.len() + json.len()) as u64 > MAX_STATE {
        return Err(EncodeError::TooLong { bytes: json.len() });
    }
    let mut bytes = header.into_bytes();
    bytes.extend_from_slice(&json);
    Ok(bytes)
}

/// Decodes the bytes of a state file.
///
/// # Errors
///
/// The cause and the remedy, as the rest of a line.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, StateError> {
    let rest = bytes.strip_prefix(MAGIC.as_bytes()).ok_or(StateError::NotAState)?;
    let line_end = rest.iter().take(MAX_HEADER).position(|&byte| byte == b'\n');
    let Some(line_end) = line_end.map(|at| MAGIC.len() + at) else {
        return Err(if bytes.len() < MAX_HEADER {
            StateError::ShortHeader
        } else {
            StateError::AlteredHeader
        });
    };
    let altered = || StateError::AlteredHeader;
    let line = std::str::from_utf8(&bytes[..line_end]).map_err(|_| altered())?;
    let (covered, check) = line.rsplit_once(' ').ok_or_else(altered)?;
    if sha256(covered.as_bytes()) != check {
        return Err(altered());
    }
    let mut words = covered.split(' ').skip(1);
    let version: u32 = words.next().and_then(|word| word.parse().ok()).ok_or_else(altered)?;
    if !(OLDEST..=VERSION).contains(&version) {
        return Err(StateError::Version { version });
    }
    let (Some(length), Some(digest), None) = (words.next(), words.next(), words.next()) else {
        return Err(altered());
    };
    let stated: usize = length.parse().map_err(|_| altered())?;
    let json = &bytes[line_end + 1..];
    if json.len() < stated {
        return Err(StateError::Truncated { len: json.len(), stated });
    }
    if json.len() > stated || sha256(json) != digest {
        return Err(StateError::Altered);
    }
    if version < VERSION {
        let mut state: Value = parse(json)?;
        upgrade(version, &mut state);
        return parse(&serde_json::to_vec(&state).expect("a value from JSON can be JSON again"));
    }
    parse(json)
}

fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, StateError> {
    let mut json = serde_json::Deserializer::from_slice(json);
    let state = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let place = match error.path().iter().next() {
            Some(_) => format!("at {}", error.path()),
            None => AT_TOP.into(),
        };
        StateError::Format { place, source: error.into_inner() }
    })?;
    json.end().map_err(|source| StateError::Format { place: AT_TOP.into(), source })?;
    Ok(state)
}

/// Upgrades the state of an older version to this version.
fn upgrade(version: u32, state: &mut Value) {
    if version < 2
        && let Some(boot) = state.get_mut("boot")
    {
        // These are paths on the host that wrote the snapshot. The state's writer chose them, so
        // they are never opened.
        *boot = Value::Null;
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::snapshot::sample::{Machine, machine};

    #[test]
    fn each_altered_or_missing_byte_is_found() {
        let bytes = encode(&machine()).unwrap();
        assert_eq!(decode::<Machine>(&bytes).unwrap(), machine());
        for len in 0..bytes.len() {
            decode::<Machine>(&bytes[..len]).unwrap_err();
        }
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut altered = bytes.clone();
                altered[at] ^= 1 << bit;
                decode::<Machine>(&altered).unwrap_err();
            }
        }
        let told = |bytes: &[u8]| decode::<Machine>(bytes).unwrap_err().to_string();
        assert!(told(&bytes[..bytes.len() - 1]).contains("is truncated"));
        assert!(told(&bytes[..30]).contains("ends in its first line"));
        assert!(told(&[&bytes[..], b" "].concat()).contains("was altered"));
        let mut altered = bytes.clone();
        altered[MAGIC.len() + 1] = b'3';
        assert!(told(&altered).contains("first line of 'state' was altered"), "not: newer");
        assert!(told(b"\x7fELF").contains("not a snapshot"));
    }

    #[test]
    fn another_version_is_reported_before_anything_else() {
        for (version, what) in [(3, "use a newer demand-vmm"), (0, "that wrote it")] {
            let covered = format!("{MAGIC} {version} more words than today");
            let state = format!("{covered} {}\nnot even JSON", sha256(covered.as_bytes()));
            let error = decode::<Machine>(state.as_bytes()).unwrap_err().to_string();
            let both = format!("it has version {version}, and this program reads 1 to 2; ");
            assert!(error.starts_with(&both) && error.contains(what), "{error}");
        }
    }

    /// Version 1 named paths on the host, which are dropped.
    #[test]
    fn an_older_state_is_upgraded() {
        let json = br#"{"vcpus":[],"clock":3,"boot":{"kernel":"/etc/shadow","initramfs":null}}"#;
        let sealed = |version| {
            let covered = format!("{MAGIC} {version} {} {}", json.len(), sha256(json));
            let line = format!("{covered} {}\n", sha256(covered.as_bytes()));
            [line.as_bytes(), json].concat()
        };
        let state: Value = decode(&sealed(1)).unwrap();
        assert_eq!(state, serde_json::json!({"vcpus": [], "clock": 3, "boot": null}));
        let state: Value = decode(&sealed(2)).unwrap();
        assert_eq!(state["boot"]["kernel"], "/etc/shadow");
    }

    #[test]
    fn wrong_field_is_named() {
        let told = |json: &str| {
            let value: serde_json::Value = serde_json::from_str(json).unwrap();
            decode::<Machine>(&encode(&value).unwrap()).unwrap_err().to_string()
        };
        // (serde_json writes the keys of a value in order.)
        for (json, place) in [
            (r#"{"clock":"x","vcpus":[]}"#, "at clock: invalid type: string \"x\""),
            (
                r#"{"clock":1,"vcpus":[{"name":"},{","rax":1},{"name":"","rax":-1}]}"#,
                "at vcpus[1].rax: invalid value",
            ),
            (r#"{"clock":1,"vcpus":[{"name":"\"}"}]}"#, "at vcpus[0]: missing field `rax`"),
            (r#"{"clock":1}"#, "at its top: missing field `vcpus`"),
            (r#"[1]"#, "at [0]: invalid type"),
        ] {
            let error = told(json);
            assert!(error.contains(place), "{error}, and not: {place}");
        }
    }
}
