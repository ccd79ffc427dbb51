// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The choice of the failed fetches that are logged, so that a source that is away fills no disk.

use std::time::{Duration, Instant};

use crate::Failure;

/// The time in which a group of pages is logged once.
const EVERY: Duration = Duration::from_secs(10);
/// Size of a group of pages, in bytes.
const GROUP: u64 = 1 << 20;
/// Maximum number of lines in that time.
const MOST: usize = 8;

/// The failures of the last seconds that were logged.
#[derive(Default)]
pub(crate) struct FailureLog {
    logged: Vec<(Group, Instant)>,
    /// Number of failures since the last line that were not logged.
    hidden: u64,
}

/// The failures of which one line is enough.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Group {
    number: u64,
    unanswered: bool,
    wanted: bool,
    given_up: bool,
}

impl FailureLog {
    /// Returns whether a failure at this time must be logged: the number of those that were not
    /// since the last line.
    pub(crate) fn admit(&mut self, failure: &Failure<'_>, now: Instant) -> Option<u64> {
        let Failure { image_offset, attempts, wanted, given_up, .. } = *failure;
        let (number, unanswered) = (image_offset / GROUP, attempts == 0);
        let group = Group { number, unanswered, wanted, given_up };
        self.logged.retain(|(_, at)| now.duration_since(*at) < EVERY);
        if self.logged.len() >= MOST || self.logged.iter().any(|(logged, _)| *logged == group) {
            self.hidden += 1;
            return None;
        }
        self.logged.push((group, now));
        Some(std::mem::take(&mut self.hidden))
    }
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use demand_source::Retry;

    use super::*;
    use crate::PageRange;

    fn failure(image_offset: u64, wanted: bool) -> Failure<'static> {
        Failure {
            error: &fmt::Error,
            image_offset,
            pages: PageRange::new(1, 2),
            attempts: 3,
            waiting: Duration::from_millis(1250),
            wanted,
            given_up: false,
            retry: Retry::Later,
        }
    }

    #[test]
    fn repeated_failures_are_logged_seldom() {
        let (mut log, begun) = (FailureLog::default(), Instant::now());
        assert_eq!(log.admit(&failure(4096, false), begun), Some(0));
        for tenth in 1..100 {
            let now = begun + tenth * Duration::from_millis(100);
            assert_eq!(log.admit(&failure(8192, false), now), None);
        }
        assert_eq!(log.admit(&failure(4096, false), begun + EVERY), Some(99));
        // A thread that begins to wait is news.
        assert_eq!(log.admit(&failure(4096, true), begun + EVERY), Some(0));
        let others = (1..100).map(|number| failure(number * GROUP, false));
        let lines = others.filter(|other| log.admit(other, begun + EVERY).is_some()).count();
        assert_eq!(lines, MOST - 2);
        assert_eq!(log.admit(&failure(0, true), begun + 2 * EVERY), Some(99 - lines as u64));
    }

    #[test]
    fn failure_is_one_line() {
        let error = fmt::Error;
        let text = |attempts, wanted| {
            Failure { attempts, ..failure(4096, wanted) }
                .to_string()
                .replace(&error.to_string(), "cannot read")
        };
        let first = "cannot read (2 pages from offset 4096, attempt 1; a thread waits)";
        assert_eq!(text(1, true), first);
        let third = "cannot read (2 pages from offset 4096, attempt 3 in 1.2 s; no thread waits)";
        assert_eq!(text(3, false), third);
        assert_eq!(text(0, true), "cannot read (2 pages from offset 4096; a thread waits)");
    }
}
