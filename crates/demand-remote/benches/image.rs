// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rate of pushes and pulls, the time of a fault compared with that of the bare request for its
//! chunk, with a directory as the store, and the time of all faults from a warm host cache compared
//! with that from a local copy.
//!
//! usage: cargo bench -p demand-remote --no-default-features --features cache --bench image

#[allow(dead_code, unreachable_pub, reason = "the benchmark uses a part of this module")]
#[path = "../tests/image/support.rs"]
mod support;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use demand_remote::HostCache;
use demand_remote::image::{Compression, Push, RemoteImage, RemoteOptions, pull, verify};
use demand_source::{Chunk, Completion, Destination, HashedImage, PageSource, Priority, Request};
use support::{GENERATION, PAGE, Place, Random, noise, records};

const SIZE: usize = 256 << 20;
const CHUNK: usize = 64 << 10;

fn rate(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / f64::from(1 << 20)
}

/// Returns the median of `count` times of `act`.
fn median(count: usize, mut act: impl FnMut(usize)) -> Duration {
    let mut times: Vec<_> = (0..count)
        .map(|number| {
            let begun = Instant::now();
            act(number);
            begun.elapsed()
        })
        .collect();
    times.sort();
    times[count / 2]
}

fn faults(place: &Place, compression: Compression) {
    // Without a cache, so that each fault makes a request.
    let options = RemoteOptions { recent_bytes: 0, ..RemoteOptions::default() };
    let image = RemoteImage::open_with(&place.store, "vm", options).unwrap();
    let before = image.stats();
    let mut random = Random::new(3);
    let fault = median(1000, |_| {
        let at = random.below(SIZE / CHUNK / 2) * CHUNK;
        let mut page = [0; PAGE];
        image.read_through(at as u64, &mut Destination::from(&mut page[..])).unwrap();
    });
    let after = image.stats();
    let requests = after.requests - before.requests;
    let bytes = (after.bytes - before.bytes) / requests.max(1);
    let packs = place.objects();
    let pack = format!("packs/{}", packs[0].file_name().unwrap().to_str().unwrap());
    let bare = median(1000, |number| {
        let start = number as u64 % 100 * bytes;
        let read = place.store.get_range(&pack, start..start + bytes);
        place.store.wait(read).unwrap();
    });
    println!(
        "{compression}: a fault takes {fault:.1?} and one request of {bytes} bytes, the bare \
         request {bare:.1?}"
    );
}

/// Reads all pages of data in random order, as faults do, and then all data in pieces, as fill
/// does. Returns the times of both.
fn read_all(image: &dyn PageSource, data: usize) -> [Duration; 2] {
    let mut order: Vec<usize> = (0..data / PAGE).collect();
    let mut random = Random::new(4);
    for at in (1..order.len()).rev() {
        order.swap(at, random.below(at + 1));
    }
    let begun = Instant::now();
    let mut page = [0; PAGE];
    for at in order {
        let mut destination = Destination::from(&mut page[..]);
        let at = (at * PAGE) as u64;
        match image.read_now(at, &mut destination) {
            Some(read) => read.unwrap(),
            None => image.read_through(at, &mut Destination::from(&mut page[..])).unwrap(),
        }
    }
    let faults = begun.elapsed();
    let begun = Instant::now();
    let mut reads = VecDeque::new();
    for at in (0..data).step_by(256 << 10) {
        if reads.len() == 32 {
            reads.pop_front().map(Completion::wait).unwrap().unwrap();
        }
        let (destination, _) = Destination::owned(vec![0; (256 << 10).min(data - at)]);
        let chunks = vec![Chunk { offset: at as u64, destination }];
        reads.push_back(image.submit(Request { priority: Priority::Fill, chunks }));
    }
    reads.into_iter().for_each(|read| read.wait().unwrap());
    [faults, begun.elapsed()]
}

/// Compares a warm host cache with a local copy of the image: the shortest of five times, in turns.
fn warm(place: &Place, local: &HashedImage, data: usize) {
    let cache = HostCache::open(place.path("cache"), 1 << 40).unwrap();
    let open = || {
        let options = RemoteOptions::default();
        RemoteImage::open_cached(&place.store, "vm", options, cache.clone()).unwrap()
    };
    let begun = Instant::now();
    read_all(&open(), data);
    println!("reading all twice into a cold host cache takes {:.1?}", begun.elapsed());
    while cache.stats().written_bytes < data as u64 {
        std::thread::sleep(Duration::from_millis(10));
    }
    let (mut of_local, mut of_cache) = ([Duration::MAX; 2], [Duration::MAX; 2]);
    for _ in 0..5 {
        let times = [read_all(local, data), read_all(&open(), data)];
        for part in 0..2 {
            of_local[part] = of_local[part].min(times[0][part]);
            of_cache[part] = of_cache[part].min(times[1][part]);
        }
    }
    for (part, what) in ["faults on all pages", "fill of all pages"].iter().enumerate() {
        println!(
            "{what}: local copy {:.1?}, warm host cache {:.1?}: ratio {:.3}",
            of_local[part],
            of_cache[part],
            of_cache[part].as_secs_f64() / of_local[part].as_secs_f64()
        );
    }
    println!("{:?}", cache.stats());
}

fn main() {
    let mut content = vec![0; SIZE];
    let (data, zeros) = content.split_at_mut(SIZE / 2);
    records(data, &mut Random::new(1));
    noise(&mut zeros[..SIZE / 16], &mut Random::new(2));
    let data = SIZE / 2 + SIZE / 16;
    for compression in
        [Compression::None, Compression::Lz4, Compression::Zstd(1), Compression::Zstd(3)]
    {
        let place = Place::new();
        let image = place.image(&content);
        let push = Push::new(&image, GENERATION).compression(compression);
        let begun = Instant::now();
        let summary = push.run(&place.store, "vm", &mut |_| true).unwrap();
        let pushed = rate(data, begun.elapsed());
        let begun = Instant::now();
        verify(&place.store, "vm", &mut |_| true).unwrap();
        let verified = rate(data, begun.elapsed());
        let to = place.path("pulled");
        let begun = Instant::now();
        pull(&place.store, "vm", &to, &mut |_| true).unwrap();
        let pulled = rate(data, begun.elapsed());
        let local = HashedImage::open(to.join("memory"), to.join("hashes")).unwrap();
        let parent = Push::new(&local, GENERATION).compression(compression).parent("vm");
        let begun = Instant::now();
        parent.run(&place.store, "next", &mut |_| true).unwrap();
        let repeated = rate(data, begun.elapsed());
        let parent = parent.parent_image(&local);
        let begun = Instant::now();
        parent.run(&place.store, "next", &mut |_| true).unwrap();
        let compared = rate(data, begun.elapsed());
        println!(
            "{compression}: ratio {:.2}; MiB/s of data: push {pushed:.0}, the same again {repeated:.0}, \
             with a local parent {compared:.0}, verify {verified:.0}, pull {pulled:.0}",
            data as f64 / summary.pack_bytes as f64,
        );
        faults(&place, compression);
        if compression == Compression::Zstd(3) {
            warm(&place, &local, data);
        }
    }
}
