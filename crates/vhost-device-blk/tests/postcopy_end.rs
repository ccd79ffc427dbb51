// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The end of a post-copy: in good order, or with the front-end or the daemon ending during a
//! fault; and the start of another. Needs /dev/userfaultfd; the tests print SKIPPED and pass where
//! it may not be opened.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::missing::*;
use common::*;
use vhost::vhost_user::{Listener, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vhost_device_blk::{
    AtomicMemory, BlkBackend, Counters, DeviceOptions, Disk, DiskOptions, Memory,
};
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// A request that waits for a page when the front-end dies never reads zeros, and does not delay
/// the next front-end.
#[test]
fn front_end_death_in_a_fault_writes_nothing() {
    need_userfaultfd!();
    let daemon = Daemon::start(4096, &["--num-queues", "2"]);
    let before = daemon.disk();
    let (mut guest, server) = restore(&daemon, 2);
    let mem = guest.mem.clone();
    server.hold(DATA + PAGE);
    guest.rings[0].submit(&mem, T_OUT, 64, &[(DATA, 4 * 4096)]);
    server.await_fault(DATA + PAGE);
    // The userfaultfd first, then the connection, as when a process is killed.
    drop(server);
    drop(guest);

    let start = Instant::now();
    let (mut guest, _server) = restore(&daemon, 2);
    assert_eq!(guest.request(0, T_IN, 64, DATA, 512), (OK, 513));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(daemon.disk() == before, "the disk has changed");
    assert!(!present(&mem, DATA + PAGE), "somebody went on over a hole");
}

/// SET_VRING_ADDR reads the ring, in the thread that handles messages.
#[test]
fn front_end_death_in_a_message_is_survived() {
    need_userfaultfd!();
    let daemon = Daemon::start(4096, &[]);
    let (guest, server) = restore(&daemon, 0);
    let ring = DATA + 50 * PAGE;
    server.hold(ring);
    let host = guest.mem.get_host_address(GuestAddress(ring)).unwrap() as u64;
    let config = VringConfigData {
        queue_max_size: 4,
        queue_size: 4,
        flags: 0,
        desc_table_addr: host,
        avail_ring_addr: host + 64,
        used_ring_addr: host + 128,
        log_addr: None,
    };
    // Read now, because the front-end is locked while it waits.
    let socket = guest.frontend.as_raw_fd();
    let frontend = guest.frontend.clone();
    let waits = thread::spawn(move || frontend.set_vring_addr(0, &config).is_err());
    server.await_fault(ring);
    drop(server);
    // SAFETY: the socket is our own, and still open.
    unsafe { libc::shutdown(socket, libc::SHUT_RDWR) };
    assert!(waits.join().unwrap());
    drop(guest);

    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.request(0, T_IN, 1, DATA, 512), (OK, 513));
}

/// The daemon terminates on request even during a fault.
#[test]
fn ends_in_a_fault() {
    need_userfaultfd!();
    let mut daemon = Daemon::start(4096, &[]);
    let before = daemon.disk();
    let (mut guest, server) = restore(&daemon, 1);
    let mem = guest.mem.clone();
    server.hold(DATA);
    guest.rings[0].submit(&mem, T_OUT, 64, &[(DATA, 4096)]);
    server.await_fault(DATA);
    daemon.signal(libc::SIGTERM);
    assert!(daemon.wait().success());
    assert!(daemon.disk() == before, "the disk has changed");
    assert!(!daemon.socket().exists());
}

