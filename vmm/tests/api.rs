// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The API's server on real sockets, with correct, incorrect, slow and many clients. Behind it is
//! not a VM but a record of the requests.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use demand_vmm::api::client::Client;
use demand_vmm::api::http::Response;
use demand_vmm::api::server::{ApiServer, MAX_CONNECTIONS, REQUEST_TIME, serve};
use demand_vmm::api::{
    Control, ControlError, Go, SnapshotProgress, SnapshotRequest, SnapshotSummary, State, Status,
};
use proptest::prelude::*;
use serde_json::Value;

/// A record of the requests.
struct Record {
    state: Mutex<State>,
    asked: Mutex<Vec<String>>,
    progress: Mutex<Option<SnapshotProgress>>,
    /// Reports that a snapshot has begun; the snapshot ends at the reply.
    gate: Mutex<Option<(Sender<()>, Receiver<()>)>>,
}

impl Record {
    fn new() -> Arc<Self> {
        Arc::new(Record {
            state: Mutex::new(State::Running),
            asked: Mutex::default(),
            progress: Mutex::default(),
            gate: Mutex::default(),
        })
    }

    /// Makes the next snapshot wait. Returns the receiver that reports its beginning, and the
    /// sender that lets it end.
    fn hold(&self) -> (Receiver<()>, Sender<()>) {
        let (begun, has_begun) = channel();
        let (go, may_go) = channel();
        *self.gate.lock().unwrap() = Some((begun, may_go));
        (has_begun, go)
    }

    fn note(&self, what: impl Into<String>) {
        self.asked.lock().unwrap().push(what.into());
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    fn go(&self, what: &str, state: State) -> Result<(), ControlError> {
        self.note(what);
        let mut now = self.state.lock().unwrap();
        if *now == State::Stopped {
            return Err(ControlError::wrong_state(format!("{what}: the VM\nhas ended")));
        }
        *now = state;
        Ok(())
    }
}

impl Control for Record {
    fn status(&self) -> Status {
        Status {
            state: *self.state.lock().unwrap(),
            engine: "uffd".into(),
            backing: "shmem".into(),
            memory_bytes: 1 << 20,
            cpus: 2,
            pages_total: 256,
            pages_present: 64,
            devices: vec![],
            uptime_us: 1,
            pid: std::process::id(),
            version: "0.1.0".into(),
            guest: None,
            snapshot: self.progress.lock().unwrap().clone(),
            last_error: None,
        }
    }

    fn pause(&self) -> Result<(), ControlError> {
        self.go("pause", State::Paused)
    }

    fn resume(&self) -> Result<(), ControlError> {
        self.go("resume", State::Running)
    }

    fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotSummary, ControlError> {
        self.note(format!("{} {:?}", request.destination.display(), request.then));
        if request.destination == Path::new("/taken") {
            return Err(ControlError::failed("snapshot /taken: it is taken"));
        }
        if let Some((begun, may_go)) = self.gate.lock().unwrap().take() {
            *self.progress.lock().unwrap() = Some(SnapshotProgress {
                destination: request.destination.display().to_string(),
                pages_done: 5,
                pages_total: 256,
            });
            begun.send(()).unwrap();
            may_go.recv().unwrap();
        }
        Ok(SnapshotSummary {
            destination: request.destination.clone(),
            data_pages: 1,
            hole_pages: 255,
            bytes: 4096,
            took_us: 7,
            warning: None,
        })
    }

    fn shutdown(&self) -> Result<(), ControlError> {
        self.go("shutdown", State::Stopped)
    }
}

struct Server {
    server: ApiServer,
    record: Arc<Record>,
    folder: tempfile::TempDir,
    path: PathBuf,
}

fn server() -> Server {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api.sock");
    let record = Record::new();
    let server = ApiServer::start(&path, record.clone()).unwrap();
    Server { server, record, folder, path }
}

/// Reads until the server hangs up.
fn rest(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        // The server hung up before it had read all of the input.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        outcome => drop(outcome.unwrap()),
    }
    bytes
}

