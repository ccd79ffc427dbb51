// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The test binaries of a workspace, run in several machines at once.
//!
//! Cargo runs one test binary after the other, and a machine is emulated by one processor of the
//! host: with a second processor, the same tests take half the time in two machines.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, io};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::cache;

/// The exit status of cargo when a test has failed.
const FAILED: u8 = 101;

/// A test binary.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Binary {
    path: PathBuf,
    /// The folder of its package, in which cargo would run it.
    folder: PathBuf,
    /// The file that it is built from.
    source: String,
}

/// A line of cargo's, as far as it tells of test binaries.
#[derive(Deserialize)]
struct Message {
    reason: String,
    executable: Option<PathBuf>,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Target {
    src_path: PathBuf,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Builds the tests that `arguments` of `cargo test` select and runs each binary by `lab run`, in
/// up to `machines` machines at once. Each binary's output is printed when the binary has ended.
/// All of them run, also after a failure. Returns the exit status.
pub fn run(
    cargo: &OsStr,
    lab: &Path,
    machines: usize,
    arguments: &[OsString],
    environment: &[(&str, OsString)],
) -> Result<u8> {
    let end = arguments.iter().position(|argument| argument == "--").unwrap_or(arguments.len());
    let (selection, rest) = arguments.split_at(end);
    let built = Command::new(cargo)
        .args(["test", "--no-run", "--message-format", "json-render-diagnostics"])
        .args(selection)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("{} could not be run", cargo.display()))?;
    if !built.status.success() {
        return Ok(status_of(built.status));
    }
    // The last first: whole-system tests depend on all else, and take longest.
    let mut binaries: VecDeque<Binary> = binaries(&String::from_utf8_lossy(&built.stdout))?;
    binaries.make_contiguous().reverse();
    ensure!(!binaries.is_empty(), "no test binary is selected by {selection:?}");

    let queue = Mutex::new(binaries);
    let failed = Mutex::new(Vec::new());
    let out = cache::target()?.join("lab-out");
    thread::scope(|scope| {
        for machine in 0..machines {
            let (queue, failed) = (&queue, &failed);
            let out = out.join(machine.to_string());
            scope.spawn(move || {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(binary) = next else { return };
                    let mut command = Command::new(lab);
                    command
                        .args(["run", "--"])
                        .arg(&binary.path)
                        .args(rest.iter().skip(1))
                        .current_dir(&binary.folder)
                        .env("CARGO_MANIFEST_DIR", &binary.folder)
                        .env("LAB_OUT", &out)
                        .envs(environment.iter().cloned());
                    if let Err(error) = run_one(&binary, command) {
                        eprintln!("lab: {}: {error:#}", binary.source);
                        let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                        failed.push(binary.source);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    if failed.is_empty() {
        return Ok(0);
    }
    eprintln!("error: {} test binaries failed:", failed.len());
    failed.iter().for_each(|source| eprintln!("    {source}"));
    Ok(FAILED)
}

/// Runs a binary, and prints its output as one piece.
fn run_one(binary: &Binary, mut command: Command) -> Result<()> {
    let begun = Instant::now();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{} could not be run", binary.path.display()))?;
    let took = begun.elapsed();
    let mut all = io::stdout().lock();
    writeln!(all, "     Running {} ({} s)", binary.source, rounded(took))?;
    all.write_all(&output.stderr)?;
    all.write_all(&output.stdout)?;
    all.flush()?;
    if !output.status.success() {
        bail!("it ended with {}", output.status);
    }
    Ok(())
}

fn rounded(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_millis() >= 500)
}

fn status_of(status: std::process::ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code).unwrap_or(1)
}

/// The test binaries that cargo tells of.
fn binaries(messages: &str) -> Result<VecDeque<Binary>> {
    let top = env::current_dir().context("the working directory could not be found")?;
    let mut found = VecDeque::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Message =
            serde_json::from_str(line).with_context(|| format!("cargo said {line}"))?;
        let Message { reason, executable, manifest_path, target, profile } = message;
        let (Some(path), Some(manifest), Some(target), Some(profile)) =
            (executable, manifest_path, target, profile)
        else {
            continue;
        };
        if reason == "compiler-artifact" && profile.test {
            let folder = manifest.parent().context("a manifest in no folder")?.to_owned();
            let source = target.src_path.strip_prefix(&top).unwrap_or(&target.src_path);
            found.push_back(Binary { path, folder, source: source.display().to_string() });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_binaries_are_found_among_messages() {
        let test = r#"{"reason":"compiler-artifact","manifest_path":"/w/a/Cargo.toml",
            "target":{"src_path":"/w/a/tests/t.rs"},"profile":{"test":true},
            "executable":"/w/target/t-1"}"#;
        let program = test.replace("true", "false");
        let library = test.replace(r#""/w/target/t-1""#, "null");
        let end = r#"{"reason":"build-finished","success":true}"#;
        let lines = [test, &program, &library, end].map(|line| line.replace('\n', ""));
        let found = binaries(&lines.join("\n")).unwrap();
        let binary = Binary {
            path: "/w/target/t-1".into(),
            folder: "/w/a".into(),
            source: "/w/a/tests/t.rs".into(),
        };
        assert_eq!(found, [binary]);
    }
}
