// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A whole system: images, a back-end process, the VMM, and a third process that compares.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use demand_memory::BackingKind;
use demand_vmm::report::Report;

use crate::backend::{BackEnd, BlkOptions};
use crate::file_system;
use crate::process::{Guarded, program, succeed};

/// The content of the guest's disk.
#[derive(Clone, Debug)]
pub enum Disk {
    /// No disk.
    None,
    /// A pattern of 16 MiB, of which the last 8 may be written.
    Pattern,
    /// A real file system, created by mkfs.ext4 from a folder, followed by writable space.
    FileSystem {
        /// The folder.
        of: PathBuf,
        /// Size of the file system, in bytes.
        size: u64,
        /// Size of the writable space, in bytes.
        room: u64,
    },
}

/// The parameters of one run.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The stage's name in the report.
    pub stage: String,
    /// Size of guest memory, in bytes.
    pub memory: u64,
    /// Size of the part that the test guest uses, in bytes; all of it by default.
    pub window: Option<u64>,
    /// Whether huge pages are reserved for all of it.
    pub reserve: bool,
    /// Whether shared memory may use transparent huge pages.
    pub thp: bool,
    /// The backing of memory.
    pub backing: BackingKind,
    /// The engine, as on the command line.
    pub engine: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// The disk.
    pub disk: Disk,
    /// Number of its queues.
    pub queues: u16,
    /// Number of requests to it.
    pub requests: u32,
    /// The fill option, as on the command line: off, on, rate=...
    pub fill: String,
    /// Further words for `--test-guest`, for example "order=strided,touches=10".
    pub guest: String,
    /// The seed of all random choices.
    pub seed: u64,
    /// The file for the timeline of pages.
    pub timeline: Option<PathBuf>,
    /// The time limit.
    pub limit: Duration,
}

impl Scenario {
    /// Returns the mixed run: guest, back-end and VMM on the same units, in all orders of arrival.
    pub fn mixed(engine: &str, backing: BackingKind, cpus: u32, seed: u64) -> Self {
        Scenario {
            stage: format!("mixed, {cpus} vCPU"),
            memory: 32 << 20,
            window: None,
            reserve: true,
            thp: false,
            backing,
            engine: engine.into(),
            cpus,
            disk: Disk::Pattern,
            queues: 2,
            requests: 48,
            fill: "off".into(),
            guest: String::new(),
            seed,
            timeline: None,
            limit: Duration::from_secs(300),
        }
    }

    /// Runs it in a new folder, and passes `progress` the number of present pages and the total.
    ///
    /// # Errors
    ///
    /// If the run does not succeed, or its report says that it was not verified.
    pub fn run(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Report> {
        let folder = tempfile::Builder::new().prefix("demand-paging-").tempdir()?;
        let system = System::set_up(self, folder.path())?;
        let outcome = system.run_vmm(self, progress)?;
        ensure!(
            outcome.status.success(),
            "test-vmm ended with {}: {}",
            outcome.status,
            outcome.stderr
        );
        let text = fs::read_to_string(&system.report).context("read the report")?;
        let report: Report = serde_json::from_str(&text).context("read the report")?;
        ensure!(report.verified, "the run was not verified: {text}");
        if let Some(back_end) = system.back_end {
            back_end.terminate()?;
        }
        if let Disk::FileSystem { .. } = self.disk {
            file_system::check(&system.disk)?;
        }
        Ok(report)
    }
}

/// The outcome of the VMM's run.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard error, without progress lines.
    pub stderr: String,
}

/// Images and a back-end, ready for the VMM.
#[derive(Debug)]
pub struct System {
    /// The memory image.
    pub image: PathBuf,
    /// The disk before the run.
    pub pristine: PathBuf,
    /// The disk that the back-end serves.
    pub disk: PathBuf,
    /// The file for the report.
    pub report: PathBuf,
    /// The back-end.
    pub back_end: Option<BackEnd>,
    write_area: u64,
}

/// Number of entries in each queue.
const QUEUE_SIZE: u16 = 1024;

impl System {
    /// Creates images for the scenario in `folder` and starts its back-end.
    ///
    /// # Errors
    ///
    /// If there is no space, or a program is missing.
    pub fn set_up(scenario: &Scenario, folder: &Path) -> Result<Self> {
        let mut system = System {
            image: folder.join("memory.img"),
            pristine: folder.join("pristine.img"),
            disk: folder.join("disk.img"),
            report: folder.join("report.json"),
            back_end: None,
            write_area: 0,
        };
        let mut make = Command::new(program("test-vmm")?);
        make.arg("make-image").arg("--memory").arg(&system.image);
        make.arg("--size").arg(scenario.window.unwrap_or(scenario.memory).to_string());
        make.arg("--vm-size").arg(scenario.memory.to_string());
        make.arg("--seed").arg(scenario.seed.to_string());
        match &scenario.disk {
            Disk::None => {}
            Disk::Pattern => {
                make.arg("--disk").arg(&system.pristine).arg("--disk-size").arg("16M");
                system.write_area = 8 << 20;
            }
            Disk::FileSystem { of, size, room } => {
                file_system::make(&system.pristine, of, *size)?;
                let file = OpenOptions::new().write(true).open(&system.pristine)?;
                file.set_len(size + room)?;
                system.write_area = *room;
            }
        }
        succeed(&mut make)?;
        if !matches!(scenario.disk, Disk::None) {
            fs::copy(&system.pristine, &system.disk).context("copy the disk")?;
            let options =
                BlkOptions { queues: scenario.queues, queue_size: QUEUE_SIZE, postcopy: true };
            system.back_end = Some(BackEnd::vhost_device_blk(folder, &system.disk, &options)?);
        }
        Ok(system)
    }

