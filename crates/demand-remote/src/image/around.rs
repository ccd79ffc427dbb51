// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fetch-around: how many chunks beside a demanded one are worth fetching with it.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

/// Chunks beside a demanded one that a [`RemoteImage`](super::RemoteImage) fetches as well, with
/// the priority of background fill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FetchAround {
    /// None.
    #[default]
    Off,
    /// As many as the store delivers in about a round trip, up to 16; fewer while less than a
    /// quarter of their pages gets used, and none while that does not help. None, either, from a
    /// store that answers within a millisecond.
    Auto,
    /// This number of bytes of the image, as whole chunks.
    Bytes(u64),
}

/// The use of fetch-around so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AroundStats {
    /// Pages that were requested though no fault had asked for them.
    pub extra_pages: u64,
    /// Those of them that were read later, by a fault or by background fill.
    pub used_pages: u64,
}

/// Most chunks for one demanded chunk.
const MOST: u64 = 16;

/// The number with which [`FetchAround::Auto`] begins.
const FIRST: u64 = 4;

/// Least time of a round trip that fetch-around helps with.
const LEAST_TRIP: Duration = Duration::from_millis(1);

/// The rate of a connection, in bytes per second, until it is measured.
const USUAL_RATE: f64 = 100e6;

/// Least length of an answer that shows the rate, in bytes.
const LONG: u64 = 128 << 10;

/// Number of chunks whose use is awaited.
const AWAITED: usize = 32;

/// Number of chunks by whose use the number is chosen.
const JUDGED: u64 = 16;

/// Number of demanded chunks after which fetch-around that was of no use is tried again.
const RETRY: u64 = 256;

const PAGE: u64 = 4096;

/// The choice of the chunks that are fetched with a demanded one.
#[derive(Debug)]
pub(crate) struct Around {
    mode: FetchAround,
    /// Bytes of a chunk of the image.
    chunk_size: u64,
    /// The most chunks that are worth it, and the demanded chunks until another trial without any.
    most: u64,
    rest: u64,
    /// The time of a round trip, the rate of a connection, and the length of a stored chunk.
    trip: Option<Duration>,
    rate: f64,
    stored: f64,
    /// The chunks whose use is awaited, with the bytes used so far.
    awaited: HashMap<u64, u64>,
    order: VecDeque<u64>,
    /// Chunks that were judged since the last choice, and their pages that were used.
    judged: u64,
    judged_pages: u64,
    /// The chunks that were fetched once, 64 to a word: they are not worth a request that no fault
    /// asks for.
    fetched: HashMap<u64, u64>,
    stats: AroundStats,
}

impl Around {
    pub(crate) fn new(mode: FetchAround, chunk_size: u64) -> Self {
        let (awaited, order, fetched, stats) = Default::default();
        Around {
            mode,
            chunk_size,
            most: FIRST,
            rest: 0,
            trip: None,
            rate: USUAL_RATE,
            stored: chunk_size as f64,
            awaited,
            order,
            judged: 0,
            judged_pages: 0,
            fetched,
            stats,
        }
    }

    /// Returns how many chunks to fetch with one that a fault needs.
    pub(crate) fn count(&mut self) -> u64 {
        match self.mode {
            FetchAround::Off => 0,
            FetchAround::Bytes(bytes) => bytes.div_ceil(self.chunk_size),
            FetchAround::Auto => {
                let Some(trip) = self.trip.filter(|trip| *trip >= LEAST_TRIP) else { return 0 };
                if self.most == 0 {
                    self.rest = self.rest.saturating_sub(1);
                    if self.rest > 0 {
                        return 0;
                    }
                    self.most = 1;
                    // The trial is judged by its own chunks.
                    self.awaited.clear();
                    self.order.clear();
                    (self.judged, self.judged_pages) = (0, 0);
                }
                let bytes = trip.as_secs_f64() * self.rate;
                let fits = |count: &u64| *count as f64 * self.stored <= bytes;
                (1..=MOST).rev().find(fits).unwrap_or(1).min(self.most)
            }
        }
    }

    /// Notes that a chunk is requested beside a demanded one.
    pub(crate) fn requested(&mut self, chunk: u64) {
        self.stats.extra_pages += self.chunk_size / PAGE;
        if self.awaited.insert(chunk, 0).is_none() {
            self.order.push_back(chunk);
        }
        if self.order.len() > AWAITED
            && let Some(oldest) = self.order.pop_front()
        {
            let used = self.awaited.remove(&oldest).unwrap_or(0);
            self.judge(used.min(self.chunk_size) / PAGE);
        }
    }

