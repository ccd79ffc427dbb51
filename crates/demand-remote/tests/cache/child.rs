// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Readers that are processes: this test program, run again.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use demand_remote::image::{RemoteImage, RemoteOptions};
use demand_remote::{HostCache, Location, Store};
use demand_source::{Chunk, Destination, PageSource, Priority, Request};
use test_support::wait::PATIENCE;

use crate::shared::{CHUNK, ROOMY};
use crate::support::Random;

const STORE: &str = "CACHE_TEST_STORE";
const CACHE: &str = "CACHE_TEST_CACHE";
const CONTENT: &str = "CACHE_TEST_CONTENT";
const SEED: &str = "CACHE_TEST_SEED";

/// Chunks that a reader requests at once.
pub(crate) const WINDOW: usize = 4;

/// A reader's process, which is killed when it is dropped.
pub(crate) struct Reader(Child);

impl Reader {
    /// Starts a reader of the snapshot `vm` in a store, which compares it with a file.
    pub(crate) fn start(store: &str, cache: &Path, content: &Path, seed: u64) -> Reader {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "child::reader", "--nocapture"]);
        command.env(STORE, store).env(CACHE, cache).env(CONTENT, content);
        command.env(SEED, seed.to_string()).stdout(Stdio::piped());
        Reader(command.spawn().unwrap())
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let id = i32::try_from(self.0.id()).unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_raw(id).unwrap(), signal).unwrap();
    }

    /// Waits for the reader's end, which must be good, and returns its numbers.
    pub(crate) fn end(mut self) -> Ended {
        let mut said = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(self.0.wait().unwrap().success(), "{said}");
        let number = |name: &str| {
            let number = said.split(name).nth(1).and_then(|rest| rest.split_whitespace().next());
            number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{said}"))
        };
        Ended { overdue: number("overdue "), hedges: number("hedges ") }
    }
}

/// The numbers of readers that have ended.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ended {
    /// Chunks for which another reader was late.
    pub(crate) overdue: u64,
    /// Requests that were made a second time, because the first one was late.
    pub(crate) hedges: u64,
}

impl std::iter::Sum for Ended {
    fn sum<I: Iterator<Item = Ended>>(all: I) -> Ended {
        all.fold(Ended::default(), |sum, one| Ended {
            overdue: sum.overdue + one.overdue,
            hedges: sum.hedges + one.hedges,
        })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads all chunks, in an order that depends on the seed, some at once.
#[test]
fn reader() {
    let Ok(store) = std::env::var(STORE) else { return };
    let value = |name: &str| std::env::var(name).unwrap();
    let store = Store::open(&store.parse::<Location>().unwrap()).unwrap();
    let cache = HostCache::open(value(CACHE), ROOMY).unwrap();
    let options = RemoteOptions { recent_bytes: 0, ..RemoteOptions::default() };
    let image = RemoteImage::open_cached(&store, "vm", options, cache.clone()).unwrap();
    let content = std::fs::read(value(CONTENT)).unwrap();
    let mut order: Vec<usize> = (0..content.len() / CHUNK).collect();
    let seed: u64 = value(SEED).parse().unwrap();
    let mut random = Random::new(seed);
    // Half of the readers in order, so that they meet, and half in any order.
    if seed % 2 == 1 {
        for at in (1..order.len()).rev() {
            order.swap(at, random.below(at + 1));
        }
    }
    let priority = if seed.is_multiple_of(3) { Priority::Fill } else { Priority::Demand };
    for window in order.chunks(WINDOW) {
        let reads: Vec<_> = window
            .iter()
            .map(|chunk| {
                let (destination, bytes) = Destination::owned(vec![0xee; CHUNK]);
                let chunks = vec![Chunk { offset: (chunk * CHUNK) as u64, destination }];
                (*chunk, image.submit(Request { priority, chunks }), bytes)
            })
            .collect();
        for (chunk, read, bytes) in reads {
            read.wait().unwrap();
            let right = &content[chunk * CHUNK..][..CHUNK];
            assert!(bytes.take().unwrap() == right, "wrong bytes of chunk {chunk}");
        }
    }
    // The last chunks are written after they were delivered.
    let end = std::time::Instant::now() + PATIENCE;
    let written = || cache.stats().written_bytes / CHUNK as u64;
    while written() + cache.stats().overdue < cache.stats().misses {
        assert!(std::time::Instant::now() < end, "{:?}", cache.stats());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let (overdue, hedges) = (cache.stats().overdue, image.figures().hedges.made);
    println!("{:?} overdue {overdue} hedges {hedges} ", cache.stats());
}
