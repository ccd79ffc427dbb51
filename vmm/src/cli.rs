// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Command-line parsing and dispatch of the `demand-vmm` binary.

pub(crate) mod advice;
mod config_file;
pub mod error;
#[cfg(feature = "remote")]
mod image;
pub mod log_args;
mod manual;
pub mod output;
pub mod parse;
pub(crate) mod probe;
mod process;
mod version;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use demand_kvm::EngineChoice;
use demand_paging::Lazy;

use crate::api::client::{self, Client, RequestProgress};
use crate::api::endpoint::Endpoint;
use crate::api::{Go, SnapshotRequest, State, Status};
use crate::bench::{Access, BenchOptions, Order, SourceOption, bench};
use crate::cli::config_file::GivenParts;
use crate::cli::error::CliError;
use crate::cli::log_args::LogArgs;
use crate::cli::output::{Output, OutputArgs, print, to_json, usage_error};
use crate::cli::parse::parse_number;
use crate::cli::probe::require::Need;
use crate::config::vm::{RestoreConfig, VmConfig};
use crate::config::{
    CacheConfig, ClockConfig, FetchAroundConfig, FillConfig, MemoryConfig, OnPanic, RestoreMemory,
    SerialConfig, VhostUserConfig, WorkingSetConfig,
};
use crate::error::Error;
use crate::logger;
use crate::signals;
use crate::snapshot::dir;
use crate::vm::linux::{self, LinuxOptions};
use crate::vm::restore::{RestoreOptions, restore};
use crate::vm::serve::serve;
use crate::vm::session::{ApiPlace, Ended, GuestOptions};

/// The example of a command in the error for a command line without one.
const EXAMPLE: &str = "demand-vmm run";

/// The help of `--engine`.
pub const ENGINE_HELP: &str = "auto: the best that the host supports; kvm-userfault: KVM reads the \
                           missing bitmap (a kernel with the KVM Userfault series); uffd: \
                           userfaultfd under the guest (any kernel); uffd-poison: its markers, \
                           at which vCPUs exit (Linux 6.6; never chosen by auto: a guest whose \
                           programs make KVM emulate string instructions may get a page fault that \
                           it did not cause); kvm-attributes: memory \
                           attributes (experimental, never chosen by auto: set-up takes a step per \
                           page, and KVM's own accesses to huge pages are not trapped)";

/// Runs virtual machines whose memory pages are fetched when they are first used.
///
/// Exit status: 0 success, 1 failure, 2 wrong command line, 3 this host cannot do what was asked. A
/// guest that SIGINT, SIGTERM or SIGHUP ends in order is a success; a second one ends it at once.
#[derive(Debug, Parser)]
#[command(name = "demand-vmm", version = version::SHORT, long_version = version::LONG.as_str())]
#[command(arg_required_else_help = true)]
struct Cli {
    /// Without a command: begin without a VM, and serve the API on this Unix socket. A client then
    /// creates and boots a VM, or restores one. The process ends with its VM.
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Reports the capabilities of this host, and the reasons.
    Probe(ProbeArgs),
    /// Boots a Linux guest from its kernel.
    Run(Box<RunArgs>),
    /// Restores a Linux guest from a snapshot; the guest runs while its pages are fetched.
    Restore(Box<RestoreArgs>),
    /// Defines the VM of a process that began without one. (To restore one there: restore --into.)
    Create(process::CreateArgs),
    /// Boots the VM that was created.
    Boot(ApiArgs),
    /// Prints the events of a VM, a line of JSON each, until the VM has ended.
    Events(ApiArgs),
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
    /// Writes snapshots to a store and reads them: a directory, or a bucket of an object store.
    #[cfg(feature = "remote")]
    Image(image::ImageArgs),
    /// Prints the script with which a shell completes commands and options.
    Completions(CompletionsArgs),
    /// Writes a man page for demand-vmm and for each of its commands.
    Man(ManArgs),
}

#[derive(Debug, Args)]
struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

