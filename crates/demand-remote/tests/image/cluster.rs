// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image in an object store of several nodes, which die one after the other
//! (`rust-vmm-ci/soak --sources`).
#![cfg(feature = "s3")]

use demand_remote::image::{Compression, Push, RemoteImage};
use demand_remote::{Location, Store};
use demand_source::{LocalFile, Retry};
use test_support::child::{self, is_child};
use test_support::garage::Garage;
use test_support::servers::{S3, free_port};
use test_support::wait::until;

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

#[test]
#[ignore = "rust-vmm-ci/soak --sources builds the cluster"]
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
    for node in [1, 2] {
        garage.kill(node);
        check(&image, &content, next(8));
        garage.restart(node);
        check(&image, &content, next(8));
    }
    // Two nodes: an error that may pass, and never content; right bytes when one is back.
    garage.kill(1);
    garage.kill(2);
    let at = CHUNKS / 2 * CHUNK;
    let error = read(&image, at, PAGE).unwrap_err();
    println!("{error}");
    assert_eq!(error.retry(), Retry::Later);
    garage.restart(1);
    until("two nodes of three answer", || read(&image, at, PAGE).is_ok());
    check(&image, &content, CHUNKS / 2 + 1..CHUNKS / 2 + 9);
    garage.restart(2);
    // The node that the client knows.
    garage.kill(0);
    let error = read(&image, at + 16 * CHUNK, PAGE).unwrap_err();
    println!("{error}");
    assert_eq!(error.retry(), Retry::Later);
    garage.restart(0);
    until("the node answers", || read(&image, at + 16 * CHUNK, PAGE).is_ok());
    check_content(&image, &content);
    println!("{} nodes were killed, and no byte was wrong", garage.kills());
}
