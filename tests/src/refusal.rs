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

/// Returns the glitch of an error's line, if it has one: what it cannot do is said twice, or a word
/// of another layer is left in it.
fn glitch(line: &str) -> Option<String> {
    let parts: Vec<&str> = line.split(": ").collect();
    let twice = parts
        .windows(2)
        .find(|pair| pair[0] == pair[1] || pair.iter().all(|part| part.starts_with("cannot ")));
    let foreign = ["SUN_LEN", "Kernel Loader", "failed to load", "..=4294967295", "..=65535"];
    let foreign = foreign.into_iter().find(|word| line.contains(word));
    // An option whose value is wrong: `invalid value 'V' for '--option <X>': --option: ...`.
    let option = parts
        .windows(2)
        .find(|pair| pair[1].starts_with("--") && pair[0].contains(&format!("for '{} ", pair[1])));
    twice
        .or(option)
        .map(|pair| format!("'{}: {}' says it twice", pair[0], pair[1]))
        .or_else(|| foreign.map(|word| format!("'{word}' means nothing to the user")))
}

/// Checks the form of an error of the API: `cannot DO THING: CAUSE; HINT`, with the keys that a
/// client knows, and without options of a command line.
///
/// # Errors
///
/// A description of the difference.
fn has_form(line: &str) -> Result<(), String> {
    if let Some(glitch) = glitch(line) {
        return Err(glitch);
    }
    let cause = line.strip_prefix("cannot ").and_then(|rest| rest.split_once(": "));
    let Some((_, cause)) = cause else { return Err("it does not say 'cannot DO THING: '".into()) };
    match cause.split_once("; ") {
        None | Some((_, "")) => Err("it has no hint".into()),
        Some(_) => match ["--memory", "--cpus", "--kernel", "--vhost-user", "--serial", "--source"]
            .into_iter()
            .find(|option| line.contains(option))
        {
            Some(option) => Err(format!("{option} is not a key")),
            None => Ok(()),
        },
    }
}

/// Checks that the command ends with `status`, with nothing on standard output and with one line on
/// standard error that begins with the program's name and contains all of `words`. Returns the
/// line.
///
/// # Errors
///
/// A description of the difference.
pub fn refusal(command: &mut Command, status: i32, words: &[&str]) -> Result<String, String> {
    let output = run(command, PATIENCE).map_err(|error| format!("{error:#}"))?;
    // A program that is built to measure coverage says as well that it cannot write its counts.
    let lines = output.stderr.lines().filter(|line| !line.starts_with("LLVM Profile Error: "));
    let said = lines.collect::<Vec<_>>().join("\n");
    let said = said.trim_end();
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
    if let Some(glitch) = glitch(said) {
        return wrong(glitch);
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

    /// Checks an error's line of the API or of its client, which must have an error's form and
    /// contain all of `words`.
    pub fn check_line(&mut self, case: &str, line: Result<String, String>, words: &[&str]) {
        match line {
            Ok(line) if line.contains('\n') => {
                self.wrong.push(format!("{case}: that is not one line: {line}"));
            }
            Ok(line) => match words.iter().find(|word| !line.contains(**word)) {
                Some(word) => self.wrong.push(format!("{case}: '{word}' is not in: {line}")),
                None => match has_form(&line) {
                    Ok(()) => println!("{case}: {line:.300}"),
                    Err(why) => self.wrong.push(format!("{case}: {why}: {line}")),
                },
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn form_of_an_error_is_checked() {
        has_form("cannot pause: the VM is paused already; resume it first").unwrap();
        for (line, why) in [
            ("pause: no VMM listens; start one", "cannot DO THING"),
            ("cannot pause", "cannot DO THING"),
            ("cannot pause: the VM is paused", "no hint"),
            ("cannot pause: cannot stop: x; y", "says it twice"),
            ("cannot create a VM: --cpus: 0; give 1", "--cpus is not a key"),
        ] {
            let error = has_form(line).unwrap_err();
            assert!(error.contains(why), "{line}: {error}");
        }
    }
}