#[derive(Debug, Args)]
struct ManArgs {
    /// The folder for the pages, which is created if necessary.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

#[derive(Debug, Args)]
struct ProbeArgs {
    /// Exit with status 3 if this host lacks one of these, with a line for each: kvm, linux (guests
    /// with all of their memory), lazy (guests before their memory has arrived), userfaultfd,
    /// postcopy (vhost-user back-ends meanwhile), thp, an engine, or a backing.
    #[arg(long, value_name = "WHAT", value_delimiter = ',')]
    require: Vec<Need>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Options that every guest takes. In a value with parts, two commas stand for one.
#[derive(Debug, Args)]
struct GuestArgs {
    /// Read the VM's configuration from this file: TOML if its name ends with .toml, else JSON.
    /// Options of the command line replace its parts.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// KIND,socket=PATH[,queues=N][,queue-size=N][,lazy=auto|postcopy|fill|refuse][,id=NAME]; KIND
    /// is blk, net, rng, console or vsock; once for each device. Two commas in PATH stand for one.
    #[arg(long, value_name = "DEVICE")]
    vhost_user: Vec<VhostUserConfig>,
    /// Where the guest's serial port leads: tty, file=PATH or off. A file grows without bound
    /// by the guest's output, up to the disk quota. On a terminal, Ctrl-A followed by x ends the
    /// VM [default: tty].
    #[arg(long)]
    serial: Option<SerialConfig>,
    /// Serve the API on a Unix socket, for pause, resume, snapshot, status and shutdown.
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    /// Action when the guest's kernel panics [default: ignore]. The kernel must have the pvpanic
    /// driver.
    #[arg(long)]
    on_panic: Option<OnPanic>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Returns the options of a run that belong to the process and not to its VM.
fn process_options(output: &OutputArgs, api: ApiPlace) -> GuestOptions {
    GuestOptions {
        stage: output.stage().into(),
        api,
        timeline: output.timeline.is_some(),
        progress: output.progress,
        ..GuestOptions::default()
    }
}

/// Returns the destinations of a report, which are checked, and must not be among `inputs`, like
/// that of the `log`.
fn destinations(args: &OutputArgs, log: Option<&Path>, inputs: &[&Path]) -> Result<Output, Error> {
    let mut files = args.files(inputs)?;
    log.iter().try_for_each(|path| files.add("--log-file", path, inputs))?;
    Ok(Output { files, json: args.json })
}

impl GuestArgs {
    /// Returns the parts of a VM's configuration that these options give.
    fn parts(&self) -> GivenParts {
        let mut parts = GivenParts::default();
        parts.put("devices", (!self.vhost_user.is_empty()).then_some(&self.vhost_user));
        parts.put("serial", self.serial.as_ref());
        parts.put("on_panic", self.on_panic);
        parts
    }

    fn options(self) -> GuestOptions {
        let api = self.api_socket.map_or(ApiPlace::Nowhere, ApiPlace::Socket);
        process_options(&self.output, api)
    }

    /// Returns the destinations of the guest's report and console, which are checked, and must not
    /// be among `inputs`, like that of the `log`.
    fn output(
        &self,
        log: Option<&Path>,
        serial: &SerialConfig,
        inputs: &[&Path],
    ) -> Result<Output, Error> {
        let mut output = destinations(&self.output, log, inputs)?;
        if let SerialConfig::File(path) = serial {
            output.files.add("--serial", path, inputs)?;
        }
        Ok(output)
    }
}

#[derive(Debug, Args)]
struct RunArgs {
    /// [size=]1G[,backing=shmem|hugetlb-2m|hugetlb-1g|guest-memfd][,reserve=on|off][,thp=on|off]
    #[arg(long, required_unless_present = "config", allow_negative_numbers = true)]
    memory: Option<MemoryConfig>,
    /// Number of vCPUs [default: 1].
    #[arg(long, value_name = "N", value_parser = parse_number::<u32>, allow_negative_numbers = true)]
    cpus: Option<u32>,
    /// The Linux kernel: a bzImage, or an ELF vmlinux with a PVH entry.
    #[arg(long, value_name = "FILE", required_unless_present = "config")]
    kernel: Option<PathBuf>,
    /// Initramfs of the Linux kernel.
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// Command line of the Linux kernel [default: console=ttyS0].
    #[arg(long)]
    cmdline: Option<String>,
    #[command(flatten)]
    guest: GuestArgs,
    #[command(flatten)]
    _paging: UnusedPagingArgs,
}

impl RunArgs {
    fn parts(&self) -> GivenParts {
        let mut parts = self.guest.parts();
        parts.put("memory", self.memory.as_ref());
        parts.put("cpus", self.cpus);
        parts.put("kernel", self.kernel.as_ref());
        parts.put("initramfs", self.initramfs.as_ref());
        parts.put("cmdline", self.cmdline.as_ref());
        parts
    }

