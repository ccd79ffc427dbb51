// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Post-copy: the front-end under test shares memory that is still missing, and serves the faults.
//! Needs /dev/userfaultfd; the tests print SKIPPED and pass where it may not be opened.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use common::missing::*;
use common::*;
use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

fn writes_and_reads(args: &[&str]) {
    let mut daemon = Daemon::start(4096, &[args, &["--postcopy", "require", "--once"]].concat());
    let (mut guest, server) = restore(&daemon, 1);

    // An untouched page is fetched before it goes to the disk: it is not zeros.
    assert!(!present(&guest.mem, DATA));
    assert_eq!(guest.request(0, T_OUT, 8, DATA, 4096), (OK, 1));
    assert_eq!(daemon.disk()[8 * 512..16 * 512], content(DATA));
    assert!(server.seen(DATA) && present(&guest.mem, DATA));

    // A read into half of a missing page: its other half is fetched, too.
    let half = DATA + 16 * PAGE;
    assert_eq!(guest.request(0, T_IN, 0, half, 2048), (OK, 2049));
    assert_eq!(guest.bytes(half, 512), [0; 512]);
    assert_eq!(guest.bytes(half + 1536, 512), [3; 512]);
    assert_eq!(guest.bytes(half + 2048, 2048), content(half)[2048..]);

    // Requests that are not a multiple of a page and cross from one region to the other.
    let seam = BASE + REGION - 3 * PAGE - 100;
    assert_eq!(guest.request(0, T_OUT, 100, seam, 6 * 4096), (OK, 1));
    let mut wanted: Vec<u8> = (0..8).flat_map(|i| content(seam + i * PAGE)).collect();
    wanted.drain(..PAGE as usize - 100);
    wanted.truncate(6 * 4096);
    assert!(daemon.disk()[100 * 512..148 * 512] == wanted);

    // The end: the front-end supplies an untouched page at once, and the guest continues without
    // faults.
    let late = DATA + 100 * PAGE;
    let file = guest.mem.iter().next().unwrap().file_offset().unwrap().file();
    file.write_all_at(&content(late), late - BASE).unwrap();
    guest.frontend.postcopy_end().unwrap();
    drop(server);
    assert_eq!(guest.request(0, T_OUT, 200, late, 4096), (OK, 1));
    assert_eq!(daemon.disk()[200 * 512..208 * 512], content(late));

    drop(guest);
    assert!(daemon.wait().success());
    assert_eq!(daemon.stderr(), "");
}

/// Over an inherited connection, too, descriptors go both ways. The counters tell how often a
/// request waited.
#[test]
fn faults_that_requests_wait_for_are_counted() {
    need_userfaultfd!();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("disk"), vec![0; 1 << 20]).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut daemon = Daemon { process: spawn_with(theirs.into(), dir.path(), &[]), dir };
    let (mut guest, server) = restore_on(Frontend::from_stream(ours, 64), 1);
    // A page that comes late, and one that is present by then.
    server.hold(DATA);
    let mem = guest.mem.clone();
    guest.rings[0].submit(&mem, T_OUT, 8, &[(DATA, 4096)]);
    server.await_fault(DATA);
    thread::sleep(Duration::from_millis(20));
    server.release(DATA);
    guest.rings[0].wait(&mem);
    let faults = || {
        daemon.signal(libc::SIGUSR1);
        until("a report", || daemon.stderr().contains("faults_waited"));
        std::fs::write(daemon.dir.path().join("stderr"), "").unwrap();
        daemon.stats()["queues"][0]["faults_waited"].as_u64().unwrap()
    };
    let waited = faults();
    assert!(waited >= 1, "{}", daemon.stats());
    for _ in 0..20 {
        assert_eq!(guest.request(0, T_OUT, 8, DATA, 4096), (OK, 1));
    }
    // At most the pages of headers and statuses.
    assert!(faults() <= waited + 3, "{}", daemon.stats());
    drop(guest);
    drop(server);
    assert!(daemon.wait().success());
}

#[test]
fn missing_memory_is_fetched() {
    need_userfaultfd!();
    writes_and_reads(&[]);
}

#[test]
fn missing_memory_is_fetched_with_memory_slots() {
    need_userfaultfd!();
    writes_and_reads(&["--mem-slots", "on"]);
}

