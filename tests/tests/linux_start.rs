// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The cost of starting a Linux guest: it does not grow with memory, and an idle guest touches
//! little.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use demand_memory::PAGE_SIZE;
use demand_tests::linux_vm::{Guest, GuestConfig, Kernel};
use demand_vmm::api::{Go, State};
use demand_vmm::report::{Report, size};
use guest_work::Work;

/// The sizes of memory to compare. The kernel uses the same amount of both.
const SIZES: [&str; 2] = ["256M", "64G"];
/// Limits the memory that the guest's kernel uses: the rest is never touched.
const USED: &str = "mem=256M";

/// Number of runs of each size whose medians are compared, and number of further runs whose minima
/// are compared if other load has distorted the medians.
const RUNS: usize = 7;
const MORE_RUNS: usize = 15;

/// Limit of a VMM's resident memory when its guest starts, in bytes, excluding touched guest
/// memory.
const RESIDENT: u64 = 64 << 20;

fn config(cpus: u32, memory: &str, more: &[&str]) -> GuestConfig {
    let more = more.iter().map(ToString::to_string).collect();
    GuestConfig { cpus, memory: memory.into(), more, ..GuestConfig::default() }
}

/// Takes a snapshot of a guest that has booted.
fn snapshot(kernel: &Kernel, folder: &Path, cpus: u32, size: &str) -> Result<PathBuf> {
    let config = config(cpus, &format!("size={size},reserve=off"), &[]);
    let at = folder.join(format!("{size}-{cpus}"));
    let mut guest = Guest::boot_with(&folder.join("boot"), kernel, &Work::Idle, USED, &config)?;
    guest.wait_ready()?;
    let summary = guest.snapshot(&at, Some(Go::Shutdown))?;
    println!("{size}, {cpus} vCPUs: {summary:?}");
    guest.ended()?;
    Ok(at)
}

/// Measurements of a guest's start.
struct Start {
    /// Microseconds from the process's start to the guest's first instruction.
    first_us: u64,
    /// Resident memory of the VMM at that time, in bytes.
    resident: u64,
    /// Bytes of the guest's memory present at that time.
    touched: u64,
}

/// Returns a number in /proc/PID/FILE, in bytes.
fn of_proc(id: u32, file: &str, name: &str) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{id}/{file}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).context("no such line")?;
    let kib = line.trim_matches([':', ' ', '\t']).trim_end_matches(" kB");
    Ok(kib.trim().parse::<u64>().with_context(|| format!("{name}: {line}"))? << 10)
}

/// Waits until the guest runs, and pauses it at once.
fn hold(guest: &Guest) -> Result<()> {
    let due = Instant::now() + Duration::from_secs(60);
    while !guest.api().status().is_ok_and(|status| status.state == State::Running) {
        ensure!(Instant::now() < due, "it does not begin; {}", guest.story());
        std::thread::sleep(Duration::from_millis(5));
    }
    guest.api().pause()?;
    Ok(())
}

/// Ends a paused guest, and returns the measurements of its start.
fn end(mut guest: Guest) -> Result<Start> {
    // Read first: the pages counted afterwards are then an upper bound.
    let touched = guest.api().status()?.pages_present * PAGE_SIZE;
    let resident = of_proc(guest.id(), "smaps_rollup", "Rss")?;
    guest.api().shutdown()?;
    let report = guest.ended()?;
    Ok(Start { first_us: report.time_to_first_instruction_us, resident, touched })
}

fn restored(folder: &Path, snapshot: &Path, more: &[&str]) -> Result<Start> {
    let config = config(0, "", &[&["--fill", "off"], more].concat());
    let guest = Guest::restore(&folder.join("restored"), snapshot, &config)?;
    hold(&guest)?;
    end(guest)
}

fn booted(folder: &Path, kernel: &Kernel, memory: &str) -> Result<Start> {
    let config = config(1, &format!("size={memory},reserve=off"), &[]);
    let folder = folder.join("booted");
    let guest = Guest::boot_with(&folder, kernel, &Work::Idle, USED, &config)?;
    hold(&guest)?;
    end(guest)
}

fn median(mut numbers: Vec<u64>) -> u64 {
    numbers.sort_unstable();
    numbers[numbers.len() / 2]
}

fn minimum(numbers: Vec<u64>) -> u64 {
    numbers.into_iter().min().unwrap_or(0)
}

