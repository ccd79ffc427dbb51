// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! TLS, with certificates that openssl makes.

use std::path::Path;

use demand_remote::nbd::{ClientCertificate, NbdErrorKind, NbdOptions, Refusal, TlsOptions};
use demand_source::{PageSource, Priority};

use crate::server::{Server, hasty, open, pattern, read, run};

/// Makes an authority, and certificates of a server named `pages.example` and of a client, with the
/// names that nbdkit expects. Returns `None` without openssl.
fn certificates(folder: &Path) -> Option<()> {
    let in_folder = |file: &str| folder.join(file).display().to_string();
    let (ca, ca_key) = (in_folder("ca-cert.pem"), in_folder("ca-key.pem"));
    let key = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    let authority =
        ["-x509", "-days", "2", "-subj", "/CN=authority", "-keyout", &ca_key, "-out", &ca];
    run("openssl", &[&key[..], &authority].concat())?;
    for (name, usage) in [("server", "serverAuth"), ("client", "clientAuth")] {
        let (cert, secret) =
            (in_folder(&format!("{name}-cert.pem")), in_folder(&format!("{name}-key.pem")));
        let usage = format!("extendedKeyUsage={usage}");
        let signed = [
            "-x509",
            "-days",
            "2",
            "-subj",
            "/CN=pages",
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            "-addext",
            "subjectAltName=DNS:pages.example",
            "-addext",
            "basicConstraints=CA:FALSE",
            "-addext",
            &usage,
            "-keyout",
            &secret,
            "-out",
            &cert,
        ];
        run("openssl", &[&key[..], &signed].concat())?;
    }
    Some(())
}

#[test]
fn encrypted_export_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = certificates(folder.path()) else { return };
    let files = format!("--tls-certificates={}", folder.path().display());
    let Some(server) = Server::nbdkit(&["--tls=require", &files, "pattern", "64M"]) else {
        return;
    };
    let authorities = Some(folder.path().join("ca-cert.pem"));
    let options = || NbdOptions {
        tls: TlsOptions { authorities: authorities.clone(), client: None },
        ..hasty()
    };
    let url = server.url("nbds", "", "&tls-hostname=pages.example");
    let source = open(&url, options()).unwrap();
    assert!(!source.extent(0).unwrap().is_hole());
    for i in 0..8 {
        let (bytes, failures) = read(&source, Priority::Fill, i << 23, 8 << 20);
        assert!(bytes == pattern(i << 23, 8 << 20) && failures == 0);
    }

    // The certificate is for another name, or of an authority that the system does not know.
    let url = server.url("nbds", "", "&tls-hostname=other.example");
    let error = open(&url, options()).unwrap_err();
    assert!(matches!(error.kind(), NbdErrorKind::Tls { .. }), "{error}");
    println!("{error}");
    let url = server.url("nbds", "", "&tls-hostname=pages.example");
    let error = open(&url, hasty()).unwrap_err();
    let unknown = matches!(error.kind(), NbdErrorKind::Tls { .. } | NbdErrorKind::NoAuthorities);
    assert!(unknown, "{error}");
    println!("{error}");
    // Without TLS.
    let error = open(&server.url("nbd", "", ""), hasty()).unwrap_err();
    let NbdErrorKind::Refused { refusal, .. } = error.kind() else { panic!("{error}") };
    assert_eq!(*refusal, Refusal::TlsRequired);
    println!("{error}");
}

#[test]
fn client_shows_its_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = certificates(folder.path()) else { return };
    let files = format!("--tls-certificates={}", folder.path().display());
    let arguments = ["--tls=require", "--tls-verify-peer", &files, "pattern", "64M"];
    let Some(server) = Server::nbdkit(&arguments) else { return };
    let in_folder = |file| folder.path().join(file);
    let url = server.url("nbds", "", "&tls-hostname=pages.example");
    let authorities = Some(in_folder("ca-cert.pem"));
    let client = ClientCertificate {
        certificate: in_folder("client-cert.pem"),
        key: in_folder("client-key.pem"),
    };
    let tls = TlsOptions { authorities: authorities.clone(), client: Some(client.clone()) };
    let source = open(&url, NbdOptions { tls, ..hasty() }).unwrap();
    assert_eq!(read(&source, Priority::Demand, 4096, 4096).0, pattern(4096, 4096));
    // All files by the URL.
    let short = format!("{url}&tls-certificates={}", folder.path().display());
    let source = open(&short, hasty()).unwrap();
    assert_eq!(read(&source, Priority::Demand, 4096, 4096).0, pattern(4096, 4096));

    let tls = TlsOptions { authorities: authorities.clone(), client: None };
    let error = open(&url, NbdOptions { tls, ..hasty() }).unwrap_err();
    assert!(matches!(error.kind(), NbdErrorKind::Tls { .. }), "{error}");
    println!("{error}");
    let missing = ClientCertificate { key: in_folder("none.pem"), ..client };
    let tls = TlsOptions { authorities, client: Some(missing) };
    let error = open(&url, NbdOptions { tls, ..hasty() }).unwrap_err();
    assert!(matches!(error.kind(), NbdErrorKind::Certificates { .. }), "{error}");
    println!("{error}");
}

#[test]
fn server_without_tls_is_refused() {
    let Some(server) = Server::nbdkit(&["pattern", "64M"]) else { return };
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = certificates(folder.path()) else { return };
    let files = format!("&tls-certificates={}", folder.path().display());
    let error = open(&server.url("nbds", "", &files), hasty()).unwrap_err();
    assert!(matches!(error.kind(), NbdErrorKind::NoTls), "{error}");
}
