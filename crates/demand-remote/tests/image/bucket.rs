// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images of a bucket behind a link with faults. Its requests are signed, with the address of the
//! link as the server's name.
#![cfg(feature = "s3")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use test_support::child::{self, is_child};
use test_support::proxy::Fault;
use test_support::servers::{S3, free_port};

use crate::far::{self, Far};
use crate::support::{PAGE, read};

/// Runs a case in a process whose clients find a free port, for the link.
fn with_bucket(test: &str, case: fn(&Far)) {
    if !is_child() {
        S3::run_client(&format!("bucket::{test}"), free_port());
    } else if let Some(far) = Far::bucket(8) {
        case(&far);
    }
}

#[test]
fn broken_answers_are_asked_for_again() {
    with_bucket("broken_answers_are_asked_for_again", far::broken_answers_are_asked_for_again);
}

#[test]
fn changed_answers_are_never_content() {
    with_bucket("changed_answers_are_never_content", far::changed_answers_are_never_content);
}

/// Writes the files of a profile to a home folder.
fn write_profile(home: &Path, key: &str) {
    fs::create_dir_all(home.join(".aws")).unwrap();
    let keys =
        format!("[default]\naws_access_key_id={key}\naws_secret_access_key={}\n", S3::SECRET);
    fs::write(home.join(".aws/credentials"), keys).unwrap();
}

#[test]
fn refused_credentials_are_renewed_at_once() {
    if !is_child() {
        let home = tempfile::tempdir().unwrap();
        write_profile(home.path(), S3::KEY);
        let [_, _, (variable, url)] = S3::variables_at("127.0.0.1", free_port());
        let variables = [("HOME", home.path().to_str().unwrap()), (variable, &*url)];
        return child::run("bucket::refused_credentials_are_renewed_at_once", &variables);
    }
    let Some(far) = Far::bucket(8) else { return };
    let home = std::env::var("HOME").unwrap();
    let image = far.open();
    let codes = ["ExpiredToken", "InvalidToken", "InvalidAccessKeyId"];
    for (chunk, code) in codes.into_iter().enumerate() {
        for (half, status) in [400, 403].into_iter().enumerate() {
            far.proxy.set_fault(Fault::Status(status, code), 1);
            let before = far.proxy.requests();
            far.check_chunk(&image, chunk * 2 + half);
            let requests = far.proxy.requests() - before;
            assert_eq!((requests, far.proxy.faults_left()), (2, 0), "{status} {code}");
        }
    }
    // The server refuses the file's keys, until the right ones are there again.
    let pause = Duration::from_millis(1100);
    std::thread::sleep(pause);
    write_profile(home.as_ref(), "AKIAOTHER");
    far.proxy.set_fault(Fault::Status(403, "ExpiredToken"), 1);
    let error = read(&image, 6 * far::CHUNK, PAGE).unwrap_err().to_string();
    println!("{error}");
    assert!(error.contains("NotSignedUp") && error.contains("check credentials"), "{error}");
    std::thread::sleep(pause);
    write_profile(home.as_ref(), S3::KEY);
    far.check_chunk(&image, 6);
}
