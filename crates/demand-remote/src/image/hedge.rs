// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hedged reads: a request for a fault that is not answered as soon as nearly all others is made
//! once more, within a budget: at another source of the image, or else on a new connection.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::{Either, FutureExt, select};
use tokio::time::sleep;

/// Number of the last answers by which the time of a band is known, and how long they count.
const SAMPLES: usize = 100;
const LAST: Duration = Duration::from_secs(60);

/// Least number of answers that say something.
const ENOUGH: usize = 20;

/// Bands of lengths, each up to four times as long as the one before: from 4 KiB on.
const BANDS: usize = 6;

/// A hedge is made no sooner than this.
const LEAST: Duration = Duration::from_millis(2);

/// One hedge for so many requests, and so many requests saved up at most.
const ONE_FOR: u64 = 20;
const SAVED: u64 = 200;

/// The times of the requests for faults, and the budget of second ones.
#[derive(Debug, Default)]
pub(crate) struct Hedges {
    bands: [Mutex<VecDeque<(Instant, Duration)>>; BANDS],
    /// Requests since those that the hedges have used up.
    saved: AtomicU64,
    made: AtomicU64,
    won: AtomicU64,
    elsewhere: AtomicU64,
}

/// Numbers of hedged reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HedgeStats {
    /// Second requests that were made.
    pub made: u64,
    /// Those that were answered first.
    pub won: u64,
    /// Second requests that were made at another source.
    pub elsewhere: u64,
}

fn band_of(len: u64) -> usize {
    let quarters = (len >> 12).checked_ilog2().map_or(0, |log| log as usize / 2 + 1);
    quarters.min(BANDS - 1)
}

impl Hedges {
    fn band(&self, len: u64) -> MutexGuard<'_, VecDeque<(Instant, Duration)>> {
        self.bands[band_of(len)].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answered(&self, len: u64, took: Duration) {
        let mut band = self.band(len);
        if band.len() == SAMPLES {
            band.pop_front();
        }
        band.push_back((Instant::now(), took));
    }

    /// Returns the time after which a request for `len` bytes is late: the lowest of the time of 99
    /// of 100, 1.25 times that of 95, and 5 times the median.
    fn late_after(&self, len: u64) -> Option<Duration> {
        let band = self.band(len);
        let recent = band.iter().filter(|(at, _)| at.elapsed() < LAST);
        let mut times: Vec<_> = recent.map(|(_, took)| *took).collect();
        drop(band);
        if times.len() < ENOUGH {
            return None;
        }
        times.sort_unstable();
        let percentile = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)];
        let late = percentile(99).min(percentile(95) * 5 / 4).min(percentile(50) * 5);
        Some(late.max(LEAST))
    }

    /// Takes a hedge from the budget.
    fn afford(&self) -> bool {
        let spend = |saved: u64| saved.checked_sub(ONE_FOR);
        self.saved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).is_ok()
    }

    /// Makes a request for `len` bytes, and once more if it is late: that of `elsewhere`, unless it
    /// returns `None`.
    pub(crate) async fn read<T, E, F, G>(
        &self,
        len: u64,
        request: impl Fn() -> F,
        elsewhere: impl Fn() -> Option<G>,
    ) -> Result<T, E>
    where
        F: Future<Output = Result<T, E>>,
        G: Future<Output = Option<T>>,
    {
        let save = |saved: u64| (saved < SAVED).then_some(saved + 1);
        // At the most that can be saved nothing changes.
        let _ = self.saved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, save);
        let begun = Instant::now();
        let got = self.race(len, request, elsewhere).await;
        if got.is_ok() {
            self.answered(len, begun.elapsed());
        }
        got
    }

    async fn race<T, E, F, G>(
        &self,
        len: u64,
        request: impl Fn() -> F,
        elsewhere: impl Fn() -> Option<G>,
    ) -> Result<T, E>
    where
        F: Future<Output = Result<T, E>>,
        G: Future<Output = Option<T>>,
    {
        let first = Box::pin(request());
        let Some(late) = self.late_after(len) else { return first.await };
        let first = match select(first, Box::pin(sleep(late))).await {
            Either::Left((got, _)) => return got,
            Either::Right(((), first)) => first,
        };
        if !self.afford() {
            return first.await;
        }
        self.made.fetch_add(1, Ordering::Relaxed);
        // Another source that fails says nothing of this one.
        let second = match elsewhere() {
            Some(other) => {
                self.elsewhere.fetch_add(1, Ordering::Relaxed);
                Either::Left(other.map(|got| got.ok_or(None)))
            }
            None => Either::Right(request().map(|got| got.map_err(Some))),
        };
        let (won, got) = match select(first, Box::pin(second)).await {
            Either::Left((Ok(got), _)) => (false, Ok(got)),
            Either::Right((Ok(got), _)) => (true, Ok(got)),
            // The other one may succeed.
            Either::Left((Err(error), second)) => {
                (true, second.await.map_err(|other| other.unwrap_or(error)))
            }
            Either::Right((Err(_), first)) => (false, first.await),
        };
        if won && got.is_ok() {
            self.won.fetch_add(1, Ordering::Relaxed);
        }
        got
    }

    pub(crate) fn stats(&self) -> HedgeStats {
        let read = |number: &AtomicU64| number.load(Ordering::Relaxed);
        HedgeStats {
            made: read(&self.made),
            won: read(&self.won),
            elsewhere: read(&self.elsewhere),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Ready;

    use super::*;

    #[test]
    fn bands_are_four_times_apart() {
        let bands: Vec<_> = [1, 4095, 4096, 16383, 16384, 65536, 1 << 18, 1 << 20, 1 << 30]
            .into_iter()
            .map(band_of)
            .collect();
        assert_eq!(bands, [0, 0, 1, 1, 2, 3, 4, 5, 5]);
    }

    #[test]
    fn late_is_what_few_requests_are() {
        let hedges = Hedges::default();
        for number in 0..SAMPLES {
            assert_eq!(hedges.late_after(4096).is_some(), number >= ENOUGH);
            let slow = number % 50 == 49;
            hedges.answered(4096, Duration::from_millis(if slow { 3000 } else { 10 }));
        }
        // The median: 5 times 10 ms, or 1.25 times the percentile 95.
        assert_eq!(hedges.late_after(4096), Some(Duration::from_micros(12_500)));
        assert_eq!(hedges.late_after(1 << 20), None);
    }

    #[test]
    fn budget_is_one_in_twenty() {
        let hedges = Hedges::default();
        let request = || async { Ok::<_, ()>(()) };
        for _ in 0..1000 {
            crate::runtime::wait(hedges.read(4096, request, || None::<Ready<_>>)).unwrap();
        }
        assert_eq!((0..1000).filter(|_| hedges.afford()).count(), 10);
    }
}
