// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A Linux guest's console as a test follows it: waits for what the guest's program says, and fails
//! as soon as that says that something is wrong.

use std::io::{BufRead, BufReader, Read};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use guest_work::{Beat, Line};

/// Lines of the console that a failure shows.
const TAIL: usize = 40;

/// Follows a console. To tell the guest something, write a [`guest_work::Command`] and an end of
/// line to it.
#[derive(Debug)]
pub struct Console {
    lines: Receiver<String>,
    heard: Vec<String>,
    complaints: Vec<String>,
}

impl Console {
    /// Follows what comes from there, in a thread, so that the guest never waits for the test.
    pub fn follow(from: impl Read + Send + 'static) -> Self {
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            let mut from = BufReader::new(from);
            let mut line = Vec::new();
            while let Ok(1..) = from.read_until(b'\n', &mut line) {
                // A test that is over listens no more; the guest may go on.
                let _ = sender.send(String::from_utf8_lossy(&line).trim_end().to_owned());
                line.clear();
            }
        });
        Self { lines, heard: Vec::new(), complaints: Vec::new() }
    }

    /// Waits for the guest to say something that `wanted` takes, and returns what that makes of it.
    /// Complaints of the kernel are kept for [`Console::complaints`].
    ///
    /// # Panics
    ///
    /// With the end of the console, if that is not said in time, or not before the console ends; and
    /// if the guest says that something is wrong, unless that is wanted.
    pub fn wait<T>(
        &mut self,
        what: &str,
        within: Duration,
        mut wanted: impl FnMut(&Line) -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let text = match self.lines.recv_timeout(left) {
                Ok(text) => text,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("no {what} within {within:?}:\n{}", self.tail())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("the console ended before {what}:\n{}", self.tail())
                }
            };
            let line: Option<Line> = text.parse().ok();
            self.heard.push(text);
            let Some(line) = line else { continue };
            if let Line::Kernel(complaint) = &line {
                self.complaints.push(complaint.clone());
            }
            if let Some(found) = wanted(&line) {
                return found;
            }
            if let Line::Wrong { what, why } = line {
                panic!("the guest says that its {what} is wrong: {why}\n{}", self.tail());
            }
        }
    }

    /// Waits for the guest to be up.
    ///
    /// # Panics
    ///
    /// See [`Console::wait`].
    pub fn ready(&mut self, within: Duration) {
        self.wait("ready guest", within, |line| matches!(line, Line::Ready { .. }).then_some(()));
    }

    /// Waits for so many more beats; returns the last one.
    ///
    /// # Panics
    ///
    /// See [`Console::wait`].
    pub fn beats(&mut self, beats: u64, within: Duration) -> Beat {
        let mut left = beats;
        self.wait("beat", within, |line| match line {
            Line::Beat(beat) => {
                left = left.saturating_sub(1);
                (left == 0).then_some(*beat)
            }
            _ => None,
        })
    }

    /// Waits for the guest to have ended its work and found all of it right; returns how many pages
    /// and records there were.
    ///
    /// # Panics
    ///
    /// If the kernel complained at any time; and see [`Console::wait`].
    pub fn done(&mut self, within: Duration) -> (u64, u64) {
        let done = self.wait("end of the work", within, |line| match line {
            Line::Done { pages, records, .. } => Some((*pages, *records)),
            _ => None,
        });
        assert!(
            self.complaints.is_empty(),
            "the guest's kernel complained: {:#?}",
            self.complaints
        );
        done
    }

    /// What the guest's kernel complained of up to now.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    /// The end of what came from the console.
    pub fn tail(&self) -> String {
        self.heard[self.heard.len().saturating_sub(TAIL)..].join("\n")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    fn console(text: &'static str) -> Console {
        Console::follow(Cursor::new(text))
    }

    #[test]
    fn the_work_is_followed_to_its_end() {
        let mut console = console(
            "[    0.1] booting\r\nguest: ready cpus=2 kernel=6.1\r\n\
             guest: beat 1 pages=1 records=1 mono_us=1 real_us=1\r\n\
             guest: beat 2 pages=5 records=6 mono_us=2 real_us=2\r\n\
             guest: done pages=7 records=8 complaints=0\r\n",
        );
        console.ready(SOON);
        assert_eq!(console.beats(2, SOON).records, 6);
        assert_eq!(console.done(SOON), (7, 8));
    }

    #[test]
    #[should_panic(expected = "its memory is wrong: page 3")]
    fn what_is_wrong_ends_the_test() {
        console("guest: WRONG memory page 3\n").done(SOON);
    }

    #[test]
    fn what_is_wrong_can_be_wanted() {
        let wanted = |line: &Line| matches!(line, Line::Wrong { .. }).then_some(());
        console("guest: WRONG memory page 3\n").wait("wrong memory", SOON, wanted);
    }

    #[test]
    #[should_panic(expected = "complained")]
    fn complaints_of_the_kernel_end_the_test() {
        console("guest: KERNEL BUG: x\nguest: done pages=0 records=0 complaints=1\n").done(SOON);
    }

    #[test]
    #[should_panic(expected = "ended before ready guest")]
    fn a_guest_that_is_gone_ends_the_test() {
        console("[ 1.0] Kernel panic\n").ready(SOON);
    }
}
