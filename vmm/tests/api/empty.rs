// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process that begins without a VM: wrong orders, a VM that does not start, and the end.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use demand_vmm::api::client::{Client, ClientError};
use demand_vmm::api::events::EventKind;
use demand_vmm::api::{SnapshotRequest, State, Status};
use demand_vmm::config::vm::{RestoreConfig, VmConfig};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, from_value, json};

/// Time limit for a process to start or to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// A process without a VM. It is killed when this is dropped.
pub(crate) struct Empty {
    child: Child,
    pub(crate) socket: PathBuf,
    folder: tempfile::TempDir,
}

impl Empty {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api.sock");
        let child = Command::new(env!("CARGO_BIN_EXE_demand-vmm"))
            .arg("--api-socket")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.path().join("stderr")).unwrap())
            .spawn()
            .unwrap();
        let empty = Empty { child, socket, folder };
        let begun = Instant::now();
        while empty.client().status().is_err() {
            assert!(begun.elapsed() < PATIENCE, "{}", empty.said());
            std::thread::sleep(Duration::from_millis(10));
        }
        empty
    }

    fn client(&self) -> Client {
        Client::new(&self.socket)
    }

    fn said(&self) -> String {
        fs::read_to_string(self.folder.path().join("stderr")).unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn wait_end(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "{}", self.said());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Expects an end with status 0 that leaves no socket, and messages only about VMs that did not
    /// start. Returns the number of these.
    fn expect_end(&mut self) -> usize {
        let status = self.wait_end();
        let said = self.said();
        assert_eq!((status.code(), status.signal()), (Some(0), None), "{said}");
        assert!(!self.socket.exists());
        let is_start = |line: &str| line.contains("the VM was not started: cannot ");
        assert!(said.lines().all(is_start), "{said}");
        said.lines().count()
    }
}

impl Drop for Empty {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn boot_config(more: &Value) -> VmConfig {
    let mut config = json!({"memory": {"size": "64M"}, "kernel": "/nowhere/vmlinuz"});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    from_value(config).unwrap()
}

fn restore_config() -> RestoreConfig {
    from_value(json!({"source": "/nowhere/snapshot"})).unwrap()
}

fn refused(outcome: Result<Status, ClientError>, words: &[&str]) {
    let error = outcome.unwrap_err().to_string();
    assert!(words.iter().all(|word| error.contains(word)), "{error}, and not: {words:?}");
    assert!(!error.contains('\n'), "{error}");
    // The client knows keys, and not the options of a command line.
    assert!(error.starts_with("cannot ") && error.contains("; "), "{error}");
    assert!(!error.contains("--"), "{error}");
}

#[test]
fn signals_and_shutdown_end_an_empty_process() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut empty = Empty::start();
        empty.signal(signal);
        assert_eq!(empty.expect_end(), 0);
    }
    let mut empty = Empty::start();
    empty.client().shutdown().unwrap();
    assert_eq!(empty.expect_end(), 0);
    let mut created = Empty::start();
    created.client().create(&boot_config(&json!({}))).unwrap();
    created.signal(Signal::TERM);
    assert_eq!(created.expect_end(), 0);
}

#[test]
fn wrong_orders_are_refused() {
    let mut empty = Empty::start();
    let client = empty.client();
    let snapshot = SnapshotRequest { destination: "/nowhere/new".into(), then: None };
    for outcome in [client.pause(), client.resume()] {
        refused(outcome, &["there is no VM", "create and boot one, or restore one"]);
    }
    let error = client.snapshot(&snapshot, |_| {}).unwrap_err().to_string();
    assert!(error.starts_with("cannot take a snapshot: there is no VM"), "{error}");
    refused(client.boot(), &["cannot boot a VM: there is none; create one"]);

    let status = client.create(&boot_config(&json!({"cpus": 2}))).unwrap();
    assert_eq!((status.state, status.memory_bytes, status.cpus), (State::Created, 64 << 20, 2));
    refused(client.create(&boot_config(&json!({}))), &["was created already", "boot it"]);
    refused(client.restore(&restore_config()), &["another one was created"]);
    refused(client.pause(), &["has not been booted; boot it"]);
    assert_eq!(client.status().unwrap().state, State::Created);
    client.shutdown().unwrap();
    assert_eq!(empty.expect_end(), 0);
}

