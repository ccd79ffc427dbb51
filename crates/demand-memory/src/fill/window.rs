// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The number of bytes in flight: how it follows the throughput of the source, and the delay of
//! faults.

use std::time::{Duration, Instant};

use super::delay::{Delays, Strain};
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
///
/// While faults need the source, their delay decides instead: the window grows as long as fill
/// hardly delays them, twofold at first and later by a request at a time. It shrinks by three
/// tenths once their delay is half as long again as without fill. Every 20 seconds it is the
/// smallest for a moment, to see what the delay is without fill. A source that fails halves it.
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
    chunk: u64,
    delays: Delays,
    /// Whether the faults' delay has not limited the window yet.
    is_early: bool,
    /// The window to return to after a look at the source's delay with less in flight, and the time
    /// since which less is.
    probe: Option<(u64, Instant)>,
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
            chunk,
            delays: Delays::default(),
            is_early: true,
            probe: None,
        }
    }

    /// Returns the largest number of bytes in flight.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Notes the delay of a request for a fault.
    pub(crate) fn fault_took(&mut self, delay: Duration, now: Instant) {
        self.delays.add(delay, now);
    }

    /// Notes that a request has failed.
    pub(crate) fn failed(&mut self) {
        // Requests that were in flight together fail together.
        if self.settling == 0 {
            self.probe = None;
            self.shrink_to(self.bytes / 2);
        }
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
                self.delays.restart();
                self.probe = self.probe.map(|(bytes, _)| (bytes, now));
            }
            return;
        }
        self.arrived += bytes;
        let strain = self.delays.strain(now);
        if let Some((bytes, since)) = self.probe {
            if strain == Strain::Unknown || self.delays.has_low_since(since) {
                self.probe = None;
                self.delays.renew_base(now);
                self.return_to(bytes);
            }
            return;
        }
        match strain {
            Strain::Unknown => {}
            _ if self.delays.is_base_old(now) => {
                self.probe = Some((self.bytes, now));
                return self.return_to(self.least);
            }
            Strain::High => {
                self.is_early = false;
                return self.shrink_to(self.bytes / 10 * 7);
            }
            strain => {
                self.is_early &= strain != Strain::Some;
                // All that was in flight has arrived: a round trip.
                if self.arrived >= self.bytes {
                    if strain == Strain::Low {
                        let growth = if self.is_early { self.bytes } else { self.chunk };
                        self.bytes = self.bytes.saturating_add(growth).min(self.most);
                        self.delays.restart();
                    }
                    self.resume_trials();
                    self.begin(now);
                }
                return;
            }
        }
        let time = now.saturating_duration_since(self.begun);
        if self.arrived >= self.bytes && time >= LEAST_TIME {
            let rate = u128::from(self.arrived) * 1_000_000 / time.as_micros().max(1);
            self.measured(u64::try_from(rate).unwrap_or(u64::MAX));
            self.begin(now);
        }
    }

    /// Shrinks the window, since it harms.
    fn shrink_to(&mut self, bytes: u64) {
        let bytes = bytes.clamp(self.least, self.most);
        if bytes < self.bytes {
            self.return_to(bytes);
        }
        self.resume_trials();
    }

    /// Tries a larger window next, once no delay is known.
    fn resume_trials(&mut self) {
        self.phase = Phase::Growing { rate: 0 };
        self.before = self.bytes;
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
        /// The request for a fault, if there are any: when it was made, and its delay.
        fault: Option<(Instant, Duration)>,
        /// The delays of requests for faults, in microseconds.
        delays: Vec<u128>,
    }

    impl Source {
        fn new(latency_ms: u64, rate: u64) -> Self {
            let now = Instant::now();
            let latency = Duration::from_millis(latency_ms);
            let (answers, delays) = Default::default();
            Source { latency, rate, now, busy: now, answers, fault: None, delays }
        }

        /// Ends the request for a fault that is answered by now, and makes the next one. It waits
        /// in one queue with the others.
        fn fault(&mut self, window: &mut Window) {
            let Some((at, delay)) = self.fault.filter(|(at, delay)| *at + *delay <= self.now)
            else {
                return;
            };
            self.delays.push(delay.as_micros());
            window.fault_took(delay, at + delay);
            let delay = self.busy.saturating_duration_since(self.now) + self.latency;
            self.fault = Some((self.now, delay));
        }

        /// Returns the delay, in microseconds, that 99 of 100 of the last requests kept to.
        fn p99(&mut self) -> u128 {
            let mut delays = std::mem::take(&mut self.delays);
            assert!(delays.len() >= 100, "{} delays", delays.len());
            delays.sort_unstable();
            delays[delays.len() * 99 / 100]
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
                self.fault(window);
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
    fn fill_hardly_delays_faults() {
        for (latency, rate) in [(10, 125 * MIB), (50, 125 * MIB), (20, 50 * MIB)] {
            let mut source = Source::new(latency, rate);
            let mut window = adaptive(source.now);
            source.fault = Some((source.now, source.latency));
            source.fetch(&mut window, 512 * MIB);
            source.delays.clear();
            let reached = source.fetch(&mut window, 2048 * MIB);
            let p99 = source.p99();
            let least = u128::from(latency) * 1000;
            println!("{latency} ms, {rate} bytes/s: {reached} bytes/s, p99 {p99} us");
            assert!(reached > rate / 10 * 9, "{latency} ms, {rate} bytes/s: {reached}");
            assert!(p99 < least * 2, "{latency} ms, {rate} bytes/s: {p99} us");
        }
    }

    #[test]
    fn failures_halve_the_window() {
        let mut source = Source::new(50, 200 * MIB);
        let mut window = adaptive(source.now);
        source.fetch(&mut window, 512 * MIB);
        let before = window.bytes();
        window.failed();
        window.failed();
        assert_eq!(window.bytes(), before / 2);
        source.fetch(&mut window, 512 * MIB);
        assert!(window.bytes() > before / 4 * 3, "{} of {before}", window.bytes());
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