/// Starts a guest again that was paused before its first instruction, as happens under load.
fn start_that_ran(start: &dyn Fn() -> Result<Start>) -> Result<Start> {
    for _ in 0..10 {
        let start = start()?;
        if start.first_us > 0 {
            return Ok(start);
        }
    }
    anyhow::bail!("ten guests in a row were paused before their first instruction")
}

/// Starts guests of both sizes alternately and compares them.
fn alike(what: &str, start: impl Fn(usize) -> Result<Start>) -> Result<()> {
    let mut starts = [Vec::new(), Vec::new()];
    for (runs, of, name) in
        [(RUNS, median as fn(_) -> _, "medians"), (MORE_RUNS, minimum, "minima")]
    {
        for _ in 0..runs {
            for (size, starts) in starts.iter_mut().enumerate() {
                starts.push(start_that_ran(&|| start(size))?);
            }
        }
        let [small, large] =
            starts.each_ref().map(|starts| of(starts.iter().map(|start| start.first_us).collect()));
        let resident = starts
            .each_ref()
            .map(|starts| starts.iter().map(|start| start.resident).max().unwrap_or(0));
        println!(
            "{what}: first instruction after {small} us with {}, {large} us with {} ({name} of \
             {}); resident at most {} and {}",
            SIZES[0],
            SIZES[1],
            starts[0].len(),
            size(resident[0]),
            size(resident[1])
        );
        for start in starts.iter().flatten() {
            ensure!(
                start.resident < RESIDENT + start.touched,
                "{what}: {} are resident, and {} were touched",
                size(start.resident),
                size(start.touched)
            );
        }
        if large * 10 <= small * 12 {
            return Ok(());
        }
    }
    anyhow::bail!("{what}: the start depends on the size of memory")
}

#[test]
fn more_memory_does_not_delay_restored_guest() {
    let Some(kernel) = Kernel::lab() else { return };
    let folder = tempfile::tempdir().unwrap();
    for (cpus, cases) in [
        (1, &[("kvm-userfault", "shmem"), ("uffd", "shmem")][..]),
        (4, &[("kvm-userfault", "hugetlb-2m"), ("kvm-userfault", "shmem")]),
    ] {
        let snapshots = SIZES.map(|size| snapshot(&kernel, folder.path(), cpus, size).unwrap());
        for (engine, backing) in cases {
            let memory = format!("backing={backing}");
            let more = ["--engine", engine, "--memory", &memory];
            let what = format!("restore, {cpus} vCPUs, {engine}, {backing}");
            alike(&what, |size| restored(folder.path(), &snapshots[size], &more)).unwrap();
        }
    }
}

#[test]
fn more_memory_does_not_delay_booted_guest() {
    let Some(kernel) = Kernel::lab() else { return };
    let folder = tempfile::tempdir().unwrap();
    alike("run", |size| booted(folder.path(), &kernel, SIZES[size])).unwrap();
}

/// Measures how much of 1 GiB an idle guest touches in the seconds after its restore.
fn idle_touches_little(kernel: &Kernel, cpus: u32) -> Result<()> {
    const WATCHED: Duration = Duration::from_secs(10);
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let booted = config(cpus, "size=1G", &[]);
    let mut guest = Guest::boot(&at("first"), kernel, &Work::Idle, &booted)?;
    guest.wait_ready()?;
    guest.snapshot(&at("snapshot"), Some(Go::Shutdown))?;
    guest.ended()?;
    let restored = config(cpus, "", &["--fill", "off"]);
    let mut guest = Guest::restore(&at("second"), &at("snapshot"), &restored)?;
    hold(&guest)?;
    guest.api().resume()?;
    std::thread::sleep(WATCHED);
    let status = guest.api().status()?;
    guest.api().shutdown()?;
    let report: Report = guest.ended()?;
    println!("idle: {} of {} pages\n{}", status.pages_present, status.pages_total, report.table());
    ensure!(status.pages_total == 1 << 18);
    ensure!(status.pages_present * 20 < status.pages_total, "{status:?}");
    Ok(())
}

#[test]
fn an_idle_guest_of_labs_kernel_touches_little() {
    let Some(kernel) = Kernel::lab() else { return };
    idle_touches_little(&kernel, 2).unwrap();
}

#[test]
fn an_idle_guest_of_debians_kernel_touches_little() {
    let Some(kernel) = Kernel::debian() else { return };
    idle_touches_little(&kernel, 2).unwrap();
}
