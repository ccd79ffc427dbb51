// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The test binaries of a workspace, run in several machines at once.
//!
//! Cargo runs one test binary after the other, and a machine is emulated by one processor of the
//! host: with a second processor, the same tests take half the time in two machines.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, io};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::cache;

/// The exit status of cargo when a test has failed.
const FAILED: u8 = 101;

/// Time between two reports of what is running.
const REPORT: Duration = Duration::from_secs(60);

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

/// A test binary in a machine.
#[derive(Clone)]
struct Running {
    source: String,
    begun: Instant,
    /// The file that collects its output.
    log: PathBuf,
}

/// Builds the tests that `arguments` of `cargo test` select and runs each binary that has one by
/// `lab run`, in up to `machines` machines at once. A line tells that a binary starts, and another
/// each minute how far it is; its output is printed when it has ended. All of them run, also after
/// a failure. Those whose source file is in `omit` are left out. Skips, which only a stock kernel
/// permits, are counted at the end. Returns the exit status.
pub(crate) fn run(
    mut cargo: Command,
    lab: &Path,
    machines: usize,
    omit: &[String],
    arguments: &[OsString],
    environment: &[(&str, OsString)],
) -> Result<u8> {
    let end = arguments.iter().position(|argument| argument == "--").unwrap_or(arguments.len());
    let (selection, rest) = arguments.split_at(end);
    let built = cargo
        .args(["test", "--no-run", "--message-format", "json-render-diagnostics"])
        .args(selection)
        .stderr(Stdio::inherit())
        .output()
        .context("cargo could not be run")?;
    if !built.status.success() {
        return Ok(status_of(built.status));
    }
    // The last first: whole-system tests depend on all else, and take longest.
    let mut binaries: VecDeque<Binary> = binaries(&String::from_utf8_lossy(&built.stdout))?;
    binaries.make_contiguous().reverse();
    ensure!(!binaries.is_empty(), "no test binary is selected by {selection:?}");
    for source in omit {
        let before = binaries.len();
        binaries.retain(|binary| binary.source != *source);
        ensure!(binaries.len() < before, "no test binary to leave out has the source {source}");
        println!("     Left out: {source}");
    }
    // Without a test to run, a machine would boot for nothing.
    let test_arguments = rest.get(1..).unwrap_or_default();
    binaries.retain(|binary| {
        let tests = has_tests(binary, test_arguments);
        if !tests {
            println!("     No test is selected in {}", binary.source);
        }
        tests
    });

    let queue = Mutex::new(binaries);
    let failed = Mutex::new(Vec::new());
    let skips = Mutex::new(Skips::default());
    let slots: Vec<_> = (0..machines).map(|_| Mutex::new(None)).collect();
    let out = cache::target()?.join("lab-out");
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    thread::scope(|scope| {
        let (ends, ended) = mpsc::channel();
        for (machine, slot) in slots.iter().enumerate() {
            let (queue, failed, skips, ends) = (&queue, &failed, &skips, ends.clone());
            let log = out.join(format!("{machine}.log"));
            let out = out.join(machine.to_string());
            scope.spawn(move || {
                loop {
                    let Some(binary) = lock(queue).pop_front() else { break };
                    let mut command = Command::new(lab);
                    command
                        .args(["run", "--"])
                        .arg(&binary.path)
                        .args(test_arguments)
                        .current_dir(&binary.folder)
                        .env("CARGO_MANIFEST_DIR", &binary.folder)
                        .env("LAB_OUT", &out)
                        .envs(environment.iter().cloned());
                    let (source, begun) = (binary.source.clone(), Instant::now());
                    let running = Running { source, begun, log: log.clone() };
                    let result = run_one(slot, running, command);
                    *lock(slot) = None;
                    lock(skips).count(&fs::read(&log).unwrap_or_default());
                    if let Err(error) = result {
                        eprintln!("lab: {}: {error:#}", binary.source);
                        lock(failed).push(binary.source);
                    }
                }
                drop(ends);
            });
        }
        drop(ends);
        report(&slots, &ended);
    });
    for (reason, times) in &lock(&skips).0 {
        println!("     Skipped {times} times: {reason}");
    }
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    if failed.is_empty() {
        return Ok(0);
    }
    eprintln!("error: {} test binaries failed:", failed.len());
    failed.iter().for_each(|source| eprintln!("    {source}"));
    Ok(FAILED)
}

/// How often tests were skipped, by reason.
#[derive(Debug, Default, PartialEq, Eq)]
struct Skips(BTreeMap<String, usize>);

impl Skips {
    /// Counts the skips in the output of a binary. A line need not begin with one: libtest prints a
    /// test's name first, and ends the line when the test has ended.
    fn count(&mut self, output: &[u8]) {
        for line in String::from_utf8_lossy(output).lines() {
            if let Some((_, reason)) = line.split_once("SKIPPED: ") {
                *self.0.entry(reason.to_owned()).or_default() += 1;
            }
        }
    }
}

/// Returns whether a binary has a test that `arguments` select. It lists them on the host; if it
/// cannot, the lab will show why.
fn has_tests(binary: &Binary, arguments: &[OsString]) -> bool {
    let listed = Command::new(&binary.path)
        .args(arguments)
        .args(["--list", "--format", "terse"])
        .current_dir(&binary.folder)
        .stdin(Stdio::null())
        .output();
    match listed {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).lines().any(|line| line.ends_with(": test"))
        }
        _ => true,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a binary, and prints its output as one piece.
fn run_one(slot: &Mutex<Option<Running>>, running: Running, mut command: Command) -> Result<()> {
    let Running { source, begun, log } = running.clone();
    println!("     Started {source}");
    let file = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
    command.stdin(Stdio::null()).stderr(file.try_clone()?).stdout(file);
    *lock(slot) = Some(running);
    let status = command.status().context("cannot run the lab")?;
    let mut all = io::stdout().lock();
    writeln!(all, "     Running {source} ({} s)", rounded(begun.elapsed()))?;
    io::copy(&mut File::open(&log)?, &mut all)?;
    all.flush()?;
    if !status.success() {
        bail!("it ended with {status}");
    }
    Ok(())
}

/// Prints each minute which binaries are running, and the last line of each one's output, until all
/// of the senders of `ended` are gone.
fn report(slots: &[Mutex<Option<Running>>], ended: &Receiver<()>) {
    while ended.recv_timeout(REPORT) == Err(RecvTimeoutError::Timeout) {
        for slot in slots {
            if let Some(Running { source, begun, log }) = &*lock(slot) {
                let output = fs::read(log).unwrap_or_default();
                println!(
                    "     For {} s: {source}: {}",
                    begun.elapsed().as_secs(),
                    last_line(&output)
                );
            }
        }
    }
}

/// Returns the last line that is not empty.
fn last_line(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("no output").to_owned()
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
    fn last_line_is_not_empty() {
        assert_eq!(last_line(b"one\ntest two has been running\n\n"), "test two has been running");
        assert_eq!(last_line(b"\n"), "no output");
    }

    #[test]
    fn skips_are_counted_by_reason() {
        let mut skips = Skips::default();
        skips.count(b"test a ... SKIPPED: no X\nSKIPPED: no X\nok\n");
        skips.count(b"SKIPPED: no Y\ntest b ... ok\n");
        let expected = [("no X".to_owned(), 2), ("no Y".to_owned(), 1)];
        assert_eq!(skips, Skips(expected.into()));
    }

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