/// A write locks the disk's inode, but no thread holds that lock while it waits for a page.
#[test]
fn queues_do_not_wait_for_each_others_pages() {
    need_userfaultfd!();
    let daemon = Daemon::start(4096, &["--num-queues", "3"]);
    let (mut guest, server) = restore(&daemon, 3);
    let (to_disk, from_disk) = (DATA, DATA + 8 * PAGE);
    // The second of four pages, in both directions.
    server.hold(to_disk + PAGE);
    server.hold(from_disk + PAGE);
    let mem = guest.mem.clone();
    let write = guest.rings[0].submit(&mem, T_OUT, 64, &[(to_disk, 4 * 4096)]);
    let read = guest.rings[1].submit(&mem, T_IN, 0, &[(from_disk, 4 * 4096)]);
    server.await_fault(to_disk + PAGE);
    server.await_fault(from_disk + PAGE);

    let start = Instant::now();
    for i in 0..20 {
        let addr = DATA + (32 + i) * PAGE;
        assert_eq!(guest.request(2, T_OUT, 1000 + i * 8, addr, 4096), (OK, 1));
        assert_eq!(guest.request(2, T_IN, 64, addr + 64 * PAGE, 4096), (OK, 4097));
        assert_eq!(guest.request(2, T_FLUSH, 0, 0, 0), (OK, 1));
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(guest.rings[0].used_index(&mem), 0);
    assert_eq!(guest.rings[1].used_index(&mem), 0);
    // Messages about other queues are answered meanwhile.
    guest.frontend.get_vring_base(2).unwrap();

    server.release(to_disk + PAGE);
    assert_eq!(guest.rings[0].wait(&mem), (u32::from(write), 1));
    server.release(from_disk + PAGE);
    assert_eq!(guest.rings[1].wait(&mem), (u32::from(read), 4 * 4096 + 1));
    let wanted: Vec<u8> = (0..4).flat_map(|i| content(to_disk + i * PAGE)).collect();
    assert!(daemon.disk()[64 * 512..96 * 512] == wanted);
}

/// The requests of one queue do not wait for each other's pages either.
#[test]
fn requests_do_not_wait_for_each_others_pages() {
    need_userfaultfd!();
    let mut daemon = Daemon::start(4096, &["--once"]);
    let (mut guest, server) = restore(&daemon, 1);
    let mem = guest.mem.clone();
    // Eight requests that wait, each for the last of its pages.
    let mut waiting = vec![];
    for i in 0..8 {
        let addr = DATA + i * 4 * PAGE;
        server.hold(addr + 3 * PAGE);
        let kind = if i % 2 == 0 { T_OUT } else { T_IN };
        let head = guest.rings[0].submit(&mem, kind, 64 + 32 * i, &[(addr, 4 * 4096)]);
        server.await_fault(addr + 3 * PAGE);
        waiting.push((addr, head));
    }
    for i in 0..20 {
        let addr = DATA + (64 + i) * PAGE;
        guest.rings[0].reuse_from(32);
        assert_eq!(guest.request(0, T_OUT, 1000 + i * 8, addr, 4096), (OK, 1));
        assert_eq!(guest.request(0, T_FLUSH, 0, 0, 0), (OK, 1));
    }
    assert_eq!(guest.rings[0].used_index(&mem), 40);

    // The queue stops when they are done, not before.
    let frontend = guest.frontend.clone();
    let stopped = thread::spawn(move || frontend.get_vring_base(0).unwrap());
    for (addr, head) in waiting.into_iter().rev() {
        thread::sleep(Duration::from_millis(20));
        assert!(!stopped.is_finished(), "stopped with a request in hand");
        server.release(addr + 3 * PAGE);
        assert_eq!(guest.rings[0].wait(&mem).0, u32::from(head));
        assert_eq!(guest.rings[0].status(&mem, head), OK);
    }
    assert_eq!(stopped.join().unwrap(), 48);
    assert_eq!(guest.rings[0].used_index(&mem), 48);
    let wanted: Vec<u8> = (0..4).flat_map(|i| content(DATA + i * PAGE)).collect();
    assert!(daemon.disk()[64 * 512..96 * 512] == wanted);
    drop(guest);
    assert!(daemon.wait().success());
    let stats = daemon.stats();
    assert_eq!((&stats["requests"], &stats["abandoned"]), (&48.into(), &0.into()));
    // A request that has been answered may still hold its place for a moment.
    assert!((9..=10).contains(&stats["most_in_hand"].as_u64().unwrap()), "{stats}");
}

/// At most as many requests wait as there are threads: the others stay in the ring, and none is
/// lost.
#[test]
fn more_requests_than_threads() {
    need_userfaultfd!();
    let mut daemon = Daemon::start(4096, &["--threads", "2", "--once"]);
    let (mut guest, server) = restore(&daemon, 1);
    let mem = guest.mem.clone();
    server.hold(DATA);
    server.hold(DATA + PAGE);
    let mut heads = vec![];
    for i in 0..10 {
        let addr = DATA + i * PAGE;
        heads.push(u32::from(guest.rings[0].submit(&mem, T_OUT, 8 * i, &[(addr, 4096)])));
        if i < 2 {
            server.await_fault(addr);
        }
    }
    thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.rings[0].used_index(&mem), 0);
    server.release(DATA + PAGE);
    let mut done = vec![];
    until("the others", || {
        done.extend(guest.rings[0].poll(&mem).map(|(head, _)| head));
        done.len() == 9
    });
    assert_eq!(done, heads[1..]);
    server.release(DATA);
    until("the first", || guest.rings[0].poll(&mem) == Some((heads[0], 1)));
    let wanted: Vec<u8> = (0..10).flat_map(|i| content(DATA + i * PAGE)).collect();
    assert!(daemon.disk()[..80 * 512] == wanted);
    drop(guest);
    assert!(daemon.wait().success());
    assert_eq!(daemon.stats()["most_in_hand"], 2);
}
