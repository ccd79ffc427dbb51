// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Images and stores in an object store that speaks S3.
//!
//! Settings come from the environment: so each test runs in a separate process.
#![cfg(feature = "s3")]
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::fs;
use std::path::Path;

use bytes::Bytes;
use demand_remote::{Location, ObjectImage, Store, StoreError};
use demand_source::{Destination, PageSource};
use test_support::child::{is_child, run};
use test_support::servers::S3;

const KEY: &str = S3::KEY;
const SECRET: &str = S3::SECRET;
const SIZE: usize = 3 << 20;

fn content() -> Vec<u8> {
    (0..SIZE).map(|at| (at * 31 % 251) as u8 ^ (at >> 12) as u8).collect()
}

/// Starts a server with the bucket `images`, which has the object `vm7/memory`.
fn serve(folder: &Path) -> Option<S3> {
    let bucket = folder.join("store/images/vm7");
    fs::create_dir_all(&bucket).unwrap();
    fs::write(bucket.join("memory"), content()).unwrap();
    S3::start(&folder.join("store"))
}

fn location(text: &str) -> Location {
    text.parse().unwrap()
}

fn image_is_read() {
    let image = ObjectImage::open(&location("s3://images/vm7/memory")).unwrap();
    assert_eq!(image.size(), SIZE as u64);
    let mut bytes = vec![0; SIZE];
    image.read_through(0, &mut Destination::from(&mut bytes[..])).unwrap();
    assert!(bytes == content());
}

#[test]
fn keys_come_from_the_environment() {
    if is_child() {
        return image_is_read();
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = serve(folder.path()) else { return };
    let url = format!("http://127.0.0.1:{}", server.port());
    let keys = [("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", SECRET)];
    for variable in ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"] {
        run("keys_come_from_the_environment", &[keys[0], keys[1], (variable, &url)]);
    }
}

#[test]
fn keys_come_from_a_profile() {
    if is_child() {
        return image_is_read();
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = serve(folder.path()) else { return };
    let home = folder.path();
    fs::create_dir(home.join(".aws")).unwrap();
    let keys = format!(
        "{{\"Version\": 1, \"AccessKeyId\": \"{KEY}\", \"SecretAccessKey\": \"{SECRET}\"}}"
    );
    fs::write(home.join("keys"), keys).unwrap();
    let config = format!(
        "[profile lab]\nendpoint_url = http://127.0.0.1:{port}\nregion = local\n\
         [profile process]\nendpoint_url = http://127.0.0.1:{port}\n\
         credential_process = /bin/cat {}\n",
        home.join("keys").display(),
        port = server.port()
    );
    fs::write(home.join(".aws/config"), config).unwrap();
    let credentials = format!("[lab]\naws_access_key_id={KEY}\naws_secret_access_key={SECRET}\n");
    fs::write(home.join(".aws/credentials"), credentials).unwrap();
    for profile in ["lab", "process"] {
        let home = home.to_str().unwrap();
        run("keys_come_from_a_profile", &[("HOME", home), ("AWS_PROFILE", profile)]);
    }
}

#[test]
fn store_is_written_and_read() {
    if is_child() {
        let store = Store::open(&location("s3://images/family/a")).unwrap();
        return store.wait(async {
            store.put("packs/one", Bytes::from_static(b"content")).await.unwrap();
            store.put("packs/one", Bytes::from_static(b"content")).await.unwrap();
            assert_eq!(store.get_range("packs/one", 1..3).await.unwrap(), "on");
            assert_eq!(store.len("packs/one").await.unwrap(), Some(7));
            assert_eq!(store.len("packs/two").await.unwrap(), None);
            let listed = store.list("packs").await.unwrap();
            assert_eq!((listed.len(), &*listed[0].name), (1, "packs/one"));
            let error = store.get_range("packs/one", 3..12).await.unwrap_err();
            assert!(matches!(error, StoreError::Short { got: 4, .. }), "{error}");
            store.remove("packs/one").await.unwrap();
            store.remove("packs/one").await.unwrap();
            let error = store.get("packs/one").await.unwrap_err();
            assert!(error.to_string().contains("s3://images/family/a/packs/one"), "{error}");
        });
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = serve(folder.path()) else { return };
    S3::run_client("store_is_written_and_read", server.port());
}

#[test]
fn refused_keys_are_not_shown() {
    if is_child() {
        let error = ObjectImage::open(&location("s3://images/vm7/memory")).unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(shown.contains("check credentials and permissions"), "{shown}");
        assert!(!shown.contains("hidden"), "{shown}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = serve(folder.path()) else { return };
    let url = format!("http://127.0.0.1:{}", server.port());
    let keys = [("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", "hidden/other")];
    run("refused_keys_are_not_shown", &[keys[0], keys[1], ("AWS_ENDPOINT_URL", &url)]);
}
