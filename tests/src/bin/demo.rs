// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The main job, end to end, to watch: `rust-vmm-ci/demo` builds and runs this.
//!
//! First it shows the capabilities of this host's own KVM. Then, in the lab, a Linux guest is
//! snapshotted under load and restored lazily on huge pages. Its vCPUs fault at 4K through KVM, and
//! its disk's back-end faults at 2M through userfaultfd, on the same memory.

use std::fs;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use demand_memory::BackingKind;
use demand_tests::cannot_run;
use demand_tests::linux_vm::Kernel;
use demand_tests::process::{Guarded, program};
use demand_tests::restore_demo::{self, Stage};
use demand_tests::scenario::{Disk, Scenario};
use demand_vmm::report::Report;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Restores memory lazily under a running guest and a running disk, and checks the result.
#[derive(Debug, Parser)]
#[command(name = "rust-vmm-ci/demo")]
struct Options {
    /// Write the stages' reports (a JSON array) to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw pages over time, coloured by path (SVG), to this file.
    #[arg(long, value_name = "FILE")]
    timeline: Option<PathBuf>,
    /// Run only the stage of this host's own KVM.
    #[arg(long, conflicts_with = "lab_only")]
    host_only: bool,
    /// Run only the lab's stage.
    #[arg(long)]
    lab_only: bool,
    /// Run the lab's stage on this machine, which is the lab.
    #[arg(long, hide = true)]
    inside: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let result = if options.inside { inside(&options) } else { outside(&options) };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the folder whose files the guest's disk holds: this project's own crates.
fn files() -> Result<PathBuf> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates");
    top.canonicalize().context("find the crates whose files go onto the disk")
}

fn host_stage() -> Result<Scenario> {
    Ok(Scenario {
        stage: "host".into(),
        memory: 128 << 20,
        window: None,
        reserve: true,
        thp: false,
        backing: BackingKind::Shmem,
        engine: "auto".into(),
        cpus: 2,
        disk: Disk::FileSystem { of: files()?, size: 16 << 20, room: 16 << 20 },
        queues: 2,
        requests: 64,
        fill: "off".into(),
        guest: "touches=32".into(),
        seed: 1,
        timeline: None,
        limit: Duration::from_secs(120),
    })
}

/// Resources of the lab's machine for its stage: the guest's memory in huge pages, and room for a
/// disk, twice, the snapshot and everything else.
const LAB_MEMORY: &str = "4G";
const LAB_HUGEPAGES: &str = "520";

fn outside(options: &Options) -> Result<()> {
    let mut reports = Vec::new();
    let mut stages = Vec::new();
    if !options.lab_only {
        println!("This host:\n");
        run_visibly(Command::new(program("demand-vmm")?).arg("probe"))?;
        println!();
        if let Some(why) = cannot_run() {
            println!("SKIPPED: the host's stage: {why}\n");
        } else {
            let mut scenario = host_stage()?;
            scenario.timeline = options.timeline.as_ref().filter(|_| options.host_only).cloned();
            let bar = Bar::new("host");
            let report = scenario.run(&mut |present, total| bar.set(present, total))?;
            bar.finish();
            println!("{}", report.table());
            reports.push(report);
        }
        stages.push("host");
    }
    if !options.host_only {
        println!("The lab: a real KVM with KVM Userfault, inside an emulated machine\n");
        let report = run_in_lab(options)?;
        println!("{}", report.table());
        check_lab_report(&report)?;
        reports.push(report);
        stages.push("lab");
    }
    if let Some(path) = &options.json {
        fs::write(path, serde_json::to_string_pretty(&reports)? + "\n")
            .with_context(|| format!("write {}", path.display()))?;
    }
    if let Some(path) = &options.timeline {
        println!("pages over time: {}", path.display());
    }
    Ok(())
}