    fn config(&self) -> Result<VmConfig, Error> {
        Ok(self.parts().over(self.guest.config.as_deref())?)
    }
}

/// Options of `restore` that `run` accepts too, so that a script can pass the same to both.
#[derive(Debug, Args)]
struct UnusedPagingArgs {
    /// As for restore, and without effect: a guest that boots has no missing pages.
    #[arg(long, default_value = "auto")]
    _engine: EngineChoice,
    /// As for restore, and without effect: a guest that boots has no missing pages.
    #[arg(long, default_value = "off")]
    _fill: FillConfig,
}

#[derive(Debug, Args)]
struct RestoreArgs {
    /// Directory of the snapshot, or its URL: s3://, https:// or http:// of a snapshot that was
    /// pushed, or with a snapshot's files below it; file:// of one that was pushed to a directory;
    /// nbd:// (nbds://, nbd+unix://) with exports of the files' names; pager:SOCKET of a process that
    /// has images of these names, or with ?files=DIR the memory only;
    /// pager+firecracker:SOCKET?files=DIR of a page fault handler. Given more than once, these are
    /// places of one snapshot: what one fails to deliver comes from another, and earlier ones are
    /// preferred.
    #[arg(long, value_name = "DIR|URL", required_unless_present = "config")]
    source: Vec<PathBuf>,
    /// DIR,size=BYTES: share what is read of a snapshot that was pushed to a store with this host's
    /// other VMs, in a directory on a local disk that its files never outgrow, as in
    /// /var/cache/demand,size=10G. Everyone who can write there can change what guests read.
    #[arg(long, value_name = "CACHE")]
    cache: Option<CacheConfig>,
    /// The parts of a snapshot that was pushed to a store that are fetched beside one that a fault
    /// needs: auto, as many as its delay is worth, and none while they are of no use; so many BYTES;
    /// or off [default: auto].
    #[arg(long, value_name = "auto|BYTES|off")]
    fetch_around: Option<FetchAroundConfig>,
    /// [backing=shmem|hugetlb-2m|hugetlb-1g|guest-memfd][,reserve=on|off][,thp=on|off]
    /// [default: the snapshot's]
    #[arg(long, allow_negative_numbers = true)]
    memory: Option<RestoreMemory>,
    /// Number of vCPUs that the snapshot must have.
    #[arg(long, value_name = "N", value_parser = parse_number::<u32>, allow_negative_numbers = true)]
    cpus: Option<u32>,
    #[command(flatten)]
    guest: GuestArgs,
    /// How vCPU accesses to missing pages are trapped [default: auto].
    #[arg(long, long_help = ENGINE_HELP)]
    engine: Option<EngineChoice>,
    /// Whether the guest runs before its memory has arrived: auto, where this host can do that,
    /// else all memory is read first; require, or an error; off, all memory is read first, which
    /// needs only /dev/kvm [default: auto].
    #[arg(long)]
    lazy: Option<Lazy>,
    /// Pause the VM after the source has failed, or has not answered, for this many seconds
    /// [default: never].
    #[arg(long, value_name = "SECONDS", value_parser = parse_number::<u64>, allow_negative_numbers = true)]
    source_limit: Option<u64>,
    /// Background fill: off, or on or rate=BYTES/s, with
    /// [,in-flight=auto|BYTES][,chunk=BYTES][,order=ascending|descending|near-fault]
    /// [default: on].
    #[arg(long)]
    fill: Option<FillConfig>,
    /// The pages that the snapshot's guests touch first: record those of this run, replay the
    /// recorded ones, auto for both, or off; with [,at=FILE|URL][,seconds=N] [default: off, beside
    /// the snapshot, 30]. Everyone who can write it can change what guests read.
    #[arg(long, value_name = "MODE")]
    working_set: Option<WorkingSetConfig>,
    /// Where the guest's clocks continue: keep, at their old values, or host, as if the guest had
    /// been paused [default: keep].
    #[arg(long)]
    clock: Option<ClockConfig>,
    /// Read and check the whole memory image before the guest runs.
    #[arg(long)]
    verify: bool,
    /// Restore the guest in the process that serves its API on this socket, and began without a
    /// VM, instead of in this one.
    #[arg(
        long,
        value_name = "PATH",
        conflicts_with_all = ["api_socket", "stage", "report", "timeline", "json", "progress"],
    )]
    into: Option<PathBuf>,
}

impl RestoreArgs {
    fn parts(&self) -> GivenParts {
        let mut parts = self.guest.parts();
        if let Some((first, others)) = self.source.split_first() {
            parts.put("source", Some(first));
            parts.put("other_sources", Some(others));
        }
        parts.put("cache", self.cache.as_ref());
        parts.put("fetch_around", self.fetch_around);
        parts.put("memory", self.memory.as_ref());
        parts.put("cpus", self.cpus);
        parts.put("engine", self.engine.map(|engine| engine.to_string()));
        parts.put("lazy", self.lazy.map(Lazy::name));
        parts.put("source_limit_s", self.source_limit);
        parts.put("fill", self.fill.clone());
        parts.put("working_set", self.working_set.as_ref());
        parts.put("clock", self.clock);
        parts.put("verify", self.verify.then_some(true));
        parts
    }

