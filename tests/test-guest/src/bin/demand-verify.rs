// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Verifies the test guest's memory and disk.
//!
//! Exit status: 0 if every byte is right, 1 if not (or if the verification failed), 2 if the
//! command line is wrong.

use std::fs::File;
use std::io::BufReader;
use std::os::fd::{FromRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{ArgGroup, Parser};
use test_guest::plan::{Plan, PlanParams};
use test_guest::verify::{Disks, FinalMemory, Verdict, verify};

/// Compare every byte of the test guest's memory and disk with the expected value.
#[derive(Parser)]
#[command(name = "demand-verify", version)]
#[command(group(ArgGroup::new("guest memory").required(true).args(["memory_fd", "memory"])))]
struct Arguments {
    /// The plan's parameters, as JSON
    #[arg(long, value_name = "FILE")]
    params: PathBuf,
    /// Guest memory, as a file descriptor that this process inherits; once for each region
    #[arg(long, value_name = "N")]
    memory_fd: Vec<RawFd>,
    /// Guest memory, as a file; once for each region, by guest address
    #[arg(long, value_name = "FILE")]
    memory: Vec<PathBuf>,
    /// Memory that is not under test must not even be allocated
    #[arg(long)]
    untouched: bool,
    /// The final disk
    #[arg(long, value_name = "FILE", requires = "pristine")]
    disk: Option<PathBuf>,
    /// The disk before anything ran
    #[arg(long, value_name = "FILE", requires = "disk")]
    pristine: Option<PathBuf>,
    /// Print the verdict as JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(verdict) => {
            print(&verdict, arguments.json);
            if verdict.equal { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("demand-verify: {error}");
            ExitCode::FAILURE
        }
    }
}

fn open(path: &Path) -> Result<File, String> {
    File::open(path)
        .map_err(|error| format!("cannot open {}: {error}; name a readable file", path.display()))
}

fn run(arguments: &Arguments) -> Result<Verdict, String> {
    let params: PlanParams = serde_json::from_reader(BufReader::new(open(&arguments.params)?))
        .map_err(|error| {
            let path = arguments.params.display();
            format!(
                "cannot read the parameters in {path}: {error}; give the file of the run to verify"
            )
        })?;
    let disk = arguments.disk.as_deref().map(open).transpose()?;
    let pristine = arguments.pristine.as_deref().map(open).transpose()?;
    let files = if arguments.memory_fd.is_empty() {
        arguments.memory.iter().map(|path| open(path)).collect::<Result<Vec<_>, _>>()?
    } else {
        arguments.memory_fd.iter().map(|&fd| inherited(fd)).collect::<Result<Vec<_>, _>>()?
    };
    let plan = Plan::new(params, pristine.as_ref()).map_err(|error| error.to_string())?;
    let memory = FinalMemory::open(&files).map_err(|error| {
        format!("cannot determine the size of guest memory: {error}; give a file or a memfd")
    })?;
    let disks = match (&disk, &pristine) {
        (Some(disk), Some(pristine)) => Some(Disks { pristine, disk }),
        _ => None,
    };
    verify(&plan, &memory, disks, arguments.untouched).map_err(|error| error.to_string())
}

fn inherited(fd: RawFd) -> Result<File, String> {
    // SAFETY: queries a number, which need not be a valid descriptor.
    if fd <= 2 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(format!(
            "cannot use file descriptor {fd}: it is not open; let this process inherit it"
        ));
    }
    // SAFETY: it is open, and this process has not yet opened a file that it could be: the parent
    // process passed it on for our use.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn print(verdict: &Verdict, json: bool) {
    if json {
        match serde_json::to_string_pretty(verdict) {
            Ok(text) => println!("{text}"),
            Err(error) => eprintln!("demand-verify: cannot print the verdict: {error}"),
        }
        return;
    }
    for difference in &verdict.differences {
        println!("{difference}");
    }
    let Verdict { difference_count, memory_bytes, disk_bytes, equal, .. } = verdict;
    let compared = format!("{memory_bytes} bytes of memory and {disk_bytes} bytes of disk");
    if *equal {
        println!("equal: {compared}");
    } else {
        println!("{difference_count} differences in {compared}");
    }
}
