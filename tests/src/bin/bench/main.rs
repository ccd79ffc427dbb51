// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Benchmark figures beside their references: `rust-vmm-ci/bench` builds and runs this.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a bench are small")]

mod access;
mod back_end;
mod crates;
mod host;
mod lab;
mod restore;
mod run;
mod table;

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};

use crate::table::{Row, Verdict};

/// Measures the project against bare loops that do the same with minimal code, and against a
/// handler in another process.
#[derive(Debug, Parser)]
#[command(name = "rust-vmm-ci/bench")]
struct Options {
    /// Measure only this part.
    #[arg(long)]
    only: Option<Part>,
    /// Write the rows (a JSON array) to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// End with status 1 if a target was missed or could not be measured.
    #[arg(long)]
    strict: bool,
    #[command(subcommand)]
    task: Option<Task>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// From the start of the process to the guest's first instruction, on this host.
    Restore,
    /// Guest faults in the lab, in instructions.
    Lab,
    /// Back-end faults and the VMM's own accesses, on this host.
    Host,
    /// The crates' own benchmarks.
    Crates,
}

impl Part {
    const fn name(self) -> &'static str {
        match self {
            Part::Restore => "restore",
            Part::Lab => "lab",
            Part::Host => "host",
            Part::Crates => "crates",
        }
    }
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Measure the lab's rows on this machine, which is the lab.
    #[command(hide = true)]
    Inside {
        /// Those by the clock, which does not count instructions.
        #[arg(long)]
        timed: bool,
    },
    /// Start a back-end and serve its faults.
    #[command(hide = true)]
    BackEnd(back_end::Options),
    /// Run as that back-end.
    #[command(hide = true)]
    Touch(back_end::Options),
}

fn main() -> ExitCode {
    let options = Options::parse();
    match execute(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(options: &Options) -> Result<bool> {
    match &options.task {
        Some(Task::Inside { timed }) => {
            let rows = if *timed { lab::timed_rows() } else { lab::rows() };
            println!("{}", serde_json::to_string(&rows?)?);
            return Ok(true);
        }
        Some(Task::BackEnd(options)) => return back_end::serve(options).map(|()| true),
        Some(Task::Touch(options)) => return back_end::touch(options).map(|()| true),
        None => {}
    }
    let mut rows = Vec::new();
    for part in [Part::Restore, Part::Lab, Part::Host, Part::Crates] {
        if options.only.is_some_and(|only| only != part) {
            continue;
        }
        eprintln!("measuring: {} ...", part.name());
        let measured = match part {
            Part::Restore => restore::rows(),
            Part::Lab => in_lab(),
            Part::Host => host::rows(),
            Part::Crates => crates::rows(),
        };
        // The other parts are useful even without this one.
        rows.extend(measured.unwrap_or_else(|error| {
            vec![Row::unavailable(part.name(), "all of it", format!("{error:#}"))]
        }));
    }
    table::print(&rows);
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_string_pretty(&rows)? + "\n")
            .with_context(|| format!("write the rows to {}", path.display()))?;
    }
    let failed = |row: &Row| matches!(row.verdict, Verdict::Missed | Verdict::Unavailable);
    Ok(!(options.strict && rows.iter().any(failed)))
}

/// Measures the lab's rows in the lab: instructions, and then times.
fn in_lab() -> Result<Vec<Row>> {
    // One processor: with more, the clock also counts the instructions of idle ones.
    let mut rows = inside(&["--icount", "--cpus", "1"], &[])?;
    // A service thread has a processor of its own here, as it would on a real host.
    rows.extend(inside(&["--cpus", "2"], &["--timed"])?);
    Ok(rows)
}

/// Measures in a lab with these options.
fn inside(lab_options: &[&str], options: &[&str]) -> Result<Vec<Row>> {
    let this = std::env::current_exe()?;
    let lab = this.with_file_name("lab");
    let output = Command::new(&lab)
        .arg("run")
        .args(lab_options)
        .args(["--memory", "2G", "--hugepages", "200"])
        .args(["--gigapages", "0", "--timeout", "800", "--"])
        .arg(&this)
        .arg("inside")
        .args(options)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("start {}; cargo build --workspace makes it", lab.display()))?;
    ensure!(output.status.success(), "the lab ended with {}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}