    fn config(&self) -> Result<RestoreConfig, Error> {
        Ok(self.parts().over(self.guest.config.as_deref())?)
    }
}

#[derive(Debug, Args)]
struct BenchArgs {
    /// Memory of each vCPU, as for run: [size=]64M[,backing=...][,reserve=on|off][,thp=on|off]
    #[arg(long, allow_negative_numbers = true)]
    memory: MemoryConfig,
    /// Number of vCPUs, each with separate memory.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=255), allow_negative_numbers = true)]
    cpus: u32,
    /// How vCPU accesses to missing pages are trapped.
    #[arg(long, default_value = "auto", long_help = ENGINE_HELP)]
    engine: EngineChoice,
    /// Where pages come from: hot, a small buffer in memory, or a raw image.
    #[arg(long, default_value = "hot", value_name = "hot|FILE")]
    source: SourceOption,
    /// Order in which a vCPU touches its pages: sequential, random or strided.
    #[arg(long, default_value = "sequential")]
    order: Order,
    /// How a vCPU accesses its pages: read or write.
    #[arg(long, default_value = "read")]
    access: Access,
    /// Number of pages that each vCPU touches [default: all].
    #[arg(long, value_name = "N", value_parser = parse_number::<u64>, allow_negative_numbers = true)]
    pages: Option<u64>,
    /// Longest time that a thread which serves faults spins before it sleeps, in microseconds; 0
    /// turns spinning off [default: 50].
    #[arg(long, value_name = "MICROSECONDS", value_parser = parse_number::<u64>, allow_negative_numbers = true)]
    spin: Option<u64>,
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
    signals::ignore_reports();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // clap reports the help and the version as errors that go to standard output.
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => return Err(usage_error(&error, EXAMPLE)),
    };
    let command = match (cli.command, cli.api_socket, cli.output.given()) {
        (Some(command), None, None) => command,
        (None, Some(socket), _) => {
            let mut output = destinations(&cli.output, cli.log.file(), &[])?;
            logger::start(&cli.log.config())?;
            let guest = process_options(&cli.output, ApiPlace::Nowhere);
            let ended = serve(&socket, &guest, &mut output.files, started)?;
            return ended.map_or(Ok(()), |ended| end(output, ended));
        }
        (None, None, _) => return Err(CliError::NoCommand { example: EXAMPLE.into() }.into()),
        (Some(_), socket, given) => {
            let option = socket.map_or(given, |_| Some("--api-socket")).unwrap_or_default();
            let error = format!("{option} is before the command; give it after");
            return Err(CliError::Usage { error }.into());
        }
    };
    // These first check that the log is none of their inputs.
    if !matches!(command, Command::Run(_) | Command::Restore(_)) {
        logger::start(&cli.log.config())?;
    }
    match command {
        Command::Probe(args) => probe::probe(args.json, &args.require),
        Command::Run(args) => run_command(*args, &cli.log, started),
        Command::Restore(args) => restore_command(*args, &cli.log, started),
        Command::Create(args) => process::create(&args),
        Command::Boot(args) => say_state(&Client::new(args.api_socket).boot()?),
        Command::Events(args) => process::events(&args),
        Command::Bench(args) => bench_command(args, started),
        Command::Status(args) => status_command(&args),
        Command::Pause(args) => say_state(&Client::new(args.api_socket).pause()?),
        Command::Resume(args) => say_state(&Client::new(args.api_socket).resume()?),
        Command::Snapshot(args) => snapshot_command(args),
        Command::Shutdown(args) => {
            let status = Client::new(args.api_socket).shutdown()?;
            // The answer comes before the end, and so with the state until then.
            match status.state {
                State::Stopped => say_state(&status),
                _ => print("shutting down\n"),
            }
        }
        #[cfg(feature = "remote")]
        Command::Image(args) => image::image_command(args),
        Command::Completions(args) => manual::print_completions(Cli::command(), args.shell),
        Command::Man(args) => manual::write_pages(Cli::command(), &args.folder),
    }
}

