// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Options of the NBD client.

use std::path::PathBuf;
use std::time::Duration;

/// The limits of an [`NbdSource`](super::NbdSource), and its certificates.
///
/// # Examples
///
/// ```
/// use demand_remote::nbd::NbdOptions;
/// use std::time::Duration;
///
/// let options = NbdOptions { answer: Duration::from_secs(5), ..NbdOptions::default() };
/// assert_eq!(options.demand_connections, None);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdOptions {
    /// Connections for demand, 1 to 16. By default two; one if the server does not say that an
    /// export may have several.
    pub demand_connections: Option<usize>,
    /// Connections for background fill, 1 to 16. The default is the same.
    pub fill_connections: Option<usize>,
    /// Most requests in flight on a connection for demand, 1 to 1024.
    pub demand_window: usize,
    /// Most requests in flight on a connection for fill, 1 to 1024. A server whose threads serve
    /// all connections should have more of them than fill has requests in flight.
    pub fill_window: usize,
    /// Longest time to connect and to agree on the export.
    pub connect: Duration,
    /// Longest time that the oldest request in flight waits for its answer. A connection that
    /// takes longer counts as broken, and its requests fail.
    pub answer: Duration,
    /// Pause before connecting again after a failure. It doubles with each failure, and varies, so
    /// that not all clients of a server return at the same time.
    pub pause: Duration,
    /// Longest pause before connecting again.
    pub longest_pause: Duration,
    /// Certificates for TLS.
    pub tls: TlsOptions,
}

impl Default for NbdOptions {
    /// Returns 32 requests in flight for demand and 6 for fill, 10 s to connect, 15 s for an
    /// answer, and pauses from 100 ms to 2 s.
    fn default() -> Self {
        NbdOptions {
            demand_connections: None,
            fill_connections: None,
            demand_window: 32,
            fill_window: 6,
            connect: Duration::from_secs(10),
            answer: Duration::from_secs(15),
            pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(2),
            tls: TlsOptions::default(),
        }
    }
}

impl NbdOptions {
    /// Returns the numbers of connections, for demand and for fill.
    pub(crate) fn connections(&self, several: bool) -> [usize; 2] {
        let default = if several { 2 } else { 1 };
        [self.demand_connections, self.fill_connections]
            .map(|count| count.unwrap_or(default).clamp(1, 16))
    }
}

/// Certificates for TLS, in files in the PEM format. They are read whenever a connection is made,
/// so renewed ones take effect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsOptions {
    /// Certificates of the authorities that may vouch for the server. By default those of the
    /// system.
    pub authorities: Option<PathBuf>,
    /// The client's own certificate (with those of its issuers) and key, for servers that want one.
    pub client: Option<ClientCertificate>,
}

/// A client's certificate and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    /// File with the certificate, followed by those of its issuers.
    pub certificate: PathBuf,
    /// File with the key.
    pub key: PathBuf,
}