#[test]
fn impossible_vms_are_refused_at_once() {
    let empty = Empty::start();
    let client = empty.client();
    refused(
        client.create(&boot_config(&json!({"cpus": 17}))),
        &["create a VM: cpus: 17", "1 to 16"],
    );
    refused(client.create(&boot_config(&json!({"cpus": 0}))), &["0 vCPUs", "1 to 16"]);
    let many = vec![json!({"type": "rng", "socket": "/s"}); 17];
    refused(client.create(&boot_config(&json!({"devices": many}))), &["devices: 17 devices", "16"]);
    let relative = boot_config(&json!({"kernel": "vmlinuz"}));
    refused(client.create(&relative), &["'vmlinuz'", "it is not absolute"]);
    let relative = boot_config(&json!({"serial": {"file": "log"}}));
    refused(client.create(&relative), &["'log'", "it is not absolute"]);
    assert_eq!(client.status().unwrap().state, State::Empty);
}

#[test]
fn failed_start_leaves_the_process_empty() {
    let mut empty = Empty::start();
    let client = empty.client();
    let mut events = client.events().unwrap();
    for _ in 0..2 {
        client.create(&boot_config(&json!({"serial": "off"}))).unwrap();
        let error = client.boot().unwrap_err().to_string();
        assert!(error.contains("cannot") && !error.contains('\n'), "{error}");
        assert_eq!(client.status().unwrap().state, State::Empty);
        refused(client.restore(&restore_config()), &["/nowhere/snapshot"]);
        assert_eq!(client.status().unwrap().state, State::Empty);
    }
    empty.signal(Signal::TERM);
    let mut seen = Vec::new();
    while let Some(event) = events.next_event().unwrap() {
        assert_eq!(event.seq, seen.len() as u64 + 1);
        seen.push(event.kind);
    }
    let names: Vec<_> = seen.iter().map(|kind| serde_json::to_value(kind).unwrap()).collect();
    let names: Vec<_> = names.iter().map(|kind| kind["event"].as_str().unwrap()).collect();
    let once = ["created", "booting", "start_failed", "restoring", "start_failed"];
    assert_eq!(names, [&once[..], &once, &["ended"]].concat());
    assert_eq!(seen.last(), Some(&EventKind::Ended { status: 0, error: None }));
    assert_eq!(empty.expect_end(), 4, "each of them is logged");
}

#[test]
fn commands_drive_an_empty_process() {
    let mut empty = Empty::start();
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_demand-vmm"))
            .args(arguments)
            .arg("--api-socket")
            .arg(&empty.socket)
            .current_dir(empty.folder.path())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    assert!(run(&["status"]).1.starts_with("empty: no VM; create or restore one\n"));
    let file = empty.folder.path().join("vm.json");
    let config = |text: &str| fs::write(&file, text).unwrap();
    let create = ["create", "--config", "vm.json"];
    assert_eq!(run(&create).0, Some(1), "there is no file");
    config(r#"{"memory": {"size": "64M"}, "kernel": "vmlinuz", "devices": [{"type": "blk"}]}"#);
    let (code, _, error) = run(&create);
    assert_eq!(code, Some(2));
    assert!(error.contains("devices[0]") && error.contains("socket"), "{error}");
    config(r#"{"memory": {"size": "64M"}, "kernel": "vmlinuz"}"#);
    assert_eq!(run(&create), (Some(0), "created\n".into(), String::new()));
    assert!(run(&["status"]).1.starts_with("created: 64M of shmem, engine none, 1 vCPU\n"));
    let (code, _, error) = run(&["boot"]);
    assert_eq!((code, error.lines().count()), (Some(1), 1), "{error}");
    assert!(run(&["status"]).1.starts_with("empty"));
    let (socket, snapshot) = (empty.socket.to_str().unwrap(), empty.folder.path().join("s"));
    let restore = |more: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_demand-vmm"))
            .args([&["restore", "--into", socket, "--source", "s"], more].concat())
            .current_dir(empty.folder.path())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    // The path that the process reads is this command's, made absolute.
    let (code, error) = restore(&["--fill", "off"]);
    assert_eq!((code, error.lines().count()), (Some(1), 1), "{error}");
    assert!(error.contains(snapshot.to_str().unwrap()), "{error}");
    let (code, error) = restore(&["--report", "r"]);
    assert_eq!(code, Some(2));
    assert!(error.contains("--into") && error.contains("--report"), "{error}");
    assert_eq!(run(&["shutdown"]), (Some(0), "stopped\n".into(), String::new()));
    assert_eq!(empty.expect_end(), 2, "boot and restore are logged");
}

#[test]
fn socket_in_use_is_refused() {
    let empty = Empty::start();
    let output = Command::new(env!("CARGO_BIN_EXE_demand-vmm"))
        .arg("--api-socket")
        .arg(&empty.socket)
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains("another process listens on it"), "{error}");
    assert_eq!(empty.client().status().unwrap().state, State::Empty);
}
