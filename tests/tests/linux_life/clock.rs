// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Clocks and watchdogs of a busy Linux guest after periods in which it did not run.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use demand_tests::linux_vm::{Guest, Kernel};
use demand_vmm::api::Go;
use guest_work::{Journal, Prove, Work};
use rustix::process::{Pid, Signal, kill_process};

use crate::config;

/// The guest's kernel reports a lockup after twice this time, in seconds.
const WATCHDOG: &str = "watchdog_thresh=1";
/// The time for which the guest is stopped.
const HELD_UP: Duration = Duration::from_millis(3000);
/// Number of beats in which the guest's kernel would detect a lockup, if it mistook the time for
/// one.
const BEATS: u32 = 3;

const PAGE: usize = 4096;
/// Start of the memory that no boot needs.
const SPARED: usize = 16 << 20;

/// Returns the task of a guest whose CPUs never rest.
fn busy() -> Work {
    Work::Prove(Prove {
        memory: 48 << 20,
        rest_us: 0,
        journal: Journal::None,
        beat_ms: 250,
        // Both of its clocks may jump, together.
        jump_ms: 1_000_000_000,
        ..Prove::default()
    })
}

/// Checks that it continues without a complaint.
fn goes_on(guest: &mut Guest, after: &str) -> Result<()> {
    guest.wait_beats(BEATS).map(drop).context(after.to_owned())
}

/// Alters pages of a snapshot's memory, or restores them.
fn flip(memory: &Path) -> Result<()> {
    let content = fs::read(memory)?;
    let file = File::options().write(true).open(memory)?;
    for (number, page) in content.chunks_exact(PAGE).enumerate().skip(SPARED / PAGE) {
        if page.iter().any(|byte| *byte != 0) {
            file.write_all_at(&[page[7] ^ 0x55], (number * PAGE + 7) as u64)?;
        }
    }
    Ok(())
}

/// Restores a guest, and makes it wait for pages. With `uffd` a waiting vCPU takes interrupts, so
/// the test could not observe anything.
fn waits_for_pages(snapshot: &Path, folder: &Path) -> Result<()> {
    let more = ["--engine", "kvm-userfault", "--fill", "off"];
    let mut guest = Guest::restore(folder, snapshot, &config(0, "backing=shmem", &more))?;
    // The effects of the restore have passed, and some of its working memory is still missing.
    guest.wait_beats(3)?;
    let memory = snapshot.join("memory");
    flip(&memory)?;
    let begun = Instant::now();
    while guest.api().status()?.last_error.is_none() {
        ensure!(begun.elapsed() < Duration::from_secs(60), "it needs no page; {}", guest.story());
        thread::sleep(Duration::from_millis(20));
    }
    thread::sleep(HELD_UP);
    flip(&memory)?;
    goes_on(&mut guest, "a wait for pages")?;
    guest.finish()?;
    Ok(())
}

/// Moves the lab's wall clock by some seconds until it is dropped.
struct Moved(i64);

impl Moved {
    fn by(seconds: i64) -> Result<Self> {
        set_clock(now_us() / 1_000_000 + seconds)?;
        Ok(Moved(seconds))
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        let _ = set_clock(now_us() / 1_000_000 - self.0);
    }
}

fn set_clock(seconds: i64) -> Result<()> {
    let set = Command::new("date").arg("-s").arg(format!("@{seconds}")).output()?;
    ensure!(set.status.success(), "{set:?}");
    Ok(())
}

fn now_us() -> i64 {
    UNIX_EPOCH.elapsed().map_or(0, |since| since.as_micros() as i64)
}

/// Restores a guest on hosts whose clocks are a day ahead of the snapshot, and a day behind.
fn wall_clocks(snapshot: &Path, folder: &Path) -> Result<()> {
    const DAY: i64 = 86_400;
    for (number, (days, clock, late)) in
        [(1, "keep", DAY), (1, "host", 0), (-1, "host", -DAY)].into_iter().enumerate()
    {
        let _moved = Moved::by(days * DAY)?;
        let config = config(0, "", &["--clock", clock, "--fill", "off"]);
        let mut guest = Guest::restore(&folder.join(number.to_string()), snapshot, &config)?;
        let beat = guest.wait_beats(BEATS)?;
        let is_late = (now_us() - beat.real_us.cast_signed()) / 1_000_000;
        let story = || format!("{days} days, --clock {clock}: {is_late} s; {}", guest.story());
        // The delay caused by earlier tests is kept, too.
        let kept = if late == 0 { 0..=5 } else { late - 5..=late + 600 };
        ensure!(kept.contains(&is_late), "{}", story());
        ensure!(guest.said().contains("s behind") == (days < 0), "{}", story());
        guest.api().shutdown()?;
        guest.ended()?;
    }
    Ok(())
}

#[test]
fn time_out_of_the_guest_is_no_lockup() {
    let Some(kernel) = Kernel::lab() else { return };
    held_up(&kernel).unwrap_or_else(|error| panic!("{error:#}"));
}

fn held_up(kernel: &Kernel) -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let at = |name: &str| temporary.path().join(name);
    let config = config(2, "size=112M", &[]);
    let mut guest = Guest::boot_with(&at("first"), kernel, &busy(), WATCHDOG, &config)?;
    guest.wait_beats(2)?;
    guest.api().pause()?;
    thread::sleep(HELD_UP);
    guest.api().resume()?;
    goes_on(&mut guest, "a pause")?;

    let process = Pid::from_raw(guest.id() as i32).context("a process")?;
    kill_process(process, Signal::STOP)?;
    thread::sleep(HELD_UP);
    kill_process(process, Signal::CONT)?;
    goes_on(&mut guest, "SIGSTOP and SIGCONT")?;

    let snapshot = at("snapshot");
    guest.snapshot(&snapshot, Some(Go::Pause))?;
    thread::sleep(HELD_UP);
    guest.api().resume()?;
    goes_on(&mut guest, "a snapshot")?;
    guest.finish()?;
    waits_for_pages(&snapshot, &at("restored"))?;
    wall_clocks(&snapshot, &at("wall"))
}
