// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line, and the implementation of its subcommands.

use std::env;
use std::ffi::OsString;
use std::num::NonZero;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::builder::FalseyValueParser;
use clap::{Args, Parser, Subcommand};

use crate::guests::Guests;
use crate::machine::Machine;
use crate::protocol::Job;
use crate::session::{self, Limits};
use crate::{agent, cache, guests, kernel, suite};

/// Runs this project's binaries with a real KVM that supports KVM Userfault, inside a machine that
/// QEMU emulates.
#[derive(Debug, Parser)]
#[command(name = "cargo lab", version)]
pub struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run one command in the lab; its exit status is passed through
    Run {
        #[command(flatten)]
        options: Options,
        /// The command and its arguments, as on the host
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// `cargo test` with every test binary run in the lab (options by environment: LAB_MEMORY, ...)
    Test {
        /// Prepare the Linux guests that tests boot: the lab's own kernel, or Debian's as well; first of
        /// the arguments
        #[arg(long, env = "LAB_GUESTS", value_name = "lab|all", num_args = 0..=1,
              require_equals = true, default_value = "no", default_missing_value = "all",
              hide_default_value = true)]
        guests: Guests,
        /// Machines that run test binaries at once; each takes one processor and LAB_MEMORY
        #[arg(long, env = "LAB_MACHINES", value_name = "N", default_value_t = NonZero::<usize>::MIN)]
        machines: NonZero<usize>,
        /// Arguments of `cargo test`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Build the lab's kernel unless it is in the cache, and print its path
    Kernel,
    /// Prepare the Linux guests that tests boot, and print their paths, as NAME=PATH
    Guests,
    /// Runs inside the lab, started by its init
    #[command(hide = true)]
    Agent,
}

/// The options of the machine, and the limits of the command.
#[derive(Debug, Args)]
pub struct Options {
    /// Emulated CPUs (with more than one, guests that receive interrupts sometimes hang)
    #[arg(long, env = "LAB_CPUS", value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Memory of the machine
    #[arg(long, env = "LAB_MEMORY", value_name = "SIZE", default_value = "4G", value_parser = mebibytes)]
    memory: u64,
    /// Huge pages of 2M to reserve at boot
    #[arg(long, env = "LAB_HUGEPAGES", value_name = "N", default_value_t = 600)]
    hugepages: u64,
    /// Huge pages of 1G to reserve at boot
    #[arg(long, env = "LAB_GIGAPAGES", value_name = "N", default_value_t = 1)]
    gigapages: u64,
    /// Make the clock count instructions, 1 ns each, so that costs are repeatable
    #[arg(long, env = "LAB_ICOUNT", value_parser = FalseyValueParser::new())]
    icount: bool,
    /// Time limit of the command in seconds; no limit by default
    #[arg(long, env = "LAB_TIMEOUT", value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Let the run pass although the lab's kernel reported a WARN, BUG or oops
    #[arg(long, env = "LAB_ALLOW_WARN", value_parser = FalseyValueParser::new())]
    allow_warn: bool,
    /// Kernel image to boot instead of the lab's own
    #[arg(long, env = "LAB_KERNEL", value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Prepare the Linux guests that tests boot, the lab's own kernel or Debian's as well, and pass
    /// their paths to the command (LAB_GUEST_...)
    #[arg(long, env = "LAB_GUESTS", value_name = "lab|all", num_args = 0..=1,
          require_equals = true, default_value = "no", default_missing_value = "all",
          hide_default_value = true)]
    guests: Guests,
    /// Unix socket for QEMU's monitor, to inspect a machine that hangs
    #[arg(long, env = "LAB_MONITOR", value_name = "SOCKET")]
    monitor: Option<PathBuf>,
    /// More parameters for the lab's kernel, such as kvm_amd.npt=0
    #[arg(long, env = "LAB_APPEND", value_name = "PARAMETERS", default_value = "")]
    append: String,
}

impl Options {
    fn machine(&self) -> Result<Machine> {
        let reserved = self.hugepages * 2 + self.gigapages * 1024;
        let least = reserved + Machine::LEAST_MEMORY_MIB;
        ensure!(
            self.memory >= least,
            "{} huge pages of 2M and {} of 1G were asked for in {} MiB of memory: give the machine at least --memory {least}M or reserve fewer",
            self.hugepages,
            self.gigapages,
            self.memory
        );
        Ok(Machine {
            cpus: self.cpus,
            memory_mib: self.memory,
            hugepages: self.hugepages,
            gigapages: self.gigapages,
            icount: self.icount,
            append: self.append.clone(),
            monitor: self.monitor.clone(),
        })
    }
}

impl Cli {
    /// Executes the subcommand; returns the exit status.
    pub fn execute(self) -> Result<u8> {
        match self.task {
            Task::Run { options, command } => run(&options, command),
            Task::Test { guests, machines, arguments } => test(guests, machines.get(), &arguments),
            Task::Kernel => {
                println!("{}", kernel::ensure()?.display());
                Ok(0)
            }
            Task::Guests => {
                for (name, path) in guests::prepare(Guests::All)? {
                    println!("{name}={}", path.display());
                }
                Ok(0)
            }
            Task::Agent => agent::main(),
        }
    }
}

