// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads per second of `Threaded` over a source with a round trip, by the number of threads and of
//! requests in flight. The ideal is the number of busy threads divided by the round trip.
//!
//! usage: cargo bench -p demand-source --bench threads

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use demand_source::{
    BlockingSource, Chunk, Destination, Extent, PageSource, Priority, Request, SourceError,
    Threaded,
};

const ROUND_TRIP: Duration = Duration::from_millis(10);
const MEASURED: Duration = Duration::from_secs(2);

struct Away;

impl BlockingSource for Away {
    fn size(&self) -> u64 {
        1 << 30
    }
    fn extent(&self, _: u64) -> Result<Extent, SourceError> {
        Ok(Extent::Data { end: 1 << 30 })
    }
    fn read(&self, _: u64, to: &mut Destination<'_>) -> Result<(), SourceError> {
        thread::sleep(ROUND_TRIP);
        to.write_at(0, &vec![7; to.len()]);
        Ok(())
    }
}

/// Keeps `in_flight` requests before the source, and returns how many were answered per second.
fn reads_per_second(threads: usize, in_flight: usize) -> f64 {
    let source = Arc::new(Threaded::new(Away, threads).unwrap());
    let (sender, answers) = mpsc::channel();
    let asked = AtomicU64::new(0);
    let ask = || {
        let offset = asked.fetch_add(1, Ordering::Relaxed) * 4096 % (1 << 30);
        let (destination, _bytes) = Destination::owned(vec![0; 4096]);
        let chunks = vec![Chunk { offset, destination }];
        let sender = sender.clone();
        let request = Request { priority: Priority::Demand, chunks };
        source.submit(request).then(move |outcome| sender.send(outcome).unwrap());
    };
    // All threads are started, and most of them may be idle after that.
    (0..threads).for_each(|_| ask());
    (0..threads).for_each(|_| answers.recv().unwrap().unwrap());
    (0..in_flight).for_each(|_| ask());
    let (begun, mut answered) = (Instant::now(), 0);
    while begun.elapsed() < MEASURED {
        answers.recv().unwrap().unwrap();
        ask();
        answered += 1;
    }
    let rate = f64::from(answered) / begun.elapsed().as_secs_f64();
    (0..in_flight).for_each(|_| answers.recv().unwrap().unwrap());
    rate
}

fn main() {
    for threads in [16, 64, 256] {
        for in_flight in [1, 16, threads, 4 * threads] {
            let ideal = in_flight.min(threads) as f64 / ROUND_TRIP.as_secs_f64();
            let rate = reads_per_second(threads, in_flight);
            println!(
                "{threads:>4} threads, {in_flight:>4} in flight: {rate:>7.0} reads/s of {ideal:>5.0}"
            );
        }
    }
}
