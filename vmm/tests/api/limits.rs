// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The limits on bodies, on a request's time and on the number of connections.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use demand_vmm::api::client::Client;
use demand_vmm::api::server::{MAX_CONNECTIONS, REQUEST_TIME};

use crate::harness::{answers, rest, server};

#[test]
fn oversized_body_does_not_hide_its_answer() {
    let server = server();
    let mut stream = server.connect();
    let body = vec![b' '; 150 << 10];
    write!(
        stream,
        "PUT /api/v1/snapshot HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .unwrap();
    stream.write_all(&body).unwrap();
    assert_eq!(answers(&rest(&stream))[0].status, 413);
}

#[test]
fn slow_clients_are_cut_off_without_delaying_others() {
    let server = server();
    let get = "GET /api/v1/status HTTP/1.1\r\nHost: a\r\n\r\n";
    let put = "PUT /api/v1/snapshot HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{";
    let headed = "PUT /api/v1/snapshot HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n";
    let second = [get, headed].concat();
    let begun = Instant::now();
    let in_time = |begun: Instant| {
        let took = begun.elapsed();
        let most = REQUEST_TIME + Duration::from_secs(5);
        assert!(took >= REQUEST_TIME - Duration::from_millis(100) && took < most, "{took:?}");
    };
    thread::scope(|scope| {
        for (bytes, statuses) in [
            ("", &[408][..]),
            ("GET /api", &[408]),
            (put, &[408]),
            // Nothing of the second request's body arrives.
            (&second, &[200, 408]),
            // Between two requests, the timeout has no answer.
            (get, &[200]),
        ] {
            let mut stream = server.connect();
            scope.spawn(move || {
                stream.write_all(bytes.as_bytes()).unwrap();
                let answers = answers(&rest(&stream));
                let got: Vec<_> = answers.iter().map(|answer| answer.status).collect();
                assert_eq!(got, statuses, "{bytes}");
                in_time(begun);
            });
        }
        // A client that keeps dripping bytes.
        let mut dripping = server.connect();
        scope.spawn(move || {
            dripping.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            while begun.elapsed() < REQUEST_TIME * 2 {
                if dripping.write_all(b"G").is_err() {
                    break;
                }
                match dripping.read(&mut [0; 1000]).map(drop) {
                    Ok(()) => break,
                    Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                }
            }
            in_time(begun);
        });
        // A client that never reads.
        let mut deaf = server.connect();
        scope.spawn(move || {
            let error = loop {
                if let Err(error) = deaf.write_all(get.as_bytes()) {
                    break error;
                }
            };
            let hung_up = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
            assert!(hung_up.contains(&error.kind()), "{error}");
            in_time(begun);
        });
        for _ in 0..50 {
            let asked = Instant::now();
            assert_eq!(server.status("GET /api/v1/status", ""), 200);
            assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
            thread::sleep(Duration::from_millis(100));
        }
    });
}

#[test]
fn too_many_connections_are_reported() {
    let server = server();
    let get = "GET /api/v1/status HTTP/1.1\r\nHost: a\r\n\r\n";
    let mut served: Vec<_> = (0..MAX_CONNECTIONS).map(|_| server.connect()).collect();
    let first_answer = |stream: &mut UnixStream| {
        stream.write_all(get.as_bytes()).unwrap();
        let mut bytes = vec![0; 4096];
        let len = stream.read(&mut bytes).unwrap();
        answers(&bytes[..len])[0].status
    };
    for stream in &mut served {
        assert_eq!(first_answer(stream), 200);
    }
    assert_eq!(server.statuses(get), [503]);
    assert!(Client::new(&server.path).status().unwrap_err().to_string().contains("32 connections"));
    // Many more connections at once are not served either, and the served ones still are.
    let more: Vec<_> = (0..100).map(|_| server.connect()).collect();
    for stream in &mut served {
        assert_eq!(first_answer(stream), 200);
    }
    drop((more, served));
    let begun = Instant::now();
    while server.statuses(get) != [200] {
        assert!(begun.elapsed() < Duration::from_secs(5), "no place comes free");
        thread::sleep(Duration::from_millis(10));
    }
}