fn run_command(args: RunArgs, log: &LogArgs, started: Instant) -> Result<(), Error> {
    let (given, file) = (args.parts(), args.guest.config.clone());
    let config = args.config()?;
    let outcome = run_with(args, config, log, started);
    outcome.map_err(|error| given.named_as_given(error, file.as_deref()))
}

fn run_with(args: RunArgs, config: VmConfig, log: &LogArgs, started: Instant) -> Result<(), Error> {
    linux::check_cpus(config.cpus)?;
    let inputs = config.boot_files().collect::<Vec<_>>();
    let output = args.guest.output(log.file(), &config.serial, &inputs)?;
    logger::start(&log.config())?;
    let options = LinuxOptions::new(config, args.guest.options());
    end(output, linux::run(options, started)?)
}

fn restore_command(args: RestoreArgs, log: &LogArgs, started: Instant) -> Result<(), Error> {
    let (given, file) = (args.parts(), args.guest.config.clone());
    let config = args.config()?;
    if let Some(socket) = &args.into {
        logger::start(&log.config())?;
        return process::restore_into(socket, config);
    }
    let outcome = restore_with(args, config, log, started);
    outcome.map_err(|error| given.named_as_given(error, file.as_deref()))
}

fn restore_with(
    args: RestoreArgs,
    config: RestoreConfig,
    log: &LogArgs,
    started: Instant,
) -> Result<(), Error> {
    let places = [&config.source].into_iter().chain(&config.other_sources);
    let files: Vec<_> = places.filter_map(|place| place.directory()).flat_map(dir::files).collect();
    let inputs: Vec<_> = files.iter().map(PathBuf::as_path).collect();
    let output = args.guest.output(log.file(), &config.serial, &inputs)?;
    logger::start(&log.config())?;
    let options = RestoreOptions::new(config, args.guest.options());
    end(output, restore(options, started)?)
}

/// Writes the report of a run, in whatever way it ended. A guest that never ran has none.
fn end(mut output: Output, run: Ended) -> Result<(), Error> {
    let Ended { record, outcome } = run;
    if !record.has_begun() {
        return outcome;
    }
    let error = outcome.as_ref().err().map(ToString::to_string);
    let report = record.report(error);
    match (outcome, output.write(&report, || record.picture(&report))) {
        (Ok(()), written) => written,
        (outcome, Ok(())) => outcome,
        (outcome, Err(unwritten)) => {
            log::error!("{unwritten}");
            outcome
        }
    }
}

fn bench_command(args: BenchArgs, started: Instant) -> Result<(), Error> {
    let options = BenchOptions {
        memory: args.memory,
        cpus: args.cpus,
        engine: args.engine,
        spin: args.spin.map(Duration::from_micros),
        source: args.source,
        order: args.order,
        access: args.access,
        pages: args.pages,
    };
    let report = bench(&options, started)?;
    if args.json { print(&(to_json(&report)? + "\n")) } else { print(&report.table()) }
}

fn status_command(args: &StatusArgs) -> Result<(), Error> {
    let status = Client::new(&args.api.api_socket).status()?;
    if args.json { print(&(to_json(&status)? + "\n")) } else { print(&client::table(&status)) }
}

fn say_state(status: &Status) -> Result<(), Error> {
    print(&format!("{}\n", status.state))
}

