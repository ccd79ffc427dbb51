// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Checks a program's response to bad input: one clear line, and the right exit status.

use std::process::Command;
use std::time::Duration;

use crate::process::run;

/// The exit status for an operation that failed.
pub const FAILED: i32 = 1;
/// The exit status when the command line is wrong.
pub const USAGE: i32 = 2;
/// The exit status if this host cannot do what was asked.
pub const HOST: i32 = 3;

/// Time limit for a refusal: the program is emulated, twice, and the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(120);

/// Checks that the command ends with `status`, with nothing on standard output and with one line on
/// standard error that begins with the program's name and contains all of `words`. Returns the
/// line.
///
/// # Errors
///
/// A description of the difference.
pub fn refusal(command: &mut Command, status: i32, words: &[&str]) -> Result<String, String> {
    let output = run(command, PATIENCE).map_err(|error| format!("{error:#}"))?;
    let said = output.stderr.trim_end();
    let wrong = |what: String| Err(format!("{what}; it said: {said}"));
    if output.status.code() != Some(status) {
        return wrong(format!("it ended with {} instead of {status}", output.status));
    }
    if !output.stdout.is_empty() {
        return wrong(format!("it wrote to standard output: {}", output.stdout));
    }
    let program = command.get_program().to_string_lossy().into_owned();
    let name = program.rsplit('/').next().unwrap_or_default();
    if said.lines().count() != 1 || !said.starts_with(&format!("{name}: ")) {
        return wrong(format!("that is not one line of {name}'s"));
    }
    match words.iter().find(|word| !said.contains(**word)) {
        Some(word) => wrong(format!("'{word}' is not in it")),
        None => Ok(said.into()),
    }
}

/// Like [`refusal`], for a test.
///
/// # Panics
///
/// If the check fails.
#[track_caller]
pub fn refused(command: &mut Command, status: i32, words: &[&str]) -> String {
    refusal(command, status, words).unwrap_or_else(|why| panic!("{why}"))
}

/// A series of refusals, which reports all failures at the end.
#[derive(Debug, Default)]
pub struct Refusals {
    wrong: Vec<String>,
}

impl Refusals {
    /// Creates an empty series.
    pub fn new() -> Self {
        Self::default()
    }

    /// Checks one refusal as [`refusal`] does; `case` describes the bad input.
    pub fn check(&mut self, case: &str, command: &mut Command, status: i32, words: &[&str]) {
        match refusal(command, status, words) {
            Ok(line) => println!("{case}: {line:.300}"),
            Err(why) => self.wrong.push(format!("{case}: {why:.2000}")),
        }
    }

    /// Checks an error line from another source, which must contain all of `words`.
    pub fn check_line(&mut self, case: &str, line: Result<String, String>, words: &[&str]) {
        match line {
            Ok(line) if line.contains('\n') => {
                self.wrong.push(format!("{case}: that is not one line: {line}"));
            }
            Ok(line) => match words.iter().find(|word| !line.contains(**word)) {
                Some(word) => self.wrong.push(format!("{case}: '{word}' is not in: {line}")),
                None => println!("{case}: {line:.300}"),
            },
            Err(why) => self.wrong.push(format!("{case}: {why}")),
        }
    }

    /// Records a failure.
    pub fn wrong(&mut self, case: &str, why: &str) {
        self.wrong.push(format!("{case}: {why}"));
    }

    /// Ends the series.
    ///
    /// # Panics
    ///
    /// If a check failed.
    #[track_caller]
    pub fn end(self) {
        assert!(
            self.wrong.is_empty(),
            "{} are wrong:\n{}",
            self.wrong.len(),
            self.wrong.join("\n")
        );
    }
}
