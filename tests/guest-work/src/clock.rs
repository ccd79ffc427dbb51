// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Checks the clocks: CLOCK_MONOTONIC never goes back, on whatever CPU it is read; a CPU's time
//! stamp counter never goes back; no clock jumps unless the jump was announced.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use guest_work::Line;
use rustix::time::{ClockId, clock_gettime};

/// Lower bound of a sane CLOCK_REALTIME: 2020-01-01, in microseconds since 1970.
const SANE_US: i64 = 1_577_836_800_000_000;
/// Maximum drift between CLOCK_REALTIME and CLOCK_MONOTONIC from one beat to the next, in
/// microseconds: neither is corrected here, so the drift is only the time between the two readings.
const APART_US: i64 = 1_000_000;

/// The latest CLOCK_MONOTONIC that any CPU has read, in nanoseconds.
static LATEST: AtomicU64 = AtomicU64::new(0);

/// Reads CLOCK_MONOTONIC in nanoseconds.
///
/// # Errors
///
/// It is behind a value that some CPU read before.
pub(crate) fn monotonic() -> Result<u64, String> {
    let before = LATEST.load(Ordering::SeqCst);
    let now = nanoseconds(ClockId::Monotonic).cast_unsigned();
    if now < before {
        return Err(format!("CLOCK_MONOTONIC went back by {} ns, from {before} ns", before - now));
    }
    LATEST.fetch_max(now, Ordering::SeqCst);
    Ok(now)
}

fn nanoseconds(id: ClockId) -> i64 {
    let time = clock_gettime(id);
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

/// The time stamp counter of the one CPU on which its thread runs.
#[derive(Debug, Default)]
pub(crate) struct Counter(u64);

impl Counter {
    /// Checks that it has not gone back.
    ///
    /// # Errors
    ///
    /// It went back.
    pub(crate) fn check(&mut self) -> Result<(), String> {
        // SAFETY: every x86-64 CPU has the instruction, and nothing in this guest disables it for
        // programs.
        let now = unsafe { std::arch::x86_64::_rdtsc() };
        if now < self.0 {
            return Err(format!("the time stamp counter went back from {} to {now}", self.0));
        }
        self.0 = now;
        Ok(())
    }
}

/// Both clocks at one beat, in microseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reading {
    /// CLOCK_MONOTONIC.
    pub mono_us: u64,
    /// CLOCK_REALTIME since 1970.
    pub real_us: i64,
}

impl Reading {
    /// Reads both.
    ///
    /// # Errors
    ///
    /// CLOCK_MONOTONIC went back.
    pub(crate) fn now() -> Result<Self, String> {
        Ok(Self { mono_us: monotonic()? / 1000, real_us: nanoseconds(ClockId::Realtime) / 1000 })
    }
}

/// Compares each beat's clocks with those of the previous beat.
#[derive(Debug)]
pub(crate) struct Beats {
    last: Reading,
    most_us: u64,
    announced: bool,
}

impl Beats {
    /// Creates a checker for beats that are at most `most` apart.
    ///
    /// # Errors
    ///
    /// The clocks are not sane.
    pub(crate) fn start(most: Duration) -> Result<Self, String> {
        let last = Reading::now()?;
        if last.real_us < SANE_US {
            return Err(format!(
                "CLOCK_REALTIME is {} us since 1970, which is long ago: the machine told the kernel no time of day",
                last.real_us
            ));
        }
        Ok(Self { last, most_us: most.as_micros() as u64, announced: false })
    }

    /// Permits one jump of the clocks.
    pub(crate) fn announce(&mut self) {
        self.announced = true;
    }

    /// Checks this beat's clocks; returns the line for an announced jump.
    ///
    /// # Errors
    ///
    /// They jumped without an announcement.
    pub(crate) fn check(&mut self, now: Reading) -> Result<Option<Line>, String> {
        let mono_us = now.mono_us - self.last.mono_us;
        let real_us = now.real_us - self.last.real_us;
        let apart = real_us - mono_us.cast_signed();
        let jumped = mono_us > self.most_us || apart.abs() > APART_US;
        self.last = now;
        if !jumped {
            return Ok(None);
        }
        if !std::mem::take(&mut self.announced) {
            return Err(format!(
                "CLOCK_MONOTONIC went on by {mono_us} us and CLOCK_REALTIME by {real_us} us between two beats, where at most {} us were right for both",
                self.most_us
            ));
        }
        Ok(Some(Line::Jump { mono_us, real_us }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beats() -> Beats {
        let last = Reading { mono_us: 1_000_000, real_us: SANE_US };
        Beats { last, most_us: 500_000, announced: false }
    }

    fn after(mono_us: u64, real_us: i64) -> Reading {
        Reading { mono_us: 1_000_000 + mono_us, real_us: SANE_US + real_us }
    }

    #[test]
    fn jumps_are_wrong_unless_announced() {
        assert_eq!(beats().check(after(400_000, 400_100)), Ok(None));
        assert!(beats().check(after(500_001, 500_001)).is_err());
        assert!(beats().check(after(400_000, 2_000_000)).is_err());
        assert!(beats().check(after(400_000, -700_000)).is_err());
        let mut beats = beats();
        beats.announce();
        let jump = Line::Jump { mono_us: 400_000, real_us: 9_000_000 };
        assert_eq!(beats.check(after(400_000, 9_000_000)), Ok(Some(jump)));
        // The announcement covered one jump only.
        assert!(beats.check(after(2_000_000, 10_600_000)).is_err());
    }

    #[test]
    fn backward_clock_is_noticed() {
        let now = monotonic().expect("goes on");
        LATEST.store(now + 1_000_000_000_000, Ordering::SeqCst);
        assert!(monotonic().is_err());
        LATEST.store(0, Ordering::SeqCst);
        let mut counter = Counter::default();
        assert_eq!(counter.check(), Ok(()));
        counter.0 = u64::MAX;
        assert!(counter.check().is_err());
    }
}
