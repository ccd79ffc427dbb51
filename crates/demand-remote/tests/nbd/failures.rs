// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Servers that fail, stall, die, return, or have another export.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use demand_remote::nbd::{NbdErrorKind, NbdOptions, Refusal};
use demand_source::{PageSource, Priority, Retry};
use test_support::proxy::{Fault, FaultProxy, Target};
use test_support::wait::{A_WHILE, until};

use crate::fake::{Fake, sevens};
use crate::server::{Server, hasty, open, pattern, read, scrambled, submit, write_image};

#[test]
fn unreachable_server_fails_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("nbd+unix:///x?socket={}/none", folder.path().display());
    let error = open(&url, hasty()).unwrap_err();
    assert!(matches!(error.kind(), NbdErrorKind::Connect { .. }), "{error}");
    assert!(error.to_string().starts_with(&format!("cannot use {url}: ")), "{error}");
    // Port 9 belongs to a service that no system runs by default.
    let error = open("nbd://127.0.0.1:9/x", hasty()).unwrap_err();
    assert!(matches!(error.kind(), NbdErrorKind::Connect { .. }), "{error}");
}

#[test]
fn missing_export_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("raw");
    write_image(&raw, 4);
    let arguments = ["--shared=8", "--format=raw", "--export-name=vm7"];
    let Some(server) = Server::qemu(&raw, &arguments) else { return };
    let error = open(&server.url("nbd", "vm8", ""), hasty()).unwrap_err();
    let NbdErrorKind::Refused { refusal, message } = error.kind() else { panic!("{error}") };
    assert_eq!(*refusal, Refusal::UnknownExport);
    assert!(message.contains("vm8"), "{message}");
    println!("{error}");
}

#[test]
fn old_style_is_refused() {
    let Some(server) = Server::nbdkit(&["--oldstyle", "pattern", "1M"]) else { return };
    let error = open(&server.url("nbd", "", ""), hasty()).unwrap_err();
    assert!(matches!(error.kind(), NbdErrorKind::Protocol { .. }), "{error}");
}

#[test]
fn failed_reads_succeed_later() {
    let Some(server) = Server::nbdkit(&[
        "--filter=error",
        "pattern",
        "64M",
        "error-pread=EIO",
        "error-pread-rate=30%",
    ]) else {
        return;
    };
    let source = server.open(hasty());
    let mut failures = 0;
    for i in 0..200 {
        let offset = (scrambled(i) % 16000) << 12;
        let (bytes, failed) = read(&source, Priority::Demand, offset, 8192);
        assert_eq!(bytes, pattern(offset, 8192));
        failures += failed;
    }
    println!("{failures} reads failed");
    assert!(failures > 20);
    // A request fails if one of its parts does.
    let mut reads = (0..100).map(|_| submit(&source, Priority::Demand, 0, 8 << 20).0.wait());
    let error = reads.find_map(Result::err).unwrap().to_string();
    assert!(error.contains("EIO") && error.contains("262144 bytes at offset"), "{error}");
    println!("{error}");
}

#[test]
fn failed_look_ups_are_repeated() {
    let filters = ["--filter=error", "memory", "64M", "error-extents=EIO"];
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("fail");
    std::fs::write(&file, []).unwrap();
    let trigger = format!("error-extents-file={}", file.display());
    let rate = ["error-extents-rate=100%", &trigger];
    let Some(server) = Server::nbdkit(&[&filters[..], &rate].concat()) else { return };
    let source = server.open(hasty());
    let error = source.extent(0).unwrap_err();
    assert!(error.to_string().contains("EIO") && error.retry() == Retry::Later, "{error}");
    assert!(source.extent_now(0).is_none());
    read(&source, Priority::Demand, 0, 4096);
    std::fs::remove_file(file).unwrap();
    until("the extents are known", || source.extent_now(0).is_some());
    assert!(source.extent(0).unwrap().is_hole());
}

#[test]
fn stalled_server_is_noticed() {
    let Some(server) = Server::nbdkit(&["--filter=delay", "pattern", "64M", "rdelay=30"]) else {
        return;
    };
    let source = server.open(NbdOptions { answer: Duration::from_millis(500), ..hasty() });
    for priority in [Priority::Demand, Priority::Fill] {
        let begun = Instant::now();
        let error = submit(&source, priority, 0, 4096).0.wait().unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        assert!(error.to_string().contains("has not answered for 500ms"), "{error}");
        assert_eq!(error.retry(), Retry::Later);
    }
}

