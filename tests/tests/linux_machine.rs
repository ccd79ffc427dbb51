// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine as Linux finds it: each way to reset it, timers for kernels without kvm-clock, and
//! nothing that a stock kernel complains of.

use anyhow::{Result, ensure};
use demand_tests::guest::{Guest, GuestConfig, Kernel};
use demand_vmm::api::Go;
use guest_work::Work;

fn config(cpus: u32, memory: &str, more: &[&str]) -> GuestConfig {
    let more = more.iter().map(ToString::to_string).collect();
    GuestConfig { cpus, memory: memory.into(), more, ..GuestConfig::default() }
}

fn test(kernel: Option<Kernel>, f: impl FnOnce(&Kernel) -> Result<()>) {
    if let Some(kernel) = kernel {
        f(&kernel).unwrap_or_else(|error| panic!("{error:#}"));
    }
}

/// Types each command, after which the guest must begin anew.
fn begins_anew_by(guest: &mut Guest, commands: &[&str]) -> Result<()> {
    for command in commands {
        guest.type_line(command)?;
        let cpus = guest.wait_ready()?;
        ensure!(cpus == 2, "after {command} the guest has {cpus} CPUs");
    }
    Ok(())
}

/// Boots a guest, which resets itself by `first`; snapshots it, and restores it lazily, where it
/// does so by `then`.
fn resets(kernel: &Kernel, words: &str, first: &[&str], then: &[&str]) -> Result<Vec<String>> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let booted = config(2, "size=256M", &[]);
    let mut guest = Guest::boot_with(&at("first"), kernel, &Work::Idle, words, &booted)?;
    guest.wait_ready()?;
    let console = guest.console.clone();
    begins_anew_by(&mut guest, first)?;
    guest.snapshot(&at("snapshot"), Some(Go::Shutdown))?;
    guest.ended()?;
    let restored = config(0, "", &["--fill", "off"]);
    let mut guest = Guest::restore(&at("second"), &at("snapshot"), &restored)?;
    begins_anew_by(&mut guest, then)?;
    guest.finish()?;
    Ok(console)
}

#[test]
fn each_way_to_reset_begins_anew() {
    test(Kernel::lab(), |kernel| {
        let (first, then) =
            (["reset-acpi", "reset-bios"], ["reset-pci", "reset-kbd", "reset-bios"]);
        resets(kernel, "", &first, &then).map(drop)
    });
}

/// Messages that a stock kernel prints on the console from the level "warning" on, of which none
/// may be about the machine.
fn complaints(console: &[String]) -> Vec<&String> {
    console
        .iter()
        .filter(|line| line.contains("] ") && line.trim_start().starts_with('['))
        .collect()
}

/// Without a word on the command line about reboots: by itself, and as it panics.
#[test]
fn debians_kernel_reboots_and_does_not_complain() {
    test(Kernel::debian(), |kernel| {
        let console = resets(kernel, "loglevel=5", &["reset"], &["panic"])?;
        let complaints = complaints(&console);
        ensure!(complaints.is_empty(), "{complaints:#?}");
        Ok(())
    });
}
