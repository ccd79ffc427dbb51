// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The progress of long work: a bar on a terminal, and lines on standard error for programs.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::logger;
use crate::report::{duration, micros};

/// Interval between lines, except for the last one.
const LINE_EVERY: Duration = Duration::from_millis(100);

/// The progress of long work. It shows a bar if standard error is a terminal.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    name: &'static str,
    unit: &'static str,
    total: u64,
    begun: Instant,
    lines: Option<Lines>,
}

/// The latest line: its number, and its time.
#[derive(Debug, Default)]
struct Lines {
    last: Option<u64>,
    said: Option<Instant>,
}

impl Progress {
    /// Creates the progress of `name`, as in "memory", over `total` units, which `unit` names, as in
    /// "pages present".
    pub fn new(name: &'static str, unit: &'static str, total: u64) -> Self {
        let target = if io::stderr().is_terminal() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let template = format!(
            "{{prefix}} [{{bar:30}}] {{percent}} %, {{pos}} of {{len}} {unit}, {{eta}} left"
        );
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(name);
        Progress { bar, name, unit, total, begun: Instant::now(), lines: None }
    }

    /// Shows no bar.
    #[must_use]
    pub fn without_bar(self) -> Self {
        self.bar.set_draw_target(ProgressDrawTarget::hidden());
        self
    }

    /// Writes lines to standard error, too, if they are `wanted`.
    #[must_use]
    pub fn with_lines(mut self, wanted: bool) -> Self {
        self.lines = wanted.then(Lines::default);
        self
    }

    /// Sets the number of units that are done.
    pub fn set(&mut self, done: u64) {
        self.bar.set_position(done);
        let Some(lines) = &mut self.lines else { return };
        let is_due = lines.said.is_none_or(|said| said.elapsed() >= LINE_EVERY);
        if lines.last == Some(done) || !is_due && done < self.total {
            return;
        }
        *lines = Lines { last: Some(done), said: Some(Instant::now()) };
        logger::say(self.line(done, self.begun.elapsed()));
    }

    /// Returns the line for work that has taken `elapsed` so far.
    fn line(&self, done: u64, elapsed: Duration) -> String {
        let Progress { name, unit, total, .. } = self;
        let percent = if *total == 0 { 100.0 } else { done as f64 * 100.0 / *total as f64 };
        let left = total.saturating_sub(done);
        let left = match done {
            0 => String::new(),
            _ if left == 0 => String::new(),
            _ => {
                let left = elapsed.as_secs_f64() * left as f64 / done as f64;
                let left = Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX);
                format!(", {} left", duration(micros(left)))
            }
        };
        format!("progress: {name}: {done} of {total} {unit} ({percent:.1} %){left}")
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_says_what_it_counts() {
        let progress = Progress::new("memory", "pages present", 4000);
        for (done, line) in [
            (0, "progress: memory: 0 of 4000 pages present (0.0 %)"),
            (1000, "progress: memory: 1000 of 4000 pages present (25.0 %), 60.0 s left"),
            (4000, "progress: memory: 4000 of 4000 pages present (100.0 %)"),
        ] {
            assert_eq!(progress.line(done, Duration::from_secs(20)), line);
        }
        let empty = Progress::new("verify", "pages", 0);
        assert_eq!(empty.line(0, Duration::ZERO), "progress: verify: 0 of 0 pages (100.0 %)");
    }
}
