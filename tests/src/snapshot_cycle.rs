// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The life cycle of a Linux guest: booted or restored, working on its memory and devices,
//! snapshotted at some moment with everything that a restored guest needs, and checked against its
//! earlier reports.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use demand_vmm::api::{Go, State};
use demand_vmm::report::Report;
use guest_work::{Beat, Journal, Line, Prove, Work};

use crate::compare_memory::same_memory;
use crate::linux_vm::{CardOption, DiskOption, Guest, GuestConfig, Kernel};

/// Size of a guest's disk, in bytes.
const DISK: u64 = 24 << 20;
/// Tolerance by which a guest's clock may be ahead of its possible run time, in microseconds.
const SLACK_US: u64 = 500_000;
/// Number of echoes in flight at a time for a guest with a network card.
const ECHOES: u64 = 8;
/// Time limit for a VM to run its guest.
const PATIENCE: Duration = Duration::from_secs(180);

/// Options for booting a guest.
#[derive(Clone, Debug)]
pub struct Birth {
    /// Its kernel.
    pub kernel: Kernel,
    /// Number of vCPUs.
    pub cpus: u32,
    /// `--memory`.
    pub memory: String,
    /// The place of its records; the guest has a disk unless that is none.
    pub journal: Journal,
    /// Whether it has a network card, and sends echo requests.
    pub net: bool,
    /// Whether its kernel reseeds its random numbers when notified that it is a copy (VMGENID).
    pub reseeds: bool,
}

impl Birth {
    fn work(&self) -> Work {
        Work::Prove(Prove {
            memory: 16 << 20,
            journal: self.journal,
            beat_ms: 250,
            echo: if self.net { ECHOES } else { 0 },
            ..Prove::default()
        })
    }

    fn has_disk(&self) -> bool {
        self.journal != Journal::None
    }

    fn disks(&self, disk: &Path) -> Vec<DiskOption> {
        self.has_disk().then(|| DiskOption::new(disk)).into_iter().collect()
    }

    fn cards(&self, card: &CardOption) -> Vec<CardOption> {
        self.net.then(|| card.clone()).into_iter().collect()
    }

    /// Returns whether work of each kind was done between these beats.
    fn gets_on(&self, before: Option<Beat>, now: Beat) -> bool {
        let before = before.map_or((0, 0, 0), |beat| (beat.pages, beat.records, beat.echoes));
        now.pages > before.0
            && (now.records > before.1 || !self.has_disk())
            && (now.echoes > before.2 || !self.net)
    }
}

/// Options for restoring a guest.
#[derive(Clone, Debug, Default)]
pub struct Rebirth {
    /// `--engine`.
    pub engine: &'static str,
    /// `--memory`; empty for the snapshot's.
    pub memory: &'static str,
    /// `--fill`.
    pub fill: &'static str,
    /// Its network card, if any.
    pub card: CardOption,
    /// Text appended to the option of its disk, for example ",lazy=fill".
    pub disk: &'static str,
    /// The URL at which the snapshot's files are served; by default its directory is named.
    pub url: Option<String>,
}

/// A snapshot, and the disk at that moment.
#[derive(Debug)]
pub struct Moment {
    folder: PathBuf,
    birth: Birth,
    /// Upper bound of the guest's clock, in microseconds.
    most_us: u64,
    /// The last beat before the snapshot.
    seen: Option<Beat>,
    /// Number of times that the guest was stopped so far.
    stops: u64,
}

/// A running guest. All its processes are killed when this is dropped.
#[derive(Debug)]
pub struct Life {
    guest: Guest,
    birth: Birth,
    disk: PathBuf,
    /// Start of this part of its life, and the upper bound of its clock then, in microseconds.
    begun: Instant,
    from_us: u64,
    seen: Option<Beat>,
    /// The snapshot from which it was restored.
    source: Option<PathBuf>,
    /// Number of times that it was stopped in its whole life.
    stops: u64,
    /// Whether it was restored while it worked.
    restored: bool,
    /// The moment of its resumption, until its clock is seen to have advanced since.
    again: Option<Again>,
    /// Words of lines that the VMM may write to its standard error.
    expected: Vec<&'static str>,
}

/// The moment at which a guest was resumed, and the lower bound of its clock then, in microseconds.
#[derive(Clone, Copy, Debug)]
struct Again {
    since: Instant,
    from_us: u64,
}

