// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The delay of requests for faults, compared with the one that an idle source has.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The time for which a median counts as that of the idle source.
const BASE_LASTS: Duration = Duration::from_secs(30);

/// The age of the lowest median from which on an idle source's is looked for anew.
const BASE_AGES: Duration = Duration::from_secs(20);

/// The time after the last request for a fault from which on no delay is known.
const LAPSE: Duration = Duration::from_secs(1);

/// Most delays of which the median is taken. Medians are compared, since a few requests are
/// answered sooner than the source can: by a cache, or with one that was on its way.
const GROUP: usize = 8;

/// Least number of delays whose median counts.
const ENOUGH: usize = 4;

/// A delay above the base that is noise, whatever the ratio.
const NOISE: Duration = Duration::from_micros(500);

/// How far background fill delays faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Strain {
    /// No fault has needed the source lately.
    Unknown,
    /// Too few have with as many bytes in flight as now.
    Unsure,
    /// Less than 1.3 times the delay of an idle source.
    Low,
    /// Up to 1.5 times.
    Some,
    /// More than 1.5 times.
    High,
}

/// The delays of requests for faults.
#[derive(Debug, Default)]
pub(super) struct Delays {
    /// The last delays since the bytes in flight have changed.
    recent: VecDeque<Duration>,
    /// Medians, each with its time; later ones are higher.
    lows: VecDeque<(Instant, Duration)>,
    last: Option<Instant>,
}

impl Delays {
    /// Adds the delay of a request that was answered by now.
    pub(super) fn add(&mut self, delay: Duration, now: Instant) {
        self.last = Some(now);
        if self.recent.len() == GROUP {
            self.recent.pop_front();
        }
        self.recent.push_back(delay);
        if self.recent.len() < ENOUGH {
            return;
        }
        let median = self.median();
        while self.lows.back().is_some_and(|(_, before)| *before >= median) {
            self.lows.pop_back();
        }
        self.lows.push_back((now, median));
        while self.lows.front().is_some_and(|(at, _)| now.duration_since(*at) > BASE_LASTS) {
            self.lows.pop_front();
        }
    }

    /// Returns whether the lowest median will soon be forgotten.
    pub(super) fn is_base_old(&self, now: Instant) -> bool {
        let age = self.lows.front().map(|(at, _)| now.saturating_duration_since(*at));
        age.is_some_and(|age| age > BASE_AGES)
    }

    /// Forgets the lowest median if it is old.
    pub(super) fn renew_base(&mut self, now: Instant) {
        if self.is_base_old(now) {
            self.lows.pop_front();
        }
    }

    /// Returns whether a median was taken since then.
    pub(super) fn has_low_since(&self, then: Instant) -> bool {
        self.lows.back().is_some_and(|(at, _)| *at > then)
    }

    /// Forgets the recent delays, since the bytes in flight are others now.
    pub(super) fn restart(&mut self) {
        self.recent.clear();
    }

    /// Returns the median of the recent delays.
    fn median(&self) -> Duration {
        let mut delays: Vec<_> = self.recent.iter().copied().collect();
        delays.sort_unstable();
        delays.get(delays.len() / 2).copied().unwrap_or_default()
    }

    /// Returns how far the requests for faults are delayed.
    pub(super) fn strain(&self, now: Instant) -> Strain {
        let is_recent = self.last.is_some_and(|last| now.saturating_duration_since(last) < LAPSE);
        if !is_recent {
            return Strain::Unknown;
        }
        let (Some((_, base)), true) = (self.lows.front(), self.recent.len() >= ENOUGH) else {
            return Strain::Unsure;
        };
        let delay = self.median();
        if delay < *base + *base * 3 / 10 || delay < *base + NOISE {
            Strain::Low
        } else if delay <= *base * 3 / 2 {
            Strain::Some
        } else {
            Strain::High
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_are_compared_with_the_lowest() {
        let begun = Instant::now();
        let mut delays = Delays::default();
        assert_eq!(delays.strain(begun), Strain::Unknown);
        let add = |delays: &mut Delays, second: u64, millis: u64| {
            let now = begun + Duration::from_secs(second);
            for _ in 0..GROUP * 8 {
                delays.add(Duration::from_millis(millis), now);
            }
            delays.strain(now)
        };
        for (millis, strain) in
            [(10, Strain::Low), (12, Strain::Low), (14, Strain::Some), (16, Strain::High)]
        {
            assert_eq!(add(&mut delays, 0, millis), strain, "{millis}");
        }
        // The base is forgotten.
        assert_eq!(add(&mut delays, 29, 16), Strain::High);
        assert_eq!(add(&mut delays, 31, 16), Strain::Low);
        assert_eq!(delays.strain(begun + Duration::from_secs(33)), Strain::Unknown);
    }
}