/// Checks the facts that the lab's stage demonstrates.
fn check_lab_report(report: &Report) -> Result<()> {
    ensure!(report.engine == "kvm-userfault", "the engine was {}", report.engine);
    ensure!(report.backing == "hugetlb-2m", "the backing was {}", report.backing);
    let (guest, back_end) = (&report.guest, &report.back_end);
    ensure!(guest.granularity_bytes == 4096, "a guest fault mapped {}", guest.granularity_bytes);
    ensure!(
        back_end.granularity_bytes == 2 << 20,
        "a back-end fault mapped {}",
        back_end.granularity_bytes
    );
    // On a busy machine background fill, which has a rate, is ahead of most accesses.
    ensure!(guest.faults >= 1_000, "there were only {} guest faults", guest.faults);
    ensure!(back_end.faults >= 20, "there were only {} back-end faults", back_end.faults);
    ensure!(report.time_to_complete_us > 0, "demand paging did not come to its end");
    ensure!(report.verified, "nobody has verified the result");
    Ok(())
}

/// Boots the lab and runs this program in it, with its files in a folder that both can write.
fn run_in_lab(options: &Options) -> Result<Report> {
    let out = tempfile::Builder::new()
        .prefix("demo-")
        .tempdir_in(std::env::current_dir()?.join("target"))
        .context("make a folder for the lab's output")?;
    let (json, svg) = (out.path().join("report.json"), out.path().join("timeline.svg"));
    let mut command = Command::new(program("lab")?);
    command.env("LAB_OUT", out.path());
    command.args(["run", "--guests=lab", "--memory", LAB_MEMORY]);
    command.args(["--hugepages", LAB_HUGEPAGES, "--gigapages", "0"]);
    command.arg("--").arg(program("demo")?).arg("--inside").arg("--json").arg(&json);
    if options.timeline.is_some() {
        command.arg("--timeline").arg(&svg);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut lab = Guarded::spawn(&mut command)?;
    let bar = Bar::new("lab");
    let pipe = lab.child().stdout.take().context("the lab's standard output")?;
    for line in BufReader::new(pipe).lines() {
        let line = line?;
        let mut words = line.split(' ');
        match (words.next(), words.next(), words.next()) {
            (Some("progress"), Some(present), Some(total)) => {
                bar.set(present.parse()?, total.parse()?);
            }
            _ => bar.say(&line),
        }
    }
    let status = lab.wait(Duration::from_secs(60))?;
    bar.finish();
    ensure!(status.success(), "the lab's stage ended with {status}");
    if let Some(path) = &options.timeline {
        fs::copy(&svg, path).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(serde_json::from_str(&fs::read_to_string(&json).context("read the lab's report")?)?)
}

/// Runs the lab's stage, in the lab.
fn inside(options: &Options) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("demand-paging-").tempdir()?;
    let mut said = 0;
    let report = restore_demo::run(Stage {
        kernel: Kernel::lab().context("the lab has no guest: it needs --guests")?,
        folder: folder.path(),
        files: files()?,
        timeline: options.timeline.clone(),
        tell: &mut |line| println!("{line}"),
        progress: &mut |present, total| {
            // The line crosses an emulated console: print no more lines than a bar can show.
            if present == total || present >= said + total / 200 {
                said = present;
                println!("progress {present} {total}");
                let _ = std::io::stdout().flush();
            }
        },
    })?;
    let path = options.json.as_ref().context("--inside needs --json")?;
    fs::write(path, serde_json::to_string(&report)?).context("write the report")
}

fn run_visibly(command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).status()?;
    ensure!(status.success(), "{} ended with {status}", command.get_program().to_string_lossy());
    Ok(())
}

/// A progress bar on a terminal; elsewhere, a line for each quarter.
struct Bar {
    name: &'static str,
    bar: ProgressBar,
    is_terminal: bool,
    quarter: std::cell::Cell<u64>,
}

impl Bar {
    fn new(name: &'static str) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let target =
            if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target);
        let template = "  {prefix:5} [{bar:40}] {pos}/{len} pages present, {elapsed}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(name);
        Bar { name, bar, is_terminal, quarter: std::cell::Cell::new(0) }
    }

    fn set(&self, present: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(present);
        let quarter = present * 4 / total.max(1);
        if !self.is_terminal && quarter > self.quarter.replace(quarter) {
            println!("  {}: {present} of {total} pages present", self.name);
        }
    }

    fn say(&self, line: &str) {
        if self.is_terminal {
            self.bar.println(format!("  {line}"));
        } else {
            println!("  {line}");
        }
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
        // Output that follows must come after the bar's last line.
        thread::sleep(Duration::from_millis(10));
    }
}
