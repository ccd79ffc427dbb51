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
use crate::inputs::Build;
use crate::kernel::Choice;
use crate::machine::Machine;
use crate::protocol::Job;
use crate::session::{self, Limits};
use crate::{agent, cache, guests, suite};

/// Runs this project's binaries with a real KVM that supports KVM Userfault, inside a machine that
/// QEMU emulates.
#[derive(Debug, Parser)]
#[command(name = "cargo lab", version)]
pub(crate) struct Cli {
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
        #[command(flatten)]
        kernel: Kernel,
        /// Prepare the Linux guests that tests boot: the lab's own kernel, or Debian's as well; first of
        /// the arguments
        #[arg(long, env = "LAB_GUESTS", value_name = "lab|all", num_args = 0..=1,
              require_equals = true, default_value = "no", default_missing_value = "all",
              hide_default_value = true)]
        guests: Guests,
        /// Machines that run test binaries at once; each takes one processor and LAB_MEMORY
        #[arg(long, env = "LAB_MACHINES", value_name = "N", default_value_t = NonZero::<usize>::MIN)]
        machines: NonZero<usize>,
        /// Source files of test binaries to leave out: those for which the host is as good, and many
        /// times faster
        #[arg(long, env = "LAB_OMIT", value_name = "FILE", value_delimiter = ' ')]
        omit: Vec<String>,
        /// Arguments of `cargo test`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Build the lab's kernel unless it is in the cache, and print its path
    Kernel(Kernel),
    /// Prepare the Linux guests that tests boot, and print their paths, as NAME=PATH
    Guests(Kernel),
    /// Runs inside the lab, started by its init
    #[command(hide = true)]
    Agent,
}

/// The kernel that the machine boots.
#[derive(Debug, Args)]
pub(crate) struct Kernel {
    /// Kernel to boot: one of the lab's own, by its series, Debian's, or an image, by its path
    #[arg(long, env = "LAB_KERNEL", value_name = "6.12|7|debian|FILE", default_value = "6.12")]
    kernel: Choice,
    /// Build the kernel without any of the lab's patches; tests of what they add are skipped
    #[arg(long, env = "LAB_STOCK", value_parser = FalseyValueParser::new())]
    stock: bool,
}

impl Kernel {
    fn image(&self) -> Result<PathBuf> {
        self.kernel.image(self.stock)
    }

    /// Returns whether the kernel is declared to be without the lab's patches.
    fn is_stock(&self) -> bool {
        self.stock || self.kernel == Choice::Debian
    }

    fn for_guests(&self) -> Build {
        self.kernel.for_guests(self.stock)
    }
}

/// The options of the machine, and the limits of the command.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    kernel: Kernel,
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
    /// Let the command reach servers on the host's loopback, as 10.0.2.2
    #[arg(long, env = "LAB_NETWORK", value_parser = FalseyValueParser::new())]
    network: bool,
    /// Time limit of the command in seconds; no limit by default
    #[arg(long, env = "LAB_TIMEOUT", value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Let the run pass although the lab's kernel reported a WARN, BUG or oops
    #[arg(long, env = "LAB_ALLOW_WARN", value_parser = FalseyValueParser::new())]
    allow_warn: bool,
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
            network: self.network,
            append: self.append.clone(),
            monitor: self.monitor.clone(),
        })
    }
}

