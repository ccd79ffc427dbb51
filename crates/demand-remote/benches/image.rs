// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rate of pushes and pulls, and the time of a fault compared with that of the bare request for
//! its chunk, with a directory as the store.
//!
//! usage: cargo bench -p demand-remote --no-default-features --features image --bench image

#[allow(dead_code, unreachable_pub, reason = "the benchmark uses a part of this module")]
#[path = "../tests/image/support.rs"]
mod support;

use std::time::{Duration, Instant};

use demand_remote::image::{Compression, Push, RemoteImage, RemoteOptions, pull, verify};
use demand_source::{Destination, HashedImage, PageSource};
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
    }
}
