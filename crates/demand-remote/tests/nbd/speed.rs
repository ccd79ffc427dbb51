// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Servers that are far, or slow: many requests in flight, and demand beside fill.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use demand_remote::nbd::NbdSource;
use demand_source::Priority;

use crate::server::{Server, hasty, pattern, scrambled, submit};

#[test]
fn far_server_is_asked_many_times_at_once() {
    let Some(server) = Server::nbdkit(&["--filter=delay", "pattern", "1G", "rdelay=10ms"]) else {
        return;
    };
    let source = server.open(hasty());
    let begun = Instant::now();
    let offsets = (0..2048).map(|i| (scrambled(i) % (1 << 14)) << 16);
    let reads: Vec<_> = offsets
        .map(|offset| (offset, submit(&source, Priority::Demand, offset, 64 << 10)))
        .collect();
    for (offset, (completion, bytes)) in reads {
        completion.wait().unwrap();
        // Its comparison takes longer than the read.
        let bytes = bytes.take().unwrap();
        assert!(
            bytes[..64] == pattern(offset, 64) && bytes[65_000..] == pattern(offset + 65_000, 536)
        );
    }
    let took = begun.elapsed();
    println!("2048 random reads of 64 KiB at 10 ms each took {took:?}, serially 20.5 s");
    assert!(took < Duration::from_secs(10), "{took:?}");
}

/// Returns the median and the 99th percentile of a number of demand reads, one after another.
fn latency(source: &NbdSource, reads: u64) -> (Duration, Duration) {
    let mut all: Vec<_> = (0..reads)
        .map(|i| {
            let offset = (scrambled(i) % (1 << 17)) << 12;
            let begun = Instant::now();
            let (completion, bytes) = submit(source, Priority::Demand, offset, 4096);
            completion.wait().unwrap();
            let took = begun.elapsed();
            // Long enough for fill to be measured, too.
            thread::sleep(Duration::from_millis(10));
            assert_eq!(bytes.take().unwrap(), pattern(offset, 4096));
            took
        })
        .collect();
    all.sort();
    (all[all.len() / 2], all[all.len() * 99 / 100])
}

/// Measures demand without and with fill, of which 200 requests are always queued.
fn demand_beside_fill(name: &str, arguments: &[&str], reads: u64) -> [Duration; 2] {
    let Some(server) = Server::nbdkit(arguments) else { return [Duration::ZERO; 2] };
    let source = Arc::new(server.open(hasty()));
    let idle = latency(&source, reads);
    let (stop, filled) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let filler = {
        let (source, stop, filled) = (source.clone(), stop.clone(), filled.clone());
        thread::spawn(move || {
            let (done, ends) = mpsc::channel();
            for i in 0.. {
                if i >= 200 {
                    ends.recv().unwrap();
                }
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let (completion, bytes) =
                    submit(&source, Priority::Fill, (i % 2000) << 18, 256 << 10);
                let (done, filled) = (done.clone(), filled.clone());
                completion.then(move |outcome| {
                    if outcome.is_ok() {
                        assert_eq!(bytes.take().unwrap().len(), 256 << 10);
                        filled.fetch_add(256 << 10, Ordering::Relaxed);
                    }
                    let _ = done.send(());
                });
            }
        })
    };
    thread::sleep(Duration::from_millis(300));
    let (begun, before) = (Instant::now(), filled.load(Ordering::Relaxed));
    let busy = latency(&source, reads);
    let rate = (filled.load(Ordering::Relaxed) - before) as f64 / begun.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    filler.join().unwrap();
    println!(
        "{name}: demand {:.1?} (p99 {:.1?}), beside fill of {:.0} MB/s {:.1?} (p99 {:.1?})",
        idle.0,
        idle.1,
        rate / 1e6,
        busy.0,
        busy.1
    );
    [idle.0, busy.0]
}

#[test]
fn demand_does_not_wait_behind_fill() {
    let slow = ["--filter=delay", "pattern", "1G", "rdelay=10ms"];
    let [idle, busy] = demand_beside_fill("10 ms delay", &slow, 200);
    assert!(busy <= idle * 5, "{idle:?}, {busy:?}");
}

#[test]
fn demand_overtakes_fill_on_a_slow_line() {
    // 4 MB/s for each connection: 256 KiB take 65 ms, and the twelve in flight 400 ms.
    let slow = ["--filter=rate", "pattern", "1G", "connection-rate=32M"];
    let [idle, busy] = demand_beside_fill("4 MB/s per connection", &slow, 60);
    assert!(busy <= idle * 5 + Duration::from_millis(50), "{idle:?}, {busy:?}");
}