impl Cli {
    /// Executes the subcommand; returns the exit status.
    pub(crate) fn execute(self) -> Result<u8> {
        match self.task {
            Task::Run { options, command } => run(&options, command),
            Task::Test { kernel, guests, machines, omit, arguments } => {
                test(&kernel, guests, machines.get(), &omit, &arguments)
            }
            Task::Kernel(kernel) => {
                println!("{}", kernel.image()?.display());
                Ok(0)
            }
            Task::Guests(kernel) => {
                for (name, path) in guests::prepare(Guests::All, kernel.for_guests())? {
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
    let kernel = options.kernel.image()?;
    let out = output_folder()?;
    let mut environment: Vec<_> = env::vars_os()
        // The host's TMPDIR may be read-only in the lab.
        .filter(|(name, _)| {
            !["TMPDIR", "LAB_OUT", "LAB", "LAB_KERNEL", "LAB_STOCK"].iter().any(|own| name == own)
        })
        .collect();
    environment.push(("LAB".into(), "1".into()));
    environment.push(("LAB_KERNEL".into(), kernel.clone().into()));
    if options.kernel.is_stock() {
        environment.push(("LAB_STOCK".into(), "1".into()));
    }
    environment.push(("LAB_OUT".into(), out.clone().into()));
    for (name, path) in guests::prepare(options.guests, options.kernel.for_guests())? {
        environment.retain(|(old, _)| old != name);
        environment.push((name.into(), path.into()));
    }
    let job = Job {
        command,
        environment,
        directory: env::current_dir().context("the working directory could not be found")?.into(),
        out: out.into(),
        network: options.network,
        hugepages: options.hugepages,
        gigapages: options.gigapages,
    };
    let limits = Limits {
        command: options.timeout.map(Duration::from_secs),
        allow_warn: options.allow_warn,
    };
    session::run(&machine, &kernel, &options.kernel.kernel.modules()?, job, &limits)
}

fn test(
    kernel: &Kernel,
    wanted: Guests,
    machines: usize,
    omit: &[String],
    arguments: &[OsString],
) -> Result<u8> {
    refuse_nesting()?;
    // Prepared here once, not again for each test program.
    let guests = guests::prepare(wanted, kernel.for_guests())?;
    // Built now, where its progress is visible, and not during the first test.
    let image = kernel.image()?;
    let stock = if kernel.is_stock() { "1" } else { "" };
    // Debian's needs its modules, too, which each run adds.
    let image = if kernel.kernel == Choice::Debian { "debian".into() } else { image };
    let mut cargo = cargo();
    let lab = env::current_exe().context("the lab's own binary could not be found")?;
    // On a stock kernel tests may be skipped, and are counted.
    if machines > 1 || !omit.is_empty() || kernel.is_stock() {
        let mut environment = vec![
            ("LAB_KERNEL", image.into()),
            ("LAB_STOCK", stock.into()),
            ("LAB_GUESTS", wanted.word().into()),
        ];
        environment.extend(guests.into_iter().map(|(name, path)| (name, path.into())));
        return suite::run(cargo, &lab, machines, omit, arguments, &environment);
    }
    let Some(lab) = lab.to_str() else {
        bail!("{} is no UTF-8: cargo's configuration cannot name it", lab.display());
    };
    // A list in the configuration, because cargo would split the environment variable at spaces.
    let runner = serde_json::to_string(&[lab, "run", "--"])?;
    let status = cargo
        .arg("test")
        .arg("--config")
        .arg(format!("target.'cfg(all())'.runner={runner}"))
        .args(arguments)
        .env("LAB_KERNEL", image)
        .env("LAB_STOCK", stock)
        .env("LAB_GUESTS", wanted.word())
        .envs(guests)
        .status()
        .context("cargo could not be run")?;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(u8::try_from(code).unwrap_or(1))
}

/// Returns cargo, without the variables that `cargo run` has set for this program: build scripts
/// depend on them, as ring's does, and all that links it would be built anew.
fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            cargo.env_remove(&name);
        }
    }
    cargo
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
    use crate::inputs::Base;

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
    fn kernel_is_named_by_series_or_path() {
        let kernel = |arguments| options(arguments).kernel;
        assert_eq!(kernel(&["--kernel", "7"]).kernel, Choice::Base(Base::V7));
        let image = kernel(&["--kernel", "./bzImage", "--stock"]);
        assert_eq!(image.kernel, Choice::File("./bzImage".into()));
        assert!(image.stock);
        assert!(Cli::try_parse_from(["lab", "run", "--kernel", "5.10", "--", "x"]).is_err());
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