    /// Returns the VMM's command for the scenario on these images.
    ///
    /// # Errors
    ///
    /// If it has not been built.
    pub fn vmm_command(&self, scenario: &Scenario) -> Result<Command> {
        let mut command = Command::new(program("test-vmm")?);
        let reserve = if scenario.reserve { "" } else { ",reserve=off" };
        let thp = if scenario.thp { ",thp=on" } else { "" };
        command
            .arg("run")
            .arg("--stage")
            .arg(&scenario.stage)
            .arg("--memory")
            .arg(format!("size={},backing={}{reserve}{thp}", scenario.memory, scenario.backing))
            .arg("--cpus")
            .arg(scenario.cpus.to_string())
            .arg("--engine")
            .arg(&scenario.engine)
            .arg("--source")
            .arg(&self.image)
            .arg("--fill")
            .arg(&scenario.fill)
            .arg("--report")
            .arg(&self.report)
            .arg("--verify")
            .arg("--progress");
        let mut guest = format!(
            "seed={},requests={},queue-size={QUEUE_SIZE},write-area={}",
            scenario.seed, scenario.requests, self.write_area
        );
        if let Some(window) = scenario.window {
            guest += &format!(",window={window}");
        }
        if let Some(back_end) = &self.back_end {
            command.arg("--vhost-user").arg(format!(
                "blk,socket={},queues={}",
                back_end.socket().display(),
                scenario.queues
            ));
            guest += &format!(",pristine={},disk={}", self.pristine.display(), self.disk.display());
        }
        if !scenario.guest.is_empty() {
            guest += &format!(",{}", scenario.guest);
        }
        command.arg("--test-guest").arg(guest);
        if let Some(timeline) = &scenario.timeline {
            command.arg("--timeline").arg(timeline);
        }
        Ok(command)
    }

    /// Runs the VMM to its end.
    ///
    /// # Errors
    ///
    /// If it cannot be started or does not end in time; not if it fails.
    pub fn run_vmm(
        &self,
        scenario: &Scenario,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Outcome> {
        let mut command = self.vmm_command(scenario)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = Guarded::spawn(&mut command)?;
        let pipe = process.child().stderr.take().context("the VMM's standard error")?;
        // A VMM that hangs is killed by this thread, which also ends its output.
        let (sender, lines) = std::sync::mpsc::channel();
        let reader = thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut stderr = String::new();
        let begun = std::time::Instant::now();
        let status = loop {
            match lines.recv_timeout(Duration::from_millis(100)) {
                Ok(line) => match parse_progress(&line) {
                    Some((present, total)) => progress(present, total),
                    None => stderr += &(line + "\n"),
                },
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                    let left = scenario.limit.saturating_sub(begun.elapsed());
                    break process.wait(left.max(Duration::from_secs(5)));
                }
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
            }
            if begun.elapsed() > scenario.limit {
                let threads = describe_threads(process.id());
                let _ = process.child().kill();
                stderr += &threads;
                break Err(anyhow::anyhow!("test-vmm did not end within {:?}", scenario.limit));
            }
        };
        drop(process);
        let _ = reader.join();
        Ok(Outcome { status: status.with_context(|| format!("it said: {stderr}"))?, stderr })
    }
}

/// Parses `progress: memory: PRESENT of TOTAL pages present (...)`.
fn parse_progress(line: &str) -> Option<(u64, u64)> {
    let mut words = line.strip_prefix("progress: memory: ")?.split(' ');
    Some((words.next()?.parse().ok()?, words.nth(1)?.parse().ok()?))
}

/// Returns the place in the kernel of each thread of a hanging process.
fn describe_threads(id: u32) -> String {
    let read = |path: PathBuf| {
        let mut text = String::new();
        fs::File::open(path).and_then(|mut file| file.read_to_string(&mut text)).ok();
        text.trim().to_string()
    };
    let Ok(tasks) = fs::read_dir(format!("/proc/{id}/task")) else { return String::new() };
    let describe = |task: fs::DirEntry| {
        let (name, place) = (read(task.path().join("comm")), read(task.path().join("wchan")));
        format!("thread {name} is in {place}\n")
    };
    tasks.flatten().map(describe).collect()
}
