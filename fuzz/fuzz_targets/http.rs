// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fuzzes the API server with arbitrary bytes from a client. The client gets complete answers or a
//! closed connection, and the server never waits for a client that has shut down its sending side.
#![no_main]

mod input;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use demand_vmm::api::events::EventLog;
use demand_vmm::api::http::{CONTINUE, Response, parse_head};
use demand_vmm::api::server::serve;
use demand_vmm::api::{Control, ControlError, SnapshotRequest, SnapshotSummary, State, Status};
use input::Input;
use libfuzzer_sys::fuzz_target;

/// A control that counts the requests, and refuses two of three.
struct Count(AtomicUsize);

impl Count {
    fn one(&self) -> Result<(), ControlError> {
        match self.0.fetch_add(1, Ordering::Relaxed) % 3 {
            0 => Ok(()),
            1 => Err(ControlError::wrong_state("no:\nit has ended")),
            _ => Err(ControlError::failed("no: it failed")),
        }
    }
}

impl Control for Count {
    fn events(&self) -> Arc<EventLog> {
        let log = Arc::new(EventLog::default());
        log.end(0, None);
        log
    }

    fn status(&self) -> Status {
        Status {
            state: State::Running,
            engine: "uffd".into(),
            backing: "shmem".into(),
            memory_bytes: 0,
            cpus: 1,
            pages_total: 0,
            pages_present: 0,
            devices: vec![],
            uptime_us: 0,
            pid: 1,
            guest: None,
            version: "0".into(),
            snapshot: None,
            last_error: None,
            sources: Vec::new(),
            working_set: None,
            limits: Vec::new(),
        }
    }

    fn pause(&self) -> Result<(), ControlError> {
        self.one()
    }

    fn resume(&self) -> Result<(), ControlError> {
        self.one()
    }

    fn snapshot(&self, request: &SnapshotRequest) -> Result<SnapshotSummary, ControlError> {
        assert!(request.destination.is_absolute());
        self.one()?;
        let destination = request.destination.clone();
        Ok(SnapshotSummary {
            destination,
            data_pages: 0,
            hole_pages: 0,
            bytes: 0,
            took_us: 0,
            warning: None,
        })
    }

    fn shutdown(&self) -> Result<(), ControlError> {
        self.one()
    }
}

/// Checks that a head parses the same whatever follows it, and does not parse before it is
/// complete.
fn check_head(bytes: &[u8]) {
    let Ok(Some(head)) = parse_head(bytes) else { return };
    assert!(head.len <= bytes.len());
    assert_eq!(parse_head(&bytes[..head.len]), Ok(Some(head.clone())));
    assert_eq!(parse_head(&bytes[..head.len - 1]), Ok(None));
}

/// Checks that the client received complete answers and nothing else.
fn check_answers(mut bytes: &[u8]) {
    while !bytes.is_empty() {
        if let Some(after) = bytes.strip_prefix(CONTINUE) {
            bytes = after;
            continue;
        }
        let answer = Response::parse(bytes, 1 << 20).unwrap();
        let (answer, len) = answer.expect("the answer is whole");
        bytes = &bytes[len..];
        // Only the metrics are text.
        if answer.body.ends_with(b"# EOF\n") {
            assert_eq!(answer.status, 200);
            continue;
        }
        let json: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        let error = json.get("error").and_then(|line| line.as_str());
        assert_eq!(error.is_none(), answer.status == 200, "{json}");
        assert!(error.is_none_or(|line| !line.contains('\n')), "{json}");
    }
}

fuzz_target!(|bytes: &[u8]| {
    check_head(bytes);
    let mut input = Input::new(bytes);
    // The request is sent in one piece, or in two that arrive separately.
    let first = match input.byte() {
        b'0' => Some(input.below(512) as usize),
        _ => None,
    };
    let bytes = first.map_or(bytes, |_| input.rest());
    let (mut client, server) = UnixStream::pair().unwrap();
    let control = Count(AtomicUsize::new(0));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let (here, rest) = bytes.split_at(first.unwrap_or(bytes.len()).min(bytes.len()));
        client.write_all(here).unwrap();
        if first.is_none() {
            client.shutdown(Shutdown::Write).unwrap();
            serve(&server, &control);
        } else {
            let (control, server) = (&control, &server);
            scope.spawn(move || serve(server, control));
            std::thread::yield_now();
            // The server may have closed the connection.
            let _ = client.write_all(rest);
            let _ = client.shutdown(Shutdown::Write);
        }
    });
    drop(server);
    assert!(begun.elapsed() < Duration::from_secs(5), "it takes {:?}", begun.elapsed());
    let mut got = Vec::new();
    if let Err(error) = client.read_to_end(&mut got) {
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    // Not checked for HEAD: the answer has a Content-Length but no body.
    if !bytes.windows(4).any(|window| window == b"HEAD") {
        check_answers(&got);
    }
});
