// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest's life by the API alone, in processes that begin without a VM: what the API answers and
//! which events it streams, each as its description says.

use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use demand_tests::linux_vm::{Guest, Kernel};
use demand_vmm::api::client::ClientError;
use demand_vmm::api::events::{EventKind, VmEvent};
use demand_vmm::api::{Go, State, Status};
use demand_vmm::config::vm::{RestoreConfig, VmConfig};
use serde::Serialize;
use serde_json::{from_value, json, to_value};
use test_support::openapi::check;

/// Collects the events of a VM until it has ended.
fn follow(guest: &Guest) -> Result<JoinHandle<Result<Vec<VmEvent>, ClientError>>> {
    let mut stream = guest.api().events()?;
    Ok(thread::spawn(move || {
        let mut events = Vec::new();
        while let Some(event) = stream.next_event()? {
            events.push(event);
        }
        Ok(events)
    }))
}

/// Checks that the events are numbered and as described, and returns their names.
fn names(events: &[VmEvent]) -> Vec<String> {
    let name = |(number, event): (u64, &VmEvent)| {
        let value = to_value(event).unwrap();
        check("Event", &value);
        assert_eq!(event.seq, number, "{value}");
        value["event"].as_str().unwrap().to_owned()
    };
    (1..).zip(events).map(name).collect()
}

fn described(name: &str, value: &impl Serialize) {
    check(name, &to_value(value).unwrap());
}

fn is(state: State, status: &Status) -> Result<()> {
    described("Status", status);
    ensure!(status.state == state, "{status:?}");
    Ok(())
}

fn refused(outcome: Result<Status, ClientError>, words: &str) -> Result<()> {
    let error = outcome.map_or_else(|error| error.to_string(), |status| format!("{status:?}"));
    ensure!(error.contains(words), "{error}, and not: {words}");
    Ok(())
}

fn first_life(kernel: &Kernel, folder: &Path, snapshot: &Path) -> Result<()> {
    let mut guest = Guest::none_yet(folder)?;
    let (api, events) = (guest.api(), follow(&guest)?);
    is(State::Empty, &api.status()?)?;
    let config: VmConfig = from_value(json!({
        "memory": {"size": "96M"}, "cpus": 2,
        "kernel": kernel.image, "initramfs": kernel.initramfs,
        "cmdline": "console=ttyS0 panic=0 quiet work=idle", "on_panic": "pause",
    }))?;
    is(State::Created, &api.create(&config)?)?;
    is(State::Running, &api.boot()?)?;
    guest.wait_ready()?;
    refused(api.boot(), "runs one already")?;
    refused(api.create(&config), "runs one already")?;
    is(State::Paused, &api.pause()?)?;
    described("SnapshotSummary", &guest.snapshot(snapshot, Some(Go::Resume))?);
    is(State::Running, &api.status()?)?;
    described("Status", &api.shutdown()?);
    let status = guest.wait_end()?;
    ensure!(status.success(), "{status}; {}", guest.story());
    let events = events.join().unwrap()?;
    let expected = [
        "created",
        "booting",
        "running",
        "paused",
        "snapshot_begun",
        "snapshot_written",
        "resumed",
        "ended",
    ];
    ensure!(names(&events) == expected, "{events:?}");
    Ok(())
}

fn second_life(folder: &Path, snapshot: &Path) -> Result<()> {
    let mut guest = Guest::none_yet(folder)?;
    let (api, events) = (guest.api(), follow(&guest)?);
    let mut config: RestoreConfig = from_value(json!({"source": "/nowhere"}))?;
    refused(api.restore(&config), "/nowhere")?;
    is(State::Empty, &api.status()?)?;
    config = from_value(json!({"source": snapshot, "on_panic": "pause"}))?;
    is(State::Running, &api.restore(&config)?)?;
    refused(api.restore(&config), "runs one already")?;
    let begun = Instant::now();
    while api.status()?.pages_present < api.status()?.pages_total {
        ensure!(begun.elapsed() < Duration::from_secs(60), "{}", guest.story());
        thread::sleep(Duration::from_millis(100));
    }
    let (status, metrics) = (api.status()?, api.metrics()?);
    let present = format!("\ndemand_vmm_present_pages {}\n", status.pages_total);
    ensure!(metrics.contains(&present), "{metrics}");
    ensure!(metrics.contains("fault_seconds_bucket{le=\"60.0\",path=\"guest\"}"), "{metrics}");
    // Demand paging is removed a moment later.
    let mut so_far = api.events()?;
    while so_far.next_event()?.is_some_and(|event| event.kind != EventKind::PagingComplete) {}
    drop(so_far);
    guest.type_line("panic")?;
    while api.status()?.state != State::Paused {
        ensure!(begun.elapsed() < Duration::from_secs(120), "{}", guest.story());
        thread::sleep(Duration::from_millis(100));
    }
    is(State::Paused, &api.status()?)?;
    // A client that comes late gets the same events.
    let late = follow(&guest)?;
    api.shutdown()?;
    let status = guest.wait_end()?;
    ensure!(status.success(), "{status}; {}", guest.story());
    let events = events.join().unwrap()?;
    ensure!(events == late.join().unwrap()?);
    let expected = [
        "restoring",
        "start_failed",
        "restoring",
        "running",
        "paging_complete",
        "guest_panicked",
        "paused",
        "ended",
    ];
    ensure!(names(&events) == expected, "{events:?}");
    ensure!(to_value(&events[6])?["reason"] == "panic", "{events:?}");
    Ok(())
}

#[test]
fn a_guest_lives_by_the_api_alone() {
    let Some(kernel) = Kernel::lab() else { return };
    let folder = tempfile::tempdir().unwrap();
    let snapshot = folder.path().join("snapshot");
    let lives = first_life(&kernel, &folder.path().join("first"), &snapshot)
        .and_then(|()| second_life(&folder.path().join("second"), &snapshot));
    lives.unwrap_or_else(|error| panic!("{error:#}"));
}
