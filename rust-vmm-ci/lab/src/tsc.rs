// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The frequency of the host's time-stamp counter, which is also that of QEMU's emulated CPUs. The
//! lab's kernel gets it as a parameter, because on a busy host its calibration fails, and without a
//! calibrated counter KVM never enters a guest.

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

/// Duration of the measurement: long enough for an error of a few parts per million.
const SPAN: Duration = Duration::from_millis(20);

/// Measures the frequency, in kHz.
pub(crate) fn khz() -> u64 {
    let (ticks, time) = sample();
    thread::sleep(SPAN);
    let (later_ticks, later_time) = sample();
    frequency(later_ticks.wrapping_sub(ticks), later_time - time)
}

fn frequency(ticks: u64, time: Duration) -> u64 {
    let khz = u128::from(ticks) * 1_000_000 / time.as_nanos().max(1);
    khz.try_into().unwrap_or(u64::MAX)
}

/// Reads the counter and the time several times, and returns the pair that was read in the shortest
/// interval.
fn sample() -> (u64, Instant) {
    let (_, ticks, time) = (0..16)
        .map(|_| {
            let before = now();
            let time = Instant::now();
            let after = now();
            (after.wrapping_sub(before), before, time)
        })
        .min_by_key(|(distance, ..)| *distance)
        .expect("the range is not empty");
    (ticks, time)
}

fn now() -> u64 {
    // SAFETY: every x86-64 CPU has this instruction, and Linux allows it in user mode.
    unsafe { _rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frequency_is_ticks_by_time() {
        assert_eq!(frequency(52_000_000, Duration::from_millis(20)), 2_600_000);
    }

    #[test]
    fn two_measurements_agree() {
        // The kernel may adjust its clock between the two measurements, as it does some seconds
        // after boot.
        let pairs: Vec<_> = (0..5).map(|_| (khz(), khz())).collect();
        let agree = |(one, other): &(u64, u64)| one.abs_diff(*other) < one / 1000;
        assert!(pairs.iter().filter(|pair| agree(pair)).count() >= 3, "{pairs:?}");
    }
}
