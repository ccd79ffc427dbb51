// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Locations of images: a pager's socket, and the name of an image there.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, percent_encode};

use crate::protocol::LONGEST_NAME;

/// Characters that are escaped.
const ESCAPED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'#').add(b'%').add(b'&').add(b'?');

/// A pager's socket, and the name of the image there: `pager:SOCKET` or `pager:SOCKET?name=NAME`.
///
/// In a path or name, `%`, `?`, `&` and `#` are written `%25`, `%3F`, `%26` and `%23`.
///
/// # Examples
///
/// ```
/// use demand_pager::Location;
///
/// let location: Location = "pager:/run/pager.sock?name=vm7".parse().unwrap();
/// assert_eq!(location.socket().to_str(), Some("/run/pager.sock"));
/// assert_eq!(location.join("memory").name(), "vm7/memory");
/// assert_eq!(location.to_string(), "pager:/run/pager.sock?name=vm7");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    socket: PathBuf,
    name: String,
}

/// An error from parsing a [`Location`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot use '{}' as a pager: {cause}", text.escape_debug())]
pub struct LocationError {
    text: String,
    /// The reason, and advice.
    cause: &'static str,
}

impl Location {
    /// Names the image `name`, which may be empty, of the pager at `socket`.
    pub fn new(socket: impl Into<PathBuf>, name: impl Into<String>) -> Location {
        Location { socket: socket.into(), name: name.into() }
    }

    /// Returns the path of the pager's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Returns the image's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the location of the image `file` below this one: with the same name, a slash, and
    /// that name; if this one has no name, of the image `file`.
    #[must_use]
    pub fn join(&self, file: &str) -> Location {
        let above = self.name.trim_end_matches('/');
        let name = if above.is_empty() { file.to_owned() } else { format!("{above}/{file}") };
        Location { name, ..self.clone() }
    }
}

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Self, LocationError> {
        parse(text).map_err(|cause| LocationError { text: text.to_owned(), cause })
    }
}

fn parse(text: &str) -> Result<Location, &'static str> {
    let rest = text.strip_prefix("pager:");
    let rest = rest.ok_or("it has another scheme; write pager:SOCKET or pager:SOCKET?name=NAME")?;
    let (socket, parameters) = rest.split_once('?').unwrap_or((rest, ""));
    if rest.contains('#') {
        return Err("it has a fragment; write # in a name as %23");
    }
    if socket.is_empty() {
        return Err("it names no socket; write pager:SOCKET");
    }
    let mut name = None;
    for parameter in parameters.split('&').filter(|parameter| !parameter.is_empty()) {
        match parameter.split_once('=') {
            Some(("name", _)) if name.is_some() => {
                return Err("it has a name twice; write it once");
            }
            Some(("name", value)) => name = Some(value),
            _ => return Err("it has an unknown parameter; the only one is name=NAME"),
        }
    }
    let name = percent_decode_str(name.unwrap_or_default()).decode_utf8();
    let name = name.map_err(|_| "the name is not UTF-8; check its escapes")?.into_owned();
    if name.len() > LONGEST_NAME {
        return Err("the name is longer than 4096 bytes; shorten it");
    }
    let socket = OsString::from_vec(percent_decode_str(socket).collect()).into();
    Ok(Location { socket, name })
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pager:{}", percent_encode(self.socket.as_os_str().as_bytes(), ESCAPED))?;
        if !self.name.is_empty() {
            write!(f, "?name={}", percent_encode(self.name.as_bytes(), ESCAPED))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_survive_a_round_trip() {
        for text in ["pager:/run/p", "pager:p?name=vm7/memory", "pager:/a%3Fb?name=%26%25"] {
            assert_eq!(text.parse::<Location>().unwrap().to_string(), text);
        }
        let odd: Location = "pager:/a%3Fb?name=%26%25".parse().unwrap();
        assert_eq!((odd.socket(), odd.name()), (Path::new("/a?b"), "&%"));
    }

    #[test]
    fn unusable_locations_are_explained() {
        for (text, cause) in [
            ("/run/p", "scheme"),
            ("pager:", "no socket"),
            ("pager:?name=x", "no socket"),
            ("pager:/p?name=%ff", "UTF-8"),
            ("pager:/p?name=a&name=b", "twice"),
            ("pager:/p?colour=red", "unknown parameter"),
            ("pager:/p#x", "fragment"),
        ] {
            let error = text.parse::<Location>().unwrap_err().to_string();
            assert!(error.contains(cause), "{text}: {error}");
        }
        let long = format!("pager:/p?name={}", "x".repeat(4097));
        assert!(long.parse::<Location>().unwrap_err().to_string().contains("longer"));
    }
}
