// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The log, in a file or on standard error, and the messages on standard error. Writing them never
//! blocks a thread, and a guest cannot flood them.
//!
//! Lines go into a bounded queue, and a separate thread writes them. If the output accepts no data,
//! the queue fills up and later lines are lost; a line with their number takes their place.
//! Warnings and errors from one line of code for one target, such as a device, are limited to
//! `BURST` and then to one per `REFILL`; the next one that passes states the number left out.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::collections::HashMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::panic::PanicHookInfo;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use env_logger::{Builder, Env, Target};
use log::{Level, LevelFilter, Log, Metadata, Record};
use rustix::fs::{OFlags, fcntl_setfl};

use crate::error::{Error, Kind};
use crate::spool::{Overflow, Spool};
use crate::sync::LockExt;

/// Number of messages from one place that pass in a row.
const BURST: u32 = 20;

/// Time until one more message passes.
const REFILL: Duration = Duration::from_secs(1);

/// How long the end of the process waits for the writing thread, if standard error has no reader.
const END_WITHIN: Duration = Duration::from_secs(1);

static STDERR: OnceLock<Spool> = OnceLock::new();
static FILE: OnceLock<Spool> = OnceLock::new();
static LOGGER: OnceLock<Logger> = OnceLock::new();

/// The level and the destination of the log.
#[derive(Clone, Debug, Default)]
pub struct LogConfig {
    /// The file to which lines are appended; `None`: standard error.
    pub file: Option<PathBuf>,
    /// The level; `None`: as `RUST_LOG` says, and without it, info in a file and warnings elsewhere.
    pub level: Option<LevelFilter>,
}

/// An error from opening the log's file.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the log to {}: {source}; name a writable file", path.display())]
pub struct LogFileError {
    path: PathBuf,
    source: io::Error,
}

impl From<LogFileError> for Error {
    fn from(error: LogFileError) -> Self {
        Error::of(Kind::Failed, error)
    }
}

/// Sets up the process's log. The caller must do this once, before the first log message and before
/// other threads start.
///
/// # Errors
///
/// [`LogFileError`]
pub fn start(config: &LogConfig) -> Result<(), LogFileError> {
    let mut builder = Builder::new();
    match (config.level, &config.file) {
        (Some(level), _) => builder.filter_level(level),
        (None, None) => builder.parse_env(Env::new().default_filter_or("warn")),
        (None, Some(_)) => builder.parse_env(Env::new().default_filter_or("info")),
    };
    builder.format_timestamp_micros();
    // Without the thread, messages are written directly. The VM needs more threads and will not
    // start.
    if let Ok(spool) = Spool::new(io::stderr(), "log", Overflow::Count) {
        builder.target(Target::Pipe(Box::new(spool.clone())));
        let _ = STDERR.set(spool);
        std::panic::set_hook(Box::new(say_panic));
    }
    if let Some(path) = &config.file {
        let failed = |source| LogFileError { path: path.clone(), source };
        let file = append_to(path).map_err(failed)?;
        let spool = Spool::new(file, "log-file", Overflow::Count).map_err(failed)?;
        builder.target(Target::Pipe(Box::new(spool.clone())));
        let _ = FILE.set(spool);
    }
    let lines = builder.build();
    log::set_max_level(lines.filter());
    let logger = LOGGER.get_or_init(|| Logger { lines, limits: Limits::default() });
    // This fails if another logger was set, which then stays in use.
    let _ = log::set_logger(logger);
    Ok(())
}

