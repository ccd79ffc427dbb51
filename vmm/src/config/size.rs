// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sizes as texts: a number of bytes, or one with a unit, as in `1G`.

/// Error for a text that is not a number of bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a size; give a number of bytes, or one with K, M, G or T")]
pub struct SizeError(String);

/// Parses a number of bytes: digits, optionally followed by K, M, G or T for powers of 1024.
///
/// # Errors
///
/// [`SizeError`]
///
/// # Examples
///
/// ```
/// use demand_vmm::config::size::parse_size;
///
/// assert_eq!(parse_size("64M"), Ok(64 << 20));
/// assert!(parse_size("64 MB").is_err());
/// ```
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let bytes = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| SizeError(text.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("2M", 2 << 20), ("1G", 1 << 30)] {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for text in ["", "G", "-1", "1.5G", "99999999999T", "1Ä"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
