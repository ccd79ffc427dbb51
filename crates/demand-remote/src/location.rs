// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Names of stores, and of objects in them, as users write them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use url::Url;

/// The place of a store, or of an object: a directory or a URL.
///
/// Its `Display` shows neither passwords nor queries, which may contain signatures.
///
/// # Examples
///
/// ```
/// use demand_remote::Location;
///
/// let signed: Location = "https://images.example/vm7.raw?signature=abc".parse().unwrap();
/// assert_eq!(signed.to_string(), "https://images.example/vm7.raw");
/// assert!(matches!("/var/lib/images".parse(), Ok(Location::Path(_))));
/// ```
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Location {
    /// A path of this system, or a URL `file:///PATH`.
    Path(PathBuf),
    /// A URL `http://` or `https://`.
    Web(Url),
    /// A URL `s3://BUCKET/KEY`.
    S3 {
        /// Name of the bucket.
        bucket: String,
        /// Name of the object, or prefix of those of a store; without a slash at either end.
        key: String,
    },
}

/// The reason why a text names no [`Location`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LocationError {
    /// The text is no URL.
    #[error("cannot use the URL {url}: {reason}; write SCHEME://HOST/PATH")]
    Url {
        /// The text, without passwords and queries.
        url: String,
        /// The reason.
        reason: String,
    },
    /// The scheme is unknown, or left out of this build.
    #[error("cannot use {url}: '{scheme}' is not supported; {known}")]
    Scheme {
        /// The text, without passwords and queries.
        url: String,
        /// The scheme.
        scheme: String,
        /// The schemes that are supported, as a sentence's end.
        known: &'static str,
    },
    /// A URL of S3 with parts that have no meaning there.
    #[error("cannot use {url}: {reason}; write s3://BUCKET/KEY, and keep credentials elsewhere")]
    S3 {
        /// The text, without passwords and queries.
        url: String,
        /// The reason.
        reason: &'static str,
    },
}

const KNOWN: &str = "use a path, file://, http://, https:// or s3://";

impl Location {
    /// Returns the folder of this place, and the last part of its name; `None` if it has no name.
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_remote::Location;
    ///
    /// let snapshot: Location = "s3://bucket/images/vm7".parse().unwrap();
    /// let (store, name) = snapshot.split().unwrap();
    /// assert_eq!((store.to_string(), name), ("s3://bucket/images".into(), "vm7".into()));
    /// ```
    pub fn split(&self) -> Option<(Location, String)> {
        let last = |text: &str| -> Option<(String, String)> {
            let text = text.trim_end_matches('/');
            let (folder, name) = text.rsplit_once('/').unwrap_or(("", text));
            (!name.is_empty()).then(|| (folder.to_owned(), name.to_owned()))
        };
        match self {
            Location::Path(path) => {
                let name = path.file_name()?.to_str()?.to_owned();
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                Some((Location::Path(folder.unwrap_or(Path::new(".")).into()), name))
            }
            Location::Web(url) => {
                let (folder, name) = last(url.path())?;
                let mut url = url.clone();
                url.set_path(&folder);
                Some((Location::Web(url), name))
            }
            Location::S3 { bucket, key } => {
                let (key, name) = last(key)?;
                Some((Location::S3 { bucket: bucket.clone(), key }, name))
            }
        }
    }

    /// Returns the place of a file below this one. A URL keeps its query.
    ///
    /// # Examples
    ///
    /// ```
    /// use demand_remote::Location;
    ///
    /// let folder: Location = "s3://bucket/vm7".parse().unwrap();
    /// assert_eq!(folder.join("memory").to_string(), "s3://bucket/vm7/memory");
    /// ```
    #[must_use]
    pub fn join(&self, file: &str) -> Location {
        match self {
            Location::Path(path) => Location::Path(path.join(file)),
            Location::Web(url) => {
                let mut url = url.clone();
                let path = below(url.path(), file);
                url.set_path(&path);
                Location::Web(url)
            }
            Location::S3 { bucket, key } => {
                Location::S3 { bucket: bucket.clone(), key: below(key, file) }
            }
        }
    }

    /// Returns whether a text is meant as a URL, and not as a path.
    pub fn is_url(text: &str) -> bool {
        text.split_once("://").is_some_and(|(scheme, _)| {
            scheme.starts_with(|first: char| first.is_ascii_alphabetic())
                && scheme.chars().all(|char| char.is_ascii_alphanumeric() || "+-.".contains(char))
        })
    }
}

/// Returns a name with another one below it.
fn below(name: &str, child: &str) -> String {
    if name.is_empty() {
        child.to_owned()
    } else {
        format!("{}/{child}", name.trim_end_matches('/'))
    }
}

