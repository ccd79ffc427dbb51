// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Connections to a server, up to the point where it takes requests.

use std::io;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::error::NbdErrorKind;
use super::handshake::{self, Export, Mode};
use super::location::{Address, Location};
use super::options::NbdOptions;
use super::tls;

/// A connection's two directions.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection that takes requests.
pub(crate) struct Connected {
    pub(crate) stream: Box<dyn Stream>,
    pub(crate) export: Export,
    pub(crate) mode: Mode,
}

/// Connects and agrees on the export, within the time limit.
pub(crate) async fn connect(
    location: &Location,
    options: &NbdOptions,
) -> Result<Connected, NbdErrorKind> {
    let after = options.connect;
    timeout(after, establish(location, options))
        .await
        .unwrap_or(Err(NbdErrorKind::Silent { after }))
}

async fn establish(location: &Location, options: &NbdOptions) -> Result<Connected, NbdErrorKind> {
    let failed = |source| NbdErrorKind::Connect { source };
    let mut stream: Box<dyn Stream> = match &location.address {
        Address::Tcp { host, port } => {
            let stream = TcpStream::connect((&**host, *port)).await.map_err(failed)?;
            stream.set_nodelay(true).map_err(failed)?;
            Box::new(stream)
        }
        Address::Unix { path } => Box::new(UnixStream::connect(path).await.map_err(failed)?),
    };
    let zeros = handshake::greet(&mut stream).await?;
    if location.tls {
        handshake::start_tls(&mut stream).await?;
        stream = encrypt(stream, location, options).await?;
    }
    match handshake::agree(&mut stream, &location.export, zeros).await {
        Ok((export, mode)) => Ok(Connected { stream, export, mode }),
        // With TLS 1.3, a server refuses a client's certificate after the handshake, and many do so
        // without a word.
        Err(NbdErrorKind::Lost { source }) if location.tls => Err(NbdErrorKind::Tls { source }),
        Err(kind) => Err(kind),
    }
}

async fn encrypt(
    stream: Box<dyn Stream>,
    location: &Location,
    options: &NbdOptions,
) -> Result<Box<dyn Stream>, NbdErrorKind> {
    let failed = |source| NbdErrorKind::Tls { source };
    let (folder, files) = (location.tls_certificates.clone(), options.tls.clone());
    // Files are read.
    let config = tokio::task::spawn_blocking(move || tls::config(folder.as_deref(), &files));
    let config = config.await.map_err(|error| failed(io::Error::other(error)))??;
    let name = match (&location.tls_hostname, &location.address) {
        (Some(name), _) => name,
        (None, Address::Tcp { host, .. }) => host,
        (None, Address::Unix { .. }) => "localhost",
    };
    let name = ServerName::try_from(name.to_owned());
    let name = name.map_err(|error| failed(io::Error::other(error)))?;
    let stream = TlsConnector::from(config).connect(name, stream).await.map_err(failed)?;
    Ok(Box::new(stream))
}
