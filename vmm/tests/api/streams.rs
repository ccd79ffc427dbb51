// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Streams of events: complete and in order for each reader, and harmless to the VM.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use demand_vmm::api::client::Client;
use demand_vmm::api::client::events::EventStream;
use demand_vmm::api::events::{EventKind, KEPT_EVENTS, MAX_READERS};

use crate::harness::{Server, server};

const REQUEST: &[u8] = b"GET /api/v1/events HTTP/1.1\r\nHost: a\r\n\r\n";

fn all(mut events: EventStream) -> Vec<(u64, EventKind)> {
    let mut seen = Vec::new();
    while let Some(event) = events.next_event().unwrap() {
        seen.push((event.seq, event.kind));
    }
    seen
}

/// Opens a stream, and reads only its head.
fn stalled(server: &Server) -> UnixStream {
    let mut stream = server.connect();
    stream.write_all(REQUEST).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert!(stream.read(&mut [0; 8]).unwrap() > 0);
    stream
}

#[test]
fn each_reader_gets_all_events_in_order() {
    let server = server();
    let client = Client::new(&server.path);
    server.record.events.add(EventKind::Running);
    let early: Vec<_> = (0..3).map(|_| client.events().unwrap()).collect();
    let early: Vec<_> = early.into_iter().map(|events| thread::spawn(|| all(events))).collect();
    server.record.events.add(EventKind::GuestReset);
    let late = client.events().unwrap();
    server.record.events.end(0, None);
    let ended = EventKind::Ended { status: 0, error: None };
    let expected = [(1, EventKind::Running), (2, EventKind::GuestReset), (3, ended)];
    for reader in early {
        assert_eq!(reader.join().unwrap(), expected);
    }
    assert_eq!(all(late), expected);
}

#[test]
fn stalled_reader_delays_nothing() {
    let server = server();
    let _stalled = stalled(&server);
    let begun = Instant::now();
    // More than the socket's buffers and the log hold together.
    let error = "x".repeat(1000);
    for _ in 0..20 * KEPT_EVENTS {
        server.record.events.add(EventKind::SourceFailing { error: error.clone() });
    }
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(Client::new(&server.path).status().is_ok());
    server.record.events.end(0, None);
    // The end waits only a little for such a reader.
    let begun = Instant::now();
    drop(server.server);
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
}

#[test]
fn slow_reader_learns_how_much_it_lost() {
    let server = server();
    let mut slow = Client::new(&server.path).events().unwrap();
    let error = "x".repeat(1000);
    let count = 20 * KEPT_EVENTS as u64;
    for _ in 0..count {
        server.record.events.add(EventKind::SourceFailing { error: error.clone() });
    }
    // It reads slowly, but the last event is there.
    let seen = thread::spawn(move || {
        let mut next = 1;
        let mut dropped = 0;
        while let Some(event) = slow.next_event().unwrap() {
            if let EventKind::Dropped { count } = event.kind {
                dropped += count;
                next += count;
                assert_eq!(event.seq + 1, next);
            } else {
                assert_eq!(event.seq, next);
                next += 1;
            }
        }
        (next - 1, dropped)
    });
    server.record.events.end(0, None);
    let (last, dropped) = seen.join().unwrap();
    assert_eq!(last, count + 1);
    assert!(dropped > 0);
}

#[test]
fn number_of_streams_is_limited() {
    let server = server();
    let client = Client::new(&server.path);
    let readers: Vec<_> = (0..MAX_READERS).map(|_| client.events().unwrap()).collect();
    let error = client.events().unwrap_err().to_string();
    assert!(error.contains("read the events already; retry later"), "{error}");
    // The other requests are not affected, and a client that goes makes room.
    assert!(client.status().is_ok());
    drop(readers);
    let begun = Instant::now();
    while client.events().is_err() {
        assert!(begun.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn end_of_the_server_ends_a_stream() {
    let server = server();
    let mut events = Client::new(&server.path).events().unwrap();
    let begun = Instant::now();
    drop(server.server);
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    let error = events.next_event().unwrap_err().to_string();
    assert!(error.contains("hung up"), "{error}");
}

#[test]
fn wrong_requests_for_events_are_refused() {
    let server = server();
    server.record.events.end(0, None);
    assert_eq!(server.statuses("GET /api/v1/events HTTP/1.0\r\nHost: a\r\n\r\n"), [505]);
    assert_eq!(server.status("PUT /api/v1/events", ""), 405);
    assert_eq!(server.status("GET /api/v1/events", "{\"x\":1}"), 400);
    assert_eq!(server.status("GET /api/v1/events", "{}"), 200);
}
