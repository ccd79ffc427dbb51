// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests of the client: servers that answer wrongly, late or never, and the tables that it prints.

use super::*;
use std::os::unix::net::UnixListener;

use crate::api::{DeviceStatus, GuestCondition, SnapshotProgress, SourceState, State};

fn against(answer: &'static [u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
        stream.write_all(answer).unwrap();
    });
    let error = Client::new(&path).status().unwrap_err().to_string();
    server.join().unwrap();
    error
}

/// A server that sends each client `first`, and then `more` every 10 ms until it hangs up.
fn trickling(first: &'static [u8], more: &'static [u8]) -> (tempfile::TempDir, Client) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            thread::spawn(move || {
                let mut stream = stream.unwrap();
                assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
                stream.write_all(first).unwrap();
                while stream.write_all(more).is_ok() {
                    thread::sleep(Duration::from_millis(10));
                }
            });
        }
    });
    let patience = Duration::from_secs(1);
    (folder, Client { socket: path, patience })
}

#[test]
fn trickling_answers_are_bounded_in_time() {
    let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let one = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n";
    for (first, more) in
        [(&b"HTTP/1.1 200 OK\r\na: "[..], &b"b"[..]), (chunked, b"1\r\na\r\n"), (one, b"a")]
    {
        let (_folder, client) = trickling(first, more);
        let begun = Instant::now();
        for error in [client.status().unwrap_err(), client.pause().unwrap_err()] {
            let error = error.to_string();
            assert!(error.contains("has not answered in full for 1 s"), "{error}");
        }
        let events = client.events().and_then(|mut events| events.next_event());
        let error = events.unwrap_err().to_string();
        // A chunk that is whole and no event is refused for that.
        assert!(error.contains("in full") || error.contains("does not answer"), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    }
}

#[test]
fn half_an_event_is_bounded_in_time() {
    let first = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n";
    let (_folder, client) = trickling(first, b"a");
    let mut events = client.events().unwrap();
    let begun = Instant::now();
    let error = events.next_event().unwrap_err().to_string();
    assert!(error.contains("cannot read the events") && error.contains("in full"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[test]
fn oversized_answers_are_refused_at_once() {
    let whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let begun = Instant::now();
    for size in [&b"200000\r\n"[..], b"ffffffffffffffff\r\n"] {
        let answer: &'static [u8] = Box::leak([&whole[..], size].concat().into_boxed_slice());
        let (_folder, client) = trickling(answer, b"");
        let error = client.status().unwrap_err().to_string();
        assert!(error.contains("longer than 1048576 bytes"), "{error}");
        let error = client.events().unwrap().next_event().unwrap_err().to_string();
        assert!(error.contains("longer than 1048576 bytes"), "{error}");
    }
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[test]
fn unexpected_answers_are_errors() {
    for (answer, text) in [
        (&b""[..], "hung up without an answer"),
        (b"SSH-2.0-x\r\n", "does not answer as a VMM"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n", "longer than"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "missing field `state`"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 1\r\n\r\nx", "its status is 502"),
        (b"HTTP/1.1 409 No\r\nContent-Length: 15\r\n\r\n{\"error\":\"no\"}", "hung up"),
        (b"HTTP/1.1 409 No\r\nContent-Length: 14\r\n\r\n{\"error\":\"no\"}", "no"),
    ] {
        let error = against(answer);
        assert!(error.contains(text), "{error}, and not: {text}");
    }
}

#[test]
fn absent_vmm_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    for _ in 0..2 {
        let error = Client::new(&path).pause().unwrap_err().to_string();
        assert!(error.starts_with("cannot pause: no VMM listens at /"), "{error}");
        // The second pass meets the socket of a listener that is gone.
        let _ = UnixListener::bind(&path);
    }
}

#[test]
fn a_table_says_everything() {
    let status = Status {
        state: State::Snapshotting,
        engine: "uffd".into(),
        backing: "shmem".into(),
        memory_bytes: 16384,
        cpus: 2,
        pages_total: 4,
        pages_present: 3,
        devices: vec![DeviceStatus {
            kind: "blk".into(),
            socket: Some("/run/blk".into()),
            state: "connected".into(),
        }],
        uptime_us: 1500,
        pid: 7,
        version: "0.1.0".into(),
        guest: Some(GuestCondition::Panicked),
        snapshot: Some(SnapshotProgress {
            destination: "/s".into(),
            pages_done: 1,
            pages_total: 4,
        }),
        last_error: Some("read /image: gone".into()),
        sources: vec![SourceStatus {
            source: "s3://a/vm7".into(),
            state: SourceState::Failing,
            failing_s: Some(3),
            failures: 2,
        }],
        limits: vec!["pages are small".into()],
        working_set: None,
    };
    assert_eq!(
        table(&status),
        "snapshotting: 16K of shmem, engine uffd, 2 vCPUs\n  \
         process   7, version 0.1.0, for 1500 us\n  \
         pages     3 of 4 (75.0 %) present\n  \
         source    failing for 3 s, s3://a/vm7\n  \
         blk       connected, /run/blk\n  \
         guest     its kernel has panicked; its console may say why\n  \
         snapshot  1 of 4 (25.0 %) written to /s\n  \
         error     read /image: gone\n  \
         note      pages are small\n"
    );
}
