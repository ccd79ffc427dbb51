// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `openapi.yaml` describes the server: its paths and methods, its answers, and the bodies that it
//! takes.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use demand_kvm::Engine;
use demand_memory::BackingKind;
use demand_vmm::api::client::Client;
use demand_vmm::api::endpoint::Endpoint;
use demand_vmm::api::events::{EventKind, EventLog, Next, PauseReason};
use demand_vmm::api::http::Response;
use demand_vmm::api::{SnapshotRequest, State};
use demand_vmm::config::vm::{RestoreConfig, VmConfig};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use test_support::openapi::{check, description, schema};

use crate::harness::{Server, answers, rest, server};

fn operations(description: &Value) -> Vec<(String, String, Value)> {
    let paths = description["paths"].as_object().unwrap();
    let all = paths.iter().flat_map(|(path, methods)| {
        let methods = methods.as_object().unwrap().iter();
        methods.map(|(method, it)| (path.clone(), method.to_uppercase(), it.clone()))
    });
    all.collect()
}

#[test]
fn every_operation_is_described_and_exists() {
    let description = description();
    let operations = operations(&description);
    let described: BTreeSet<_> =
        operations.iter().map(|(path, method, _)| (path.as_str(), method.as_str())).collect();
    let served: BTreeSet<_> = Endpoint::ALL
        .iter()
        .flat_map(|it| it.paths().iter().flat_map(|path| it.methods().iter().map(|m| (*path, *m))))
        .collect();
    assert_eq!(described, served);
    let ids: BTreeSet<_> = operations.iter().map(|(.., it)| it["operationId"].as_str()).collect();
    assert_eq!(ids.len(), operations.len(), "an operation's ID is its own");
    for (path, method, operation) in &operations {
        let endpoint = Endpoint::find(method, path).unwrap();
        let body = operation["requestBody"]["required"].as_bool().unwrap_or(false);
        assert_eq!(body, endpoint.needs_body(), "{method} {path}");
    }
}

/// Returns the names that each schema with the property `name` allows for it, except those in
/// `besides`.
fn names_of(name: &str, besides: &[&str]) -> Vec<BTreeSet<String>> {
    let description = description();
    let schemas = description["components"]["schemas"].as_object().unwrap().values();
    let names = schemas.filter_map(|schema| schema["properties"][name]["enum"].as_array());
    let known = |names: &Vec<Value>| {
        let names = names.iter().map(|name| name.as_str().unwrap());
        names.filter(|name| !besides.contains(name)).map(ToString::to_string).collect()
    };
    names.map(known).collect()
}

#[test]
fn every_engine_and_backing_is_described() {
    let engines: BTreeSet<_> = Engine::ALL.map(|engine| engine.name().to_string()).into();
    assert_eq!(names_of("engine", &["auto", "none"]), [engines.clone(), engines]);
    let backings: BTreeSet<_> = BackingKind::ALL.map(|kind| kind.name().to_string()).into();
    assert_eq!(names_of("backing", &["none"]), [backings.clone(), backings]);
}

/// Returns the values of the examples of a request's body.
fn examples(path: &str) -> Vec<Value> {
    let body = &description()["paths"][path]["put"]["requestBody"]["content"]["application/json"];
    let examples = body["examples"].as_object().unwrap();
    examples.values().map(|example| example["value"].clone()).collect()
}

fn take_examples<T: DeserializeOwned + serde::Serialize>(path: &str, name: &str) {
    let examples = examples(path);
    assert!(examples.len() >= 2);
    for example in examples {
        check(name, &example);
        let value: T = serde_json::from_value(example).unwrap();
        // With defaults filled in, and in the form in which the client sends it.
        check(name, &serde_json::to_value(value).unwrap());
    }
}

#[test]
fn examples_are_accepted() {
    take_examples::<VmConfig>(Endpoint::Create.path(), "VmConfig");
    take_examples::<RestoreConfig>(Endpoint::Restore.path(), "RestoreConfig");
    take_examples::<SnapshotRequest>(Endpoint::Snapshot.path(), "SnapshotRequest");
}

/// Fields that the server refuses are refused by the schemas, too.
#[test]
fn schemas_refuse_unknown_and_missing_fields() {
    for (path, name) in [
        (Endpoint::Create.path(), "VmConfig"),
        (Endpoint::Restore.path(), "RestoreConfig"),
        (Endpoint::Snapshot.path(), "SnapshotRequest"),
    ] {
        let schema = schema(name);
        for example in examples(path) {
            let with = |key: &str, value: Value| {
                let mut example = example.clone();
                example[key] = value;
                example
            };
            assert!(!schema.is_valid(&with("color", json!(1))));
            assert!(!schema.is_valid(&with("devices", json!([{"type": "fs", "socket": "/s"}]))));
        }
        assert!(!schema.is_valid(&json!({})));
    }
}

fn ask(server: &Server, method: &str, path: &str, body: &str) -> Response {
    let mut stream = server.connect();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n");
    write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    answers(&rest(&stream)).remove(0)
}

