// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine as Linux sees it: each way to reset it, timers for kernels without kvm-clock, and no
//! complaint of a stock kernel.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use demand_tests::linux_vm::{DiskOption, Guest, GuestConfig, Kernel};
use demand_vmm::api::Go;
use guest_work::{Beat, Journal, Line, Prove, Work};

fn config(cpus: u32, memory: &str, more: &[&str]) -> GuestConfig {
    let more = more.iter().map(ToString::to_string).collect();
    GuestConfig { cpus, memory: memory.into(), more, ..GuestConfig::default() }
}

/// Held while a test's guests run: a guest whose timer is a PIT gets each tick that it has missed,
/// and one that is too slow for them does nothing else.
static ALONE: Mutex<()> = Mutex::new(());

fn test(kernel: Option<Kernel>, f: impl FnOnce(&Kernel) -> Result<()>) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(kernel) = kernel {
        f(&kernel).unwrap_or_else(|error| panic!("{error:#}"));
    }
}

/// Types each command, after which the guest must reboot.
fn begins_anew_by(guest: &mut Guest, commands: &[&str]) -> Result<()> {
    for command in commands {
        guest.type_line(command)?;
        let cpus = guest.wait_ready()?;
        ensure!(cpus == 2, "after {command} the guest has {cpus} CPUs");
    }
    Ok(())
}

/// Boots a guest, which resets itself by the commands in `first`; snapshots it, and restores it
/// lazily, after which it resets itself by those in `then`.
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

/// As for the last one: with SVM, KVM returns a vCPU after a triple fault to the reset vector,
/// where no code is.
#[test]
fn each_way_to_reset_begins_anew() {
    test(Kernel::lab(), |kernel| {
        let (first, then) =
            (["reset-acpi", "reset-kbd"], ["reset-bios", "reset-pci", "reset-triple"]);
        resets(kernel, "", &first, &then).map(drop)
    });
}

/// The message that a kernel prints on every virtual machine with AMD CPUs: its frequency driver
/// needs information that only real firmware has.
const SAID_OF_ALL: [&str; 1] = ["amd_pstate: the _CPC object is not present"];

/// Returns the messages of a stock kernel on the console from the level "warning" on; none may
/// concern this machine.
fn complaints(console: &[String]) -> Vec<&String> {
    let of_the_kernel = |line: &&String| line.trim_start().starts_with('[') && line.contains("] ");
    let of_this_machine = |line: &&String| !SAID_OF_ALL.iter().any(|said| line.contains(said));
    console.iter().filter(of_the_kernel).filter(of_this_machine).collect()
}

/// Without a reboot option on the command line: by request, and on panic.
#[test]
fn debians_kernel_reboots_and_does_not_complain() {
    test(Kernel::debian(), |kernel| {
        let console = resets(kernel, "loglevel=5", &["reset"], &["panic"])?;
        let complaints = complaints(&console);
        ensure!(complaints.is_empty(), "{complaints:#?}");
        Ok(())
    });
}

/// Returns the task of a guest that verifies its clocks, its memory and its disk.
fn proves() -> Work {
    Work::Prove(Prove { memory: 8 << 20, journal: Journal::Raw, beat_ms: 250, ..Prove::default() })
}

/// Waits for beats and checks that the guest's clock runs as fast as the host's. Returns the last
/// beat.
fn keeps_time(guest: &mut Guest) -> Result<Beat> {
    let first = guest.wait_beats(1)?;
    let begun = Instant::now();
    let last = guest.wait_beats(6)?;
    let passed = begun.elapsed();
    let its = Duration::from_micros(last.mono_us - first.mono_us);
    // A beat may be received late, both the first and the last.
    let most = Duration::from_millis(700);
    ensure!(its.abs_diff(passed) < most, "{its:?} passed in the guest, and here {passed:?}");
    Ok(last)
}

/// Boots a guest with `words` on its command line, and restores it lazily. `clock` is its expected
/// clock source.
fn clock_goes_on(kernel: &Kernel, words: &str, cpus: u64, clock: &str) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    std::fs::File::create(at("disk"))?.set_len(24 << 20)?;
    let mut config = config(2, "size=192M", &[]);
    config.disks = vec![DiskOption::new(at("disk"))];
    // The time of day, which a kernel without kvm-clock cannot determine.
    let words = format!("{words} epoch=1800000000");
    let mut guest = Guest::boot_with(&at("first"), kernel, &proves(), &words, &config)?;
    let (found, source) = guest.wait_for(|line| match line {
        Line::Ready { cpus, clock, .. } => Some((*cpus, clock.clone())),
        _ => None,
    })?;
    ensure!(found == cpus, "{found} CPUs; {}", guest.story());
    // "tsc-early" comes before "tsc".
    ensure!(source.starts_with(clock), "the time is {source}'s; {}", guest.story());
    let before = keeps_time(&mut guest)?;
    guest.snapshot(&at("snapshot"), Some(Go::Shutdown))?;
    guest.ended()?;
    (config.memory, config.more) = (String::new(), vec!["--fill".into(), "off".into()]);
    let mut guest = Guest::restore(&at("second"), &at("snapshot"), &config)?;
    let after = keeps_time(&mut guest)?;
    ensure!(after.mono_us > before.mono_us, "{before:?}, {after:?}");
    guest.finish()?;
    Ok(())
}

/// Returns the option that gives the kernel the TSC's frequency. A machine with an emulated CPU is
/// too slow for calibration: a kernel reads a timer and the TSC together within some microseconds.
/// The lab's own kernel gets the option, too.
fn frequency_parameter() -> Result<String> {
    let line = std::fs::read_to_string("/proc/cmdline")?;
    let word = line.split_whitespace().find(|word| word.starts_with("tsc_early_khz="));
    Ok(word.context("the lab's kernel is not told the TSC's frequency")?.to_owned())
}

/// Disables the timer that treats the TSC's frequency as known; see [`frequency_parameter`].
const BY_APIC: &str = "lapic=notscdeadline";

#[test]
fn kernel_without_kvm_clock_keeps_time_by_acpi() {
    let words = format!("no-kvmclock clocksource=acpi_pm {BY_APIC}");
    test(Kernel::lab(), |kernel| clock_goes_on(kernel, &words, 2, "acpi_pm"));
}

#[test]
fn kernel_without_paravirtualization_keeps_time_by_tsc() {
    test(Kernel::lab(), |kernel| {
        let words = format!("nopv clocksource=tsc tsc=reliable {}", frequency_parameter()?);
        clock_goes_on(kernel, &words, 2, "tsc")
    });
}

/// Its interrupts come through the PICs, including those of the disk.
#[test]
fn kernel_without_io_apic_boots() {
    let words = format!("nosmp no-kvmclock clocksource=acpi_pm {BY_APIC}");
    test(Kernel::lab(), |kernel| clock_goes_on(kernel, &words, 1, "acpi_pm"));
}