/// Returns a text that may be a URL without what follows its path, and without its user.
fn without_secrets(text: &str) -> String {
    let text = text.split(['?', '#']).next().unwrap_or_default();
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = host.rsplit('@').next().unwrap_or_default();
    format!("{scheme}://{host}{path}")
}

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Self, LocationError> {
        if !Location::is_url(text) {
            return Ok(Location::Path(text.into()));
        }
        let url = || without_secrets(text);
        let parsed = Url::parse(text)
            .map_err(|error| LocationError::Url { url: url(), reason: error.to_string() })?;
        match parsed.scheme() {
            "file" => parsed.to_file_path().map(Location::Path).map_err(|()| LocationError::Url {
                url: url(),
                reason: "it names no path of this system".into(),
            }),
            "http" | "https" => Ok(Location::Web(parsed)),
            "s3" => {
                let refused = |reason| LocationError::S3 { url: url(), reason };
                if !parsed.username().is_empty() || parsed.password().is_some() {
                    return Err(refused("it names a user"));
                }
                if parsed.query().is_some() || parsed.fragment().is_some() {
                    return Err(refused("it has a query"));
                }
                if parsed.port().is_some() {
                    return Err(refused("it names a port"));
                }
                let bucket = parsed.host_str().ok_or_else(|| refused("it names no bucket"))?;
                // Names of objects are taken as they are written: `Url` would encode and shorten them.
                let rest = &text["s3://".len()..];
                let key = rest.split_once('/').map_or("", |(_, key)| key.trim_matches('/'));
                Ok(Location::S3 { bucket: bucket.to_owned(), key: key.to_owned() })
            }
            scheme => {
                Err(LocationError::Scheme { url: url(), scheme: scheme.to_owned(), known: KNOWN })
            }
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::Path(path) => path.display().fmt(f),
            Location::Web(url) => f.write_str(&without_secrets(url.as_str())),
            Location::S3 { bucket, key } => write!(f, "s3://{bucket}/{key}"),
        }
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Location({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_urls_are_distinguished() {
        for path in ["/var/image", "image", "./a://b", "c:/x", "://x"] {
            assert_eq!(path.parse(), Ok(Location::Path(path.into())), "{path}");
        }
        let s3 = |bucket: &str, key: &str| Location::S3 { bucket: bucket.into(), key: key.into() };
        assert_eq!("s3://bucket/a/b c/../d/".parse(), Ok(s3("bucket", "a/b c/../d")));
        assert_eq!("s3://bucket".parse(), Ok(s3("bucket", "")));
        let web: Location = "http://[::1]:8080/x".parse().unwrap();
        assert_eq!(web.to_string(), "http://[::1]:8080/x");
    }

    #[test]
    fn files_are_below_a_folder() {
        let below = |folder: &str| folder.parse::<Location>().unwrap().join("memory");
        assert_eq!(below("s3://bucket"), "s3://bucket/memory".parse().unwrap());
        assert_eq!(below("https://host/a/?x=1"), "https://host/a/memory?x=1".parse().unwrap());
        assert_eq!(below("/a"), Location::Path("/a/memory".into()));
        assert_eq!(below("file:///a%20b"), Location::Path("/a b/memory".into()));
        for place in ["s3://bucket/a/memory", "https://host/a/memory?x=1", "/a/memory", "a/memory"]
        {
            let place: Location = place.parse().unwrap();
            let (folder, name) = place.split().unwrap();
            assert_eq!((folder.join("memory"), &*name), (place, "memory"));
        }
        for place in ["s3://bucket", "https://host", "/"] {
            assert_eq!(place.parse::<Location>().unwrap().split(), None, "{place}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        for text in [
            "https://user:secret@host/x?X-Amz-Signature=secret#secret",
            "s3://user:secret@bucket/x",
            "s3://bucket/x?token=secret",
            "ftp://user:secret@host/x?secret",
            "https://user:secret@[bad/x?secret",
        ] {
            let shown = match text.parse::<Location>() {
                Ok(location) => format!("{location} {location:?}"),
                Err(error) => format!("{error} {error:?}"),
            };
            assert!(!shown.contains("secret"), "{shown}");
        }
    }

    #[test]
    fn refused_urls_say_why() {
        for (text, words) in [
            ("ftp://host/x", "'ftp' is not supported"),
            ("s3://", "no bucket"),
            ("s3://bucket:80/x", "names a port"),
            ("https://", "empty host"),
        ] {
            let error = text.parse::<Location>().unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
