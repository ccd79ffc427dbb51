// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that a thread on each CPU verifies and rewrites repeatedly.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::block::{Block, SIZE, step};
use crate::clock::{self, Counter};
use crate::console::wrong;

/// The third word of a page, which marks it as memory.
const MEMORY: u64 = 0x7972_6f6d_656d;
/// Number of pages between two pauses.
const BATCH: usize = 64;

/// State shared by the threads and their creator.
#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    poke: AtomicBool,
    pages: AtomicU64,
}

/// The running work on memory.
pub(crate) struct Memory {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Part>>,
}

impl Memory {
    /// Starts the work on `bytes` bytes, with a pause after each batch of pages.
    pub(crate) fn start(bytes: u64, rest: Duration) -> Self {
        let shared = Arc::new(Shared::default());
        let cpus = cpus();
        let pages = bytes / SIZE as u64;
        let mut threads = Vec::new();
        for (i, &cpu) in cpus.iter().enumerate() {
            let (i, count) = (i as u64, cpus.len() as u64);
            let numbers = pages * i / count..pages * (i + 1) / count;
            let shared = shared.clone();
            threads.push(thread::spawn(move || {
                pin(cpu);
                let mut part = Part::new(numbers);
                let mut counter = Counter::default();
                let mut batches = 0;
                while !shared.stop.load(Ordering::Relaxed) {
                    if shared.poke.swap(false, Ordering::Relaxed) {
                        part.spoil();
                    }
                    let done = part.batch().unwrap_or_else(|why| wrong("memory", &why));
                    shared.pages.fetch_add(done, Ordering::Relaxed);
                    clock::monotonic().unwrap_or_else(|why| wrong("clock", &why));
                    counter
                        .check()
                        .unwrap_or_else(|why| wrong("clock", &format!("{why} on CPU {cpu}")));
                    batches += 1;
                    // Without pauses, other threads must still get a turn.
                    if rest.is_zero() && batches % 16 == 0 {
                        thread::yield_now();
                    } else if !rest.is_zero() {
                        thread::sleep(rest);
                    }
                }
                part
            }));
        }
        Self { shared, threads }
    }

    /// Returns the number of pages verified and rewritten so far.
    pub(crate) fn pages(&self) -> u64 {
        self.shared.pages.load(Ordering::Relaxed)
    }

    /// Requests the corruption of one byte.
    pub(crate) fn poke(&self) {
        self.shared.poke.store(true, Ordering::Relaxed);
    }

    /// Stops, and verifies every page.
    pub(crate) fn finish(self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            match thread.join() {
                Ok(part) => part.verify().unwrap_or_else(|why| wrong("memory", &why)),
                Err(_) => wrong("work", "a thread that works on memory panicked"),
            }
        }
    }
}

fn cpus() -> Vec<usize> {
    let set = sched_getaffinity(None)
        .unwrap_or_else(|error| wrong("work", &format!("CPUs could not be counted: {error}")));
    (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect()
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    if let Err(error) = sched_setaffinity(None, &set) {
        wrong("work", &format!("a thread could not be bound to CPU {cpu}: {error}"));
    }
}

/// One thread's pages. Those before `next`, in the round's order, have the round as their version,
/// the others the previous round. So a page that reverts to an older version is an error, even if
/// it is intact.
struct Part {
    first: u64,
    pages: Vec<Block>,
    round: u64,
    next: usize,
}

impl Part {
    fn new(numbers: std::ops::Range<u64>) -> Self {
        let count = (numbers.end - numbers.start) as usize;
        let mut pages = Vec::new();
        if pages.try_reserve_exact(count).is_err() {
            wrong("work", &format!("there is no memory for {count} pages: ask for less"));
        }
        pages.resize(count, Block::ZERO);
        for (page, number) in pages.iter_mut().zip(numbers.clone()) {
            page.fill([number, 0, MEMORY]);
        }
        Self { first: numbers.start, pages, round: 1, next: 0 }
    }

    /// Returns the page at this place of a round: each page once, and far from the previous one.
    fn at(&self, place: usize, round: u64) -> usize {
        // Steps by a prime visit all pages, because it has no divisor in common with a smaller
        // count.
        const PRIME: u64 = 2_654_435_761;
        let count = self.pages.len() as u64;
        ((place as u64 * (PRIME % count) + step(round) % count) % count) as usize
    }

    /// Verifies and rewrites a batch of pages; returns their number.
    fn batch(&mut self) -> Result<u64, String> {
        if self.pages.is_empty() {
            return Ok(0);
        }
        let end = (self.next + BATCH).min(self.pages.len());
        let done = end - self.next;
        for place in self.next..end {
            let page = self.at(place, self.round);
            self.check(page, self.round - 1)?;
            let number = self.first + page as u64;
            self.pages[page].fill([number, self.round, MEMORY]);
        }
        self.next = end;
        if self.next == self.pages.len() {
            self.round += 1;
            self.next = 0;
        }
        Ok(done as u64)
    }

    fn check(&self, page: usize, version: u64) -> Result<(), String> {
        let number = self.first + page as u64;
        self.pages[page]
            .check([number, version, MEMORY])
            .map_err(|why| format!("page {number} at {:p}: {why}", &self.pages[page]))
    }

    /// Verifies all pages.
    fn verify(&self) -> Result<(), String> {
        for place in 0..self.pages.len() {
            let done = place < self.next;
            self.check(self.at(place, self.round), self.round - u64::from(!done))?;
        }
        Ok(())
    }

    fn spoil(&mut self) {
        if self.pages.is_empty() {
            return;
        }
        let page = self.at(self.next, self.round);
        self.pages[page].0[SIZE / 3] ^= 0x40;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_has_its_turn_in_a_round() {
        for count in [1, 2, 63, 64, 100, 4096, 5000] {
            let mut part = Part::new(10..10 + count);
            let mut done = 0;
            while part.round == 1 {
                done += part.batch().expect("nothing is wrong");
            }
            assert_eq!(done, count);
            part.batch().expect("nothing is wrong");
            assert_eq!(part.verify(), Ok(()));
            let mut seen = vec![false; count as usize];
            (0..count as usize).for_each(|place| seen[part.at(place, 2)] = true);
            assert!(seen.iter().all(|seen| *seen), "{count}");
        }
    }

    #[test]
    fn spoilt_and_old_pages_are_noticed() {
        let mut part = Part::new(0..200);
        part.batch().expect("nothing is wrong");
        part.spoil();
        assert!(part.verify().is_err());
        assert!(part.batch().is_err());

        let mut part = Part::new(0..100);
        let page = part.at(0, 1);
        let old = part.pages[page].clone();
        part.batch().expect("nothing is wrong");
        part.pages[page] = old;
        assert!(part.verify().unwrap_err().contains("whole"));
    }
}