/// Returns the answers in a server's output, which must hold nothing else.
fn answers(mut bytes: &[u8]) -> Vec<Response> {
    let mut answers = Vec::new();
    while !bytes.is_empty() {
        if let Some(after) = bytes.strip_prefix(demand_vmm::api::http::CONTINUE) {
            bytes = after;
            continue;
        }
        let (answer, len) = Response::parse(bytes, 1 << 20)
            .unwrap()
            .unwrap_or_else(|| panic!("half an answer: {}", String::from_utf8_lossy(bytes)));
        let json: Value = serde_json::from_slice(&answer.body).unwrap();
        let error = json.get("error").and_then(Value::as_str);
        assert_eq!(error.is_none(), answer.status == 200, "{json}");
        assert!(error.is_none_or(|line| !line.is_empty() && !line.contains('\n')), "{json}");
        bytes = &bytes[len..];
        answers.push(answer);
    }
    answers
}

impl Server {
    fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    /// Sends bytes and the end of the input, and returns the statuses of the answers.
    fn statuses(&self, bytes: &str) -> Vec<u16> {
        let mut stream = self.connect();
        stream.write_all(bytes.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        answers(&rest(&stream)).iter().map(|answer| answer.status).collect()
    }

    /// As `statuses`, for one request with a body.
    fn status(&self, request: &str, body: &str) -> u16 {
        let length = body.len();
        let bytes =
            format!("{request} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{body}");
        let statuses = self.statuses(&bytes);
        assert_eq!(statuses.len(), 1, "{bytes}");
        statuses[0]
    }
}

#[test]
fn each_request_is_carried_out() {
    let server = server();
    for (request, body, status, asked) in [
        ("GET /api/v1/status", "", 200, &[][..]),
        ("PUT /api/v1/pause", "", 200, &["pause"]),
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
    assert_eq!(error.to_string(), "snapshot /taken: it is taken");
}

#[test]
fn slow_clients_are_cut_off_without_delaying_others() {
    let server = server();
    let get = "GET /api/v1/status HTTP/1.1\r\nHost: a\r\n\r\n";
    let put = "PUT /api/v1/snapshot HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{";
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
fn too_many_connections_are_told() {
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

#[test]
fn curl_is_understood() {
    let server = server();
    let curl = |arguments: &[&str]| {
        Command::new("curl")
            .args(["--silent", "--show-error", "--max-time", "20", "--write-out", " %{http_code}"])
            .arg("--unix-socket")
            .arg(&server.path)
            .args(arguments)
            .output()
    };
    let told = |output: Output| {
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let status = match curl(&["http://vmm/api/v1/status"]) {
        Ok(output) => told(output),
        // The lab has no foreign programs, and a run on the host is enough.
        Err(error) if error.kind() == ErrorKind::NotFound && test_support::host::is_lab() => return,
        Err(error) => return test_support::host::skip(&format!("curl: {error}")),
    };
    assert!(status.contains("\"state\":\"running\"") && status.ends_with(" 200"), "{status}");
    let both = ["http://vmm/api/v1/status", "http://vmm/api/v1/status"];
    assert_eq!(told(curl(&both).unwrap()).matches("\"pid\"").count(), 2);
    assert!(told(curl(&["-X", "PUT", "http://vmm/api/v1/pause"]).unwrap()).ends_with(" 200"));
    assert!(told(curl(&["--head", "http://vmm/api/v1/status"]).unwrap()).ends_with(" 200"));
    // A body that is long enough for curl to wait for the server's word.
    let body = format!("{{\"destination\":\"/{}\"}}", "a".repeat(1 << 15));
    let url = "http://vmm/api/v1/snapshot";
    for (body, expect, status) in [
        (body.as_str(), "Expect: 100-continue", " 200"),
        (&body, "Expect:", " 200"),
        (r#"{"destination":"/a"}"#, "Expect:", " 200"),
        ("destination=/a", "Expect:", " 400"),
    ] {
        let answer = told(curl(&["--data", body, "--header", expect, url]).unwrap());
        assert!(answer.ends_with(status), "{answer}");
    }
    let long = server.folder.path().join("long");
    std::fs::write(&long, vec![b' '; 3 << 20]).unwrap();
    let data = format!("@{}", long.display());
    assert!(told(curl(&["--data-binary", &data, url]).unwrap()).ends_with(" 413"));
    let chunked = ["--header", "Transfer-Encoding: chunked", "--data", "{}", url];
    assert!(told(curl(&chunked).unwrap()).ends_with(" 501"));
}

#[test]
fn the_program_asks_and_tells() {
    let server = server();
    let program = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_demand-vmm"))
            .args(arguments)
            .arg("--api-socket")
            .arg(&server.path)
            .current_dir(server.folder.path())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let right = |arguments: &[&str]| {
        let (code, told, errors) = program(arguments);
        assert_eq!((code, errors.as_str()), (Some(0), ""), "{arguments:?}");
        told
    };
    assert!(right(&["status"]).starts_with("running: 1M of shmem, engine uffd, 2 vCPUs\n"));
    let status: Status = serde_json::from_str(&right(&["status", "--json"])).unwrap();
    assert_eq!(status.pages_present, 64);
    assert_eq!(right(&["pause"]), "paused\n");
    assert_eq!(right(&["resume"]), "running\n");
    let here = server.folder.path().canonicalize().unwrap().join("a");
    let summary = right(&["snapshot", "--then", "resume", "a"]);
    assert_eq!(
        summary,
        format!("{}: 4K with content, 1020K of holes, 4K written in 7 us\n", here.display())
    );
    let asked = format!("{} Some(Resume)", here.display());
    assert_eq!(server.record.asked(), ["pause", "resume", &asked]);
    assert_eq!(right(&["shutdown"]), "stopped\n");
    let wrong = (Some(1), String::new(), "demand-vmm: pause: the VM has ended\n".to_string());
    assert_eq!(program(&["pause"]), wrong);
    drop(server.server);
    let output = Command::new(env!("CARGO_BIN_EXE_demand-vmm"))
        .args(["status", "--api-socket"])
        .arg(&server.path)
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("no VMM listens at") && error.lines().count() == 1, "{error}");
    assert_eq!(output.status.code(), Some(1));
}

/// Pieces of requests, which are combined in any order and with other bytes.
const PIECES: &[&str] = &[
    "GET /api/v1/status HTTP/1.1\r\nHost: a\r\n\r\n",
    "PUT /api/v1/snapshot HTTP/1.1\r\n",
    "POST /api/v1/pause HTTP/1.0\r\n",
    "HEAD",
    " / ",
    "HTTP/1.1",
    "Host: a\r\n",
    "Content-Length: 20\r\n",
    "Content-Length: 0\r\n",
    "Content-Length: 18446744073709551616\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Expect: 100-continue\r\n",
    "Connection: close\r\n",
    "Connection: keep-alive\r\n",
    "\r\n",
    "\n",
    ": ",
    r#"{"destination":"/a"}"#,
    "{",
    "\0",
    "é",
];

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let pieces = prop::collection::vec(prop::sample::select(PIECES), 0..16);
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..300),
        pieces.clone().prop_map(|pieces| pieces.concat().into_bytes()),
        (pieces, any::<prop::sample::Index>(), any::<u8>()).prop_map(|(pieces, index, byte)| {
            let mut bytes = pieces.concat().into_bytes();
            if !bytes.is_empty() {
                let at = index.index(bytes.len());
                bytes[at] = byte;
            }
            bytes
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 3000, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn any_input_is_answered_or_disconnected(bytes in bytes()) {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(&bytes).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let begun = Instant::now();
        serve(&server, &*Record::new());
        drop(server);
        prop_assert!(begun.elapsed() < Duration::from_secs(5));
        let got = rest(&client);
        // (The answers to HEAD have the lengths of bodies that do not follow.)
        if !bytes.windows(4).any(|window| window == b"HEAD") {
            let whole = answers(&got);
            prop_assert!(!whole.is_empty() || bytes.iter().all(|b| b"\r\n".contains(b)));
        }
    }
}
