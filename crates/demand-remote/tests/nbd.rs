// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `NbdSource` with real servers: qemu-nbd and nbdkit.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

#[path = "nbd/failures.rs"]
mod failures;
#[path = "nbd/fake.rs"]
mod fake;
#[path = "nbd/server.rs"]
mod server;
#[path = "nbd/speed.rs"]
mod speed;
#[path = "nbd/tls.rs"]
mod tls;

use demand_remote::nbd::NbdOptions;
use demand_source::{Destination, Extent, PageSource, Priority, SourceError};
use server::{Server, hasty, open, pattern, read, run, submit, write_image};
use test_support::wait::until;

#[test]
fn qcow2_is_read_with_its_holes() {
    let folder = tempfile::tempdir().unwrap();
    let (raw, qcow2) = (folder.path().join("raw"), folder.path().join("qcow2"));
    let content = write_image(&raw, 512);
    let (from, to) = (raw.to_str().unwrap(), qcow2.to_str().unwrap());
    let Some(()) = run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", from, to]) else {
        return;
    };
    let Some(server) = Server::qemu(&qcow2, &["--shared=8", "--export-name=vm 7"]) else { return };
    let source = open(&server.url("nbd", "vm%207", ""), hasty()).unwrap();
    assert_eq!(source.size(), content.len() as u64);

    // Threads that serve faults learn of holes without waiting.
    until("extents are known", || source.extent_now(0).is_some());
    let (mut at, mut holes) = (0, 0);
    while at < source.size() {
        let extent = source.extent(at).unwrap();
        assert_eq!(source.extent_now(at).unwrap().unwrap(), extent);
        let bytes = &content[at as usize..extent.end() as usize];
        let zeros = bytes.chunks(64 << 10).all(|block| block.iter().all(|byte| *byte == 0));
        assert_eq!(extent.is_hole(), zeros, "{at}");
        holes += if zeros { bytes.len() } else { 0 };
        at = extent.end();
    }
    let zeros = content.chunks(4096).filter(|page| page.iter().all(|byte| *byte == 0)).count();
    assert_eq!(holes, zeros * 4096);
    println!("{} MiB of {} are holes", holes >> 20, content.len() >> 20);

    for (number, expected) in content.chunks(4096).enumerate() {
        let mut page = [0xee; 4096];
        let offset = number as u64 * 4096;
        source.read_through(offset, &mut Destination::from(&mut page[..])).unwrap();
        assert_eq!(page, expected, "page {number}");
    }
    // In large requests, with holes amid the data.
    for (number, expected) in content.chunks(5 << 20).enumerate() {
        let priority = if number % 2 == 0 { Priority::Fill } else { Priority::Demand };
        let (bytes, failures) = read(&source, priority, number as u64 * (5 << 20), expected.len());
        assert!(bytes == expected && failures == 0);
    }
}

#[test]
fn raw_image_of_odd_length_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("raw");
    let mut content = write_image(&raw, 40);
    content.extend([7; 5000]);
    std::fs::write(&raw, &content).unwrap();
    let file = format!("file={}", raw.display());
    let Some(server) = Server::nbdkit(&["file", &file]) else { return };
    let source = server.open(hasty());
    assert_eq!(source.size(), content.len() as u64);
    let (bytes, _) = read(&source, Priority::Fill, 0, content.len());
    assert!(bytes == content);
    let last = content.len() as u64 / 4096 * 4096;
    let (bytes, _) = read(&source, Priority::Demand, last, content.len() - last as usize);
    assert_eq!(bytes, content[last as usize..]);
    let (completion, _bytes) = submit(&source, Priority::Demand, last, 4096);
    let error = completion.wait().unwrap_err();
    assert!(matches!(error, SourceError::OutOfRange { .. }), "{error}");
    assert_eq!(source.extent(last).unwrap(), Extent::Data { end: source.size() });
}

#[test]
fn servers_with_simple_replies_are_read() {
    let Some(server) = Server::nbdkit(&["--no-sr", "pattern", "100M"]) else { return };
    let source = server.open(hasty());
    assert_eq!(source.extent_now(4096).unwrap().unwrap(), Extent::Data { end: 100 << 20 });
    let reads: Vec<_> =
        (0..50).map(|i| submit(&source, Priority::Demand, i << 21, 1 << 20)).collect();
    for ((completion, bytes), i) in reads.into_iter().zip(0..) {
        completion.wait().unwrap();
        assert!(bytes.take().unwrap() == pattern(i << 21, 1 << 20));
    }
}