fn snapshot_command(args: SnapshotArgs) -> Result<(), Error> {
    // The VMM's working directory differs from this process's.
    let destination = std::path::absolute(&args.destination)
        .map_err(|source| CliError::SnapshotPath { path: args.destination, source })?;
    let request = SnapshotRequest { destination, then: args.then };
    let mut progress = RequestProgress::new(Endpoint::Snapshot);
    let client = Client::new(args.api.api_socket);
    let snapshot = client.snapshot(&request, |status| progress.show(status))?;
    drop(progress);
    if args.json {
        print(&(to_json(&snapshot)? + "\n"))
    } else {
        print(&client::summary(&snapshot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::config::device_kind::DeviceKind;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_engine_is_explained() {
        let choices = demand_kvm::Engine::ALL.map(EngineChoice::Only);
        for choice in choices.into_iter().chain([EngineChoice::Auto]) {
            assert!(ENGINE_HELP.contains(&format!("{choice}: ")), "{choice}");
        }
    }

    #[test]
    fn command_line_replaces_parts_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm.json");
        let file = r#"{"cpus": 2, "memory": {"size": "1G", "thp": true}, "serial": "off",
            "cmdline": "quiet",
            "devices": [{"type": "blk", "socket": "a"}, {"type": "rng", "socket": "b"}]}"#;
        std::fs::write(&path, file).unwrap();
        let of = |more: &[&str]| {
            let first = ["demand-vmm", "run", "--config", path.to_str().unwrap()];
            let cli = Cli::try_parse_from(first.iter().chain(more)).unwrap();
            let Some(Command::Run(args)) = cli.command else { panic!("it is another command") };
            args.config()
        };
        let error = of(&[]).unwrap_err().to_string();
        assert!(error.contains("no kernel is given; give --kernel, or"), "{error}");
        let config = of(&["--kernel=a"]).unwrap();
        assert_eq!((config.cpus, config.devices.len()), (2, 2));
        assert!(config.memory.thp);
        let more = ["--memory", "64M", "--kernel=b", "--vhost-user=blk,socket=c", "--serial=tty"];
        let config = of(&more).unwrap();
        assert_eq!((config.cpus, config.memory), (2, "64M".parse().unwrap()));
        assert_eq!((config.kernel, &*config.cmdline), ("b".into(), "quiet"));
        assert_eq!(config.devices, [VhostUserConfig::new(DeviceKind::Blk, "c")]);
        assert_eq!(config.serial, SerialConfig::Terminal);
    }

    #[test]
    fn options_of_restore_have_their_keys() {
        let options = [
            "demand-vmm",
            "restore",
            "--source=s",
            "--source=https://host/t",
            "--memory=backing=shmem",
            "--cpus=3",
            "--engine=uffd",
            "--lazy=off",
            "--source-limit=7",
            "--fill=rate=1M",
            "--clock=host",
            "--verify",
            "--on-panic=reset",
        ];
        let cli = Cli::try_parse_from(options).unwrap();
        let Some(Command::Restore(args)) = cli.command else { panic!("it is another command") };
        let config = args.config().unwrap();
        assert_eq!((config.source.directory(), config.cpus), (Some("s".as_ref()), Some(3)));
        assert_eq!(config.other_sources, ["https://host/t".parse().unwrap()]);
        assert_eq!(config.memory, "backing=shmem".parse().unwrap());
        assert_eq!(config.lazy, Lazy::Off);
        assert_eq!((config.engine.to_string(), config.source_limit_s), ("uffd".into(), Some(7)));
        assert_eq!((config.fill, config.clock), ("rate=1M".parse().unwrap(), ClockConfig::Host));
        assert_eq!((config.verify, config.on_panic), (true, OnPanic::Reset));
    }

    #[test]
    fn negative_number_is_an_error_of_its_option() {
        for (command, option, value) in [
            ("run", "--memory", "-1"),
            ("run", "--cpus", "-1"),
            ("restore", "--memory", "-1"),
            ("restore", "--cpus", "-2"),
            ("restore", "--source-limit", "-1"),
            ("bench", "--memory", "-1"),
            ("bench", "--cpus", "-1"),
            ("bench", "--pages", "-1"),
        ] {
            let error = Cli::try_parse_from(["demand-vmm", command, option, value]).unwrap_err();
            let line = usage_error(&error, EXAMPLE).to_string();
            let begin = format!("invalid value '{value}' for '{option} <");
            assert!(line.starts_with(&begin), "{line}");
        }
    }

    #[test]
    fn a_wrong_option_is_one_line() {
        for arguments in [
            &["demand-vmm"][..],
            &["demand-vmm", "run", "--memory", "size=1G"],
            &["demand-vmm", "run", "--memory", "size=1Q", "--kernel", "x"],
            &["demand-vmm", "run", "--memory", "size=1G", "--kernel", "x", "--source", "y"],
            &["demand-vmm", "fly"],
            &["demand-vmm", "run", "--memory=0", "--kernel=x"],
            &["demand-vmm", "status"],
            &["demand-vmm", "snapshot", "--api-socket", "x", "--then", "fly", "dir"],
        ] {
            let error = Cli::try_parse_from(arguments).unwrap_err();
            let line = usage_error(&error, EXAMPLE).to_string();
            assert!(!line.contains('\n') && line.len() > 20, "{line}");
        }
    }
}
