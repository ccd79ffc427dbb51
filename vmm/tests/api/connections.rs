// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The course of a connection, from its first request to the end of the server.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use demand_vmm::api::SnapshotRequest;
use demand_vmm::api::client::Client;
use demand_vmm::api::server::ApiServer;

use crate::harness::{Server, answers, rest, server};

#[test]
fn a_connection_lasts_as_the_client_says() {
    let server = server();
    let get = "GET /api/v1/status HTTP/1.1\r\nHost: a\r\n\r\n";
    let missing = "GET /no HTTP/1.1\r\nHost: a\r\n\r\n";
    assert_eq!(server.statuses(&[get, missing, "\r\n", get].concat()), [200, 404, 200]);
    let last = "GET /api/v1/status HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    assert_eq!(server.statuses(&[get, last, get].concat()), [200, 200]);
    let old = "GET /api/v1/status HTTP/1.0\r\n\r\n";
    assert_eq!(server.statuses(&[old, get].concat()), [200]);
    let lasting = "GET /api/v1/status HTTP/1.0\r\nConnection: keep-alive\r\n\r\n";
    assert_eq!(server.statuses(&[lasting, get].concat()), [200, 200]);
    // After these requests, the start of the next one is unknown.
    let chunked = "PUT /api/v1/snapshot HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(server.statuses(&[chunked, get].concat()), [501]);
    let unbounded = "PUT /api/v1/snapshot HTTP/1.1\r\nHost: a\r\n\r\n{}";
    assert_eq!(server.statuses(&[unbounded, get].concat()), [411]);
    assert_eq!(server.statuses(&get[..20]), [400]);
    assert_eq!(server.statuses(""), [0; 0]);
    // The head is there, and nothing of the body.
    let headed = "PUT /api/v1/snapshot HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n";
    assert_eq!(server.statuses(headed), [400]);
    assert_eq!(server.statuses(&[get, headed].concat()), [200, 400]);
    // HEAD is answered without a body.
    let mut stream = server.connect();
    write!(stream, "HEAD /api/v1/status HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
    let text = String::from_utf8(rest(&stream)).unwrap();
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("\r\n\r\n"), "{text}");
}

#[test]
fn expect_100_continue_is_answered() {
    let server = server();
    let body = r#"{"destination":"/a"}"#;
    let head = |request: &str, length: usize| {
        format!(
            "PUT {request} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\
             Content-Length: {length}\r\nExpect: 100-continue\r\n\r\n"
        )
    };
    let mut stream = server.connect();
    stream.write_all(head("/api/v1/snapshot", body.len()).as_bytes()).unwrap();
    let mut told = [0; demand_vmm::api::http::CONTINUE.len()];
    stream.read_exact(&mut told).unwrap();
    assert_eq!(told, demand_vmm::api::http::CONTINUE);
    stream.write_all(body.as_bytes()).unwrap();
    assert_eq!(answers(&rest(&stream))[0].status, 200);
    // The server does not wait for a body that it would refuse.
    for (request, length, status) in [("/no", 5, 404), ("/api/v1/snapshot", 65537, 413)] {
        let mut stream = server.connect();
        stream.write_all(head(request, length).as_bytes()).unwrap();
        let bytes = rest(&stream);
        assert!(!bytes.starts_with(demand_vmm::api::http::CONTINUE));
        assert_eq!(answers(&bytes)[0].status, status);
    }
}

#[test]
fn the_end_of_the_server_is_in_order() {
    let Server { server, record, folder, path } = server();
    let (has_begun, go) = record.hold();
    let idle = UnixStream::connect(&path).unwrap();
    let client = Client::new(&path);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            client.snapshot(&SnapshotRequest { destination: "/a".into(), then: None }, |_| {})
        });
        has_begun.recv().unwrap();
        let ending = scope.spawn(|| drop(server));
        assert_eq!(rest(&idle), b"");
        go.send(()).unwrap();
        // The request in progress is answered.
        assert_eq!(waiting.join().unwrap().unwrap().bytes, 4096);
        ending.join().unwrap();
    });
    assert!(!path.exists());
    // The server's threads have dropped the record.
    assert_eq!(Arc::strong_count(&record), 1);
    assert!(client.status().unwrap_err().to_string().contains("no VMM listens"));
    drop(ApiServer::start(&path, record).unwrap());
    drop(folder);
}
