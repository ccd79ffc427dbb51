// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The place of a snapshot that a pager serves: `pager:SOCKET[?name=NAME][&files=DIR]`, or
//! `pager+firecracker:SOCKET?files=DIR`.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{PathBuf, absolute};
use std::str::FromStr;

use demand_pager::{Location, LocationError};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};

/// The protocol of a pager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PagerKind {
    /// The messages of demand-pager.
    Messages,
    /// That of Firecracker's page fault handlers.
    Firecracker,
}

/// The place of a snapshot that a pager serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PagerPlace {
    pub(crate) kind: PagerKind,
    /// The pager, and the snapshot's name there.
    pub(crate) location: Location,
    /// The directory that has the snapshot's files except the memory; the pager has them if there
    /// is none.
    pub(crate) files: Option<PathBuf>,
}

/// An error from parsing a [`PagerPlace`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PagerPlaceError {
    #[error(transparent)]
    Location(#[from] LocationError),
    #[error("it names a directory of files twice, or an empty one; write files=DIR once")]
    Files,
    #[error("a handler has the memory only; write pager+firecracker:SOCKET?files=DIR")]
    MemoryOnly,
}

impl PagerKind {
    /// The prefix of a location.
    const MESSAGES: &str = "pager:";

    fn scheme(self) -> &'static str {
        match self {
            PagerKind::Messages => PagerKind::MESSAGES,
            PagerKind::Firecracker => "pager+firecracker:",
        }
    }

    /// Returns the protocol of a pager's place, or `None` if the text is another place's.
    pub(crate) fn of(text: &str) -> Option<PagerKind> {
        let kinds = [PagerKind::Messages, PagerKind::Firecracker];
        kinds.into_iter().find(|kind| text.starts_with(kind.scheme()))
    }
}

impl PagerPlace {
    /// Returns the paths in it.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        let socket = self.location.socket().to_owned();
        [Some(socket), self.files.clone()].into_iter().flatten().collect()
    }

    /// Returns the place with absolute paths.
    pub(crate) fn absolute(&self) -> io::Result<PagerPlace> {
        let socket = absolute(self.location.socket())?;
        let files = self.files.as_ref().map(absolute).transpose()?;
        let location = Location::new(socket, self.location.name());
        Ok(PagerPlace { kind: self.kind, location, files })
    }

    /// Returns the pager, and the snapshot's name there, for messages.
    pub(crate) fn shown(&self) -> String {
        self.location.to_string().replacen(PagerKind::MESSAGES, self.kind.scheme(), 1)
    }
}

impl FromStr for PagerPlace {
    type Err = PagerPlaceError;

    fn from_str(text: &str) -> Result<Self, PagerPlaceError> {
        let kind = PagerKind::of(text).unwrap_or(PagerKind::Messages);
        let (socket, parameters) = text.split_once('?').unwrap_or((text, ""));
        let is_files = |parameter: &&str| parameter.starts_with("files=");
        let (files, others): (Vec<&str>, Vec<&str>) = parameters.split('&').partition(is_files);
        let socket = socket.replacen(kind.scheme(), PagerKind::MESSAGES, 1);
        let location: Location = format!("{socket}?{}", others.join("&")).parse()?;
        let files = match files[..] {
            [] => None,
            ["files="] | [_, _, ..] => return Err(PagerPlaceError::Files),
            [one] => {
                let path = percent_decode_str(&one["files=".len()..]).collect();
                Some(OsString::from_vec(path).into())
            }
        };
        if kind == PagerKind::Firecracker && (files.is_none() || !location.name().is_empty()) {
            return Err(PagerPlaceError::MemoryOnly);
        }
        Ok(PagerPlace { kind, location, files })
    }
}

impl fmt::Display for PagerPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ESCAPED: &AsciiSet =
            &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.');
        f.write_str(&self.shown())?;
        if let Some(files) = &self.files {
            let separator = if self.location.name().is_empty() { '?' } else { '&' };
            write!(
                f,
                "{separator}files={}",
                percent_encode(files.as_os_str().as_bytes(), ESCAPED)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pagers_survive_a_round_trip() {
        for text in [
            "pager:/run/p",
            "pager:/run/p?name=vm7",
            "pager:/run/p?files=/snapshots/a",
            "pager:p?name=vm7&files=b%26%3F",
            "pager+firecracker:/run/p?files=/a",
        ] {
            assert_eq!(text.parse::<PagerPlace>().unwrap().to_string(), text);
        }
        let swapped: PagerPlace = "pager:p?files=/b&name=vm7".parse().unwrap();
        assert_eq!(swapped.to_string(), "pager:p?name=vm7&files=/b");
    }

    #[test]
    fn unusable_pagers_are_explained() {
        for (text, cause) in [
            ("pager:", "no socket"),
            ("pager:/p?files=", "files=DIR"),
            ("pager:/p?files=/a&files=/b", "files=DIR"),
            ("pager+firecracker:/p", "the memory only"),
            ("pager+firecracker:/p?files=/a&name=vm7", "the memory only"),
            ("pager:/p?colour=red&files=/a", "unknown parameter"),
        ] {
            let error = text.parse::<PagerPlace>().unwrap_err().to_string();
            assert!(error.contains(cause), "{text}: {error}");
        }
    }

    #[test]
    fn paths_are_made_absolute() {
        let place: PagerPlace = "pager:p?name=vm7&files=a".parse().unwrap();
        let place = place.absolute().unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(place.location.socket(), here.join("p"));
        assert_eq!(place.files, Some(here.join("a")));
    }
}
