// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a program says to bad input: one clear line, and the exit status that belongs to it.

use std::process::Command;
use std::time::Duration;

use crate::process::run;

/// The exit status when what was asked for was begun and failed.
pub const FAILED: i32 = 1;
/// The exit status when the command line is wrong.
pub const USAGE: i32 = 2;
/// The exit status when this host cannot do what was asked for.
pub const HOST: i32 = 3;

/// How long a refusal may take: it is emulated, twice, and the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(120);

/// Whether the command ends with `status`, nothing on standard output, and one line on standard
/// error that begins with the program's name and has all of `words`; the line.
///
/// # Errors
///
/// What is otherwise.
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

/// As [`refusal`], for a test.
///
/// # Panics
///
/// If it is otherwise.
#[track_caller]
pub fn refused(command: &mut Command, status: i32, words: &[&str]) -> String {
    refusal(command, status, words).unwrap_or_else(|why| panic!("{why}"))
}

/// Many refusals, of which all that are otherwise are told in the end.
#[derive(Debug, Default)]
pub struct Refusals {
    wrong: Vec<String>,
}

impl Refusals {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// One that must be as [`refusal`] has it; `case` is what is wrong with the input.
    pub fn check(&mut self, case: &str, command: &mut Command, status: i32, words: &[&str]) {
        match refusal(command, status, words) {
            Ok(line) => println!("{case}: {line:.300}"),
            Err(why) => self.wrong.push(format!("{case}: {why:.2000}")),
        }
    }

    /// One of another kind, whose line, if there is one, must have all of `words`.
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

    /// One that was not as it must be.
    pub fn wrong(&mut self, case: &str, why: &str) {
        self.wrong.push(format!("{case}: {why}"));
    }

    /// The end.
    ///
    /// # Panics
    ///
    /// If one was not as it must be.
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
