// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faults and background fill at the same time, with objects that come and go.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use demand_remote::image::{Compression, FetchAround, RemoteImage, RemoteOptions};
use demand_source::{Chunk, Destination, PageSource, Priority, Request};

use crate::support::{PAGE, Place, Random, mixed};

/// Reads one range, and returns whether it succeeded; checks the bytes if so.
fn try_read(image: &RemoteImage, content: &[u8], at: usize, len: usize, how: Priority) -> bool {
    let (destination, bytes) = Destination::owned(vec![0xee; len]);
    let chunks = vec![Chunk { offset: at as u64, destination }];
    let read = image.submit(Request { priority: how, chunks }).wait().is_ok();
    if read {
        assert!(bytes.take().unwrap() == content[at..at + len], "wrong bytes at {at}");
    }
    read
}

#[test]
fn faults_and_fill_get_right_bytes() {
    let place = Place::new();
    let content = mixed(8 << 20, 60);
    let with = Compression::Lz4;
    place.push("vm", &content, |push| push.chunk_size(32 << 10).compression(with)).unwrap();
    // Little is kept and little may be in progress, so that requests meet in every state.
    let (recent_bytes, around) = (200 << 10, FetchAround::Bytes(200 << 10));
    let options = RemoteOptions { recent_bytes, demand: 3, fill: 1, around };
    let image = RemoteImage::open_with(&place.store, "vm", options).unwrap();
    let pack = place.objects()[0].clone();
    let (aside, end) = (place.path("aside"), Instant::now() + Duration::from_secs(6));
    let (reads, failures) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for seed in 0..6 {
            let (image, content, reads, failures) = (&image, &content, &reads, &failures);
            scope.spawn(move || {
                let mut random = Random::new(seed + 61);
                while Instant::now() < end {
                    let fill = seed >= 4;
                    let len = if fill { 256 << 10 } else { PAGE };
                    let how = if fill { Priority::Fill } else { Priority::Demand };
                    let at = random.below((content.len() - len) / PAGE) * PAGE;
                    if random.below(8) == 0 {
                        // A request that is withdrawn at some time.
                        let (destination, _) = Destination::owned(vec![0; len]);
                        let chunks = vec![Chunk { offset: at as u64, destination }];
                        drop(image.submit(Request { priority: how, chunks }));
                        image.raise(at as u64, len as u64);
                    }
                    let read = try_read(image, content, at, len, how);
                    (if read { reads } else { failures }).fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // The pack is missing for a part of the time.
        scope.spawn(|| {
            while Instant::now() < end {
                fs::rename(&pack, &aside).unwrap();
                thread::sleep(Duration::from_millis(20));
                fs::rename(&aside, &pack).unwrap();
                thread::sleep(Duration::from_millis(60));
            }
        });
    });
    let (reads, failures) = (reads.into_inner(), failures.into_inner());
    println!("{reads} reads, {failures} failures, {:?}", image.stats());
    assert!(reads > 100 && failures > 0);
    for at in (0..content.len()).step_by(1 << 20) {
        assert!(try_read(&image, &content, at, 1 << 20, Priority::Demand));
    }
}
