// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Certificates of TLS.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use super::error::NbdErrorKind;
use super::options::{ClientCertificate, TlsOptions};

fn unusable(file: &Path, cause: impl ToString) -> NbdErrorKind {
    NbdErrorKind::Certificates { file: file.to_owned(), cause: cause.to_string() }
}

/// Reads the certificates: those of the options, or else those of the URL's folder, or else those
/// of the system.
pub(crate) fn config(
    folder: Option<&Path>,
    options: &TlsOptions,
) -> Result<Arc<ClientConfig>, NbdErrorKind> {
    let in_folder = |file: &str| folder.map(|folder| folder.join(file));
    let authorities = options.authorities.clone().or_else(|| in_folder("ca-cert.pem"));
    let roots = match &authorities {
        Some(file) => roots_of(file)?,
        None => system_roots()?,
    };
    let client = options.client.clone().or_else(|| {
        let certificate = in_folder("client-cert.pem").filter(|file| file.exists())?;
        Some(ClientCertificate { certificate, key: in_folder("client-key.pem")? })
    });
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| NbdErrorKind::Tls { source: std::io::Error::other(error) })?
        .with_root_certificates(roots);
    let config = match client {
        None => builder.with_no_client_auth(),
        Some(ClientCertificate { certificate, key }) => {
            let secret =
                PrivateKeyDer::from_pem_file(&key).map_err(|error| unusable(&key, error))?;
            builder
                .with_client_auth_cert(certificates(&certificate)?, secret)
                .map_err(|error| unusable(&certificate, error))?
        }
    };
    Ok(Arc::new(config))
}

fn certificates(file: &PathBuf) -> Result<Vec<CertificateDer<'static>>, NbdErrorKind> {
    let read = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let found = read.map_err(|error| unusable(file, error))?;
    if found.is_empty() { Err(unusable(file, "it has none")) } else { Ok(found) }
}

fn roots_of(file: &PathBuf) -> Result<RootCertStore, NbdErrorKind> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(file)? {
        roots.add(certificate).map_err(|error| unusable(file, error))?;
    }
    Ok(roots)
}

fn system_roots() -> Result<RootCertStore, NbdErrorKind> {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        log::debug!("cannot use certificates of the system: {error}");
    }
    let mut roots = RootCertStore::empty();
    let (usable, _) = roots.add_parsable_certificates(found.certs);
    if usable == 0 { Err(NbdErrorKind::NoAuthorities) } else { Ok(roots) }
}