/// Opens a file to append to. A FIFO without a reader is refused; opening it would block.
fn append_to(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options.append(true).create(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    fcntl_setfl(&file, OFlags::APPEND)?;
    Ok(file)
}

/// Writes a line to standard error, through the queue.
pub fn say(line: impl fmt::Display) {
    let line = format!("{line}\n");
    match STDERR.get() {
        Some(spool) => drop(spool.clone().write_all(line.as_bytes())),
        None => eprint!("{line}"),
    }
}

/// Reports the error that ends `program` on standard error, and in the log if that is a file.
pub fn say_error(program: &str, error: &Error) {
    say(format_args!("{program}: {error}"));
    if FILE.get().is_some() {
        log::error!("{error}");
    }
}

/// Waits until all log lines are written, for at most a second.
pub fn end() {
    if let Some(logger) = LOGGER.get() {
        logger.say_left_out();
    }
    flush();
}

fn flush() {
    for spool in [&STDERR, &FILE].into_iter().filter_map(OnceLock::get) {
        spool.drain(END_WITHIN);
    }
}

fn say_panic(info: &PanicHookInfo<'_>) {
    let this = thread::current();
    let trace = Backtrace::capture();
    let line = format!("thread '{}' {info}", this.name().unwrap_or("?"));
    if FILE.get().is_some() {
        log::error!("{line}");
    }
    say(line);
    match trace.status() {
        BacktraceStatus::Captured => say(trace),
        _ => say("note: RUST_BACKTRACE=1 shows a backtrace"),
    }
    // A panic of the main thread ends the process.
    flush();
}

struct Logger {
    lines: env_logger::Logger,
    limits: Limits,
}

impl Logger {
    /// Logs, for each place, the number of messages left out since the last one that passed.
    fn say_left_out(&self) {
        for (target, text, left_out) in self.limits.take_left_out() {
            let record = |args: fmt::Arguments<'_>| {
                let mut builder = Record::builder();
                let builder = builder.level(Level::Warn).target(&target);
                self.lines.log(&builder.args(args).build());
            };
            record(format_args!("{left_out} more like this were left out: {text}"));
        }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.lines.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.lines.matches(record) {
            return;
        }
        // A user who enables more than warnings wants all of them.
        if record.level() > Level::Warn {
            return self.lines.log(record);
        }
        match self.limits.pass(record, Instant::now()) {
            None => {}
            Some(0) => self.lines.log(record),
            Some(left_out) => self.lines.log(
                &Record::builder()
                    .metadata(record.metadata().clone())
                    .module_path(record.module_path())
                    .args(format_args!("{} ({left_out} more like it were left out)", record.args()))
                    .build(),
            ),
        }
    }

    fn flush(&self) {
        flush();
    }
}

/// The origin of a message: its target, and the line of code.
type Place = (String, Option<&'static str>, Option<u32>);

/// The remaining messages that a place may log.
struct Bucket {
    left: u32,
    refilled: Instant,
    left_out: u64,
    /// The message that used up the limit.
    text: String,
}

/// The limits of all places. There are at most as many as logging lines of code times devices.
#[derive(Default)]
struct Limits(Mutex<HashMap<Place, Bucket>>);

impl Limits {
    /// Returns `None` if a message may not pass, else the number of messages left out before it.
    fn pass(&self, record: &Record<'_>, now: Instant) -> Option<u64> {
        let place = (record.target().to_owned(), record.file_static(), record.line());
        let mut buckets = self.0.lock_always();
        let new = || Bucket { left: BURST, refilled: now, left_out: 0, text: String::new() };
        let bucket = buckets.entry(place).or_insert_with(new);
        let refills = now.duration_since(bucket.refilled).as_nanos() / REFILL.as_nanos();
        if refills > 0 {
            let refills = u32::try_from(refills).unwrap_or(BURST);
            bucket.left = bucket.left.saturating_add(refills).min(BURST);
            bucket.refilled = now;
        }
        let Some(left) = bucket.left.checked_sub(1) else {
            bucket.left_out += 1;
            return None;
        };
        bucket.left = left;
        if left == 0 {
            bucket.text = record.args().to_string();
        }
        Some(std::mem::take(&mut bucket.left_out))
    }

    fn take_left_out(&self) -> Vec<(String, String, u64)> {
        let mut buckets = self.0.lock_always();
        let silent = buckets.iter_mut().filter(|(_, bucket)| bucket.left_out > 0);
        silent
            .map(|((target, ..), bucket)| {
                (target.clone(), bucket.text.clone(), std::mem::take(&mut bucket.left_out))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_limited_and_counted() {
        let (limits, begin) = (Limits::default(), Instant::now());
        let pass = |target: &str, line, now| {
            let mut record = Record::builder();
            let record = record.target(target).file_static(Some("a.rs")).line(Some(line));
            limits.pass(&record.args(format_args!("it fails")).build(), now)
        };
        let passed: Vec<_> = (0..1000).filter_map(|_| pass("disk0", 1, begin)).collect();
        assert_eq!(passed, vec![0; BURST as usize]);
        // Other devices and other messages are unaffected.
        assert_eq!(pass("disk1", 1, begin), Some(0));
        assert_eq!(pass("disk0", 2, begin), Some(0));
        let later = begin + REFILL * 2;
        let passed: Vec<_> = (0..1000).filter_map(|_| pass("disk0", 1, later)).collect();
        assert_eq!(passed, [1000 - u64::from(BURST), 0]);
        let left_out = limits.take_left_out();
        assert_eq!(left_out, [("disk0".to_string(), "it fails".to_string(), 998)]);
        assert!(limits.take_left_out().is_empty());
        assert_eq!(pass("disk0", 1, later + REFILL * 1000), Some(0));
    }
}
