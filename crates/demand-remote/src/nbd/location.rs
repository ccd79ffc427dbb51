// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Locations of exports: the URLs that name a server and one of its exports.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, percent_encode};

/// The port of a URL that names none.
const PORT: u16 = 10809;

/// Longest name of an export in bytes, by the protocol.
const LONGEST_NAME: usize = 4096;

/// Characters that are escaped in the name of an export.
const IN_NAME: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'#').add(b'%').add(b'?');
/// Characters that are escaped in the value of a parameter.
const IN_VALUE: &AsciiSet = &IN_NAME.add(b'&').add(b'+').add(b'=');

/// The name of an export: a server's address, and the export's name there.
///
/// | URL | server |
/// |---|---|
/// | `nbd://HOST[:PORT]/EXPORT` | over TCP, port 10809 if none is given |
/// | `nbds://HOST[:PORT]/EXPORT` | the same with TLS |
/// | `nbd+unix:///EXPORT?socket=PATH` | on a Unix socket |
/// | `nbds+unix:///EXPORT?socket=PATH` | the same with TLS |
///
/// The export's name may be empty: it is the server's default export then. Two parameters belong to
/// TLS: `tls-hostname=NAME`, the name that the server's certificate must have (by default the host,
/// or `localhost` on a Unix socket), and `tls-certificates=FOLDER`, a folder with the authorities'
/// certificates in `ca-cert.pem`, and optionally a client's certificate and key in
/// `client-cert.pem` and `client-key.pem`. Other characters than letters, digits and `-._~/` are
/// written `%XX`.
///
/// # Examples
///
/// ```
/// use demand_remote::nbd::Location;
///
/// let location: Location = "nbd+unix:///vm%207?socket=/run/nbd.sock".parse().unwrap();
/// assert_eq!(location.export(), "vm 7");
/// assert_eq!(location.to_string(), "nbd+unix:///vm%207?socket=/run/nbd.sock");
///
/// let error = "nbd:///vm7".parse::<Location>().unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "cannot use 'nbd:///vm7' as an NBD export: it names no host; write nbd://HOST/EXPORT"
/// );
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    pub(crate) address: Address,
    pub(crate) export: String,
    pub(crate) tls: bool,
    pub(crate) tls_hostname: Option<String>,
    pub(crate) tls_certificates: Option<PathBuf>,
}

/// The address of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    /// A host, by name or address (without brackets), and its port.
    Tcp { host: String, port: u16 },
    /// A Unix socket.
    Unix { path: PathBuf },
}

/// An error from parsing a [`Location`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot use '{}' as an NBD export: {cause}", url.escape_debug())]
pub struct LocationError {
    /// The URL.
    url: String,
    /// The reason, and advice.
    cause: &'static str,
}

impl Location {
    /// Returns the export's name.
    pub fn export(&self) -> &str {
        &self.export
    }

    /// Returns the location of the export `file` below this one: with the same name, a slash, and
    /// that name; of a server's default export, the export `file`.
    #[must_use]
    pub fn join(&self, file: &str) -> Location {
        let name = self.export.trim_end_matches('/');
        let export = if name.is_empty() { file.to_owned() } else { format!("{name}/{file}") };
        Location { export, ..self.clone() }
    }

    /// Returns whether the connection uses TLS.
    pub fn is_encrypted(&self) -> bool {
        self.tls
    }
}

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(url: &str) -> Result<Self, LocationError> {
        parse(url).map_err(|cause| LocationError { url: url.to_owned(), cause })
    }
}