/// A waiting message does not delay the daemon's termination either, whether it waits for a page
/// itself or for a request that does.
#[test]
fn ends_with_a_message_in_hand() {
    need_userfaultfd!();
    for stopping in [true, false] {
        let mut daemon = Daemon::start(4096, &[]);
        let before = daemon.disk();
        let (mut guest, server) = restore(&daemon, 1);
        let mem = guest.mem.clone();
        let held = DATA + 50 * PAGE;
        server.hold(held);
        let frontend = guest.frontend.clone();
        let answered = if stopping {
            guest.rings[0].submit(&mem, T_OUT, 64, &[(held, 4096)]);
            server.await_fault(held);
            thread::spawn(move || frontend.get_vring_base(0).is_ok())
        } else {
            let host = mem.get_host_address(GuestAddress(held)).unwrap() as u64;
            let config = VringConfigData {
                queue_max_size: 4,
                queue_size: 4,
                flags: 0,
                desc_table_addr: host,
                avail_ring_addr: host + 64,
                used_ring_addr: host + 128,
                log_addr: None,
            };
            thread::spawn(move || frontend.set_vring_addr(0, &config).is_ok())
        };
        server.await_fault(held);
        thread::sleep(Duration::from_millis(20));
        let start = Instant::now();
        daemon.signal(libc::SIGTERM);
        assert!(daemon.wait().success());
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
        assert!(!answered.join().unwrap());
        assert!(daemon.disk() == before);
        assert!(!daemon.socket().exists());
        assert!(!present(&mem, held));
    }
}

/// Successive post-copies, each on a separate connection: one completed, one cut off, one whose
/// front-end dies during a fault, and the same again.
#[test]
fn again_and_again() {
    need_userfaultfd!();
    let mut daemon = Daemon::start(4096, &[]);
    let mut disk = daemon.disk();
    for i in 0..6 {
        let (mut guest, server) = restore(&daemon, 1);
        let addr = DATA + i * PAGE;
        assert_eq!(guest.request(0, T_OUT, 8 * i, addr, 4096), (OK, 1));
        let at = i as usize * 4096;
        disk[at..at + 4096].copy_from_slice(&content(addr));
        match i % 3 {
            0 => guest.frontend.postcopy_end().unwrap(),
            1 => {}
            _ => {
                let addr = DATA + 100 * PAGE;
                server.hold(addr);
                guest.rings[0].submit(&guest.mem, T_OUT, 1000, &[(addr, 4096)]);
                server.await_fault(addr);
            }
        }
        assert!(daemon.disk() == disk, "post-copy {i}");
    }
    daemon.signal(libc::SIGTERM);
    assert!(daemon.wait().success());
    assert!(daemon.disk() == disk);
    let stats = daemon.stats();
    assert_eq!((&stats["connections"], &stats["abandoned"]), (&6.into(), &2.into()));
    assert_eq!((&stats["requests"], &stats["writes"]), (&8.into(), &6.into()));
}

/// A connection takes one post-copy: a second one ends it, with one clear line, and works on the
/// next connection.
#[test]
fn a_second_post_copy_on_one_connection() {
    need_userfaultfd!();
    let daemon = Daemon::start(4096, &[]);
    let (mut guest, server) = restore(&daemon, 1);
    assert_eq!(guest.request(0, T_OUT, 8, DATA, 4096), (OK, 1));
    guest.frontend.postcopy_end().unwrap();
    drop(server);
    assert_eq!(guest.request(0, T_IN, 8, DATA + PAGE, 4096), (OK, 4097));
    assert!(guest.frontend.postcopy_advise().is_err());
    assert!(guest.frontend.get_features().is_err(), "the connection goes on");

    until("the message", || daemon.stderr().contains("second POSTCOPY_ADVISE"));
    assert_eq!(daemon.stderr().lines().count(), 1, "{}", daemon.stderr());
    let (mut guest, _server) = restore(&daemon, 1);
    assert_eq!(guest.request(0, T_OUT, 16, DATA, 4096), (OK, 1));
    assert_eq!(daemon.disk()[16 * 512..24 * 512], content(DATA));
}

const SOCKET: &str = "FRONT_END_SOCKET";

/// Not a test by itself: the front-end of the next test, in a separate process.
#[test]
fn front_end_to_be_killed() {
    let Some(socket) = std::env::var_os(SOCKET) else {
        return;
    };
    let (mut guest, server) = restore_at(Path::new(&socket), 1);
    for i in 0..4 {
        server.hold(DATA + i * PAGE);
        guest.rings[0].submit(&guest.mem, T_OUT, 8 * i, &[(DATA + i * PAGE, 4096)]);
        server.await_fault(DATA + i * PAGE);
    }
    println!("in the fault");
    thread::sleep(6 * PATIENCE);
}

