// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Wrong requests to the API of a running VM, in wrong states, and by misbehaving clients: the
//! guest is not affected.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use demand_tests::linux_vm::Guest;
use demand_tests::refusal::Refusals;
use demand_vmm::api::client::Client;
use demand_vmm::api::endpoint::Endpoint;
use demand_vmm::api::events::MAX_READERS;
use demand_vmm::api::http::{MAX_BODY, MAX_HEAD, Response};
use demand_vmm::api::server::{MAX_CONNECTIONS, REQUEST_TIME};
use demand_vmm::api::{Go, SnapshotRequest, State};

use crate::snapshot::Snapshot;

fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

/// Returns the answer to these bytes; the server may stop reading before their end.
fn ask(socket: &Path, request: &[u8]) -> Response {
    let mut stream = connect(socket);
    let _ = stream.write_all(request);
    let _ = stream.shutdown(Shutdown::Write);
    answer(&mut stream)
}

fn answer(stream: &mut UnixStream) -> Response {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        // The server hung up before it had read all of them.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        outcome => drop(outcome.unwrap()),
    }
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Response::parse(&bytes, 1 << 20).unwrap().unwrap_or_else(|| panic!("no answer: {text}")).0
}

/// Builds a request from its method, path and body.
fn request(method: &str, path: &str, body: &str) -> Vec<u8> {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Returns the line of an answer that must be an error with this status.
fn error_of(response: &Response, status: u16) -> Result<String, String> {
    let body = String::from_utf8_lossy(&response.body).into_owned();
    if response.status != status {
        return Err(format!(
            "it was answered with {} instead of {status}: {body}",
            response.status
        ));
    }
    let json: serde_json::Value = serde_json::from_str(&body).map_err(|error| error.to_string())?;
    json["error"].as_str().map(str::to_owned).ok_or(format!("it is no error: {body}"))
}

/// A VM that `vm.create` takes.
const VM: &str = r#"{"memory":{"size":"64M"},"cpus":1,"kernel":"/k","devices":[]}"#;

/// Malformed requests: description, bytes, status, words of the answer.
fn wrong_requests() -> Vec<(&'static str, Vec<u8>, u16, &'static [&'static str])> {
    let put = |path: &str, body: &str| request("PUT", path, body);
    let snapshot = Endpoint::Snapshot.path();
    let (create, restore) = (Endpoint::Create.path(), Endpoint::Restore.path());
    let events = Endpoint::Events.path();
    let with = |header: &str| {
        format!("GET {} HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n", Endpoint::Status.path())
    };
    vec![
        (
            "an unknown path",
            put("/api/v1/explode", ""),
            404,
            &["/api/v1/explode", "/api/v1/status"],
        ),
        ("the root", request("GET", "/", ""), 404, &["the paths are"]),
        ("another version", request("GET", "/api/v2/status", ""), 404, &["/api/v1/status"]),
        ("to read a pause", request("GET", Endpoint::Pause.path(), ""), 405, &["PUT, POST"]),
        ("to write a status", put(Endpoint::Status.path(), ""), 405, &["GET, HEAD"]),
        ("to delete", request("DELETE", snapshot, ""), 405, &["DELETE", "PUT, POST"]),
        ("to read a creation", request("GET", create, ""), 405, &["PUT, POST"]),
        ("to write events", put(events, ""), 405, &["it takes GET"]),
        ("events with a body", request("GET", events, "{\"from\":1}"), 400, &["takes no body"]),
        (
            "events by HTTP/1.0",
            b"GET /api/v1/events HTTP/1.0\r\n\r\n".into(),
            505,
            &["chunks", "HTTP/1.1"],
        ),
        ("a second VM", put(create, VM), 409, &["cannot create a VM", "runs one already"]),
        ("a second boot", put(Endpoint::Boot.path(), ""), 409, &["cannot boot a VM"]),
        ("a boot with a body", put(Endpoint::Boot.path(), VM), 400, &["takes no body"]),
        ("a second guest", put(restore, "{\"source\":\"/s\"}"), 409, &["cannot restore a VM"]),
        ("no source", put(restore, "{}"), 400, &["source"]),
        ("a relative source", put(restore, "{\"source\":\"s\"}"), 400, &["absolute"]),
        ("no VM", put(create, "[]"), 400, &["as a VM configuration"]),
        ("no memory", put(create, "{\"kernel\":\"/k\"}"), 400, &["memory"]),
        ("no size", put(create, &VM.replace("64M", "64Q")), 400, &["memory.size", "not a size"]),
        ("a field more in a VM", put(create, &VM.replace("cpus", "cups")), 400, &["cups"]),
        ("more after a VM", put(create, &format!("{VM}{VM}")), 400, &["trailing"]),
        (
            "an impossible device",
            put(create, &VM.replace("[]", "[{\"type\":\"blk\",\"socket\":\"/b\",\"queues\":0}]")),
            400,
            &["devices[0]", "at least one queue"],
        ),
        ("a relative kernel", put(create, &VM.replace("/k", "k")), 400, &["absolute"]),
        (
            "a pause with a body",
            put(Endpoint::Pause.path(), "{\"now\":1}"),
            400,
            &["takes no body"],
        ),
        (
            "no body",
            b"PUT /api/v1/snapshot HTTP/1.1\r\nHost: a\r\n\r\n".into(),
            411,
            &["Content-Length"],
        ),
        ("an empty body", put(snapshot, ""), 400, &["as a snapshot request"]),
        ("no JSON", put(snapshot, "{destination: x"), 400, &["as a snapshot request"]),
        ("another JSON", put(snapshot, "[1, 2]"), 400, &["as a snapshot request"]),
        ("no destination", put(snapshot, "{}"), 400, &["destination"]),
        ("a number", put(snapshot, "{\"destination\": 7}"), 400, &["string"]),
        ("a field more", put(snapshot, "{\"destination\":\"/x\",\"how\":1}"), 400, &["how"]),
        ("to fly", put(snapshot, "{\"destination\":\"/x\",\"then\":\"fly\"}"), 400, &["fly"]),
        ("a relative path", put(snapshot, "{\"destination\":\"x\"}"), 400, &["absolute"]),
        ("a path with a NUL", put(snapshot, "{\"destination\":\"/x\\u0000y\"}"), 400, &["NUL"]),
        ("a deep body", put(snapshot, &"[".repeat(60_000)), 400, &["as a snapshot request"]),
        ("a long body", put(snapshot, &"x".repeat(MAX_BODY + 1)), 413, &["longer than 65536"]),
        ("an endless body", with("Content-Length: 99999999999999999999").into(), 413, &["longer"]),
        ("two lengths", with("Content-Length: 1\r\nContent-Length: 2").into(), 400, &["two"]),
        ("a body in chunks", with("Transfer-Encoding: chunked").into(), 501, &["Content-Length"]),
        ("a long path", request("GET", &"/a".repeat(MAX_HEAD), ""), 414, &["first line"]),
        ("a long header", with(&format!("a: {}", "b".repeat(MAX_HEAD))).into(), 431, &["headers"]),
        ("many headers", with(&"a: b\r\n".repeat(100)).into(), 431, &["64 headers"]),
        ("no host", b"GET /api/v1/status HTTP/1.1\r\n\r\n".into(), 400, &["Host"]),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(), 505, &["HTTP/1.1"]),
        ("half a request", b"GET /api/v1/sta".into(), 400, &["incomplete"]),
        (
            "half a body",
            b"PUT /api/v1/snapshot HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{".into(),
            400,
            &["incomplete"],
        ),
        (
            "TLS",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\r\n\r\n".into(),
            400,
            &["not HTTP"],
        ),
        ("zeros", vec![0; 100_000], 400, &["not HTTP"]),
        ("ones", vec![0xff; 100_000], 400, &["not HTTP"]),
        ("letters", vec![b'a'; 100_000], 414, &["first line"]),
        ("empty lines", b"\r\n".repeat(50_000), 414, &["first line"]),
    ]
}

/// Checks that the VM's state is unchanged, and that the guest works.
fn goes_on(guest: &mut Guest, state: State) {
    let status = guest.api().status().unwrap();
    assert_eq!((status.state, status.last_error), (state, None));
    if state == State::Running {
        guest.wait_beats(1).unwrap();
    }
}

fn wrong_requests_are_reported(socket: &Path) {
    let mut refusals = Refusals::new();
    for (case, bytes, status, words) in wrong_requests() {
        refusals.check_line(case, error_of(&ask(socket, &bytes), status), words);
    }
    refusals.end();
}

/// Returns the command's error, or an error if it succeeded.
fn refused<T: std::fmt::Debug>(
    outcome: Result<T, demand_vmm::api::client::ClientError>,
) -> Result<String, String> {
    match outcome {
        Ok(done) => Err(format!("it was done: {done:?}")),
        Err(error) => Ok(error.to_string()),
    }
}

fn snapshot_to(destination: PathBuf) -> SnapshotRequest {
    SnapshotRequest { destination, then: Some(Go::Resume) }
}

/// Several clients request a snapshot, and other operations, at once: one is executed, and the
/// others get an error.
fn one_thing_at_a_time(guest: &Guest, folder: &Path) {
    let client = |n: usize| {
        let (api, to) = (guest.api(), snapshot_to(folder.join(format!("at-once-{n}"))));
        thread::spawn(move || api.snapshot(&to, |_| {}))
    };
    let clients: Vec<_> = (0..3).map(client).collect();
    let begun = Instant::now();
    while guest.api().status().unwrap().state == State::Running {
        assert!(begun.elapsed() < Duration::from_secs(30), "no snapshot begins");
    }
    let others =
        [("pause", refused(guest.api().pause())), ("resume", refused(guest.api().resume()))];
    let outcomes: Vec<_> = clients.into_iter().map(|client| client.join().unwrap()).collect();
    let done = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert!(done >= 1, "{outcomes:?}");
    let mut refusals = Refusals::new();
    let told =
        outcomes.into_iter().filter(Result::is_err).map(|outcome| ("snapshot", refused(outcome)));
    for (case, line) in told.chain(others) {
        refusals.check_line(case, line, &["in progress", "retry when it is done"]);
    }
    refusals.end();
}

/// Clients that never finish their request delay no other client, and are disconnected.
fn slow_clients(socket: &Path) {
    let mut held: Vec<_> = (0..4).map(|_| connect(socket)).collect();
    held[1].write_all(b"GET /api/v1/status HTTP/1.1\r\nHost:").unwrap();
    held[2]
        .write_all(b"PUT /api/v1/snapshot HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
        .unwrap();
    let begun = Instant::now();
    // A client that sends a byte now and then has no more time than others.
    while begun.elapsed() < REQUEST_TIME + Duration::from_secs(5) {
        let status = Client::new(socket).status().unwrap();
        assert_eq!(status.state, State::Running);
        if held[3].write_all(b"G").is_err() {
            break;
        }
        thread::sleep(Duration::from_millis(500));
    }
    for stream in &mut held {
        let answer = answer(stream);
        assert!([408, 400].contains(&answer.status), "{answer:?}");
    }
}

/// More connections than the limit: those in excess are refused, and the server recovers.
fn many_connections(socket: &Path) {
    let mut held: Vec<_> = (0..MAX_CONNECTIONS + 10).map(|_| connect(socket)).collect();
    let answer = answer(held.last_mut().unwrap());
    assert_eq!(answer.status, 503, "{answer:?}");
    drop(held);
    let begun = Instant::now();
    while let Err(error) = Client::new(socket).status() {
        assert!(begun.elapsed() < Duration::from_secs(30), "{error}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Clients that ask for events and read none of them.
fn stalled_readers(socket: &Path) -> Vec<UnixStream> {
    let stalled = || {
        let mut stream = connect(socket);
        stream.write_all(&request("GET", Endpoint::Events.path(), "")).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 1);
        stream
    };
    let readers = (0..MAX_READERS).map(|_| stalled()).collect();
    let answer = ask(socket, &request("GET", Endpoint::Events.path(), ""));
    let line = error_of(&answer, 503).unwrap();
    assert!(line.contains("retry later"), "{line}");
    readers
}

#[test]
fn wrong_requests_do_the_guest_no_harm() {
    let Some(snapshot) = Snapshot::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (mut guest, _back_end) = snapshot.restore(folder.path(), &snapshot.dir(), &[]);
    let socket = folder.path().join("api.sock");
    guest.wait_beats(1).unwrap();
    let said = guest.complaints();

    wrong_requests_are_reported(&socket);
    goes_on(&mut guest, State::Running);
    let mut refusals = Refusals::new();
    refusals.check_line("to resume what runs", refused(guest.api().resume()), &["running already"]);
    guest.api().pause().unwrap();
    refusals.check_line("to pause twice", refused(guest.api().pause()), &["paused already"]);
    wrong_requests_are_reported(&socket);
    goes_on(&mut guest, State::Paused);
    guest.api().resume().unwrap();
    goes_on(&mut guest, State::Running);
    one_thing_at_a_time(&guest, folder.path());
    goes_on(&mut guest, State::Running);
    slow_clients(&socket);
    many_connections(&socket);
    goes_on(&mut guest, State::Running);
    // They are there until the end, and do not delay it.
    let _readers = stalled_readers(&socket);
    goes_on(&mut guest, State::Running);
    assert_eq!(guest.complaints(), said, "all of it is the clients' business");
    refusals.end();
    guest.finish().unwrap();
    assert!(!socket.exists());
    snapshot.assert_unchanged();
}

#[test]
fn nothing_begins_during_shutdown() {
    let Some(snapshot) = Snapshot::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (mut guest, _back_end) = snapshot.restore(folder.path(), &snapshot.dir(), &[]);
    guest.wait_beats(1).unwrap();
    let late = folder.path().join("late");
    // A snapshot in progress does not outlast the VM, and leaves no files.
    let (api, to) = (guest.api(), snapshot_to(late.clone()));
    let writing = thread::spawn(move || api.snapshot(&to, |_| {}));
    let begun = Instant::now();
    while guest.api().status().unwrap().state == State::Running {
        assert!(begun.elapsed() < Duration::from_secs(30), "no snapshot begins");
    }
    guest.api().shutdown().unwrap();
    // Every request from here on is answered or disconnected soon.
    while folder.path().join("api.sock").exists() {
        let _ = (guest.api().pause(), guest.api().resume(), guest.api().shutdown());
        let _ = guest.api().snapshot(&snapshot_to(folder.path().join("later")), |_| {});
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", guest.story());
    }
    let status = guest.wait_end().unwrap();
    assert!(status.success(), "{status}; {}", guest.story());
    match writing.join().unwrap() {
        // It finished before the shutdown.
        Ok(_) => assert!(late.join("state").exists()),
        Err(error) => {
            assert!(!late.exists(), "{error}");
            println!("a snapshot under way: {error}");
        }
    }
    let error = guest.api().status().unwrap_err().to_string();
    assert!(error.contains("no VMM listens"), "{error}");
    let partial =
        |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().contains(".partial-");
    assert!(!std::fs::read_dir(folder.path()).unwrap().flatten().any(partial));
    snapshot.assert_unchanged();
}
