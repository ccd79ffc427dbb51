// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The main job, which the demo shows: a Linux guest with a disk is snapshotted under load, all its
//! processes are killed, and it is restored lazily and continues.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use demand_vmm::api::{Go, Status};
use demand_vmm::report::{Report, duration, size};
use guest_work::{Beat, Journal, Line, Prove, Work};

use crate::file_system;
use crate::linux_vm::{DiskOption, Guest, GuestConfig, Kernel};

/// Size of the guest's memory, in bytes.
const MEMORY: u64 = 1 << 30;
/// Size of the part that the guest fills with patterns, verifies and rewrites, in bytes.
const WORKED_ON: u64 = 256 << 20;
/// Size of the file that it reads repeatedly from the disk, in bytes.
const FILE: u64 = 256 << 20;
/// Size of its disk, in bytes.
const DISK: u64 = 320 << 20;
/// Rate limit of background fill, in bytes per second: so low that the guest and the disk reach
/// most pages first, even on a slow machine.
const FILL: &str = "rate=16M";

/// The environment of a run: its inputs and its listeners.
#[allow(missing_debug_implementations, reason = "it borrows closures")]
pub struct Stage<'a> {
    /// The guest's kernel.
    pub kernel: Kernel,
    /// A folder for this run only, with room for the disk, twice, and the snapshot: about 1 GiB.
    pub folder: &'a Path,
    /// The initial content of the disk's file system.
    pub files: PathBuf,
    /// The file for the timeline of pages.
    pub timeline: Option<PathBuf>,
    /// Receives a line for each step.
    pub tell: &'a mut dyn FnMut(&str),
    /// Receives the number of present pages and the total.
    pub progress: &'a mut dyn FnMut(u64, u64),
}

/// Reports each step with the time since the start.
struct Story<'a> {
    begun: Instant,
    tell: &'a mut dyn FnMut(&str),
}

impl Story<'_> {
    fn step(&mut self, text: impl AsRef<str>) {
        (self.tell)(&format!("{:6.1} s  {}", self.begun.elapsed().as_secs_f64(), text.as_ref()));
    }
}

fn done_so_far(beat: &Beat) -> String {
    format!("{} pages verified and written, {} records synced", beat.pages, beat.records)
}

/// Runs the job, from the creation of the disk to its last check. Returns the restored guest's
/// report; its `verified` states that the guest has verified its memory, its journal and its file,
/// and that its file system is intact.
///
/// # Errors
///
/// If any check fails.
pub fn run(stage: Stage<'_>) -> Result<Report> {
    let Stage { kernel, folder, files, timeline, tell, progress } = stage;
    let mut story = Story { begun: Instant::now(), tell };
    let at = |name: &str| folder.join(name);

    story.step(format!(
        "making an ext4 file system of {}, with vhost-device-blk before it",
        size(DISK)
    ));
    file_system::make(&at("disk"), &files, DISK)?;
    let mut config = GuestConfig {
        cpus: 2,
        memory: format!("size={MEMORY},backing=hugetlb-2m"),
        disks: vec![DiskOption::new(at("disk"))],
        ..GuestConfig::default()
    };
    let work = Work::Prove(Prove {
        memory: WORKED_ON,
        journal: Journal::Ext4,
        file: FILE,
        rest_us: 0,
        beat_ms: 500,
        ..Prove::default()
    });
    story.step(format!(
        "booting Linux in {} of hugetlb-2m, with {} vCPUs",
        size(MEMORY),
        config.cpus
    ));
    let mut guest = Guest::boot(&at("first"), &kernel, &work, &config)?;
    let kernel_release = guest.wait_for(|line| match line {
        Line::Ready { kernel, .. } => Some(kernel.clone()),
        _ => None,
    })?;
    story.step(format!(
        "Linux {kernel_release} is up; its program works: {} of memory, a journal, a file of {}",
        size(WORKED_ON),
        size(FILE)
    ));
    let before = guest.wait_beats(6)?;
    story.step(format!("{}; a snapshot is taken meanwhile", done_so_far(&before)));
    let taken = guest.snapshot(&at("snapshot"), Some(Go::Pause))?;
    story.step(format!(
        "the snapshot is complete after {}: {} of content, the rest holes",
        duration(taken.took_us),
        size(taken.data_pages * 4096)
    ));
    guest.kill();
    // The snapshot and its disk belong together; the restored guest writes to a copy.
    fs::copy(at("disk"), at("disk-restored")).context("copy the disk")?;
    story.step("VMM and back-end are killed (SIGKILL); the disk is copied");

    config.memory.clear();
    config.disks = vec![DiskOption::new(at("disk-restored"))];
    config.more =
        ["--stage", "lab", "--engine", "kvm-userfault", "--fill", FILL].map(String::from).to_vec();
    if let Some(path) = timeline {
        config.more.extend(["--timeline".into(), path.display().to_string()]);
    }
    story.step("restoring it: new processes, and no page of its memory");
    let mut guest = Guest::restore(&at("second"), &at("snapshot"), &config)?;
    let first = guest.wait_beats(1)?;
    ensure!(
        first.number > before.number && first.mono_us > before.mono_us,
        "the restored guest did not resume where it stopped: {first:?} after {before:?}"
    );
    let status = guest.api().status()?;
    story.step(format!("its first beat, the {}th, with {}", first.number, present(&status)));
    let last = until_complete(&mut guest, progress)?;
    story.step(format!("all pages are present, demand paging is gone; {}", done_so_far(&last)));
    // Also check that the guest works without demand paging.
    guest.wait_beats(2)?;
    story.step("stopping the guest, which first verifies all of its memory, journal and file");
    let (pages, records, mut report) = guest.finish()?;
    ensure!(
        pages > before.pages && records > before.records,
        "the restored guest has done nothing: {pages} pages and {records} records in all"
    );
    story.step(format!("the guest verified {pages} pages and {records} records: no error"));
    file_system::check(&at("disk-restored"))?;
    story.step("e2fsck, too, finds nothing wrong on the disk");
    report.verified = true;
    Ok(report)
}

fn present(status: &Status) -> String {
    format!(
        "{} of {} pages present ({:.1} %)",
        status.pages_present,
        status.pages_total,
        status.pages_present as f64 * 100.0 / status.pages_total.max(1) as f64
    )
}

/// Waits for the last page; returns the beat after it.
fn until_complete(guest: &mut Guest, progress: &mut dyn FnMut(u64, u64)) -> Result<Beat> {
    loop {
        let beat = guest.wait_beats(1)?;
        let status = guest.api().status()?;
        progress(status.pages_present, status.pages_total);
        if status.pages_present == status.pages_total {
            return Ok(beat);
        }
    }
}
