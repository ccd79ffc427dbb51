// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Each request has its effect and its answer, also while a snapshot is written.

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use demand_vmm::api::client::Client;
use demand_vmm::api::{Go, SnapshotRequest, State};

use crate::harness::server;

#[test]
fn each_request_is_carried_out() {
    let server = server();
    for (request, body, status, asked) in [
        ("GET /api/v1/status", "", 200, &[][..]),
        ("GET /metrics", "", 200, &[]),
        ("GET /api/v1/metrics", "", 200, &[]),
        ("PUT /metrics", "", 405, &[]),
        ("PUT /api/v1/pause", "", 200, &["pause"]),
        ("PUT /api/v1/vm.pause", "", 200, &["pause"]),
        ("POST /api/v1/vm.resume", "", 200, &["resume"]),
        ("PUT /api/v1/vm.snapshot", r#"{"destination":"/a"}"#, 200, &["/a None"]),
        ("PUT /api/v1/vm.create", "{}", 400, &[]),
        ("PUT /api/v1/vm.create", r#"{"memory":{"size":"64M"},"kernel":"/k"}"#, 409, &[]),
        ("PUT /api/v1/vm.create", r#"{"memory":{"size":"64M"},"kernel":"k"}"#, 400, &[]),
        ("PUT /api/v1/vm.restore", r#"{"source":"/s"}"#, 409, &[]),
        ("PUT /api/v1/vm.restore", r#"{"source":"s"}"#, 400, &[]),
        ("PUT /api/v1/vm.restore", "", 400, &[]),
        ("PUT /api/v1/vm.boot", "", 409, &[]),
        ("PUT /api/v1/vm.boot", r#"{"now":true}"#, 400, &[]),
        ("GET /api/v1/vm.boot", "", 405, &[]),
        ("POST /api/v1/resume", "{}", 200, &["resume"]),
        ("PUT /api/v1/snapshot", r#"{"destination":"/a"}"#, 200, &["/a None"]),
        (
            "PUT /api/v1/snapshot",
            r#"{"destination":"/a","then":"shutdown"}"#,
            200,
            &["/a Some(Shutdown)"],
        ),
        ("PUT /api/v1/snapshot", r#"{"destination":"/taken"}"#, 500, &["/taken None"]),
        ("PUT /api/v1/snapshot", r#"{"destination":"a"}"#, 400, &[]),
        ("PUT /api/v1/snapshot", r#"{"destination":"/a","than":"pause"}"#, 400, &[]),
        ("PUT /api/v1/snapshot", r#"{"destination":"/a","then":"fly"}"#, 400, &[]),
        ("PUT /api/v1/snapshot", r#"{"destination":"/a""#, 400, &[]),
        ("PUT /api/v1/snapshot", "", 400, &[]),
        ("PUT /api/v1/pause", r#"{"now":true}"#, 400, &[]),
        ("GET /api/v1/pause", "", 405, &[]),
        ("PUT /api/v1/status", "{}", 405, &[]),
        ("put /api/v1/pause", "", 405, &[]),
        ("GET /api/v1", "", 404, &[]),
        ("GET /", "", 404, &[]),
        ("PUT /api/v1/shutdown", "", 200, &["shutdown"]),
        ("PUT /api/v1/pause", "", 409, &["pause"]),
    ] {
        assert_eq!(server.status(request, body), status, "{request} {body}");
        assert_eq!(server.record.asked(), asked, "{request} {body}");
    }
}

#[test]
fn status_is_answered_during_a_snapshot() {
    let server = server();
    let (has_begun, go) = server.record.hold();
    let client = Client::new(&server.path);
    let seen = Mutex::new(None);
    let summary = thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let request = SnapshotRequest { destination: "/a".into(), then: Some(Go::Pause) };
            client.snapshot(&request, |status| {
                // Once is enough for the test to continue.
                if seen.lock().unwrap().replace(status.clone()).is_none() {
                    go.send(()).unwrap();
                }
            })
        });
        has_begun.recv().unwrap();
        let begun = Instant::now();
        assert_eq!(client.status().unwrap().snapshot.unwrap().pages_done, 5);
        assert_eq!(client.pause().unwrap().state, State::Paused);
        assert!(begun.elapsed() < Duration::from_secs(2));
        waiting.join().unwrap().unwrap()
    });
    assert_eq!((summary.data_pages, summary.destination), (1, "/a".into()));
    assert_eq!(seen.into_inner().unwrap().unwrap().pid, std::process::id());
    assert_eq!(server.record.asked(), ["/a Some(Pause)", "pause"]);
    let error = client
        .snapshot(&SnapshotRequest { destination: "/taken".into(), then: None }, |_| {})
        .unwrap_err();
    assert_eq!(error.to_string(), "cannot create snapshot /taken: it is taken; name another");
}
