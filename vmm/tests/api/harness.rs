// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A server before a record of the requests, and the parser of its output.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use demand_vmm::api::events::EventLog;
use demand_vmm::api::http::Response;
use demand_vmm::api::server::ApiServer;
use demand_vmm::api::{
    Control, ControlError, SnapshotProgress, SnapshotRequest, SnapshotSummary, State, Status,
};
use demand_vmm::report::WorkingSetReport;
use serde_json::Value;

/// A record of the requests.
pub(crate) struct Record {
    pub(crate) state: Mutex<State>,
    asked: Mutex<Vec<String>>,
    progress: Mutex<Option<SnapshotProgress>>,
    pub(crate) events: Arc<EventLog>,
    /// Reports that a snapshot has begun; the snapshot ends at the reply.
    gate: Mutex<Option<(Sender<()>, Receiver<()>)>>,
}

impl Record {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Record {
            state: Mutex::new(State::Running),
            asked: Mutex::default(),
            progress: Mutex::default(),
            events: Arc::default(),
            gate: Mutex::default(),
        })
    }

    /// Makes the next snapshot wait. Returns the receiver that reports its beginning, and the
    /// sender that lets it end.
    pub(crate) fn hold(&self) -> (Receiver<()>, Sender<()>) {
        let (begun, has_begun) = channel();
        let (go, may_go) = channel();
        *self.gate.lock().unwrap() = Some((begun, may_go));
        (has_begun, go)
    }

    fn note(&self, what: impl Into<String>) {
        self.asked.lock().unwrap().push(what.into());
    }

    pub(crate) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    fn go(&self, what: &str, state: State) -> Result<(), ControlError> {
        self.note(what);
        let mut now = self.state.lock().unwrap();
        if *now == State::Stopped {
            return Err(ControlError::wrong_state(format!(
                "cannot {what}: the VM\nhas ended; start another"
            )));
        }
        *now = state;
        Ok(())
    }
}

impl Control for Record {
    fn events(&self) -> Arc<EventLog> {
        self.events.clone()
    }

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
            sources: Vec::new(),
            limits: Vec::new(),
            working_set: Some(WorkingSetReport { mode: "auto".into(), ..Default::default() }),
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
            return Err(ControlError::failed(
                "cannot create snapshot /taken: it is taken; name another",
            ));
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

pub(crate) struct Server {
    pub(crate) server: ApiServer,
    pub(crate) record: Arc<Record>,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) path: PathBuf,
}

pub(crate) fn server() -> Server {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api.sock");
    let record = Record::new();
    let server = ApiServer::start(&path, record.clone()).unwrap();
    Server { server, record, folder, path }
}

/// Reads until the server hangs up.
pub(crate) fn rest(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        // The server hung up before it had read all of the input.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        outcome => drop(outcome.unwrap()),
    }
    bytes
}

/// Returns the answers in a server's output, which must hold nothing else.
pub(crate) fn answers(mut bytes: &[u8]) -> Vec<Response> {
    let mut answers = Vec::new();
    while !bytes.is_empty() {
        if let Some(after) = bytes.strip_prefix(demand_vmm::api::http::CONTINUE) {
            bytes = after;
            continue;
        }
        let (answer, len) = Response::parse(bytes, 1 << 20)
            .unwrap()
            .unwrap_or_else(|| panic!("half an answer: {}", String::from_utf8_lossy(bytes)));
        let json: Value = if answer.body.starts_with(b"# ") {
            assert!(answer.body.ends_with(b"# EOF\n"), "half of the metrics");
            Value::Null
        } else {
            serde_json::from_slice(&answer.body).unwrap()
        };
        let error = json.get("error").and_then(Value::as_str);
        assert_eq!(error.is_none(), answer.status == 200, "{json}");
        assert!(error.is_none_or(|line| !line.is_empty() && !line.contains('\n')), "{json}");
        bytes = &bytes[len..];
        answers.push(answer);
    }
    answers
}

impl Server {
    pub(crate) fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    /// Sends bytes and the end of the input, and returns the statuses of the answers.
    pub(crate) fn statuses(&self, bytes: &str) -> Vec<u16> {
        let mut stream = self.connect();
        stream.write_all(bytes.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        answers(&rest(&stream)).iter().map(|answer| answer.status).collect()
    }

    /// As `statuses`, for one request with a body.
    pub(crate) fn status(&self, request: &str, body: &str) -> u16 {
        let length = body.len();
        let bytes =
            format!("{request} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{body}");
        let statuses = self.statuses(&bytes);
        assert_eq!(statuses.len(), 1, "{bytes}");
        statuses[0]
    }
}
