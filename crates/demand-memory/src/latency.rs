// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A histogram of latencies that is written without a lock.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use demand_source::to_usize;

/// Each power of two has 2^7 buckets, so that a bucket's middle is within 0.4 % of its values.
const BITS: u32 = 7;

/// Number of buckets for all values of 64 bits: those below 2^7 have one each, and each power of
/// two from there on has 2^7.
const BUCKETS: usize = (64 - BITS as usize + 1) << BITS;

/// The number of times that each latency occurred. Mostly one thread writes it; others may write
/// and read it.
#[derive(Default)]
pub(crate) struct Latencies {
    /// Allocated by the first record: 58 KiB.
    buckets: OnceLock<Box<[AtomicU64]>>,
    /// The longest latency, in nanoseconds.
    max: AtomicU64,
}

impl Latencies {
    #[inline]
    pub(crate) fn record(&self, latency: Duration) {
        let seconds = latency.as_secs().saturating_mul(1_000_000_000);
        let nanos = seconds.saturating_add(latency.subsec_nanos().into());
        let buckets =
            self.buckets.get_or_init(|| (0..BUCKETS).map(|_| AtomicU64::new(0)).collect());
        buckets[bucket_of(nanos)].fetch_add(1, Ordering::Relaxed);
        // Loaded first, because hardly any latency is the longest so far.
        if nanos > self.max.load(Ordering::Relaxed) {
            self.max.fetch_max(nanos, Ordering::Relaxed);
        }
    }
}

fn bucket_of(value: u64) -> usize {
    // The shift that leaves BITS bits after the value's leading one.
    let shift = (u64::BITS - (value | 1 << BITS).leading_zeros()) - BITS - 1;
    ((shift as usize) << BITS) + to_usize(value >> shift)
}

/// Returns the middle of a bucket's values.
fn middle_of(bucket: usize) -> u64 {
    let Some(shift) = (bucket >> BITS).checked_sub(1) else { return bucket as u64 };
    let first = (1 << BITS | (bucket as u64 & ((1 << BITS) - 1))) << shift;
    first + (1 << shift) / 2
}

/// The sum of the latencies of several threads.
pub(crate) struct Sum {
    buckets: Vec<u64>,
    max: u64,
}

impl Sum {
    pub(crate) fn new() -> Self {
        Sum { buckets: vec![0; BUCKETS], max: 0 }
    }

    pub(crate) fn add(&mut self, latencies: &Latencies) {
        let Some(buckets) = latencies.buckets.get() else { return };
        for (sum, count) in self.buckets.iter_mut().zip(buckets) {
            *sum += count.load(Ordering::Relaxed);
        }
        self.max = self.max.max(latencies.max.load(Ordering::Relaxed));
    }

    /// Returns the number of latencies up to each of these bounds, and above the one before it; and
    /// of those above the last one. The bounds rise.
    pub(crate) fn counts(&self, bounds: &[Duration]) -> Vec<u64> {
        let mut counts = vec![0; bounds.len() + 1];
        for (bucket, count) in self.buckets.iter().enumerate().filter(|(_, count)| **count > 0) {
            let middle = Duration::from_nanos(middle_of(bucket));
            counts[bounds.partition_point(|bound| *bound < middle)] += count;
        }
        counts
    }

    /// Returns the sum of all latencies.
    pub(crate) fn total(&self) -> Duration {
        let nanos = self.buckets.iter().enumerate().filter(|(_, count)| **count > 0);
        let nanos = nanos.map(|(bucket, count)| u128::from(middle_of(bucket)) * u128::from(*count));
        Duration::from_nanos(u64::try_from(nanos.sum::<u128>()).unwrap_or(u64::MAX))
    }

    /// Returns the longest latency, in nanoseconds.
    pub(crate) fn max(&self) -> u64 {
        self.max
    }

    /// Returns the time, in nanoseconds, within which `percent` of 100 faults were resolved; 0
    /// without a fault.
    pub(crate) fn percentile(&self, percent: u64) -> u64 {
        let wanted = (self.buckets.iter().sum::<u64>() * percent).div_ceil(100);
        let mut seen = 0;
        let found = self.buckets.iter().position(|count| {
            seen += count;
            *count > 0 && seen >= wanted
        });
        found.map_or(0, |bucket| middle_of(bucket).min(self.max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_has_its_bucket() {
        let mut last = 0;
        let powers = (0..64).flat_map(|power| [(1u64 << power) - 1, 1 << power, (1 << power) + 1]);
        for value in powers.chain([u64::MAX, 1_000_000, 123_456_789]) {
            let bucket = bucket_of(value);
            assert!(bucket < BUCKETS, "{value}");
            let error = middle_of(bucket).abs_diff(value);
            assert!(error as f64 <= value as f64 / 256.0, "{value} is off by {error}");
            assert_eq!(bucket_of(middle_of(bucket)), bucket);
        }
        // Without a gap or a step back.
        for value in 0..100_000 {
            let bucket = bucket_of(value);
            assert!(bucket == last || bucket == last + 1, "{value}");
            last = bucket;
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn latencies_are_counted_between_bounds() {
        let latencies = Latencies::default();
        for micros in [1, 99, 101, 150, 900, 5000] {
            latencies.record(Duration::from_micros(micros));
        }
        let mut sum = Sum::new();
        let bounds = [100, 1000].map(Duration::from_micros);
        assert_eq!(sum.counts(&bounds), [0, 0, 0]);
        sum.add(&latencies);
        assert_eq!(sum.counts(&bounds), [2, 3, 1]);
        assert_eq!(sum.counts(&[]), [6]);
        let (total, expected) = (sum.total().as_nanos(), 6_251_000);
        assert!(total.abs_diff(expected) <= expected / 250, "{total}");
        latencies.record(Duration::MAX);
        sum.add(&latencies);
        assert_eq!(sum.counts(&bounds).iter().sum::<u64>(), 13);
        assert!(sum.total() > Duration::from_secs(18_000_000_000));
    }

    #[test]
    fn percentiles_of_several_threads() {
        let all: [Latencies; 2] = Default::default();
        for micros in 1..=1000 {
            all[to_usize(micros) % 2].record(Duration::from_micros(micros));
        }
        let mut sum = Sum::new();
        assert_eq!((sum.percentile(50), sum.max()), (0, 0));
        all.iter().for_each(|latencies| sum.add(latencies));
        for (percent, expected) in [(50, 500_000), (99, 990_000), (1, 10_000)] {
            let found = sum.percentile(percent);
            assert!(found.abs_diff(expected) <= expected / 250, "{percent} %: {found}");
        }
        assert_eq!(sum.max(), 1_000_000);
        assert!(sum.percentile(100) <= sum.max());
        let longest = Latencies::default();
        longest.record(Duration::MAX);
        sum.add(&longest);
        assert_eq!(sum.max(), u64::MAX);
    }
}
