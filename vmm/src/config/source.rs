// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The place of a snapshot.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf, absolute};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::config::pager::{PagerKind, PagerPlace};

/// The place of a snapshot: a directory, or a URL. As text it is either. `pager:SOCKET` is a URL,
/// too; a directory of such a name is written `./pager:SOCKET`.
///
/// Its `Debug` and `Display` show neither passwords nor queries of URLs, which may be signatures.
///
/// # Examples
///
/// ```
/// use demand_vmm::config::source::SnapshotPlace;
///
/// let place: SnapshotPlace = "https://images.example/vm7?signature=abc".parse().unwrap();
/// assert_eq!(place.to_string(), "https://images.example/vm7");
/// assert_eq!(place.directory(), None);
/// ```
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "PathBuf", into = "PathBuf")]
pub enum SnapshotPlace {
    /// A directory of this system.
    Directory(PathBuf),
    /// A URL, as it was given.
    Url(String),
}

impl SnapshotPlace {
    /// Returns the directory, unless the place is a URL.
    pub fn directory(&self) -> Option<&Path> {
        match self {
            SnapshotPlace::Directory(path) => Some(path),
            SnapshotPlace::Url(_) => None,
        }
    }

    /// Returns the paths in it.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        match self {
            SnapshotPlace::Directory(path) => vec![path.clone()],
            // One that cannot be used is refused later.
            SnapshotPlace::Url(url) => match url.parse::<PagerPlace>() {
                Ok(place) => place.paths(),
                Err(_) => Vec::new(),
            },
        }
    }

    /// Makes the paths in it absolute.
    pub(crate) fn make_absolute(&mut self) -> io::Result<()> {
        match self {
            SnapshotPlace::Directory(path) => *path = absolute(&*path)?,
            SnapshotPlace::Url(url) => {
                // One that cannot be used is refused later, as it was given.
                if let Ok(place) = url.parse::<PagerPlace>() {
                    *url = place.absolute()?.to_string();
                }
            }
        }
        Ok(())
    }

    /// Returns the place as a path, for messages about its files.
    pub(crate) fn shown(&self) -> PathBuf {
        match self {
            SnapshotPlace::Directory(path) => path.clone(),
            SnapshotPlace::Url(url) => without_secrets(url).into(),
        }
    }
}

/// Returns a URL without its user, and without what follows its path. The socket of an NBD server
/// is no secret, and distinguishes URLs; nor is a pager's.
fn without_secrets(url: &str) -> String {
    if let Ok(pager) = url.parse::<PagerPlace>() {
        return pager.shown();
    }
    let (url, query) = url.split_once('?').unwrap_or((url, ""));
    let url = url.split('#').next().unwrap_or_default();
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = host.rsplit('@').next().unwrap_or_default();
    let socket = query.split('&').find(|part| part.starts_with("socket="));
    let socket = socket.map(|socket| format!("?{socket}")).unwrap_or_default();
    format!("{scheme}://{host}{path}{socket}")
}

impl From<PathBuf> for SnapshotPlace {
    fn from(path: PathBuf) -> Self {
        let has_scheme = |text: &str| {
            text.split_once("://").is_some_and(|(scheme, _)| {
                !scheme.is_empty()
                    && scheme.chars().all(|char| char.is_ascii_alphanumeric() || char == '+')
            })
        };
        let is_url = |text: &str| PagerKind::of(text).is_some() || has_scheme(text);
        match path.to_str() {
            Some(text) if is_url(text) => SnapshotPlace::Url(text.into()),
            _ => SnapshotPlace::Directory(path),
        }
    }
}

impl From<SnapshotPlace> for PathBuf {
    fn from(place: SnapshotPlace) -> Self {
        match place {
            SnapshotPlace::Directory(path) => path,
            SnapshotPlace::Url(url) => url.into(),
        }
    }
}

impl From<&OsStr> for SnapshotPlace {
    fn from(text: &OsStr) -> Self {
        PathBuf::from(text).into()
    }
}

impl FromStr for SnapshotPlace {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(PathBuf::from(text).into())
    }
}

impl fmt::Display for SnapshotPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shown().display().fmt(f)
    }
}

impl fmt::Debug for SnapshotPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SnapshotPlace({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(text: &str) -> SnapshotPlace {
        text.parse().unwrap()
    }

    #[test]
    fn urls_and_directories_are_distinguished() {
        for text in [
            "s3://bucket/vm7",
            "nbd+unix:///?socket=/run/s",
            "https://host/vm7",
            "pager:p",
            "pager+firecracker:p",
        ] {
            assert_eq!(place(text), SnapshotPlace::Url(text.into()));
        }
        for text in ["/snapshots/a", "a", "./s3://b", "://", "a/b://c", "", "./pager:p"] {
            assert_eq!(place(text), SnapshotPlace::Directory(text.into()), "{text}");
        }
    }

    #[test]
    fn paths_of_pagers_are_known() {
        let pager = place("pager:p?files=/snapshot&name=vm7");
        assert_eq!(pager.paths(), [Path::new("p"), Path::new("/snapshot")]);
        assert!(place("pager:").paths().is_empty() && place("http://host/a").paths().is_empty());
    }

    #[test]
    fn urls_survive_a_round_trip() {
        let url = place("https://me:word@host/vm7?signature=x");
        let json = serde_json::to_string(&url).unwrap();
        assert_eq!(json, "\"https://me:word@host/vm7?signature=x\"");
        assert_eq!(serde_json::from_str::<SnapshotPlace>(&json).unwrap(), url);
    }

    #[test]
    fn secrets_are_not_shown() {
        let url = place("https://me:hidden@host/vm7?signature=hidden#hidden");
        assert_eq!(format!("{url} {url:?}"), "https://host/vm7 SnapshotPlace(https://host/vm7)");
        let socket = place("nbd+unix:///vm7?socket=/run/s&password=hidden");
        assert_eq!(socket.to_string(), "nbd+unix:///vm7?socket=/run/s");
        let pager = place("pager:/run/p?files=/snapshot&name=vm7");
        assert_eq!(pager.to_string(), "pager:/run/p?name=vm7");
        let handler = place("pager+firecracker:/run/p?files=/snapshot");
        assert_eq!(handler.to_string(), "pager+firecracker:/run/p");
    }
}
