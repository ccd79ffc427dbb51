// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The main job, end to end, to watch: `rust-vmm-ci/demo` builds and runs this.
//!
//! First it shows the capabilities of this host's own KVM. Then, in the lab, a Linux guest is
//! snapshotted under load and restored lazily on huge pages. Its vCPUs fault at 4K through KVM, and
//! its disk's back-end faults at 2M through userfaultfd, on the same memory. At last a Linux guest
//! is restored from an object store over a long link, without and with its working set.

use std::fs;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use demand_memory::BackingKind;
use demand_tests::cannot_run;
use demand_tests::distance_demo::{
    self, DistanceReport, Message, ROUND_TRIP, Row, Server, Traffic,
};
use demand_tests::linux_vm::Kernel;
use demand_tests::process::{Guarded, program, run};
use demand_tests::restore_demo::{self, Stage};
use demand_tests::scenario::{Disk, Scenario};
use demand_vmm::report::{Report, duration};
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
    /// Run only the stage of this host's own KVM, and the third one if that runs Linux.
    #[arg(long, conflicts_with = "lab_only")]
    host_only: bool,
    /// Run only the lab's stage, and the third one in the lab.
    #[arg(long)]
    lab_only: bool,
    /// Run only the third stage, over a link with this time for a round trip, in milliseconds: on
    /// this host if its KVM runs Linux, and else in the lab.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(..=1000))]
    #[arg(conflicts_with_all = ["host_only", "lab_only", "timeline"])]
    distance: Option<u64>,
    /// Run this stage on this machine, for the process that shows it.
    #[arg(long, hide = true)]
    inside: Option<Inside>,
    /// The URL of the third stage's server, without the link.
    #[arg(long, hide = true, value_name = "URL")]
    direct: Option<String>,
}

/// A stage that runs in another process than the one that shows it.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Inside {
    Lab,
    Distance,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let result = match options.inside {
        Some(Inside::Lab) => inside(&options),
        Some(Inside::Distance) => inside_distance(&options),
        None => outside(&options),
    };
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
    let only_distance = options.distance.is_some();
    if !options.lab_only && !only_distance {
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
    }
    if !options.host_only && !only_distance {
        println!("The lab: a real KVM with KVM Userfault, inside an emulated machine\n");
        let report = run_in_lab(options)?;
        println!("{}", report.table());
        check_lab_report(&report)?;
        reports.push(report);
    }
    let distance = distance(options)?;
    if let Some(report) = &distance {
        println!("\n{}", report.table());
    }
    if let Some(path) = &options.json {
        let mut stages = reports.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>()?;
        stages.extend(distance.map(serde_json::to_value).transpose()?);
        fs::write(path, serde_json::to_string_pretty(&stages)? + "\n")
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
    command.arg("--").arg(program("demo")?).args(["--inside", "lab"]).arg("--json").arg(&json);
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

/// Where the third stage's guests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Host,
    Lab,
}

impl Place {
    /// Returns the place where the third stage's guests run; `None`, with the reason printed, if
    /// only the host may run them, and cannot.
    fn choose(options: &Options) -> Result<Option<Self>> {
        if options.lab_only {
            return Ok(Some(Place::Lab));
        }
        let probe = run(
            Command::new(program("demand-vmm")?).args(["probe", "--require", "lazy"]),
            Duration::from_secs(60),
        )?;
        if probe.status.success() {
            return Ok(Some(Place::Host));
        }
        let why = probe.stderr.trim().to_owned();
        if options.host_only {
            println!("SKIPPED: the third stage: {why}\n");
            return Ok(None);
        }
        println!("The third stage's guests run in the lab: {why}");
        Ok(Some(Place::Lab))
    }

    fn name(self) -> &'static str {
        match self {
            Place::Host => "host",
            Place::Lab => distance_demo::LAB,
        }
    }

    /// Returns the host's address at this place. The lab's is the one of its network.
    fn server(self) -> &'static str {
        match self {
            Place::Host => "127.0.0.1",
            Place::Lab => "10.0.2.2",
        }
    }

    /// Returns this program, to be run at the place with Linux guests.
    fn demo(self) -> Result<Command> {
        let mut lab = Command::new(program("lab")?);
        if self == Place::Lab {
            lab.args(["run", "--guests=lab", "--network", "--memory", DISTANCE_MEMORY]);
            lab.args(["--hugepages", "0", "--gigapages", "0", "--"]).arg(program("demo")?);
            return Ok(lab);
        }
        let mut demo = Command::new(program("demo")?);
        if Kernel::of_environment().is_none() {
            let guests = run(lab.arg("guests"), GUESTS_LIMIT)?;
            ensure!(
                guests.status.success(),
                "lab guests ended with {}: {}",
                guests.status,
                guests.stderr
            );
            demo.envs(guests.stdout.lines().filter_map(|line| line.split_once('=')));
        }
        Ok(demo)
    }
}

/// Size of the lab's machine for the third stage.
const DISTANCE_MEMORY: &str = "2G";
/// Time limit for the guests to be prepared, with a kernel that may have to be built.
const GUESTS_LIMIT: Duration = Duration::from_secs(3600);

/// Runs the third stage, unless it cannot be run here.
fn distance(options: &Options) -> Result<Option<DistanceReport>> {
    println!("A snapshot in an object store, over a long link\n");
    let round_trip = options.distance.map_or(ROUND_TRIP, Duration::from_millis);
    let (Some(place), Some(server)) = (Place::choose(options)?, Server::start(round_trip)?) else {
        return Ok(None);
    };
    let server_at = place.server();
    let mut command = place.demo()?;
    command.args(["--inside", "distance", "--direct"]);
    command.arg(format!("http://{server_at}:{}", server.port()));
    command.envs(server.variables(server_at)).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut process = Guarded::spawn(&mut command)?;
    let pipe = process.child().stdout.take().context("the stage's standard output")?;
    let (mut rows, mut before, mut traffic) = (Vec::new(), Traffic::default(), Traffic::default());
    for line in BufReader::new(pipe).lines() {
        let line = line?;
        match serde_json::from_str(&line) {
            Ok(Message::Step(text)) => println!("  {text}"),
            Ok(Message::Begins) => before = server.traffic(),
            Ok(Message::Done) => traffic = server.traffic().since(before),
            Ok(Message::Verified(row)) => {
                println!("  {}: beats after {}", row.name, duration(row.first_beat_us));
                rows.push(Row { traffic, ..row });
            }
            Err(_) => println!("  {line}"),
        }
    }
    let status = process.wait(Duration::from_secs(60))?;
    ensure!(status.success(), "the third stage ended with {status}");
    Ok(Some(DistanceReport::new(place.name(), round_trip, rows)))
}

/// Runs the third stage's guests on this machine.
fn inside_distance(options: &Options) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("demand-paging-").tempdir()?;
    distance_demo::run(distance_demo::Stage {
        kernel: Kernel::of_environment().context("there is no guest: it needs cargo lab guests")?,
        folder: folder.path(),
        direct: options.direct.as_deref().context("--inside distance needs --direct")?,
        tell: &mut |message| {
            println!("{}", serde_json::to_string(message).expect("it has no maps"));
            let _ = std::io::stdout().flush();
        },
    })
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
