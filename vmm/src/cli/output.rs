// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The output of commands: reports, lines, and errors in the command line.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use clap::error::ErrorKind;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use crate::cli::error::CliError;
use crate::error::Error;
use crate::report::Report;
use crate::report::outputs::Outputs;

/// Options for the report of a run.
#[derive(Clone, Debug, Args)]
pub struct OutputArgs {
    /// Name of the run in its report [default: run].
    #[arg(long)]
    pub stage: Option<String>,
    /// Write the report (JSON) to this file.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Draw a timeline of the pages (SVG) to this file.
    #[arg(long, value_name = "FILE")]
    pub timeline: Option<PathBuf>,
    /// Print the report as JSON instead of a table.
    #[arg(long)]
    pub json: bool,
    /// Report the number of present pages on standard error from time to time.
    #[arg(long)]
    pub progress: bool,
}

impl OutputArgs {
    /// Returns the name of the run.
    pub fn stage(&self) -> &str {
        self.stage.as_deref().unwrap_or("run")
    }

    /// Returns the name of one of these options that is given.
    pub(crate) fn given(&self) -> Option<&'static str> {
        let OutputArgs { stage, report, timeline, json, progress } = self;
        let given = [
            ("--stage", stage.is_some()),
            ("--report", report.is_some()),
            ("--timeline", timeline.is_some()),
            ("--json", *json),
            ("--progress", *progress),
        ];
        given.into_iter().find_map(|(name, given)| given.then_some(name))
    }

    /// Returns the files of the report, which are checked, and must not be among `inputs`.
    ///
    /// # Errors
    ///
    /// One line that names the option, if a file cannot be written or is an input.
    pub fn files(&self, inputs: &[&Path]) -> Result<Outputs, Error> {
        self.timeline.iter().try_for_each(|path| check_picture(path))?;
        let mut files = Outputs::default();
        for (option, path) in [("--report", &self.report), ("--timeline", &self.timeline)] {
            path.iter().try_for_each(|path| files.add(option, path, inputs))?;
        }
        Ok(files)
    }
}

/// Formats of pictures other than SVG, as endings of files.
const OTHER_PICTURES: [&str; 8] = ["png", "jpg", "jpeg", "gif", "webp", "bmp", "pdf", "ps"];

/// Refuses a file for the timeline whose ending promises another format than SVG.
fn check_picture(path: &Path) -> Result<(), CliError> {
    let ending = path.extension().unwrap_or_default();
    match OTHER_PICTURES.iter().any(|other| ending.eq_ignore_ascii_case(other)) {
        true => Err(CliError::NotSvg { path: path.into() }),
        false => Ok(()),
    }
}

/// The destinations and formats of a run's report.
#[derive(Debug)]
pub struct Output {
    /// The files of the report (`--report`, JSON) and of its picture (`--timeline`, SVG), as far as
    /// they were given.
    pub files: Outputs,
    /// Whether the report is printed as JSON, instead of a table.
    pub json: bool,
}

/// How long the table waits for room in the standard output, which may be the guest's console, and
/// not be read any more.
const ROOM_WITHIN: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

impl Output {
    /// Writes a report, and its `picture` (SVG). A destination that fails does not keep the report
    /// from the others; standard output comes first.
    ///
    /// # Errors
    ///
    /// Returns a one-line error that names the first such destination; the others are logged.
    pub fn write(
        &mut self,
        report: &Report,
        picture: impl FnOnce() -> String,
    ) -> Result<(), Error> {
        let json = to_json(report)? + "\n";
        let printed = if self.json { print(&json) } else { print_table(&report.table()) };
        let drawn = if self.files.has("--timeline") { picture() } else { String::new() };
        let mut write = |option, content: &str| -> Result<(), Error> {
            Ok(self.files.write(option, content.as_bytes())?)
        };
        let results = [printed, write("--report", &json), write("--timeline", &drawn)];
        let mut errors = results.into_iter().filter_map(Result::err);
        let first = errors.next();
        errors.for_each(|error| log::error!("{error}"));
        first.map_or(Ok(()), Err)
    }
}

/// Writes a table to standard output, unless that is a pipe or a terminal whose reader has stopped
/// reading: the end of a guest must not wait for it.
fn print_table(table: &str) -> Result<(), Error> {
    let stdout = io::stdout();
    let mut ready = [PollFd::new(&stdout, PollFlags::OUT)];
    match poll(&mut ready, Some(&ROOM_WITHIN)) {
        Ok(0) => {
            log::warn!("the table is not printed: standard output is not read; use --report FILE");
            Ok(())
        }
        _ => print(table),
    }
}

/// Writes to standard output, which may be a pipe without a reader.
pub(crate) fn print(text: &str) -> Result<(), Error> {
    let written = io::stdout().write_all(text.as_bytes());
    Ok(written.map_err(|source| CliError::Stdout { source })?)
}

pub(crate) fn to_json(report: &impl Serialize) -> Result<String, Error> {
    let json = serde_json::to_string_pretty(report);
    Ok(json.map_err(|source| CliError::Json { source })?)
}

/// Converts clap's error to one line: its first paragraph, without the tips and the usage below.
/// `example` is a command, for a command line without one.
pub fn usage_error(error: &clap::Error, example: &str) -> Error {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return CliError::NoCommand { example: example.into() }.into();
    }
    let text = error.to_string();
    let first = text.split("\n\n").next().unwrap_or(&text);
    let first = first.strip_prefix("error: ").unwrap_or(first);
    CliError::Usage { error: once(first) }.into()
}

/// Removes the name of the option before the error of its value, if the parser's text names it too:
/// `invalid value 'size=0' for '--memory <MEMORY>': --memory: ...`.
fn once(text: &str) -> String {
    let Some((value, error)) = text.split_once(">': ") else { return text.into() };
    let option = value.rsplit(['\'', ' ']).nth(1).unwrap_or_default();
    match error.strip_prefix(option).and_then(|error| error.strip_prefix(": ")) {
        Some(error) => format!("{value}>': {error}"),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeline_in_another_format_is_refused() {
        for name in ["x.png", "a/x.PDF"] {
            let error = check_picture(Path::new(name)).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("SVG"), "{error}");
        }
        for name in ["x.svg", "png", "/dev/stdout", "x.txt"] {
            assert!(check_picture(Path::new(name)).is_ok(), "{name}");
        }
    }
}
