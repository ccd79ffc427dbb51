// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The number of bytes in flight: how it follows the throughput of the source.

use std::time::{Duration, Instant};

use crate::InFlight;

/// Least time of a measurement, so that the scheduler's moods do not decide.
const LEAST_TIME: Duration = Duration::from_millis(20);

/// Least growth of the throughput, in percent, that keeps a doubled window.
const GROWTH: u64 = 10;

/// Largest loss of throughput, in percent, that keeps a window that was made smaller.
const LOSS: u64 = 6;

/// Number of measurements between two trials of another window.
const QUIET: u32 = 6;

/// The state of the search for the smallest window with the full throughput.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The window is twice that which gave `rate`.
    Growing { rate: u64 },
    /// The window is smaller than the one that gave `rate`, by a quarter or several.
    Shrinking { rate: u64 },
    /// The window stays for some measurements. `rate` is the highest of them.
    Quiet { left: u32, rate: u64, next: Trial },
}

/// The window to try after some quiet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trial {
    Larger,
    Smaller,
}

/// The largest number of bytes in flight. It follows the throughput as a congestion window does:
/// it doubles while that raises the throughput, then shrinks while that costs none, and tries both
/// again from time to time. A window larger than needed only lengthens the source's queue, and with
/// it the wait of a fault on a page in flight.
#[derive(Debug)]
pub(crate) struct Window {
    bytes: u64,
    least: u64,
    most: u64,
    phase: Phase,
    /// The window before the current trial.
    before: u64,
    /// Bytes to arrive before the next measurement begins: those that were requested under an
    /// earlier window.
    settling: u64,
    /// Bytes that have arrived since the measurement began.
    arrived: u64,
    begun: Instant,
}

impl Window {
    /// Creates the window for requests of `chunk` bytes.
    pub(crate) fn new(in_flight: InFlight, chunk: u64, now: Instant) -> Self {
        let (bytes, least, most) = match in_flight {
            InFlight::Fixed(bytes) => (bytes, bytes, bytes),
            InFlight::Adaptive { at_most } => {
                let least = chunk.saturating_mul(2).min(at_most);
                (least, least, at_most)
            }
        };
        Window {
            bytes,
            least,
            most,
            phase: Phase::Growing { rate: 0 },
            before: bytes,
            settling: 0,
            arrived: 0,
            begun: now,
        }
    }

    /// Returns the largest number of bytes in flight.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Notes that bytes have arrived after they were in flight.
    pub(crate) fn arrived(&mut self, bytes: u64, now: Instant) {
        if self.least == self.most {
            return;
        }
        if self.settling > 0 {
            self.settling = self.settling.saturating_sub(bytes);
            if self.settling == 0 {
                self.begin(now);
            }
            return;
        }
        self.arrived += bytes;
        let time = now.saturating_duration_since(self.begun);
        if self.arrived >= self.bytes && time >= LEAST_TIME {
            let rate = u128::from(self.arrived) * 1_000_000 / time.as_micros().max(1);
            self.measured(u64::try_from(rate).unwrap_or(u64::MAX));
            self.begin(now);
        }
    }

    fn begin(&mut self, now: Instant) {
        (self.arrived, self.begun) = (0, now);
    }

    /// Chooses the next window after a measurement, in bytes per second.
    fn measured(&mut self, now: u64) {
        let percent = |rate: u64, part: u64| rate / 100 * part;
        match self.phase {
            Phase::Growing { rate } if now >= percent(rate, 100 + GROWTH) => {
                if !self.try_window(self.bytes.saturating_mul(2)) {
                    self.rest(now, Trial::Smaller);
                    return;
                }
                self.phase = Phase::Growing { rate: now };
            }
            Phase::Growing { rate } => {
                self.return_to(self.before);
                // The smallest window with this throughput may lie below.
                self.shrink_from(rate.max(now));
            }
            Phase::Shrinking { rate } if now >= percent(rate, 100 - LOSS) => {
                self.shrink_from(rate);
            }
            Phase::Shrinking { rate } => {
                self.return_to(self.before);
                self.rest(rate, Trial::Larger);
            }
            Phase::Quiet { left: 0, rate, next } => {
                let rate = rate.max(now);
                match next {
                    Trial::Smaller => self.shrink_from(rate),
                    Trial::Larger if self.try_window(self.bytes.saturating_mul(2)) => {
                        self.phase = Phase::Growing { rate };
                    }
                    Trial::Larger => self.rest(0, Trial::Smaller),
                }
            }
            Phase::Quiet { left, rate, next } => {
                // The first measurement replaces that of the trial: the source may have changed.
                let rate = if left == QUIET { now } else { rate.max(now) };
                self.phase = Phase::Quiet { left: left - 1, rate, next };
            }
        }
    }

