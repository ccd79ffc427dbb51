// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Restores from several places of one snapshot.

use std::fs::{self, File};
use std::net::TcpListener;
use std::process::Stdio;
use std::time::Duration;

use demand_tests::process::Guarded;
use demand_tests::refusal::{FAILED, USAGE, refused};
use demand_tests::tiny_snapshot::TinySnapshot;
use demand_vmm::api::{Go, SnapshotRequest, SourceState};

/// Takes a snapshot and pushes it to the store beside it. Returns it, and the pushed one's URL.
fn pushed() -> Option<(TinySnapshot, String)> {
    let snapshot = TinySnapshot::take(&[]).unwrap()?;
    let url = snapshot.push().unwrap();
    Some((snapshot, url))
}

/// Starts a restore without fill, lets `then` happen, reads all memory, and checks it. Returns the
/// log.
fn restored(snapshot: &TinySnapshot, sources: &[&str], then: impl FnOnce()) -> String {
    let [first, others @ ..] = sources else { panic!("no source") };
    let mut restore = snapshot.restore_from(first, &[]).unwrap();
    restore.args(others.iter().flat_map(|other| ["--source", other]));
    let (log, copy) = (snapshot.at("log"), snapshot.at("copy"));
    restore.args(["--fill", "off", "--serial", "off"]).stdout(Stdio::null());
    let mut vmm = Guarded::spawn(restore.stderr(File::create(&log).unwrap())).unwrap();
    snapshot.wait_running();
    then();
    let request = SnapshotRequest { destination: copy.clone(), then: Some(Go::Shutdown) };
    snapshot.api().snapshot(&request, |_| {}).unwrap();
    assert!(vmm.wait(Duration::from_secs(60)).unwrap().success());
    snapshot.expect_memory_of(&copy).unwrap();
    fs::remove_dir_all(copy).unwrap();
    fs::read_to_string(log).unwrap()
}

#[test]
fn what_one_source_loses_comes_from_another() {
    let Some((snapshot, url)) = pushed() else { return };
    let directory = snapshot.dir().display().to_string();
    let none = restored(&snapshot, &[&url, &directory], || {});
    assert!(!none.contains("page source"), "{none}");
    let packs = snapshot.at("store/packs");
    let log = restored(&snapshot, &[&url, &directory], || fs::remove_dir_all(&packs).unwrap());
    assert!(log.contains(&format!("page source {url} fails, and others are asked")), "{log}");
}

#[test]
fn absent_source_is_left_out() {
    let Some((snapshot, url)) = pushed() else { return };
    let directory = snapshot.dir().display().to_string();
    let (absent, socket) = (format!("{url}-absent"), snapshot.at("absent.sock"));
    let log = restored(&snapshot, &[&absent, &directory, &url], || {});
    assert!(log.contains(&absent) && log.contains("this source is left out"), "{log}");
    let pager = format!("pager:{}", socket.display());
    let log = restored(&snapshot, &[&url, &pager, &directory], || {});
    assert!(log.contains("absent.sock") && log.contains("this source is left out"), "{log}");
    let mut restore = snapshot.restore_from(&absent, &[]).unwrap();
    refused(restore.args(["--source", &pager, "--log-level", "off"]), FAILED, &["absent.sock"]);
}

/// Its server accepts connections, and never answers.
#[test]
fn silent_source_delays_no_restore() {
    let Some((snapshot, url)) = pushed() else { return };
    let silent = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let silent_url = format!("nbd://{}/vm7", silent.local_addr().unwrap());
    let mut states = Vec::new();
    restored(&snapshot, &[&silent_url, &url], || {
        states = snapshot.api().status().unwrap().sources;
    });
    let states: Vec<_> = states.iter().map(|it| (&*it.source, it.state)).collect();
    let expected = [(&*silent_url, SourceState::Opening), (&*url, SourceState::Healthy)];
    assert_eq!(states, expected);
    drop(silent);
}

#[test]
fn places_of_different_snapshots_are_refused() {
    let Some((_pushed, url)) = pushed() else { return };
    let Some(other) = TinySnapshot::take(&[]).unwrap() else { return };
    let mut restore = other.restore(&[]).unwrap();
    refused(restore.args(["--source", &url]), USAGE, &["another snapshot", &url, "places of one"]);
}