#[test]
fn block_sizes_of_the_server_are_respected() {
    for (least, most) in [("4096", "32768"), ("16384", "1M"), ("512", "65536")] {
        let (least, most) =
            (format!("blocksize-minimum={least}"), format!("blocksize-maximum={most}"));
        let Some(server) = Server::nbdkit(&[
            "--filter=blocksize-policy",
            "pattern",
            "size=3M",
            "blocksize-error-policy=error",
            "blocksize-preferred=16384",
            &least,
            &most,
        ]) else {
            return;
        };
        let open = server.url("nbd", "", "");
        let source = match server::open(&open, hasty()) {
            Ok(source) => source,
            Err(error) => panic!("{least}: {error}"),
        };
        for (offset, len) in [(0, 3 << 20), (100, 1 << 20), (4096, 4096), ((3 << 20) - 9, 9)] {
            let (bytes, failures) = read(&source, Priority::Fill, offset, len);
            assert!(bytes == pattern(offset, len) && failures == 0, "{least}, {offset}");
        }
    }
}

#[test]
fn server_for_one_client_serves_both_priorities() {
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("raw");
    let content = write_image(&raw, 64);
    let Some(server) = Server::qemu(&raw, &["--shared=1", "--format=raw"]) else { return };
    let source = server.open(hasty());
    for (number, expected) in content.chunks(1 << 20).enumerate() {
        let offset = number as u64 * (1 << 20);
        for priority in [Priority::Fill, Priority::Demand] {
            let (bytes, failures) = read(&source, priority, offset, expected.len());
            assert!(bytes == expected && failures == 0);
        }
    }
}

#[test]
fn withdrawn_requests_are_not_sent() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let logfile = format!("logfile={}", log.display());
    let filters = ["--filter=log", "--filter=delay"];
    let plugin = ["pattern", "100M", "rdelay=200ms", &logfile];
    let Some(server) = Server::nbdkit(&[&filters[..], &plugin].concat()) else { return };
    let options = NbdOptions {
        demand_connections: Some(1),
        fill_connections: Some(1),
        demand_window: 1,
        ..hasty()
    };
    let source = server.open(options);
    let (first, _bytes) = submit(&source, Priority::Demand, 0, 4096);
    for page in 1..100 {
        drop(submit(&source, Priority::Demand, page << 12, 4096));
    }
    let (last, _bytes) = submit(&source, Priority::Demand, 100 << 12, 4096);
    first.wait().unwrap();
    last.wait().unwrap();
    drop(source);
    let log = std::fs::read_to_string(log).unwrap();
    let reads = log.lines().filter(|line| line.contains(" Read ")).count();
    assert!((2..10).contains(&reads), "{log}");
}

#[test]
fn raised_fill_overtakes_queued_fill() {
    let Some(server) = Server::nbdkit(&["--filter=delay", "pattern", "100M", "rdelay=100ms"])
    else {
        return;
    };
    let source = server.open(NbdOptions { fill_window: 1, ..hasty() });
    // Until fill has its connections.
    read(&source, Priority::Fill, 0, 4096);
    std::thread::sleep(test_support::wait::A_WHILE);
    let mut fill: Vec<_> =
        (0..40).map(|i| submit(&source, Priority::Fill, i << 20, 256 << 10)).collect();
    let begun = std::time::Instant::now();
    let (raised, bytes) = fill.pop().unwrap();
    source.raise((39 << 20) + 8192, 4096);
    raised.wait().unwrap();
    let waited = begun.elapsed();
    assert_eq!(bytes.take().unwrap(), pattern(39 << 20, 256 << 10));
    for (completion, _) in fill {
        completion.wait().unwrap();
    }
    println!("raised fill took {waited:?}, all fill {:?}", begun.elapsed());
    assert!(waited < begun.elapsed() / 3);
}

#[test]
fn dropped_source_answers_its_requests() {
    let Some(server) = Server::nbdkit(&["--filter=delay", "pattern", "100M", "rdelay=20"]) else {
        return;
    };
    let source = server.open(hasty());
    let reads: Vec<_> =
        (0..500).map(|i| submit(&source, Priority::Demand, i << 12, 4096)).collect();
    std::thread::sleep(test_support::wait::A_WHILE);
    let begun = std::time::Instant::now();
    drop(source);
    for (completion, _) in reads {
        let error = completion.wait().unwrap_err();
        assert!(matches!(error, SourceError::Abandoned), "{error}");
    }
    assert!(begun.elapsed().as_secs() < 10);
}