fn parse(url: &str) -> Result<Location, &'static str> {
    const SCHEMES: &str = "its scheme is none of nbd, nbds, nbd+unix and nbds+unix; write \
                           nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH";
    let (scheme, rest) = url.split_once("://").ok_or(SCHEMES)?;
    let (tls, unix) = match &*scheme.to_ascii_lowercase() {
        "nbd" => (false, false),
        "nbds" => (true, false),
        "nbd+unix" => (false, true),
        "nbds+unix" => (true, true),
        _ => return Err(SCHEMES),
    };
    if rest.contains('#') {
        return Err("it has a fragment; write # in a name as %23");
    }
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, name) = rest.split_once('/').unwrap_or((rest, ""));
    let export = text(name).ok_or("the export's name is not UTF-8; check its escapes")?;
    if export.len() > LONGEST_NAME {
        return Err("the export's name is longer than 4096 bytes; shorten it");
    }
    let parameters = parameters(query, tls)?;
    let address = match (unix, parameters.socket) {
        (true, Some(path)) if authority.is_empty() => Address::Unix { path },
        (true, Some(_)) => {
            return Err("it names a host and a socket; write nbd+unix:///EXPORT?socket=PATH");
        }
        (true, None) => {
            return Err("it names no socket; write nbd+unix:///EXPORT?socket=PATH");
        }
        (false, Some(_)) => {
            return Err("it names a host and a socket; write nbd+unix:///EXPORT?socket=PATH");
        }
        (false, None) => tcp(authority)?,
    };
    let (tls_hostname, tls_certificates) = (parameters.hostname, parameters.certificates);
    Ok(Location { address, export, tls, tls_hostname, tls_certificates })
}

/// Parses `HOST[:PORT]`.
fn tcp(authority: &str) -> Result<Address, &'static str> {
    if authority.contains('@') {
        return Err("it names a user; NBD has none, so write nbd://HOST/EXPORT");
    }
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, port) = rest.split_once(']').ok_or("its address has no closing bracket")?;
        let port = match port {
            "" => None,
            port => Some(port.strip_prefix(':').ok_or("a colon must follow its address")?),
        };
        (host, port)
    } else {
        match authority.split_once(':') {
            Some((_, port)) if port.contains(':') => {
                return Err("its host has several colons; write an IPv6 address in brackets");
            }
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        }
    };
    if host.is_empty() {
        return Err("it names no host; write nbd://HOST/EXPORT");
    }
    // `%` introduces the zone of an IPv6 address.
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:%".contains(&byte);
    if !host.bytes().all(fits) {
        return Err("its host has characters that no name of a host has; check it");
    }
    let port = match port {
        None | Some("") => PORT,
        Some(port) => match port.parse() {
            Ok(number @ 1..) if port.bytes().all(|byte| byte.is_ascii_digit()) => number,
            _ => return Err("its port is no number from 1 to 65535; check it"),
        },
    };
    Ok(Address::Tcp { host: host.to_owned(), port })
}

#[derive(Default)]
struct Parameters {
    socket: Option<PathBuf>,
    hostname: Option<String>,
    certificates: Option<PathBuf>,
}

/// Parses the part behind the question mark.
fn parameters(query: &str, tls: bool) -> Result<Parameters, &'static str> {
    let mut found = Parameters::default();
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        if value.is_empty() {
            return Err("one of its parameters has no value; write NAME=VALUE");
        }
        let twice = match key {
            "socket" => found.socket.replace(path(value)).is_some(),
            "tls-hostname" | "tls-certificates" if !tls => {
                return Err("it has a parameter for TLS, but no TLS; write nbds or nbds+unix");
            }
            "tls-hostname" => {
                let name = text(value).ok_or("its tls-hostname is not UTF-8; check its escapes")?;
                found.hostname.replace(name).is_some()
            }
            "tls-certificates" => found.certificates.replace(path(value)).is_some(),
            _ => {
                return Err("it has an unknown parameter; the parameters are socket, \
                            tls-hostname and tls-certificates");
            }
        };
        if twice {
            return Err("it has a parameter twice; write it once");
        }
    }
    Ok(found)
}

fn text(escaped: &str) -> Option<String> {
    Some(percent_decode_str(escaped).decode_utf8().ok()?.into_owned())
}

