// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Serialization of KVM structures as hexadecimal strings, for `#[serde(with = "hex")]`. Otherwise
//! they would be arrays of numbers in JSON, with one line per byte.

use std::fmt::Write;

use serde::de::DeserializeOwned;
use serde::de::value::BytesDeserializer;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};

/// Serializes a value that serializes as its bytes, as the structures of kvm-bindings do.
pub(crate) fn serialize<T: Serialize, S: Serializer>(
    value: &T,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let bytes = bytes_of(value).ok_or_else(|| ser::Error::custom("not a string of bytes"))?;
    serializer.serialize_str(&digits(&bytes))
}

/// Deserializes the output of [`serialize`]. It refuses structures of another length, which
/// kvm-bindings would truncate or pad.
pub(crate) fn deserialize<'de, T: Serialize + DeserializeOwned, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    let bytes = bytes(&String::deserialize(deserializer)?)
        .ok_or_else(|| de::Error::custom("not a string of hexadecimal digits, two for a byte"))?;
    let value = T::deserialize(BytesDeserializer::<de::value::Error>::new(&bytes))
        .map_err(de::Error::custom)?;
    match bytes_of(&value) {
        Some(now) if now == bytes => Ok(value),
        now => Err(de::Error::custom(format!(
            "{} bytes where this version has {}",
            bytes.len(),
            now.map_or(0, |now| now.len())
        ))),
    }
}

/// Serialization of plain bytes.
pub(crate) mod area {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&digits(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<u8>, D::Error> {
        bytes(&String::deserialize(deserializer)?)
            .ok_or_else(|| de::Error::custom("not a string of hexadecimal digits, two for a byte"))
    }
}

fn bytes_of<T: Serialize>(value: &T) -> Option<Vec<u8>> {
    serde_json::from_value(serde_json::to_value(value).ok()?).ok()
}

fn digits(bytes: &[u8]) -> String {
    let mut digits = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        let _ = write!(digits, "{byte:02x}");
    }
    digits
}

fn bytes(digits: &str) -> Option<Vec<u8>> {
    let value = |digit: &u8| char::from(*digit).to_digit(16);
    let pairs = digits.as_bytes().chunks(2);
    pairs
        .map(|pair| {
            let [high, low] = pair else { return None };
            u8::try_from(value(high)? << 4 | value(low)?).ok()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_regs;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Saved {
        #[serde(with = "super")]
        regs: kvm_regs,
        #[serde(with = "super::area")]
        area: Vec<u8>,
    }

    #[test]
    fn structures_come_back_and_others_are_refused() {
        let regs = kvm_regs { rax: 0x0123_4567_89ab_cdef, rflags: 2, ..Default::default() };
        let saved = Saved { regs, area: vec![0, 0x7f, 0xff] };
        let json = serde_json::to_string(&saved).unwrap();
        assert!(json.starts_with(r#"{"regs":"efcdab8967452301"#), "{json}");
        assert!(json.ends_with(r#""area":"007fff"}"#), "{json}");
        assert_eq!(serde_json::from_str::<Saved>(&json).unwrap(), saved);
        for (from, to) in [("efcd", "ef"), ("efcd", "efcd00"), ("efcd", "efc"), ("efcd", "efxd")] {
            let other = json.replace(from, to);
            assert!(serde_json::from_str::<Saved>(&other).is_err(), "{other}");
        }
    }
}
