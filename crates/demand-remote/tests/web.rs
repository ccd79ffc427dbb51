// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Raw images on a web server.
#![cfg(feature = "http")]
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use demand_remote::{ObjectImage, StoreError};
use demand_source::{Destination, PageSource, Retry, SourceError};
use test_support::proxy::{FaultProxy, Target};
use test_support::servers::Web;

/// Three MiB and a bit, in which no page is like another.
const SIZE: usize = (3 << 20) + 100;

fn content() -> Vec<u8> {
    (0..SIZE).map(|at| (at * 31 % 251) as u8 ^ (at >> 12) as u8).collect()
}

fn serve(folder: &Path, settings: &str) -> Option<Web> {
    fs::write(folder.join("image"), content()).unwrap();
    Web::start(folder, settings)
}

fn open(web: &Web) -> Result<ObjectImage, StoreError> {
    ObjectImage::open(&web.url("image").parse().unwrap())
}

fn read(image: &ObjectImage, offset: u64, len: usize) -> Result<Vec<u8>, SourceError> {
    let mut bytes = vec![0; len];
    image.read_through(offset, &mut Destination::from(&mut bytes[..]))?;
    Ok(bytes)
}

#[test]
fn ranges_are_read_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let Some(web) = serve(folder.path(), "") else { return };
    let image = open(&web).unwrap();
    assert_eq!(image.size(), SIZE as u64);
    let content = content();
    assert_eq!(read(&image, 0, SIZE).unwrap(), content);
    for (offset, len) in [(0, 1), (4096, 4096), (SIZE - 1, 1), ((1 << 20) - 3, 600_000)] {
        assert_eq!(read(&image, offset as u64, len).unwrap(), content[offset..offset + len]);
    }
    let error = read(&image, SIZE as u64 - 1, 2).unwrap_err();
    assert!(matches!(error, SourceError::OutOfRange { .. }), "{error}");
    // A page costs one request.
    let of_a_page = || web.requests().iter().filter(|line| line.contains("206 4096 ")).count();
    let before = await_count(of_a_page, 1);
    read(&image, 8192, 4096).unwrap();
    assert_eq!(await_count(of_a_page, before + 1), before + 1);
}

/// A connection costs round trips, and a client all of the system's certificates.
#[test]
fn images_of_one_server_share_connections() {
    let folder = tempfile::tempdir().unwrap();
    let Some(web) = serve(folder.path(), "") else { return };
    let proxy = FaultProxy::start(Target::Port(web.port()));
    let url = format!("http://127.0.0.1:{}/image", proxy.port());
    for _ in 0..8 {
        let image = ObjectImage::open(&url.parse().unwrap()).unwrap();
        read(&image, 4096, 4096).unwrap();
    }
    // A connection that has just answered may not be free yet.
    assert!(proxy.connections() < 4, "{}", proxy.connections());
}

/// Waits until something is counted so often: the server writes its log after the answer.
fn await_count(count: impl Fn() -> usize, least: usize) -> usize {
    for _ in 0..500 {
        if count() >= least {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    count()
}

#[test]
fn restarted_server_answers_again() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut web) = serve(folder.path(), "") else { return };
    let image = open(&web).unwrap();
    web.stop();
    let error = read(&image, 0, 4096).unwrap_err();
    assert_eq!(error.retry(), Retry::Later);
    assert!(error.to_string().contains("check the network"), "{error}");
    web.restart("");
    assert_eq!(read(&image, 0, 4096).unwrap(), content()[..4096]);
}

#[test]
fn changed_image_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let Some(web) = serve(folder.path(), "") else { return };
    let image = open(&web).unwrap();
    let mut longer = content();
    longer.push(1);
    fs::write(folder.path().join("image"), longer).unwrap();
    let error = read(&image, 0, 4096).unwrap_err().to_string();
    assert!(error.contains("it has changed since it was opened"), "{error}");
    fs::remove_file(folder.path().join("image")).unwrap();
    let error = read(&image, 0, 4096).unwrap_err().to_string();
    assert!(error.contains("does not have it"), "{error}");
}

#[test]
fn unsuitable_servers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut web) = serve(folder.path(), "max_ranges 0;") else { return };
    let mut refused = |settings: &str, words: &str| {
        web.restart(settings);
        let error = open(&web).unwrap_err().to_string();
        assert!(error.contains(words) && !error.contains('\n'), "{settings}: {error}");
    };
    refused("max_ranges 0;", "does not support reads of ranges");
    refused("return 403;", "check credentials and permissions");
    refused("return 404;", "does not have it");
    refused("return 503;", "503");
}

#[test]
fn secrets_of_a_url_are_not_shown() {
    let folder = tempfile::tempdir().unwrap();
    let Some(web) = serve(folder.path(), "return 403;") else { return };
    for url in [web.url("image?signature=hidden"), web.url("image").replace("//", "//me:hidden@")] {
        let error = ObjectImage::open(&url.parse().unwrap()).unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains("hidden"), "{shown}");
    }
}