#[test]
fn answers_are_as_described() {
    let server = server();
    let description = description();
    server.record.events.end(0, None);
    for (path, method, operation) in operations(&description) {
        if method == "HEAD" {
            continue;
        }
        let body = examples_of(&operation).first().map_or(String::new(), Value::to_string);
        let mut wrong = vec![("DELETE", "", 405), (method.as_str(), "{\"x\"", 400)];
        wrong.push((&method, &body, 0));
        for (method, body, status) in wrong {
            let answer = ask(&server, method, &path, body);
            let content = &operation["responses"]["200"]["content"];
            if answer.status == 200 && content["application/openmetrics-text"].is_object() {
                assert!(answer.body.starts_with(b"# HELP demand_vmm_"));
                continue;
            }
            let value: Value = serde_json::from_slice(&answer.body).unwrap();
            if status == 405 {
                assert_eq!(answer.status, 405);
                check("Error", &value);
                continue;
            }
            assert!(status == 0 || answer.status == status, "{method} {path}: {value}");
            // A wrong body of an operation that takes none is a wrong request as well.
            let code = answer.status.to_string();
            let mut described = operation["responses"][&code].clone();
            if code == "400" && described.is_null() {
                described = json!({"$ref": "#/components/responses/Invalid"});
            }
            if let Some(name) = described["$ref"].as_str() {
                described = description.pointer(&name[1..]).unwrap().clone();
            }
            let content = described["content"].as_object().unwrap().values().next().unwrap();
            let name = content["schema"]["$ref"].as_str().unwrap().rsplit('/').next().unwrap();
            check(name, &value);
        }
        *server.record.state.lock().unwrap() = State::Running;
    }
}

fn examples_of(operation: &Value) -> Vec<Value> {
    let content = &operation["requestBody"]["content"]["application/json"];
    let examples = content["examples"].as_object().into_iter().flatten();
    examples.map(|(_, example)| example["value"].clone()).collect()
}

/// All kinds of events. A kind that is added does not compile until it is here.
fn all_events() -> Vec<EventKind> {
    let text = || "text".to_string();
    let first = EventKind::Created { memory_bytes: 1, cpus: 1 };
    let next = |kind: &EventKind| match kind {
        EventKind::Created { .. } => Some(EventKind::Booting { kernel: "/k".into() }),
        EventKind::Booting { .. } => Some(EventKind::Restoring { source: "/s".into() }),
        EventKind::Restoring { .. } => Some(EventKind::StartFailed { error: text() }),
        EventKind::StartFailed { .. } => Some(EventKind::Running),
        EventKind::Running => {
            Some(EventKind::Paused { reason: PauseReason::Source, error: Some(text()) })
        }
        EventKind::Paused { .. } => Some(EventKind::Resumed),
        EventKind::Resumed => Some(EventKind::SnapshotBegun { destination: "/d".into() }),
        EventKind::SnapshotBegun { .. } => {
            Some(EventKind::SnapshotWritten { destination: "/d".into(), bytes: 1 })
        }
        EventKind::SnapshotWritten { .. } => {
            Some(EventKind::SnapshotFailed { destination: "/d".into(), error: text() })
        }
        EventKind::SnapshotFailed { .. } => Some(EventKind::SourceFailing { error: text() }),
        EventKind::SourceFailing { .. } => Some(EventKind::SourceBack),
        EventKind::SourceBack => Some(EventKind::BackEndDisconnected { error: text() }),
        EventKind::BackEndDisconnected { .. } => Some(EventKind::GuestPanicked),
        EventKind::GuestPanicked => Some(EventKind::GuestHalted),
        EventKind::GuestHalted => Some(EventKind::GuestReset),
        EventKind::GuestReset => Some(EventKind::PagingComplete),
        EventKind::PagingComplete => Some(EventKind::Dropped { count: 1 }),
        EventKind::Dropped { .. } => Some(EventKind::Ended { status: 1, error: Some(text()) }),
        _ => None,
    };
    std::iter::successors(Some(first), next).collect()
}

#[test]
fn every_event_is_described() {
    let log = Arc::new(EventLog::default());
    let mut reader = log.read().unwrap();
    let all = all_events();
    let described = description()["components"]["schemas"]["Event"]["oneOf"].clone();
    assert_eq!(all.len(), described.as_array().unwrap().len());
    all.into_iter().for_each(|kind| log.add(kind));
    let schema = schema("Event");
    while let Next::Event(event) = reader.next(Duration::ZERO) {
        let mut value = serde_json::to_value(&event).unwrap();
        check("Event", &value);
        value["more"] = json!(1);
        assert!(!schema.is_valid(&value), "{value}");
    }
}

#[test]
fn status_of_an_empty_process_is_as_described() {
    let process = crate::empty::Empty::start();
    let status = Client::new(&process.socket).status().unwrap();
    assert_eq!(status.state, State::Empty);
    check("Status", &serde_json::to_value(status).unwrap());
}