    /// Notes that bytes of a chunk were read.
    pub(crate) fn used(&mut self, chunk: u64, bytes: usize) {
        let Some(used) = self.awaited.get_mut(&chunk) else { return };
        let before = *used;
        *used = (before + bytes as u64).min(self.chunk_size);
        self.stats.used_pages += (*used - before) / PAGE;
    }

    fn judge(&mut self, used_pages: u64) {
        self.judged += 1;
        self.judged_pages += used_pages;
        if self.judged < JUDGED {
            return;
        }
        let extra = self.judged * (self.chunk_size / PAGE);
        if self.judged_pages * 4 < extra {
            self.most /= 2;
            self.rest = RETRY;
        } else if self.judged_pages * 2 >= extra {
            self.most = (self.most * 2).min(MOST);
        }
        (self.judged, self.judged_pages) = (0, 0);
    }

    /// Notes an answer of this length, in bytes, to a request for so many chunks.
    pub(crate) fn answered(&mut self, len: u64, chunks: usize, took: Duration) {
        let stored = len as f64 / chunks.max(1) as f64;
        self.stored += (stored - self.stored) / 8.0;
        if len < LONG {
            // The lowest, which rises slowly if the others do.
            let trip = self.trip.map_or(took, |trip| (trip + trip / 64).min(took));
            self.trip = Some(trip);
        } else {
            let trip = self.trip.unwrap_or_default();
            let transfer = took.saturating_sub(trip).max(took / 8);
            let rate = len as f64 / transfer.as_secs_f64().max(1e-6);
            self.rate += (rate - self.rate) / 4.0;
        }
    }

    /// Notes that a chunk was fetched.
    pub(crate) fn fetched(&mut self, chunk: u64) {
        if self.mode != FetchAround::Off {
            *self.fetched.entry(chunk / 64).or_default() |= 1 << (chunk % 64);
        }
    }

    /// Returns whether a chunk was fetched before.
    pub(crate) fn was_fetched(&self, chunk: u64) -> bool {
        self.fetched.get(&(chunk / 64)).is_some_and(|word| word >> (chunk % 64) & 1 == 1)
    }

    pub(crate) fn stats(&self) -> AroundStats {
        self.stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 64 << 10;

    fn auto(trip: Duration) -> Around {
        let mut around = Around::new(FetchAround::Auto, CHUNK);
        (0..64).for_each(|_| around.answered(20_000, 1, trip));
        around
    }

    /// Fetches around one chunk after another, of whose neighbours so many bytes get used.
    fn run(around: &mut Around, chunks: &mut std::ops::RangeFrom<u64>, used: usize) -> u64 {
        let mut fetched = 0;
        for _ in 0..RETRY / 2 {
            for _ in 0..around.count() {
                let chunk = chunks.next().unwrap();
                around.requested(chunk);
                around.used(chunk, used);
                fetched += 1;
            }
        }
        fetched
    }

    #[test]
    fn useless_neighbours_are_left_out() {
        let mut around = auto(Duration::from_millis(10));
        let mut chunks = 0..;
        assert_eq!(around.count(), FIRST);
        run(&mut around, &mut chunks, 65536);
        assert_eq!(around.count(), MOST);
        let wasted = run(&mut around, &mut chunks, 4096);
        assert_eq!(around.count(), 0);
        assert!(wasted < 150, "{wasted}");
        // One trial, and then none for as long.
        assert!(run(&mut around, &mut chunks, 4096) < 2 * JUDGED);
        run(&mut around, &mut chunks, 65536);
        run(&mut around, &mut chunks, 65536);
        assert!(around.count() > 0);
    }

    #[test]
    fn near_store_needs_no_neighbours() {
        assert_eq!(auto(Duration::from_micros(900)).count(), 0);
        let mut around = auto(Duration::from_millis(2));
        // A connection delivers 20 KB in a round trip: one chunk.
        (0..64).for_each(|_| around.answered(200_000, 10, Duration::from_millis(22)));
        assert_eq!(around.count(), 1);
        let mut fixed = Around::new(FetchAround::Bytes(CHUNK * 3 / 2), CHUNK);
        assert_eq!(fixed.count(), 2);
        assert_eq!(Around::new(FetchAround::Off, CHUNK).count(), 0);
    }

    #[test]
    fn pages_are_counted_once() {
        let mut around = auto(Duration::from_millis(10));
        around.requested(7);
        (0..20).for_each(|_| around.used(7, 4096));
        around.used(8, 4096);
        assert_eq!(around.stats(), AroundStats { extra_pages: 16, used_pages: 16 });
        around.fetched(7);
        assert!(around.was_fetched(7) && !around.was_fetched(8));
    }
}