fn path(escaped: &str) -> PathBuf {
    OsString::from_vec(percent_decode_str(escaped).collect()).into()
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls { "nbds" } else { "nbd" })?;
        match &self.address {
            Address::Unix { .. } => f.write_str("+unix://")?,
            Address::Tcp { host, port } => {
                let (open, close) = if host.contains(':') { ("[", "]") } else { ("", "") };
                write!(f, "://{open}{host}{close}")?;
                if *port != PORT {
                    write!(f, ":{port}")?;
                }
            }
        }
        write!(f, "/{}", percent_encode(self.export.as_bytes(), IN_NAME))?;
        let socket = match &self.address {
            Address::Unix { path } => Some(path.as_os_str().as_bytes()),
            Address::Tcp { .. } => None,
        };
        let certificates = self.tls_certificates.as_ref().map(|path| path.as_os_str().as_bytes());
        let hostname = self.tls_hostname.as_ref().map(String::as_bytes);
        let parameters =
            [("socket", socket), ("tls-hostname", hostname), ("tls-certificates", certificates)];
        let mut separator = '?';
        for (key, value) in parameters {
            if let Some(value) = value {
                write!(f, "{separator}{key}={}", percent_encode(value, IN_VALUE))?;
                separator = '&';
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_and_written_alike() {
        for url in [
            "nbd://example.com/",
            "nbd://example.com/vm/7",
            "nbd://10.0.0.1:1234/a%20b%25",
            "nbds://[2001:db8::1]/x",
            "nbds://[::1]:7/x?tls-hostname=a.example",
            "nbd+unix:///?socket=/run/a%26b",
            "nbds+unix:///x?socket=/s&tls-hostname=h&tls-certificates=/etc/pki",
        ] {
            let location: Location = url.parse().unwrap();
            assert_eq!(location.to_string(), url);
            assert_eq!(location.is_encrypted(), url.starts_with("nbds"));
        }
    }

    #[test]
    fn short_forms_have_defaults() {
        let location: Location = "NBD://host".parse().unwrap();
        assert_eq!(location.to_string(), "nbd://host/");
        let location: Location = "nbd://host:10809/z%C3%BC".parse().unwrap();
        assert_eq!((location.export(), &*location.to_string()), ("zü", "nbd://host/z%C3%BC"));
    }

    #[test]
    fn unusable_urls_are_explained() {
        for (url, cause) in [
            ("", "scheme"),
            ("/dev/nbd0", "scheme"),
            ("http://host/x", "scheme"),
            ("nbd:///x", "no host"),
            ("nbd://:5/x", "no host"),
            ("nbd://host:0/x", "port"),
            ("nbd://host:65536/x", "port"),
            ("nbd://host:+5/x", "port"),
            ("nbd://::1/x", "brackets"),
            ("nbd://[::1/x", "bracket"),
            ("nbd://[::1]5/x", "colon"),
            ("nbd://me@host/x", "user"),
            ("nbd://ho st/x", "characters"),
            ("nbd://host/x#y", "fragment"),
            ("nbd://host/%ff", "UTF-8"),
            ("nbd://host/x?socket=/s", "host and a socket"),
            ("nbd+unix://host/x?socket=/s", "host and a socket"),
            ("nbd+unix:///x", "no socket"),
            ("nbd+unix:///x?socket=", "no value"),
            ("nbd+unix:///x?socket=/s&socket=/t", "twice"),
            ("nbd+unix:///x?socket=/s&colour=red", "unknown parameter"),
            ("nbd://host/x?tls-hostname=y", "no TLS"),
        ] {
            let error = url.parse::<Location>().unwrap_err().to_string();
            assert!(error.contains(cause), "{url}: {error}");
        }
        let long = format!("nbd://host/{}", "x".repeat(4097));
        assert!(long.parse::<Location>().unwrap_err().to_string().contains("longer"));
    }
}
