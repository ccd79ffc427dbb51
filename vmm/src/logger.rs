// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Standard error of the process: what is logged and said there keeps no thread waiting, and a guest
//! cannot fill it.
//!
//! Lines go into a queue of bounded length, and a thread writes them. If standard error takes none,
//! the queue fills up, and later lines are lost; how many were is said in their place. Warnings and
//! errors that come from one line of code for one target, such as a device, are limited to
//! `BURST` and one each `REFILL` after that; the next one says how many were left out.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::collections::HashMap;
use std::fmt;
use std::io::Write;
use std::panic::PanicHookInfo;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use log::{Level, Log, Metadata, Record};

use crate::spool::{Overflow, Spool};

/// Messages of one place that pass in a row.
const BURST: u32 = 20;

/// How long it takes for one more to pass.
const REFILL: Duration = Duration::from_secs(1);

/// How long an end waits until all is written, should nobody read it.
const END_WITHIN: Duration = Duration::from_secs(1);

static STDERR: OnceLock<Spool> = OnceLock::new();
static LOGGER: OnceLock<Logger> = OnceLock::new();

/// Sets up the process's log, with the level and the filters of the variable `RUST_LOG`. To be called
/// once, before anything is logged.
pub fn start() {
    let mut builder =
        env_logger::Builder::from_env(env_logger::Env::new().default_filter_or("warn"));
    builder.format_timestamp_micros();
    // Without a thread it is written as it comes; the VM, which needs some more, will not start.
    if let Ok(spool) = Spool::new(std::io::stderr(), "log", Overflow::Count) {
        builder.target(env_logger::Target::Pipe(Box::new(spool.clone())));
        let _ = STDERR.set(spool);
        std::panic::set_hook(Box::new(say_panic));
    }
    let lines = builder.build();
    log::set_max_level(lines.filter());
    let logger = LOGGER.get_or_init(|| Logger { lines, limits: Limits::default() });
    // It fails if another logger was set, which is then the one.
    let _ = log::set_logger(logger);
}

/// Writes a line to standard error.
pub fn say(line: impl fmt::Display) {
    let line = format!("{line}\n");
    match STDERR.get() {
        Some(spool) => drop(spool.clone().write_all(line.as_bytes())),
        None => eprint!("{line}"),
    }
}

/// Waits until all that was logged is written, for a second at most.
pub fn end() {
    if let Some(logger) = LOGGER.get() {
        logger.say_left_out();
    }
    flush();
}

fn flush() {
    if let Some(spool) = STDERR.get() {
        spool.drain(END_WITHIN);
    }
}

fn say_panic(info: &PanicHookInfo<'_>) {
    let this = thread::current();
    let trace = Backtrace::capture();
    say(format_args!("thread '{}' {info}", this.name().unwrap_or("?")));
    match trace.status() {
        BacktraceStatus::Captured => say(trace),
        _ => say("note: RUST_BACKTRACE=1 shows a backtrace"),
    }
    // It may have been the main thread.
    flush();
}

struct Logger {
    lines: env_logger::Logger,
    limits: Limits,
}

impl Logger {
    /// Says of each place how many of its messages were left out since the last one.
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
        // Whoever asks for more than warnings wants all of it.
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

/// Where a message comes from: its target, and the line of code.
type Place = (String, Option<&'static str>, Option<u32>);

/// The messages that a place may still log.
struct Bucket {
    left: u32,
    refilled: Instant,
    left_out: u64,
    /// Its last message.
    text: String,
}

/// The limits of all places; there are as many as lines of code that log, times devices.
#[derive(Default)]
struct Limits(Mutex<HashMap<Place, Bucket>>);

impl Limits {
    /// Whether a message may pass: then how many before it did not.
    fn pass(&self, record: &Record<'_>, now: Instant) -> Option<u64> {
        let place = (record.target().to_owned(), record.file_static(), record.line());
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Bucket { left: BURST, refilled: now, left_out: 0, text: String::new() };
        let bucket = buckets.entry(place).or_insert_with(new);
        let refills = now.duration_since(bucket.refilled).as_nanos() / REFILL.as_nanos();
        if refills > 0 {
            bucket.left = bucket.left.saturating_add(refills as u32).min(BURST);
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
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
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
        // Neither another device nor another message is concerned.
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