#[test]
fn stopped_server_does_not_hang_the_opening() {
    // A socket that listens, and nothing that accepts.
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let options = NbdOptions { connect: Duration::from_millis(300), ..hasty() };
    let url = format!("nbd+unix:///?socket={}", socket.display());
    let error = open(&url, options).unwrap_err();
    assert!(matches!(error.kind(), NbdErrorKind::Silent { .. }), "{error}");
}

#[test]
fn killed_server_comes_back() {
    let Some(mut server) = Server::nbdkit(&["--filter=delay", "pattern", "256M", "rdelay=2ms"])
    else {
        return;
    };
    let source = server.open(hasty());
    let (stop, failures, reads) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
    thread::scope(|scope| {
        for thread in 0..8 {
            let (source, stop, failures, reads) = (&source, &stop, &failures, &reads);
            scope.spawn(move || {
                let priority = if thread < 4 { Priority::Demand } else { Priority::Fill };
                for i in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let number = scrambled(thread << 32 | i);
                    let (offset, len) = ((number % 50_000) << 12, 4096 << (number >> 60));
                    let (bytes, failed) = read(source, priority, offset, len.min(4 << 20));
                    assert!(bytes == pattern(offset, bytes.len()), "at {offset}");
                    failures.fetch_add(failed, Ordering::Relaxed);
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for _ in 0..4 {
            let before = reads.load(Ordering::Relaxed);
            until("reads succeed", || reads.load(Ordering::Relaxed) > before + 40);
            server.kill();
            thread::sleep(Duration::from_millis(100));
            server.restart("", "");
        }
        let before = reads.load(Ordering::Relaxed);
        until("reads succeed", || reads.load(Ordering::Relaxed) > before + 40);
        stop.store(true, Ordering::Relaxed);
    });
    let (failures, reads) = (failures.into_inner(), reads.into_inner());
    println!("{reads} reads succeeded, {failures} failed and were repeated");
    assert!(failures > 0);
}

#[test]
fn cut_connections_yield_no_wrong_byte() {
    // Not nbdkit: version 1.32 fails an assertion when a connection ends amid its requests.
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("raw");
    let content = write_image(&raw, 1024);
    let Some(server) = Server::qemu(&raw, &["--shared=64", "--format=raw"]) else { return };
    let proxy = FaultProxy::start(Target::Socket(server.socket()));
    let source = open(&url_of(&proxy), hasty()).unwrap();
    proxy.set_fault(Fault::Cut(600_000), usize::MAX);
    let failures = AtomicU32::new(0);
    thread::scope(|scope| {
        for thread in 0..4 {
            let (source, content, failures) = (&source, &content, &failures);
            scope.spawn(move || {
                let priority = if thread < 2 { Priority::Demand } else { Priority::Fill };
                for i in 0..100 {
                    let number = scrambled(thread << 32 | i);
                    let (offset, len) = ((number % 16_000) << 12, 4096 << (number >> 61));
                    let (bytes, failed) = read(source, priority, offset, len);
                    assert!(bytes == content[offset as usize..][..len], "at {offset}");
                    failures.fetch_add(failed, Ordering::Relaxed);
                }
            });
        }
    });
    let connections = proxy.connections();
    println!("400 reads succeeded, {} failed, on {connections} connections", failures.into_inner());
    assert!(connections > 10);
}

fn url_of(proxy: &FaultProxy) -> String {
    format!("nbd://127.0.0.1:{}/", proxy.port())
}

/// Reads through a proxy while a fault occurs once. Returns the failure that a single attempt
/// shows, or `None` without a server.
fn failure_of(fault: Fault, options: NbdOptions) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("raw");
    let content = write_image(&raw, 64);
    let server = Server::qemu(&raw, &["--shared=64", "--format=raw"])?;
    let proxy = FaultProxy::start(Target::Socket(server.socket()));
    let one = Some(1);
    let options = NbdOptions { demand_connections: one, fill_connections: one, ..options };
    let source = open(&url_of(&proxy), options).unwrap();
    // A block that is no hole.
    let at = content.chunks(65536).position(|block| block[0] != 0).unwrap() * 65536;
    // Both connections are made, so no handshake meets the fault.
    for priority in [Priority::Demand, Priority::Fill] {
        assert!(read(&source, priority, at as u64, 4096).0 == content[at..][..4096]);
    }
    // The search for holes reads as well.
    until("the holes are known", || {
        (0..content.len()).step_by(65536).all(|block| source.extent_now(block as u64).is_some())
    });
    // The end of its last reply passes by the other connection.
    thread::sleep(A_WHILE);
    proxy.set_fault(fault, 1);
    let error = submit(&source, Priority::Demand, at as u64, 65536).0.wait().unwrap_err();
    assert_eq!((error.retry(), proxy.faults_left()), (Retry::Later, 0), "{error}");
    assert!(read(&source, Priority::Demand, at as u64, 65536).0 == content[at..][..65536]);
    let text = error.to_string();
    println!("{text}");
    assert!(!text.contains('\n'), "{text}");
    Some(text)
}

#[test]
fn faults_of_the_link_cost_an_attempt() {
    let Some(cut) = failure_of(Fault::Cut(30_000), hasty()) else { return };
    assert!(cut.contains("connection broke"), "{cut}");
    let impatient = NbdOptions { answer: Duration::from_millis(300), ..hasty() };
    let stalled = failure_of(Fault::Stall(30_000), impatient).unwrap();
    assert!(stalled.contains("has not answered"), "{stalled}");
    // The first byte of a reply has one value only.
    let flipped = failure_of(Fault::Flip(0), hasty()).unwrap();
    assert!(flipped.contains("no reply"), "{flipped}");
}

#[test]
fn export_of_another_size_is_refused() {
    let Some(mut server) = Server::nbdkit(&["pattern", "size=64M"]) else { return };
    let source = server.open(hasty());
    read(&source, Priority::Demand, 0, 4096);
    server.kill();
    server.restart("size=64M", "size=32M");
    let mut last = None;
    until("the other export is noticed", || {
        let outcome = submit(&source, Priority::Demand, 4096, 4096).0.wait();
        last = Some(outcome.unwrap_err());
        last.as_ref().is_some_and(|error| error.retry() == Retry::Never)
    });
    let text = last.unwrap().to_string();
    assert!(text.contains("size was 67108864 bytes, and is 33554432"), "{text}");
    println!("{text}");
    // It comes back by itself: no request has to ask for it.
    server.kill();
    server.restart("size=64M", "size=64M");
    until("the original export is read", || {
        let (completion, bytes) = submit(&source, Priority::Demand, 4096, 4096);
        completion.wait().is_ok_and(|()| bytes.take().unwrap() == pattern(4096, 4096))
    });
}

#[test]
fn unanswered_read_fails_while_others_succeed() {
    // The read at 0 is never answered.
    let server = Fake::start(|stream, cookie, offset, len| match offset {
        0 => Ok(()),
        _ => sevens(stream, cookie, len),
    });
    let options =
        NbdOptions { answer: Duration::from_millis(500), demand_connections: Some(1), ..hasty() };
    let source = open(&server.url(), options).unwrap();
    let begun = Instant::now();
    let (lost, _bytes) = submit(&source, Priority::Demand, 0, 4096);
    let answered = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut reads = 0;
            while !answered.load(Ordering::Relaxed) {
                let (bytes, _) = read(&source, Priority::Demand, 4096, 4096);
                assert_eq!(bytes, [7; 4096]);
                reads += 1;
            }
            println!("{reads} other reads succeeded");
            assert!(reads > 10);
        });
        let error = lost.wait().unwrap_err();
        answered.store(true, Ordering::Relaxed);
        assert!(error.to_string().contains("has not answered"), "{error}");
    });
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(read(&source, Priority::Demand, 4096, 4096).0, [7; 4096]);
}

