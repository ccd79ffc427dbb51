// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Command-line parsing and dispatch of the `demand-vmm` binary.

pub(crate) mod advice;
pub mod probe;

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use demand_kvm::{Engine, EngineChoice};

use test_guest::windows::Windows;

use crate::api::client::{self, Client, Progress};
use crate::api::{Go, SnapshotRequest, Status};
use crate::arch::layout::MAX_CPUS;
use crate::bench::{Access, BenchOptions, SourceOption, bench};
use crate::config::{
    ClockOption, FillOption, MemoryOption, OnPanic, RestoreMemory, TestGuestOption, VhostUserOption,
};
use crate::devices::serial::SerialOption;
use crate::error::Error;
use crate::report::Report;
use crate::snapshot::boot_files::BootOption;
use crate::test_guest::{RunOptions, run};
use crate::vm::linux::{self, LinuxOptions};
use crate::vm::restore::{RestoreOptions, restore};
use crate::vm::session::GuestOptions;

/// Runs virtual machines whose memory pages are fetched when they are first used.
///
/// Exit status: 0 success, 1 failure, 2 wrong command line, 3 this host cannot do what was asked.
#[derive(Debug, Parser)]
#[command(name = "demand-vmm", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Reports the capabilities of this host, and the reasons.
    Probe(ProbeArgs),
    /// Runs a Linux guest from its kernel (--kernel), or the built-in test guest on memory that is
    /// filled from an image (--source).
    Run(Box<RunArgs>),
    /// Restores a Linux guest from a snapshot; the guest runs while its pages are fetched.
    Restore(Box<RestoreArgs>),
    /// Writes the memory image, and optionally a disk, for a test guest of the same seed.
    MakeImage(MakeImageArgs),
    /// Measures the cost of a guest's access to a missing page.
    Bench(BenchArgs),
    /// Reports the configuration and state of a running VM.
    Status(StatusArgs),
    /// Pauses a running VM.
    Pause(ApiArgs),
    /// Resumes a paused VM.
    Resume(ApiArgs),
    /// Writes a snapshot of a running or paused VM, and waits until it is complete.
    Snapshot(SnapshotArgs),
    /// Ends a VM in order.
    Shutdown(ApiArgs),
}

#[derive(Debug, Args)]
struct ProbeArgs {
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Options that every guest takes.
#[derive(Debug, Args)]
struct GuestArgs {
    /// KIND,socket=PATH[,queues=N][,queue-size=N][,lazy=auto|postcopy|fill|refuse][,id=NAME]; KIND
    /// is blk, net, rng, console or vsock; once for each device.
    #[arg(long, value_name = "DEVICE")]
    vhost_user: Vec<VhostUserOption>,
    /// Where a Linux guest's serial port leads: tty, file=PATH or off. A file grows without bound
    /// by the guest's output, up to the disk quota. On a terminal, Ctrl-A followed by x ends the
    /// VM.
    #[arg(long, default_value = "tty")]
    serial: SerialOption,
    /// Serve the API on a Unix socket, for pause, resume, snapshot, status and shutdown.
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    /// Action when a Linux guest's kernel panics. The kernel must have the pvpanic driver.
    #[arg(long, default_value = "ignore")]
    on_panic: OnPanic,
    /// Name of the run in its report.
    #[arg(long, default_value = "run")]
    stage: String,
    /// Write the report (JSON) to this file.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Draw a timeline of the pages (SVG) to this file.
    #[arg(long, value_name = "FILE")]
    timeline: Option<PathBuf>,
    /// Print the report as JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Report the number of present pages on standard error from time to time.
    #[arg(long)]
    progress: bool,
}

impl GuestArgs {
    fn options(self) -> GuestOptions {
        GuestOptions {
            stage: self.stage,
            vhost_user: self.vhost_user,
            serial: self.serial,
            on_panic: self.on_panic,
            api_socket: self.api_socket,
            timeline: self.timeline,
            report: self.report,
            progress: self.progress,
        }
    }