    fn shrink_from(&mut self, rate: u64) {
        if self.try_window(self.bytes / 4 * 3) {
            self.phase = Phase::Shrinking { rate };
        } else {
            self.rest(rate, Trial::Larger);
        }
    }

    fn rest(&mut self, rate: u64, next: Trial) {
        self.phase = Phase::Quiet { left: QUIET, rate, next };
    }

    /// Changes the window for a trial. Returns false if the bounds leave it as it is.
    fn try_window(&mut self, bytes: u64) -> bool {
        let bytes = bytes.clamp(self.least, self.most);
        let changed = bytes != self.bytes;
        if changed {
            self.before = self.bytes;
            self.return_to(bytes);
        }
        changed
    }

    fn return_to(&mut self, bytes: u64) {
        self.settling = self.bytes;
        self.bytes = bytes;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const CHUNK: u64 = 256 << 10;
    const MIB: u64 = 1 << 20;

    /// A source that answers after `latency`, and no faster than `rate` bytes per second.
    struct Source {
        latency: Duration,
        rate: u64,
        now: Instant,
        /// The time at which the last answer so far ends.
        busy: Instant,
        answers: VecDeque<Instant>,
    }

    impl Source {
        fn new(latency_ms: u64, rate: u64) -> Self {
            let now = Instant::now();
            let latency = Duration::from_millis(latency_ms);
            Source { latency, rate, now, busy: now, answers: VecDeque::new() }
        }

        /// Fetches `bytes` under the window, and returns the bytes per second.
        fn fetch(&mut self, window: &mut Window, bytes: u64) -> u64 {
            let begun = self.now;
            for _ in 0..bytes / CHUNK {
                while (self.answers.len() as u64 + 1) * CHUNK <= window.bytes() {
                    let transfer = Duration::from_nanos(CHUNK * 1_000_000_000 / self.rate);
                    self.busy = self.busy.max(self.now) + transfer;
                    self.answers.push_back(self.busy + self.latency);
                }
                self.now = self.now.max(self.answers.pop_front().expect("a request in flight"));
                window.arrived(CHUNK, self.now);
            }
            let time = self.now.duration_since(begun).as_micros();
            u64::try_from(u128::from(bytes) * 1_000_000 / time).unwrap()
        }
    }

    fn adaptive(now: Instant) -> Window {
        Window::new(InFlight::Adaptive { at_most: 64 * MIB }, CHUNK, now)
    }

    #[test]
    fn window_follows_bandwidth_times_latency() {
        for (latency, rate) in [(50, 200 * MIB), (5, 200 * MIB), (20, 1000 * MIB), (1, 50 * MIB)] {
            let mut source = Source::new(latency, rate);
            let mut window = adaptive(source.now);
            source.fetch(&mut window, 256 * MIB);
            let reached = source.fetch(&mut window, 256 * MIB);
            assert!(reached > rate / 100 * 85, "{latency} ms, {rate} bytes/s: {reached}");
            let product = (rate / 1000 * latency).max(2 * CHUNK);
            let bytes = window.bytes();
            assert!(bytes <= product * 4, "{latency} ms, {rate} bytes/s: {bytes} of {product}");
        }
    }

    #[test]
    fn window_shrinks_with_the_need() {
        let mut source = Source::new(50, 200 * MIB);
        let mut window = adaptive(source.now);
        source.fetch(&mut window, 512 * MIB);
        let large = window.bytes();
        assert!(large > 8 * MIB, "{large}");
        source.latency = Duration::from_millis(1);
        source.fetch(&mut window, 2048 * MIB);
        let small = window.bytes();
        assert!(small < large / 4, "{small} after {large}");
    }

    #[test]
    fn window_keeps_its_bounds() {
        let mut source = Source::new(50, 10_000 * MIB);
        let at_most = 3 * MIB;
        let mut window = Window::new(InFlight::Adaptive { at_most }, CHUNK, source.now);
        for _ in 0..64 {
            source.fetch(&mut window, 4 * MIB);
            assert!((2 * CHUNK..=at_most).contains(&window.bytes()), "{window:?}");
        }
        assert_eq!(window.bytes(), at_most);
        let mut window = Window::new(InFlight::Fixed(MIB), CHUNK, source.now);
        source.fetch(&mut window, 64 * MIB);
        assert_eq!(window.bytes(), MIB);
    }
}