fn run(options: &Options, command: Vec<OsString>) -> Result<u8> {
    refuse_nesting()?;
    let machine = options.machine()?;
    let kernel = match &options.kernel {
        Some(kernel) => kernel.clone(),
        None => kernel::ensure()?,
    };
    let out = output_folder()?;
    let mut environment: Vec<_> = env::vars_os()
        // The host's TMPDIR may be read-only in the lab.
        .filter(|(name, _)| name != "TMPDIR" && name != "LAB_OUT" && name != "LAB")
        .collect();
    environment.push(("LAB".into(), "1".into()));
    environment.push(("LAB_OUT".into(), out.clone().into()));
    for (name, path) in guests::prepare(options.guests)? {
        environment.retain(|(old, _)| old != name);
        environment.push((name.into(), path.into()));
    }
    let job = Job {
        command,
        environment,
        directory: env::current_dir().context("the working directory could not be found")?.into(),
        out: out.into(),
        hugepages: options.hugepages,
        gigapages: options.gigapages,
    };
    let limits = Limits {
        command: options.timeout.map(Duration::from_secs),
        allow_warn: options.allow_warn,
    };
    session::run(&machine, &kernel, job, &limits)
}

fn test(wanted: Guests, machines: usize, arguments: &[OsString]) -> Result<u8> {
    refuse_nesting()?;
    // Prepared here once, not again for each test program.
    let guests = guests::prepare(wanted)?;
    // Built now, where its progress is visible, and not during the first test.
    let kernel = match env::var_os("LAB_KERNEL") {
        Some(kernel) => kernel,
        None => kernel::ensure()?.into(),
    };
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let lab = env::current_exe().context("the lab's own binary could not be found")?;
    if machines > 1 {
        let mut environment = vec![("LAB_KERNEL", kernel), ("LAB_GUESTS", wanted.word().into())];
        environment.extend(guests.into_iter().map(|(name, path)| (name, path.into())));
        return suite::run(&cargo, &lab, machines, arguments, &environment);
    }
    let Some(lab) = lab.to_str() else {
        bail!("{} is no UTF-8: cargo's configuration cannot name it", lab.display());
    };
    // A list in the configuration, because cargo would split the environment variable at spaces.
    let runner = serde_json::to_string(&[lab, "run", "--"])?;
    let status = Command::new(&cargo)
        .arg("test")
        .arg("--config")
        .arg(format!("target.'cfg(all())'.runner={runner}"))
        .args(arguments)
        .env("LAB_KERNEL", kernel)
        .env("LAB_GUESTS", wanted.word())
        .envs(guests)
        .status()
        .with_context(|| format!("{} could not be run", cargo.display()))?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(u8::try_from(code).unwrap_or(1))
}

fn refuse_nesting() -> Result<()> {
    ensure!(
        env::var_os("LAB").is_none(),
        "LAB is set, so this seems to run inside the lab already: run the command as it is, or unset LAB"
    );
    Ok(())
}

/// Returns the folder that is writable from inside the lab, at the same path: `LAB_OUT`, or
/// `lab-out` in cargo's target directory.
fn output_folder() -> Result<PathBuf> {
    let folder = match env::var_os("LAB_OUT") {
        Some(folder) => PathBuf::from(folder),
        None => cache::target().context("set LAB_OUT")?.join("lab-out"),
    };
    std::fs::create_dir_all(&folder)
        .and_then(|()| folder.canonicalize())
        .with_context(|| format!("LAB_OUT={} could not be created", folder.display()))
}

/// Parses a size such as 512M or 4G; returns MiB.
fn mebibytes(text: &str) -> Result<u64, String> {
    let usage = || format!("{text:?} is no size such as 512M or 4G");
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'G' | b'g') => (&text[..text.len() - 1], 1024),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 1),
        _ => return Err(usage()),
    };
    let number: u64 = digits.parse().map_err(|_| usage())?;
    number.checked_mul(unit).ok_or_else(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(arguments: &[&str]) -> Options {
        let line = ["lab", "run"].iter().chain(arguments).chain(&["--", "x"]);
        match Cli::try_parse_from(line).expect("parses").task {
            Task::Run { options, .. } => options,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn sizes_are_in_mebibytes() {
        assert_eq!(mebibytes("4G"), Ok(4096));
        assert_eq!(mebibytes("512M"), Ok(512));
        for bad in ["", "4", "G", "4T", "-1G", "99999999999999999999G"] {
            assert!(mebibytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn oversized_pool_is_refused() {
        assert!(options(&["--memory", "4G"]).machine().is_ok());
        let error =
            options(&["--memory", "1G", "--hugepages", "500"]).machine().expect_err("too small");
        assert!(error.to_string().contains("--memory"), "{error}");
    }

    #[test]
    fn guests_are_debians_too_unless_it_is_said() {
        // Without the option the value comes from the environment, which may differ between runs.
        assert_eq!(options(&["--guests=no"]).guests, Guests::No);
        assert_eq!(options(&["--guests"]).guests, Guests::All);
        assert_eq!(options(&["--guests=lab"]).guests, Guests::Lab);
        assert!(Cli::try_parse_from(["lab", "run", "--guests=bsd", "--", "x"]).is_err());
    }

    #[test]
    fn arguments_after_the_command_are_the_commands() {
        let line = ["lab", "run", "--", "ls", "--icount", "--", "-l"];
        match Cli::try_parse_from(line).expect("parses").task {
            Task::Run { options, command } => {
                assert!(!options.icount);
                assert_eq!(command, ["ls", "--icount", "--", "-l"]);
            }
            other => panic!("{other:?}"),
        }
    }
}