    /// Returns the destination of a Linux guest's report. The table is left out where it would
    /// appear between the lines of the guest's console.
    fn output(&self) -> Output {
        let table = self.serial != SerialOption::Terminal;
        Output { report: self.report.clone(), json: self.json, table }
    }
}

#[derive(Debug, Args)]
struct RunArgs {
    /// size=1G[,backing=shmem|hugetlb-2m|hugetlb-1g][,reserve=on|off][,thp=on|off]
    #[arg(long)]
    memory: MemoryOption,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    cpus: u32,
    /// The Linux kernel: a bzImage, or an ELF vmlinux with a PVH entry.
    #[arg(long, value_name = "FILE", required_unless_present = "source")]
    kernel: Option<PathBuf>,
    /// Initramfs of the Linux kernel.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initramfs: Option<PathBuf>,
    /// Command line of the Linux kernel.
    #[arg(long, default_value = "console=ttyS0", requires = "kernel")]
    cmdline: String,
    #[command(flatten)]
    guest: GuestArgs,
    /// How vCPU accesses to missing pages are trapped. (A guest that boots has no missing pages.)
    #[arg(long, default_value = "auto", long_help = Engine::HELP)]
    engine: EngineChoice,
    /// The raw image from which the test guest's memory is filled.
    #[arg(long, conflicts_with = "kernel")]
    source: Option<PathBuf>,
    /// End with an error after the source has failed, or has not answered, for this many seconds
    /// [default: never].
    #[arg(long, value_name = "SECONDS", requires = "source", conflicts_with = "kernel")]
    source_limit: Option<u64>,
    /// Background fill: on, off or rate=BYTES/s.
    #[arg(long, default_value = "off")]
    fill: FillOption,
    /// Parameters of the test guest:
    /// seed=N,window=SIZE,order=sequential|random|strided,touches=N,requests=N,
    /// write-area=SIZE,pristine=PATH,disk=PATH and more.
    #[arg(long, default_value = "")]
    test_guest: TestGuestOption,
    /// Compare memory and disk with their expected content, in a separate process.
    #[arg(long, requires = "source", conflicts_with = "kernel")]
    verify: bool,
}

#[derive(Debug, Args)]
struct RestoreArgs {
    /// Directory of the snapshot.
    #[arg(long, value_name = "DIR")]
    source: PathBuf,
    /// [backing=shmem|hugetlb-2m|hugetlb-1g][,reserve=on|off][,thp=on|off]
    /// [default: the snapshot's]
    #[arg(long, default_value = "", hide_default_value = true)]
    memory: RestoreMemory,
    /// Number of vCPUs that the snapshot must have.
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    #[command(flatten)]
    guest: GuestArgs,
    /// How vCPU accesses to missing pages are trapped.
    #[arg(long, default_value = "auto", long_help = Engine::HELP)]
    engine: EngineChoice,
    /// Pause the VM after the source has failed, or has not answered, for this many seconds
    /// [default: never].
    #[arg(long, value_name = "SECONDS")]
    source_limit: Option<u64>,
    /// Background fill: on, off or rate=BYTES/s.
    #[arg(long, default_value = "on")]
    fill: FillOption,
    /// Where the guest's clocks continue: keep, at their old values, or host, as if the guest had
    /// been paused.
    #[arg(long, default_value = "keep")]
    clock: ClockOption,
    /// Read and check the whole memory image before the guest runs.
    #[arg(long)]
    verify: bool,
}

#[derive(Debug, Args)]
struct MakeImageArgs {
    /// Path of the memory image.
    #[arg(long)]
    memory: Option<PathBuf>,
    /// Bytes of memory that the test guest uses.
    #[arg(long, value_parser = crate::config::parse_size, default_value = "64M")]
    size: u64,
    /// Size of memory, with holes in the image where the test guest uses none [default: --size].
    #[arg(long, value_parser = crate::config::parse_size)]
    vm_size: Option<u64>,
    /// Path of the disk image.
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Size of the disk image.
    #[arg(long, value_parser = crate::config::parse_size, default_value = "16M")]
    disk_size: u64,
    /// Seed of the content.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Debug, Args)]
struct BenchArgs {
    /// Memory of each vCPU: size=64M[,backing=shmem|hugetlb-2m|hugetlb-1g][,reserve=on|off]
    #[arg(long)]
    memory: MemoryOption,
    /// Number of vCPUs, each with separate memory.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    cpus: u32,
    /// How vCPU accesses to missing pages are trapped.
    #[arg(long, default_value = "auto", long_help = Engine::HELP)]
    engine: EngineChoice,
    /// Where pages come from: hot, a small buffer in memory, or a raw image.
    #[arg(long, default_value = "hot", value_name = "hot|FILE")]
    source: SourceOption,
    /// Order in which a vCPU touches its pages: sequential, random or strided.
    #[arg(long, default_value = "sequential", value_parser = crate::config::parse_order)]
    order: test_guest::plan::Order,
    /// How a vCPU accesses its pages: read or write.
    #[arg(long, default_value = "read")]
    access: Access,
    /// Number of pages that each vCPU touches [default: all].
    #[arg(long, value_name = "N")]
    pages: Option<u64>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct ApiArgs {
    /// The socket given to the VM as --api-socket.
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
}

#[derive(Debug, Args)]
struct StatusArgs {
    #[command(flatten)]
    api: ApiArgs,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct SnapshotArgs {
    #[command(flatten)]
    api: ApiArgs,
    /// State of the VM afterwards [default: its state before].
    #[arg(long)]
    then: Option<Go>,
    /// Print JSON instead of a line.
    #[arg(long)]
    json: bool,
    /// The directory that becomes the snapshot. It must not exist, or must be empty.
    #[arg(value_name = "DIR")]
    destination: PathBuf,
}

/// Runs the command that the process's arguments name. `started` is when the process started.
///
/// # Errors
///
/// Returns a one-line error with its exit status.
pub fn main(started: Instant) -> Result<(), Error> {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // clap reports the help and the version as errors that go to standard output.
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => return Err(usage(&error)),
    };
    match cli.command {
        Command::Probe(args) => say(&crate::cli::probe::probe(args.json)?),
        Command::Run(args) => run_command(*args, started),
        Command::Restore(args) => restore_command(*args, started),
        Command::MakeImage(args) => make_image(&args),
        Command::Bench(args) => bench_command(args, started),
        Command::Status(args) => status_command(&args),
        Command::Pause(args) => say_state(&Client::new(args.api_socket).pause()?),
        Command::Resume(args) => say_state(&Client::new(args.api_socket).resume()?),
        Command::Snapshot(args) => snapshot_command(args),
        Command::Shutdown(args) => say_state(&Client::new(args.api_socket).shutdown()?),
    }
}

/// Converts clap's error to one line: its first paragraph, without the tips and the usage below.
fn usage(error: &clap::Error) -> Error {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Error::usage("no command given; name one, as in demand-vmm run; --help lists them");
    }
    let text = error.to_string();
    let first = text.split("\n\n").next().unwrap_or(&text);
    let first = first.strip_prefix("error: ").unwrap_or(first);
    Error::usage(format!("{first}; --help lists the options"))
}

/// The destination and formats of a report.
struct Output {
    report: Option<PathBuf>,
    json: bool,
    table: bool,
}

impl Output {
    fn write(&self, report: &Report) -> Result<(), Error> {
        let json = to_json(report)?;
        if let Some(path) = &self.report {
            std::fs::write(path, &json).map_err(|error| {
                Error::failed(format!("cannot write the report to {}: {error}", path.display()))
            })?;
        }
        match (self.json, self.table) {
            (true, _) => say(&(json + "\n")),
            (false, true) => say(&report.table()),
            (false, false) => Ok(()),
        }
    }
}

fn run_command(args: RunArgs, started: Instant) -> Result<(), Error> {
    if let Some(kernel) = args.kernel {
        if args.cpus > MAX_CPUS {
            return Err(Error::usage(format!(
                "--cpus: {} vCPUs are not supported; a Linux guest can have 1 to {MAX_CPUS}",
                args.cpus
            )));
        }
        let output = args.guest.output();
        let boot = BootOption { kernel, initramfs: args.initramfs, cmdline: args.cmdline };
        let options = LinuxOptions {
            guest: args.guest.options(),
            memory: args.memory,
            cpus: args.cpus,
            boot,
        };
        return output.write(&linux::run(options, started)?);
    }
    let source =
        args.source.ok_or_else(|| Error::usage("nothing to run: name a kernel with --kernel"))?;
    let mut devices = args.guest.vhost_user.into_iter();
    let options = RunOptions {
        stage: args.guest.stage,
        memory: args.memory,
        cpus: args.cpus,
        engine: args.engine,
        source,
        source_limit: args.source_limit.map(Duration::from_secs),
        vhost_user: devices.next(),
        fill: args.fill,
        test_guest: args.test_guest,
        verify: args.verify,
        progress: args.guest.progress,
        timeline: args.guest.timeline,
        report: args.guest.report.clone(),
    };
    if devices.next().is_some() {
        return Err(Error::usage("--vhost-user: the test guest has one device; name only one"));
    }
    let output = Output { report: args.guest.report, json: args.guest.json, table: true };
    output.write(&run(options, started)?)
}

fn restore_command(args: RestoreArgs, started: Instant) -> Result<(), Error> {
    let output = args.guest.output();
    let options = RestoreOptions {
        guest: args.guest.options(),
        source: args.source,
        memory: args.memory,
        cpus: args.cpus,
        engine: args.engine,
        source_limit: args.source_limit.map(Duration::from_secs),
        fill: args.fill,
        clock: args.clock,
        verify: args.verify,
    };
    output.write(&restore(options, started)?)
}

fn bench_command(args: BenchArgs, started: Instant) -> Result<(), Error> {
    let options = BenchOptions {
        memory: args.memory,
        cpus: args.cpus,
        engine: args.engine,
        source: args.source,
        order: args.order,
        access: args.access,
        pages: args.pages,
    };
    let report = bench(&options, started)?;
    if args.json { say(&(to_json(&report)? + "\n")) } else { say(&report.table()) }
}

fn status_command(args: &StatusArgs) -> Result<(), Error> {
    let status = Client::new(&args.api.api_socket).status()?;
    if args.json { say(&(to_json(&status)? + "\n")) } else { say(&client::table(&status)) }
}

fn say_state(status: &Status) -> Result<(), Error> {
    say(&format!("{}\n", status.state))
}

fn snapshot_command(args: SnapshotArgs) -> Result<(), Error> {
    // The VMM's working directory differs from this process's.
    let destination = std::path::absolute(&args.destination).map_err(|error| {
        Error::failed(format!(
            "cannot use the snapshot path {}: {error}; give an absolute path",
            args.destination.display()
        ))
    })?;
    let request = SnapshotRequest { destination, then: args.then };
    let mut progress = Progress::new("snapshot");
    let client = Client::new(args.api.api_socket);
    let snapshot = client.snapshot(&request, |status| progress.show(status))?;
    drop(progress);
    if args.json { say(&(to_json(&snapshot)? + "\n")) } else { say(&client::summary(&snapshot)) }
}

/// Writes to standard output, which may be a pipe without a reader.
fn say(text: &str) -> Result<(), Error> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|error| Error::failed(format!("cannot write to standard output: {error}")))
}