impl Life {
    /// Boots a guest; all its files are in `folder`, which is created. Returns when its first
    /// instructions run.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn boot(folder: &Path, birth: &Birth) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let disk = folder.join("disk");
        std::fs::File::create(&disk)?.set_len(DISK)?;
        if birth.journal == Journal::Ext4 {
            run(Command::new("mkfs.ext4").arg("-q").arg(&disk))?;
        }
        let config = GuestConfig {
            cpus: birth.cpus,
            memory: birth.memory.clone(),
            disks: birth.disks(&disk),
            cards: birth.cards(&CardOption::default()),
            ..GuestConfig::default()
        };
        let begun = Instant::now();
        let guest = Guest::boot(folder, &birth.kernel, &birth.work(), &config)?;
        let birth = birth.clone();
        let life = Life {
            guest,
            birth,
            disk,
            begun,
            from_us: 0,
            seen: None,
            source: None,
            stops: 0,
            restored: false,
            again: None,
            expected: Vec::new(),
        };
        life.wait_running()?;
        Ok(life)
    }

    fn wait_running(&self) -> Result<()> {
        let api = self.guest.api();
        while !api.status().is_ok_and(|status| status.state == State::Running) {
            let late = self.begun.elapsed() > PATIENCE;
            ensure!(!late, "the VM does not run within {PATIENCE:?}; {}", self.guest.story());
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Expects the VMM to write lines with these words: its source fails, for example.
    pub fn expect_lines(&mut self, words: &[&'static str]) {
        self.expected.extend(words);
    }

    /// Returns the guest, for operations outside its life cycle.
    pub fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }

    /// Waits for `count` beats, and checks the last one against the previous state.
    ///
    /// # Errors
    ///
    /// If the guest finds an error, or its clocks or its work are out of bounds.
    pub fn wait_beats(&mut self, count: u32) -> Result<()> {
        let beat = self.guest.wait_beats(count)?;
        let most_us = self.most_us();
        ensure!(
            beat.mono_us <= most_us,
            "the guest's CLOCK_MONOTONIC is {} us, and it can have run for {most_us} us; {}",
            beat.mono_us,
            self.guest.story()
        );
        if let Some(seen) = self.seen {
            let apart = |beat: &Beat| beat.real_us.wrapping_sub(beat.mono_us);
            ensure!(
                beat.number > seen.number
                    && beat.mono_us > seen.mono_us
                    && beat.pages >= seen.pages
                    && beat.records >= seen.records
                    && beat.echoes >= seen.echoes
                    && apart(&beat).abs_diff(apart(&seen)) < 2 * SLACK_US,
                "after {seen:?} the guest says {beat:?}; {}",
                self.guest.story()
            );
        }
        if let Some(again) = self.again {
            let ran_us = again.since.elapsed().as_micros() as u64;
            if beat.mono_us + 2 * SLACK_US > again.from_us + ran_us {
                self.again = None;
            }
        }
        self.seen = Some(beat);
        Ok(())
    }

    /// Waits until more work is done than at the start of this part of its life, for at least two
    /// beats, and until its clock has advanced as far as real time. A clock that was behind would
    /// stand still until it has caught up, and never make up the difference; a single beat may be
    /// late.
    ///
    /// # Errors
    ///
    /// Those of [`wait_beats`](Self::wait_beats), or that it makes no progress.
    pub fn wait_work(&mut self) -> Result<()> {
        const BEATS: u32 = 100;
        let before = self.seen;
        for beat in 1..=BEATS {
            self.wait_beats(1)?;
            let more = self.seen.is_some_and(|now| self.birth.gets_on(before, now));
            if beat > 1 && more && self.again.is_none() {
                return Ok(());
            }
        }
        if let Some(again) = self.again {
            let ran = again.since.elapsed();
            bail!(
                "{ran:?} ago the guest's CLOCK_MONOTONIC was {} us at least, and it has not gone on \
                 as far: {:?}; {}",
                again.from_us,
                self.seen,
                self.guest.story()
            );
        }
        bail!("the guest does not get on within {BEATS} beats; {}", self.guest.story())
    }

    /// Returns the upper bound of the guest's clock now, in microseconds.
    fn most_us(&self) -> u64 {
        self.from_us + self.begun.elapsed().as_micros() as u64 + SLACK_US
    }

    /// Takes a snapshot in `folder`, which is created, checks all of its memory, and copies the
    /// disk while it is not written. The guest is paused afterwards.
    ///
    /// # Errors
    ///
    /// The VMM's, a wrong page, or an error that the guest has found so far.
    pub fn stop_at(&mut self, folder: &Path) -> Result<Moment> {
        std::fs::create_dir_all(folder)?;
        let snapshot = folder.join("snapshot");
        self.guest.snapshot(&snapshot, Some(Go::Pause))?;
        let most_us = self.most_us();
        same_memory(self.guest.id(), &snapshot, self.source.as_deref())?;
        if let Some(beat) = self.guest.last_beat()? {
            self.seen = Some(beat);
        }
        std::fs::copy(&self.disk, folder.join("disk"))?;
        self.stops += 1;
        let (birth, seen, stops) = (self.birth.clone(), self.seen, self.stops);
        Ok(Moment { folder: folder.into(), birth, most_us, seen, stops })
    }

    /// Waits until all pages of its memory are present.
    ///
    /// # Errors
    ///
    /// If they do not arrive, or an error that the guest has found so far.
    pub fn wait_complete(&mut self) -> Result<()> {
        let begun = Instant::now();
        loop {
            let status = self.guest.api().status()?;
            if status.pages_present == status.pages_total {
                return Ok(());
            }
            ensure!(begun.elapsed() < PATIENCE, "{status:?}; {}", self.guest.story());
            self.wait_beats(1)?;
        }
    }

    /// Resumes it.
    ///
    /// # Errors
    ///
    /// The VMM's.
    pub fn resume(&self) -> Result<()> {
        self.guest.api().resume()?;
        Ok(())
    }

    /// Makes the guest verify all its work and end; checks the remaining results against it.
    ///
    /// # Errors
    ///
    /// If any check fails.
    pub fn finish(self) -> Result<Report> {
        let Life { mut guest, birth, disk, seen, stops, restored, expected, .. } = self;
        guest.type_line("stop")?;
        let (pages, records, echoes, lost) = guest.wait_for(|line| match line {
            Line::Done { pages, records, echoes, lost, complaints: 0 } => {
                Some((*pages, *records, *echoes, *lost))
            }
            _ => None,
        })?;
        let report = guest.ended()?;
        // A guest that crashed and restarted may have succeeded since.
        let mut complaints = guest.complaints();
        complaints.retain(|line| !expected.iter().any(|words| line.contains(words)));
        ensure!(complaints.is_empty(), "the VMM had something to say; {}", guest.story());
        let story = || guest.story();
        if let Some(seen) = seen {
            ensure!(
                pages >= seen.pages && records >= seen.records && echoes >= seen.echoes,
                "after {seen:?} {pages} pages, {records} records and {echoes} echoes are done; {}",
                story()
            );
        }
        // A stopped back-end may drop the packets that it has just taken.
        ensure!(
            lost <= ECHOES * stops,
            "of {echoes} echoes {lost} were lost, and the guest was stopped {stops} times; {}",
            story()
        );
        if restored && birth.reseeds {
            let reseeded = guest.console.iter().any(|line| line.ends_with("guest: reseeded"));
            ensure!(reseeded, "the guest's kernel has not noticed that it is a copy; {}", story());
        }
        if birth.journal == Journal::Ext4 {
            run(Command::new("e2fsck").arg("-fn").arg(&disk))?;
        }
        Ok(report)
    }
}

impl Moment {
    /// Returns the snapshot's directory.
    pub fn snapshot(&self) -> PathBuf {
        self.folder.join("snapshot")
    }

    /// Returns the path of the disk at that moment.
    pub fn disk(&self) -> PathBuf {
        self.folder.join("disk")
    }

    /// Restores the guest, with a copy of the disk; all its files are in `folder`, which is
    /// created. Returns when it runs.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn restore(&self, folder: &Path, rebirth: &Rebirth) -> Result<Life> {
        std::fs::create_dir_all(folder)?;
        let disk = folder.join("disk");
        std::fs::copy(self.disk(), &disk)?;
        let more = ["--engine", rebirth.engine, "--fill", rebirth.fill].map(String::from);
        let config = GuestConfig {
            cpus: 0,
            memory: rebirth.memory.into(),
            disks: self
                .birth
                .disks(&disk)
                .into_iter()
                .map(|option| DiskOption { more: rebirth.disk.into(), ..option })
                .collect(),
            cards: self.birth.cards(&rebirth.card),
            more: more.into(),
        };
        let begun = Instant::now();
        let snapshot = self.snapshot();
        let source = rebirth.url.as_ref().map_or(&*snapshot, |url| Path::new(url));
        let guest = Guest::restore(folder, source, &config)?;
        let mut life = Life {
            guest,
            birth: self.birth.clone(),
            disk,
            begun,
            from_us: self.most_us,
            seen: self.seen,
            source: Some(self.snapshot()),
            stops: self.stops,
            restored: self.seen.is_some(),
            again: None,
            expected: Vec::new(),
        };
        life.wait_running()?;
        // Before its first beat its kernel may not have a clock yet.
        life.again = self.seen.map(|beat| Again { since: Instant::now(), from_us: beat.mono_us });
        Ok(life)
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