#[test]
fn killed_front_end_in_a_fault_writes_nothing() {
    need_userfaultfd!();
    let daemon = Daemon::start(4096, &[]);
    let before = daemon.disk();
    for _ in 0..2 {
        let mut front_end = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "front_end_to_be_killed", "--nocapture"])
            .env(SOCKET, daemon.socket())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(front_end.stdout.take().unwrap());
        let in_the_fault = said.lines().any(|line| line.unwrap().contains("in the fault"));
        front_end.kill().unwrap();
        front_end.wait().unwrap();
        assert!(in_the_fault);

        let (mut guest, _server) = restore(&daemon, 1);
        assert_eq!(guest.request(0, T_IN, 9, DATA, 512), (OK, 513));
        assert!(daemon.disk() == before, "a request that waited has been carried out");
    }
    assert_eq!(daemon.stats()["abandoned"], 8);
}

/// A region that is removed stays mapped for the requests that have already begun with it.
#[test]
fn memory_removed_under_a_request() {
    need_userfaultfd!();
    let daemon = Daemon::start(4096, &["--mem-slots", "on"]);
    let (mut guest, server) = restore(&daemon, 1);
    let mem = guest.mem.clone();
    let addr = BASE + REGION + 8 * PAGE;
    server.hold(addr);
    let head = guest.rings[0].submit(&mem, T_OUT, 64, &[(addr, 4096)]);
    server.await_fault(addr);
    guest.frontend.remove_mem_region(&region_infos(&mem)[1]).unwrap();
    server.release(addr);
    assert_eq!(guest.rings[0].wait(&mem), (u32::from(head), 1));
    assert_eq!(daemon.disk()[64 * 512..72 * 512], content(addr));
    // A request that comes now does not find the region.
    assert_eq!(guest.request(0, T_OUT, 64, addr, 4096), (IOERR, 0));
    assert_eq!(daemon.stderr(), "");
}

/// A device in another program, without the daemon, also waits for its requests when it is dropped,
/// because the userfaultfd that they wait for is closed next.
#[test]
fn dropped_device_waits_for_requests_in_a_fault() {
    need_userfaultfd!();
    let dir = tempfile::tempdir().unwrap();
    let (disk, socket) = (dir.path().join("disk"), dir.path().join("socket"));
    fs::write(&disk, vec![7; 1 << 20]).unwrap();
    let device = DeviceOptions {
        num_queues: 1,
        queue_size: 256,
        threads: 4,
        write_cache: true,
        serial: "".into(),
        postcopy: true,
        mem_slots: false,
    };
    let counters = Arc::new(Counters::new(1).unwrap());
    let mem = AtomicMemory::new(Memory::new());
    let opened = Arc::new(Disk::open(&disk, &DiskOptions::default()).unwrap());
    let backend = Arc::new(BlkBackend::new(opened, counters, mem.clone(), device));
    // The handle that stops the device may outlive it.
    let requests = backend.requests();
    let mut daemon = VhostUserDaemon::new("blk".into(), backend, mem).unwrap();
    let mut listener = Listener::new(&socket, true).unwrap();
    let waits = thread::spawn(move || {
        daemon.start(&mut listener).unwrap();
        let _ = daemon.wait();
    });

    let (mut guest, server) = restore_at(&socket, 1);
    server.hold(DATA);
    guest.rings[0].submit(&guest.mem, T_OUT, 8, &[(DATA, 4096)]);
    server.await_fault(DATA);
    drop(guest);
    thread::sleep(Duration::from_millis(200));
    assert!(!waits.is_finished());
    assert!(!requests.stop(Duration::ZERO), "the request has not begun");
    assert!(fs::read(&disk).unwrap() == vec![7; 1 << 20], "went on over a hole");
    server.release(DATA);
    waits.join().unwrap();
    assert!(requests.stop(Duration::ZERO));
    assert_eq!(fs::read(&disk).unwrap()[8 * 512..16 * 512], content(DATA));
}
