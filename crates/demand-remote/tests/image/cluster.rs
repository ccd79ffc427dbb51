// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image in an object store of several nodes, which die one after the other
//! (`rust-vmm-ci/soak --sources`, which builds it).
#![cfg(feature = "s3")]

use std::time::{Duration, Instant};

use demand_remote::image::{Compression, Push, RemoteImage};
use demand_remote::{Location, Store};
use demand_source::{LocalFile, Retry};
use test_support::child::{self, is_child};
use test_support::garage::Garage;
use test_support::servers::{S3, free_port};

use crate::far::CHUNK;
use crate::support::{PAGE, Random, check_content, noise, read};

const CHUNKS: usize = 96;

/// Reads one page of each of these chunks, each of which must succeed.
fn check(image: &RemoteImage, content: &[u8], chunks: impl Iterator<Item = usize>) {
    for chunk in chunks {
        let at = chunk * CHUNK;
        assert!(read(image, at, PAGE).unwrap() == content[at..at + PAGE], "chunk {chunk}");
    }
}

/// Does the same while the cluster may have no quorum: reads that fail may be made again, and
/// succeed within two minutes. A node that was restarted is known to the others only after half a
/// minute.
fn check_patiently(image: &RemoteImage, content: &[u8], chunks: impl Iterator<Item = usize>) {
    for chunk in chunks {
        let (at, begun) = (chunk * CHUNK, Instant::now());
        let bytes = loop {
            match read(image, at, PAGE) {
                Ok(bytes) => break bytes,
                Err(error) => assert_eq!(error.retry(), Retry::Later, "{error}"),
            }
            assert!(begun.elapsed() < Duration::from_secs(120), "chunk {chunk} does not come");
        };
        assert!(bytes == content[at..at + PAGE], "chunk {chunk}");
    }
}

#[test]
fn dying_nodes_are_a_pause() {
    if !is_child() {
        let variables = Garage::variables_at(free_port());
        let variables = variables.each_ref().map(|(name, value)| (*name, &**value));
        return child::run("cluster::dying_nodes_are_a_pause", &variables);
    }
    let Some(mut garage) = Garage::start(S3::port_of_variables()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut content = vec![0; CHUNKS * CHUNK];
    noise(&mut content, &mut Random::new(11));
    std::fs::write(folder.path().join("memory"), &content).unwrap();
    let memory = LocalFile::open(folder.path().join("memory")).unwrap();
    let store = Store::open(&"s3://store".parse::<Location>().unwrap()).unwrap();
    let push = Push::new(&memory, [7; 16]).compression(Compression::None);
    push.run(&store, "vm", &mut |_| true).unwrap();

    let image = RemoteImage::open(&store, "vm").unwrap();
    let mut chunks = 0..CHUNKS;
    let mut next = |count| chunks.by_ref().take(count).collect::<Vec<_>>().into_iter();
    check(&image, &content, next(8));
    // One of the two others: every request succeeds, without a pause.
    garage.kill(1);
    check(&image, &content, next(24));
    garage.restart(1);
    garage.kill(2);
    check_patiently(&image, &content, next(8));
    // Two nodes: an error that may pass, and never content; right bytes when one is back.
    garage.kill(1);
    let error = read(&image, next(1).next().unwrap() * CHUNK, PAGE).unwrap_err();
    println!("{error}");
    assert_eq!(error.retry(), Retry::Later);
    garage.restart(1);
    check_patiently(&image, &content, next(8));
    garage.restart(2);
    // The node that the client knows.
    garage.kill(0);
    let error = read(&image, next(1).next().unwrap() * CHUNK, PAGE).unwrap_err();
    println!("{error}");
    assert_eq!(error.retry(), Retry::Later);
    garage.restart(0);
    check_patiently(&image, &content, 0..CHUNKS);
    check_content(&image, &content);
    println!("{} nodes were killed, and no byte was wrong", garage.kills());
}