#[test]
fn nonsense_ends_the_connection_and_pauses_grow() {
    let server = Fake::start(|stream, _, _, _| std::io::Write::write_all(stream, &[0x55; 100]));
    let options = NbdOptions {
        pause: Duration::from_millis(50),
        longest_pause: Duration::from_secs(10),
        ..hasty()
    };
    let source = open(&server.url(), options).unwrap();
    let begun = Instant::now();
    let mut failures = 0;
    while begun.elapsed() < Duration::from_secs(3) {
        let error = submit(&source, Priority::Demand, 0, 4096).0.wait().unwrap_err();
        assert!(error.to_string().contains("no reply"), "{error}");
        assert_eq!(error.retry(), Retry::Later);
        failures += 1;
        thread::sleep(Duration::from_millis(5));
    }
    let connections = server.connections();
    println!("{failures} reads failed on {connections} connections");
    assert!((5..60).contains(&connections));
}

#[test]
fn reply_that_ends_early_is_no_zeros() {
    // Half of the bytes, then the end of the connection.
    let server = Fake::start(|stream, cookie, _, len| {
        sevens(stream, cookie, len / 2)?;
        stream.shutdown(std::net::Shutdown::Both)
    });
    let source = open(&server.url(), hasty()).unwrap();
    for priority in [Priority::Demand, Priority::Fill] {
        let (completion, bytes) = submit(&source, priority, 0, 8192);
        let error = completion.wait().unwrap_err();
        assert!(error.to_string().contains("connection broke"), "{error}");
        assert!(bytes.take().is_err());
    }
}
