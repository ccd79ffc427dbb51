// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Requests in flight when the front-end disconnects or the daemon is terminated: each is executed
//! or dropped as a whole, and every answered request was executed.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::*;
use vhost::VhostBackend;
use vm_memory::{Bytes, GuestAddress};

const REQUESTS: usize = 20;
const LEN: usize = 512 << 10;

/// Submits twenty writes, of half a megabyte of `byte` each. Returns their heads.
fn set_going(guest: &mut Guest, byte: u8) -> Vec<u32> {
    guest.mem.write_slice(&vec![byte; LEN], GuestAddress(DATA)).unwrap();
    let (ring, mem) = (&mut guest.rings[0], &guest.mem);
    ring.reuse_from(0);
    (0..REQUESTS)
        .map(|i| u32::from(ring.submit(mem, T_OUT, (i * LEN / 512) as u64, &[(DATA, LEN as u32)])))
        .collect()
}

/// Returns for each of the writes whether it is on the disk; panics if one is incomplete.
fn carried_out(daemon: &Daemon, byte: u8) -> Vec<bool> {
    let disk = daemon.disk();
    let whole = |part: &[u8]| {
        let new = part.iter().filter(|b| **b == byte).count();
        assert!(new == 0 || new == LEN, "{new} of {LEN} bytes of a write are there");
        new == LEN
    };
    disk.chunks(LEN).map(whole).collect()
}

/// Checks that every answered write is on the disk. Returns the number of writes on the disk.
fn check(daemon: &Daemon, guest: &mut Guest, heads: &[u32], byte: u8) -> usize {
    let there = carried_out(daemon, byte);
    while let Some((head, len)) = guest.rings[0].poll(&guest.mem) {
        let request = heads.iter().position(|h| *h == head).expect("a head that was submitted");
        assert_eq!(len, 1);
        assert!(there[request], "request {request} was answered and is not there");
    }
    there.into_iter().filter(|there| *there).count()
}

fn blank(daemon: &Daemon) {
    fs::write(daemon.dir.path().join("disk"), vec![0; REQUESTS * LEN]).unwrap();
}

#[test]
fn disconnect_in_flight_loses_no_answered_request() {
    let daemon = Daemon::start(REQUESTS * LEN / 512, &[]);
    let mut sum = 0;
    for round in 1..=10u8 {
        blank(&daemon);
        let mut guest = Guest::connect(&daemon.socket(), 1);
        let heads = set_going(&mut guest, round);
        std::thread::sleep(Duration::from_micros(300) * u32::from(round));
        // Only the connection ends; the memory and the rings remain for inspection.
        guest.hang_up();
        // The next front-end is served when the first has been cleaned up.
        drop(Guest::connect(&daemon.socket(), 0));
        sum += check(&daemon, &mut guest, &heads, round);
    }
    assert!(sum > 0, "nothing was ever carried out");
    assert_eq!(daemon.stats()["abandoned"], 0);
    assert_eq!(daemon.stderr(), "");
}

#[test]
fn ending_in_flight_loses_no_answered_request() {
    for round in 1..=5u8 {
        let mut daemon = Daemon::start(REQUESTS * LEN / 512, &[]);
        blank(&daemon);
        let mut guest = Guest::connect(&daemon.socket(), 1);
        let heads = set_going(&mut guest, round);
        std::thread::sleep(Duration::from_micros(500) * u32::from(round));
        let start = Instant::now();
        daemon.signal(if round % 2 == 0 { libc::SIGINT } else { libc::SIGTERM });
        assert_eq!(daemon.wait().code(), Some(0));
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        check(&daemon, &mut guest, &heads, round);
        assert!(!daemon.socket().exists());
        let stats = daemon.stats();
        assert_eq!(stats["requests"], stats["writes"], "{stats}");
        assert_eq!(daemon.stderr(), "");
    }
}

/// The ring base tells where to resume, whenever a queue is stopped: no request is lost or
/// repeated.
#[test]
fn stopped_and_set_going_under_load() {
    let mut daemon = Daemon::start(REQUESTS * LEN / 512, &["--once"]);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    for round in 1..=10u8 {
        let mut heads = set_going(&mut guest, round);
        std::thread::sleep(Duration::from_micros(200) * u32::from(round));
        let base = guest.frontend.get_vring_base(0).unwrap() as u16;
        // All requests that were taken are on the used ring.
        assert_eq!(guest.rings[0].used_index(&guest.mem), base);
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(guest.rings[0].used_index(&guest.mem), base);
        guest.rings[0].start(&mut guest.frontend, &guest.mem, base);
        let mut done = vec![];
        until("all requests", || {
            done.extend(guest.rings[0].poll(&guest.mem).map(|(head, _)| head));
            done.len() == heads.len()
        });
        done.sort_unstable();
        heads.sort_unstable();
        assert_eq!(done, heads);
        assert!(carried_out(&daemon, round).into_iter().all(|there| there));
    }
    drop(guest);
    assert!(daemon.wait().success());
    let stats = daemon.stats();
    assert_eq!((&stats["requests"], &stats["writes"]), (&200.into(), &200.into()));
}

/// The daemon leaves no process and no socket behind, at whatever moment it is terminated.
#[test]
fn ends_at_any_moment() {
    for delay in 0..25u64 {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("disk"), vec![0; 1 << 20]).unwrap();
        let mut process = spawn(dir.path(), &[]);
        let connects = std::thread::spawn({
            let socket = dir.path().join("socket");
            move || {
                while std::os::unix::net::UnixStream::connect(&socket).is_err() {
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
        });
        // Wait until the daemon has blocked the signal.
        until("the daemon to begin", || dir.path().join("stats").exists());
        std::thread::sleep(Duration::from_micros(150 * delay));
        // SAFETY: it is our own child, which has not been waited for yet.
        assert_eq!(unsafe { libc::kill(process.id() as i32, libc::SIGTERM) }, 0);
        let start = Instant::now();
        let status = process.wait().unwrap();
        assert_eq!(status.code(), Some(0), "after {delay}");
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(!dir.path().join("socket").exists());
        let _keep = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
        connects.join().unwrap();
    }
}
