// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that panics or halts, and the reports about it.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use demand_tests::linux_vm::{Guest, Kernel};
use demand_vmm::api::{Go, GuestCondition, State, Status};
use guest_work::Work;

use crate::config;

/// On a panic, the kernel neither restarts the machine nor ends it.
const STAYS: &str = "panic=0";

fn wait(guest: &Guest, what: &str, wanted: impl Fn(&Status) -> bool) -> Result<()> {
    let begun = Instant::now();
    loop {
        let status = guest.api().status();
        if status.as_ref().is_ok_and(&wanted) {
            return Ok(());
        }
        let late = begun.elapsed() > Duration::from_secs(60);
        ensure!(!late, "{what}: {status:?}; {}", guest.story());
        thread::sleep(Duration::from_millis(50));
    }
}

fn is(state: State, condition: Option<GuestCondition>) -> impl Fn(&Status) -> bool {
    move |status| status.state == state && status.guest == condition
}

fn restored(folder: &Path, name: &str, more: &[&str]) -> Result<Guest> {
    let guest = Guest::restore(&folder.join(name), &folder.join("snapshot"), &config(0, "", more))?;
    wait(&guest, "it begins", is(State::Running, None))?;
    Ok(guest)
}

fn ends(kernel: &Kernel) -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let folder = temporary.path();
    let booted = config(2, "size=96M", &["--on-panic", "pause"]);
    let mut guest = Guest::boot_with(&folder.join("first"), kernel, &Work::Idle, STAYS, &booted)?;
    guest.wait_ready()?;
    guest.snapshot(&folder.join("snapshot"), Some(Go::Resume))?;
    guest.type_line("panic")?;
    wait(&guest, "paused", is(State::Paused, Some(GuestCondition::Panicked)))?;
    guest.api().resume()?;
    wait(&guest, "resumed", is(State::Running, Some(GuestCondition::Panicked)))?;
    guest.api().shutdown()?;
    guest.ended()?;
    ensure!(guest.said().contains("kernel has panicked"), "{}", guest.story());

    let mut guest = restored(folder, "shutdown", &["--on-panic", "shutdown"])?;
    guest.type_line("panic")?;
    let status = guest.wait_end()?;
    ensure!(status.code() == Some(1), "{status}; {}", guest.story());
    ensure!(guest.said().contains("kernel has panicked"), "{}", guest.story());

    let mut guest = restored(folder, "reset", &["--on-panic", "reset"])?;
    guest.type_line("panic")?;
    guest.wait_ready()?;
    wait(&guest, "begins anew", is(State::Running, None))?;

    // The same guest, after being left idle for a while.
    thread::sleep(Duration::from_secs(3));
    let status = guest.api().status()?;
    ensure!(status.guest.is_none(), "it only waits: {status:?}; {}", guest.story());
    guest.type_line("halt")?;
    wait(&guest, "halted", is(State::Running, Some(GuestCondition::Halted)))?;
    guest.api().shutdown()?;
    guest.ended()?;
    // Only now, because a log line may follow the change that it reports.
    let said = guest.said();
    ensure!(said.matches("all vCPUs of the guest are halted").count() == 1, "{said}");
    Ok(())
}

#[test]
fn panic_and_halt_are_reported() {
    let Some(kernel) = Kernel::lab() else { return };
    ends(&kernel).unwrap_or_else(|error| panic!("{error:#}"));
}