fn to_json(report: &impl serde::Serialize) -> Result<String, Error> {
    serde_json::to_string_pretty(report)
        .map_err(|error| Error::failed(format!("cannot write the report: {error}")))
}

fn make_image(args: &MakeImageArgs) -> Result<(), Error> {
    let content = test_guest::content::Content::new(args.seed);
    let windows = Windows::new(args.size, args.vm_size.unwrap_or(args.size))
        .map_err(|error| Error::usage(format!("make-image: {error}")))?;
    if !args.disk_size.is_multiple_of(512) {
        return Err(Error::usage("make-image: --disk-size must be a multiple of 512 bytes"));
    }
    let failed = |path: &PathBuf| {
        let path = path.display().to_string();
        move |error| {
            Error::failed(format!("cannot write {path}: {error}; check that the disk has room"))
        }
    };
    if let Some(path) = &args.memory {
        content.write_image(path, &windows).map_err(failed(path))?;
    }
    if let Some(path) = &args.disk {
        test_guest::content::write_disk(path, args.seed, args.disk_size).map_err(failed(path))?;
    }
    if args.memory.is_none() && args.disk.is_none() {
        return Err(Error::usage("make-image: nothing to make; use --memory or --disk"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_wrong_option_is_one_line() {
        for arguments in [
            &["demand-vmm"][..],
            &["demand-vmm", "run", "--memory", "size=1G"],
            &["demand-vmm", "run", "--memory", "size=1Q", "--source", "x"],
            &["demand-vmm", "fly"],
            &["demand-vmm", "status"],
            &["demand-vmm", "snapshot", "--api-socket", "x", "--then", "fly", "dir"],
        ] {
            let error = Cli::try_parse_from(arguments).unwrap_err();
            let line = usage(&error).to_string();
            assert!(!line.contains('\n') && line.len() > 20, "{line}");
        }
    }
}
