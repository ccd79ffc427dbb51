// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Command-line parsing and dispatch of the `test-vmm` binary.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use demand_kvm::EngineChoice;
use demand_memory::PAGE_SIZE;
use demand_vmm::cli::ENGINE_HELP;
use demand_vmm::cli::log_args::LogArgs;
use demand_vmm::cli::output::{Output, OutputArgs, usage_error};
use demand_vmm::config::size::parse_size;
use demand_vmm::config::{FillConfig, MemoryConfig, VhostUserConfig};
use demand_vmm::error::Error;
use demand_vmm::logger;
use demand_vmm::report::outputs::Outputs;
use demand_vmm::report::progress::Progress;
use demand_vmm::vm::interrupt::{Interrupt, on_signals};
use test_guest::content::Content;
use test_guest::image::write_disk_to;
use test_guest::windows::Windows;

use crate::new_image::NewImage;
use crate::options::TestGuestOption;
use crate::run::run;
use crate::run_options::RunOptions;

/// Runs the test guest on demand-paged memory, on any KVM.
///
/// Exit status: 0 success, 1 failure, 2 wrong command line, 3 this host cannot do what was asked.
#[derive(Debug, Parser)]
#[command(name = "test-vmm", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the test guest on memory that is filled from an image.
    Run(Box<RunArgs>),
    /// Writes the memory image, and optionally a disk, for a test guest of the same seed.
    MakeImage(MakeImageArgs),
}

#[derive(Debug, Args)]
struct RunArgs {
    /// size=1G[,backing=shmem|hugetlb-2m|hugetlb-1g|guest-memfd][,reserve=on|off][,thp=on|off]
    #[arg(long)]
    memory: MemoryConfig,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// How vCPU accesses to missing pages are trapped.
    #[arg(long, default_value = "auto", long_help = ENGINE_HELP)]
    engine: EngineChoice,
    /// The raw image from which the test guest's memory is filled.
    #[arg(long)]
    source: PathBuf,
    /// End with an error after the source has failed, or has not answered, for this many seconds
    /// [default: never].
    #[arg(long, value_name = "SECONDS")]
    source_limit: Option<u64>,
    /// The test guest's disk: blk,socket=PATH[,queues=N]
    #[arg(long, value_name = "DEVICE")]
    vhost_user: Vec<VhostUserConfig>,
    /// Background fill: on, off or rate=BYTES/s.
    #[arg(long, default_value = "off")]
    fill: FillConfig,
    /// Parameters of the test guest:
    /// seed=N,window=SIZE,order=sequential|random|strided,touches=N,requests=N,
    /// write-area=SIZE,pristine=PATH,disk=PATH and more.
    #[arg(long, default_value = "")]
    test_guest: TestGuestOption,
    /// Compare memory and disk with their expected content, in a separate process.
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct MakeImageArgs {
    /// Path of the memory image.
    #[arg(long)]
    memory: Option<PathBuf>,
    /// Bytes of memory that the test guest uses.
    #[arg(long, value_parser = parse_size, default_value = "64M")]
    size: u64,
    /// Size of memory, with holes in the image where the test guest uses none [default: --size].
    #[arg(long, value_parser = parse_size)]
    vm_size: Option<u64>,
    /// Path of the disk image.
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Size of the disk image.
    #[arg(long, value_parser = parse_size, default_value = "16M")]
    disk_size: u64,
    /// Seed of the content.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Replace existing files.
    #[arg(long)]
    force: bool,
    /// Report the number of written pages on standard error from time to time.
    #[arg(long)]
    progress: bool,
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
        Err(error) => return Err(usage_error(&error, "test-vmm run")),
    };
    logger::start(&cli.log.config())?;
    match cli.command {
        Command::Run(args) => run_command(*args, started),
        Command::MakeImage(args) => make_image(&args),
    }
}

fn run_command(args: RunArgs, started: Instant) -> Result<(), Error> {
    let files = args.output.files(&[&args.source])?;
    let mut output = Output { files, json: args.output.json };
    let mut devices = args.vhost_user.into_iter();
    let options = RunOptions {
        stage: args.output.stage().into(),
        memory: args.memory,
        cpus: args.cpus,
        engine: args.engine,
        source: args.source,
        source_limit: args.source_limit.map(Duration::from_secs),
        vhost_user: devices.next(),
        fill: args.fill,
        test_guest: args.test_guest,
        verify: args.verify,
        progress: args.output.progress,
        timeline: args.output.timeline.is_some(),
    };
    if devices.next().is_some() {
        return Err(Error::usage("--vhost-user: the test guest has one device; name only one"));
    }
    let (report, picture) = run(options, started)?;
    output.write(&report, || picture)
}

fn make_image(args: &MakeImageArgs) -> Result<(), Error> {
    let content = Content::new(args.seed);
    let windows = Windows::new(args.size, args.vm_size.unwrap_or(args.size))
        .map_err(|error| Error::usage(format!("make-image: {error}")))?;
    if !args.disk_size.is_multiple_of(512) {
        return Err(Error::usage("make-image: --disk-size must be a multiple of 512 bytes"));
    }
    if args.memory.is_none() && args.disk.is_none() {
        return Err(Error::usage("make-image: nothing to make; use --memory or --disk"));
    }
    let begin = |path: &Option<PathBuf>| {
        path.as_deref().map(|path| NewImage::begin(path, args.force)).transpose()
    };
    let (memory, disk) = (begin(&args.memory)?, begin(&args.disk)?);
    // One must not replace the other.
    let mut files = Outputs::default();
    for (option, path) in [("--memory", &args.memory), ("--disk", &args.disk)] {
        path.iter().try_for_each(|path| files.add(option, path, &[]))?;
    }
    let interrupt = Interrupt::default();
    on_signals(interrupt.clone())
        .map_err(|error| Error::host(format!("cannot start a thread: {error}")))?;
    // The interrupt is the cause of an error. Dropping the images removes what was written.
    let write = |new: &NewImage, name, bytes: u64, write: &Write<'_>| {
        let pages = |bytes: u64| bytes.div_ceil(PAGE_SIZE);
        let shown = Progress::new(name, "pages written", pages(bytes));
        let mut shown = shown.with_lines(args.progress);
        let mut progress = |bytes| {
            shown.set(pages(bytes));
            interrupt.reason().is_none()
        };
        new.write(|file| write(file, &mut progress))
            .map_err(|error| interrupt.reason().map_or(error, Error::failed))
    };
    if let Some(memory) = &memory {
        let image: &Write<'_> = &|file, progress| content.write_image_to(file, &windows, progress);
        write(memory, "memory image", args.size, image)?;
    }
    if let Some(disk) = &disk {
        let (seed, size) = (args.seed, args.disk_size);
        let image: &Write<'_> = &|file, progress| write_disk_to(file, seed, size, progress);
        write(disk, "disk image", size, image)?;
    }
    memory.into_iter().chain(disk).try_for_each(NewImage::finish)
}

/// Writes a file, and passes on the number of bytes that are done, until that returns `false`.
type Write<'a> = dyn Fn(&File, &mut dyn FnMut(u64) -> bool) -> io::Result<()> + 'a;

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn wrong_option_is_one_line() {
        for arguments in [
            &["test-vmm"][..],
            &["test-vmm", "run", "--memory", "size=1G"],
            &["test-vmm", "run", "--memory", "size=1Q", "--source", "x"],
            &["test-vmm", "fly"],
        ] {
            let error = Cli::try_parse_from(arguments).unwrap_err();
            let line = usage_error(&error, "test-vmm run").to_string();
            assert!(!line.contains('\n') && line.len() > 20, "{line}");
        }
    }
}
