// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device over a real socket, driven by a front-end with real rings.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use common::*;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

const EVENT_IDX: u64 = 1 << 29;
const RO: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
const MQ: u64 = 1 << 12;

#[test]
fn configuration() {
    let daemon = Daemon::start(1000, &["--num-queues", "3", "--postcopy", "off"]);
    let mut guest = Guest::connect(&daemon.socket(), 0);
    assert_eq!(guest.features & (RO | MQ | FLUSH | EVENT_IDX), MQ | FLUSH | EVENT_IDX);
    assert_eq!(guest.features & (1 << 32 | 1 << 28), 1 << 32 | 1 << 28);
    assert_eq!(guest.frontend.get_queue_num().unwrap(), 3);
    assert_eq!(guest.config(0, 8), 1000u64.to_le_bytes());
    assert_eq!(guest.config(12, 4), 1022u32.to_le_bytes());
    assert_eq!(guest.config(34, 2), 3u16.to_le_bytes());
    assert_eq!(guest.config(0, 60).len(), 60);
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG;
    assert_eq!(guest.protocol, wanted);
}

#[test]
fn truncated_image_is_reported() {
    let daemon = Daemon::start(64, &["--postcopy", "off"]);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.request(0, T_IN, 40, DATA, 512), (OK, 513));
    let image = fs::File::options().write(true).open(daemon.dir.path().join("disk")).unwrap();
    image.set_len(16 * 512).unwrap();
    assert_eq!(guest.request(0, T_OUT, 8, DATA, 512), (OK, 1));
    assert_eq!(daemon.stderr(), "");

    let words = "the image has been truncated: it has 8192 bytes, and the guest's disk 32768";
    assert_eq!(guest.request(0, T_OUT, 40, DATA, 512), (OK, 1));
    assert!(daemon.stderr().contains(words), "{}", daemon.stderr());
    assert_eq!(guest.request(0, T_IN, 50, DATA, 512), (IOERR, 0));
    assert_eq!(guest.request(0, T_OUT, 60, DATA, 512), (OK, 1));
    // The next front-end is served by another process.
    drop(guest);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.request(0, T_IN, 63, DATA, 512), (IOERR, 0));
    assert_eq!(daemon.stderr().matches(words).count(), 1, "{}", daemon.stderr());
    assert!(daemon.stderr().contains("cannot read from the disk: the image has been truncated; "));
}

#[test]
fn read_write_flush_and_id() {
    let mut daemon = Daemon::start(8192, &["--serial", "serial-0123456789", "--once"]);
    let mut guest = Guest::connect(&daemon.socket(), 1);

    assert_eq!(guest.request(0, T_IN, 5, DATA, 1024), (OK, 1025));
    assert_eq!(guest.bytes(DATA, 1024), [[5; 512], [6; 512]].concat());

    guest.fill(DATA, 4096, 0xab);
    assert_eq!(guest.request(0, T_OUT, 100, DATA, 4096), (OK, 1));
    assert_eq!(guest.request(0, T_FLUSH, 0, 0, 0), (OK, 1));
    assert_eq!(daemon.disk()[100 * 512..108 * 512], [0xab; 4096]);
    assert_eq!(daemon.disk()[108 * 512], 108);

    // Scattered, out of order, of odd sizes and across the seam of the two regions.
    let pieces = [(DATA + 99, 13), (DATA, 87), (BASE + REGION - 1000, 2000), (DATA + 8192, 460)];
    let head = guest.rings[0].submit(&guest.mem, T_IN, 40, &pieces);
    assert_eq!(guest.rings[0].wait(&guest.mem), (u32::from(head), 2561));
    assert_eq!(guest.rings[0].status(&guest.mem, head), OK);
    assert_eq!(guest.bytes(BASE + REGION - 1000, 412), [40; 412]);
    assert_eq!(guest.bytes(BASE + REGION - 1000 + 412, 512), [41; 512]);
    let rest = daemon.disk()[40 * 512 + 2100..45 * 512].to_vec();
    assert_eq!(guest.bytes(DATA + 8192, 460), rest);

    // 3 MiB in one request.
    guest.fill(DATA + REGION, 3 << 20, 0x17);
    assert_eq!(guest.request(0, T_OUT, 2000, DATA + REGION, 3 << 20), (OK, 1));
    assert!(daemon.disk()[2000 * 512..8144 * 512] == vec![0x17; 3 << 20]);

    assert_eq!(guest.request(0, T_GET_ID, 0, DATA, 20), (OK, 21));
    assert_eq!(guest.bytes(DATA, 20), b"serial-0123456789\0\0\0");
    assert_eq!(guest.request(0, T_GET_ID, 0, DATA, 8), (OK, 9));

    drop(guest);
    assert!(daemon.wait().success());
    assert!(!daemon.socket().exists());
    let stats = daemon.stats();
    assert_eq!(stats["connections"], 1);
    assert_eq!(stats["requests"], 7);
    assert_eq!((&stats["reads"], &stats["writes"]), (&2.into(), &2.into()));
    assert_eq!((&stats["flushes"], &stats["get_ids"]), (&1.into(), &2.into()));
    assert_eq!(stats["bytes_read"], 1024 + 2560);
    assert_eq!(stats["bytes_written"], 4096 + (3 << 20));
    assert_eq!(daemon.stderr(), "");
}

#[test]
fn many_requests_on_several_queues_at_once() {
    let queues = 4;
    let mut daemon = Daemon::start(4096, &["--num-queues", "4", "--once"]);
    let mut guest = Guest::connect(&daemon.socket(), queues);
    let rings = std::mem::take(&mut guest.rings);
    let mem = &guest.mem;
    thread::scope(|scope| {
        for (q, mut ring) in rings.into_iter().enumerate() {
            scope.spawn(move || {
                // Ten in flight, a thousand in total: write, then read back.
                let base = DATA + q as u64 * 0x4_0000;
                for round in 0..50u64 {
                    for kind in [T_OUT, T_IN] {
                        let mut heads = vec![];
                        for i in 0..10u64 {
                            let (addr, fill) = (base + i * PAGE, (q as u64 * 50 + round + i) as u8);
                            let was = if kind == T_OUT { fill } else { 0 };
                            mem.write_slice(&[was; 4096], GuestAddress(addr)).unwrap();
                            let sector = (q as u64 * 10 + i) * 8;
                            heads.push(ring.submit(mem, kind, sector, &[(addr, 4096)]));
                        }
                        let mut done = vec![];
                        until("completions", || {
                            done.extend(ring.poll(mem).map(|(id, _)| id as u16));
                            done.len() == heads.len()
                        });
                        // Each exactly once, in any order.
                        done.sort_unstable();
                        heads.sort_unstable();
                        assert_eq!(done, heads);
                        for (i, head) in heads.into_iter().enumerate() {
                            assert_eq!(ring.status(mem, head), OK);
                            let mut page = [0u8; 4096];
                            mem.read_slice(&mut page, GuestAddress(base + i as u64 * PAGE))
                                .unwrap();
                            assert_eq!(page, [(q as u64 * 50 + round + i as u64) as u8; 4096]);
                        }
                    }
                }
            });
        }
    });
    drop(guest);
    assert!(daemon.wait().success());
    let stats = daemon.stats();
    let requests: Vec<_> =
        stats["queues"].as_array().unwrap().iter().map(|queue| &queue["requests"]).collect();
    assert_eq!(requests, [1000, 1000, 1000, 1000]);
}

#[test]
fn indirect_descriptors() {
    let daemon = Daemon::start(100, &[]);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    let (ring, mem) = (&mut guest.rings[0], &guest.mem);
    ring.header(mem, 0, T_IN, 9);
    let table = DATA + PAGE;
    // More segments than the queue has descriptors.
    let segments = 128u16;
    let mut entries = vec![Descriptor::new(ring.header_addr(0), 16, NEXT, 1)];
    for i in 0..segments {
        let addr = DATA + 2 * PAGE + 1000 * u64::from(i);
        entries.push(Descriptor::new(addr, 512, NEXT | WRITE, i + 2));
    }
    entries.push(Descriptor::new(ring.status_addr(0), 1, WRITE, 0));
    for (i, entry) in entries.iter().enumerate() {
        mem.write_obj(*entry, GuestAddress(table + 16 * i as u64)).unwrap();
    }
    ring.descriptor(mem, 0, Descriptor::new(table, 16 * entries.len() as u32, INDIRECT, 0));
    // Beyond the end of the disk: 9 + 128 sectors.
    ring.publish(mem, 0);
    assert_eq!(ring.wait(mem), (0, 0));
    assert_eq!(ring.status(mem, 0), IOERR);

    // The same table, shortened to fit the disk.
    let fits = 40u16;
    ring.header(mem, 0, T_IN, 9);
    let status = Descriptor::new(ring.status_addr(0), 1, WRITE, 0);
    mem.write_obj(status, GuestAddress(table + 16 * u64::from(fits + 1))).unwrap();
    ring.publish(mem, 0);
    assert_eq!(ring.wait(mem), (0, u32::from(fits) * 512 + 1));
    assert_eq!(ring.status(mem, 0), OK);
    assert_eq!(guest.bytes(DATA + 2 * PAGE + 39000, 512), [48; 512]);
}

#[test]
fn bad_requests_are_answered_and_the_queue_continues() {
    let mut daemon = Daemon::start(100, &["--once"]);
    let before = daemon.disk();
    let mut guest = Guest::connect(&daemon.socket(), 1);

    // Past the end, partial sectors, and positions that overflow.
    assert_eq!(guest.request(0, T_IN, 100, DATA, 512), (IOERR, 0));
    assert_eq!(guest.request(0, T_IN, 99, DATA, 1024), (IOERR, 0));
    assert_eq!(guest.request(0, T_OUT, 99, DATA, 1024), (IOERR, 1));
    assert_eq!(guest.request(0, T_IN, 0, DATA, 511), (IOERR, 0));
    assert_eq!(guest.request(0, T_OUT, 0, DATA, 513), (IOERR, 1));
    assert_eq!(guest.request(0, T_OUT, u64::MAX, DATA, 512), (IOERR, 1));
    assert_eq!(guest.request(0, T_OUT, u64::MAX / 512 + 1, DATA, 512), (IOERR, 1));
    // Data outside memory.
    assert_eq!(guest.request(0, T_IN, 0, BASE + 2 * REGION - 256, 512), (IOERR, 0));
    assert_eq!(guest.request(0, T_OUT, 0, 0, 512), (IOERR, 0));
    // Unsupported types: a legacy one, secure erase, and one that does not exist.
    for kind in [2, 14, 99] {
        assert_eq!(guest.request(0, kind, 0, 0, 0), (UNSUPP, 1));
    }
    assert_eq!(guest.request(0, 14, 0, DATA, 16), (UNSUPP, 0));

    // Chains without a status byte are returned with a length of 0.
    let (ring, mem) = (&mut guest.rings[0], &guest.mem);
    let header = ring.header_addr(0);
    let broken: &[&[Descriptor]] = &[
        &[Descriptor::new(header, 16, 0, 0)],
        &[Descriptor::new(header, 16, NEXT, 0)],
        &[Descriptor::new(header, 16, NEXT, 60000)],
        &[Descriptor::new(header, 16, NEXT, 1), Descriptor::new(0, 1, WRITE, 0)],
        &[
            Descriptor::new(header, 16, NEXT, 1),
            Descriptor::new(DATA, 512, NEXT | WRITE, 2),
            Descriptor::new(DATA, 512, 0, 0),
        ],
        &[Descriptor::new(1 << 60, 48, INDIRECT, 0)],
        &[Descriptor::new(DATA, 17, INDIRECT, 0)],
    ];
    for chain in broken {
        for (i, descriptor) in chain.iter().enumerate() {
            ring.descriptor(mem, i as u16, *descriptor);
        }
        ring.header(mem, 0, T_IN, 0);
        ring.publish(mem, 0);
        assert_eq!(ring.wait(mem), (0, 0), "{chain:?}");
    }
    // A head beyond the queue cannot be returned at all, and gets no completion.
    ring.publish(mem, QUEUE_SIZE + 7);

    assert_eq!(guest.request(0, T_IN, 3, DATA, 512), (OK, 513));
    assert_eq!(guest.bytes(DATA, 512), [3; 512]);
    drop(guest);
    assert!(daemon.wait().success());
    assert!(daemon.disk() == before, "the disk has changed");
    let stats = daemon.stats();
    assert_eq!(stats["io_errors"], 9);
    assert_eq!(stats["unsupported"], 4);
    assert_eq!(stats["dropped"], broken.len() + 1);
    assert_eq!(daemon.stderr(), "");
}

#[test]
fn inconsistent_ring_does_not_spin_and_can_restart() {
    let daemon = Daemon::start(100, &["--num-queues", "2"]);
    let mut guest = Guest::connect(&daemon.socket(), 2);
    // More chains available than the ring can hold.
    guest.rings[0].set_avail_index(&guest.mem, 5000);
    until("the message", || daemon.stderr().contains("queue 0"));
    let ticks = || {
        // The process that serves the front-end is the child of the process started here. (Not
        // every kernel lists the children of a process.)
        let parent = daemon.process.id().to_string();
        let fields = fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            let fields: Vec<String> =
                stat.rsplit(')').next()?.split_whitespace().map(str::to_owned).collect();
            (fields.get(1) == Some(&parent)).then_some(fields)
        });
        let fields = fields.expect("a child that serves");
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let before = ticks();
    thread::sleep(Duration::from_millis(300));
    assert!(ticks() - before < 10, "the daemon spins");

    assert_eq!(guest.request(1, T_IN, 3, DATA, 512), (OK, 513));
    guest.frontend.get_vring_base(0).unwrap();
    guest.rings[0] = Ring::new(&guest.mem, 0, true);
    guest.rings[0].start(&mut guest.frontend, &guest.mem, 0);
    assert_eq!(guest.request(0, T_IN, 4, DATA, 512), (OK, 513));
}

#[test]
fn read_only() {
    let daemon = Daemon::start(100, &["--read-only"]);
    let before = daemon.disk();
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.features & RO, RO);
    assert_eq!(guest.request(0, T_OUT, 0, DATA, 512), (IOERR, 1));
    assert_eq!(guest.request(0, T_FLUSH, 0, 0, 0), (OK, 1));
    assert_eq!(guest.request(0, T_IN, 7, DATA, 512), (OK, 513));
    assert!(daemon.disk() == before, "the disk has changed");
}

#[test]
fn drivers_without_event_idx_and_flush() {
    let daemon = Daemon::start(100, &[]);
    let mut guest = Guest::connect_without(&daemon.socket(), 1, EVENT_IDX | FLUSH);
    for i in 0..100 {
        guest.fill(DATA, 512, i);
        assert_eq!(guest.request(0, T_OUT, u64::from(i), DATA, 512), (OK, 1));
        assert_eq!(guest.request(0, T_IN, u64::from(i), DATA + PAGE, 512), (OK, 513));
        assert_eq!(guest.bytes(DATA + PAGE, 512), [i; 512]);
    }
}

#[test]
fn event_idx_saves_calls() {
    let daemon = Daemon::start(100, &[]);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    let (ring, mem) = (&mut guest.rings[0], &guest.mem);
    // The driver asks for a call only for the third completion.
    ring.set_used_event(mem, 2);
    for n in 1..=2 {
        ring.submit(mem, T_IN, 0, &[(DATA, 512)]);
        until("the completion", || ring.used_index(mem) == n);
    }
    thread::sleep(Duration::from_millis(50));
    assert!(ring.call.read().is_err(), "called too early");
    ring.submit(mem, T_IN, 0, &[(DATA, 512)]);
    ring.wait(mem);
}

#[test]
fn memory_slots() {
    let daemon = Daemon::start(100, &["--mem-slots", "on"]);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert!(guest.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS));
    assert!(guest.frontend.get_max_mem_slots().unwrap() > 2);
    assert_eq!(guest.request(0, T_IN, 9, DATA + REGION, 512), (OK, 513));
    assert_eq!(guest.bytes(DATA + REGION, 512), [9; 512]);
    // Without the second region, a request for its memory is an error.
    let second = region_infos(&guest.mem)[1];
    guest.frontend.remove_mem_region(&second).unwrap();
    assert_eq!(guest.request(0, T_IN, 9, DATA + REGION, 512), (IOERR, 0));
}

/// The log that a migrating front-end reads contains the pages that the device wrote, above all the
/// data.
#[test]
fn written_pages_are_logged() {
    let daemon = Daemon::start(100, &[]);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    let size = (BASE + 2 * REGION) / PAGE / 8;
    let log = memfd(size);
    let region =
        VhostUserDirtyLogRegion { mmap_size: size, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
    guest.frontend.set_log_base(0, Some(region)).unwrap();
    let logged = |addr: u64| {
        let mut byte = [0];
        log.read_exact_at(&mut byte, addr / PAGE / 8).unwrap();
        byte[0] >> (addr / PAGE % 8) & 1 == 1
    };
    // From the middle of a page into the next, and into the other region.
    assert_eq!(guest.request(0, T_IN, 0, DATA + 3 * PAGE + 2048, 4096), (OK, 4097));
    assert_eq!(guest.request(0, T_IN, 0, BASE + REGION - 512, 1024), (OK, 1025));
    assert_eq!(guest.request(0, T_OUT, 0, DATA + 9 * PAGE, 4096), (OK, 1));
    let pages = [DATA + 3 * PAGE, DATA + 4 * PAGE, BASE + REGION - PAGE, BASE + REGION];
    assert!(pages.into_iter().all(logged));
    let status = guest.rings[0].status_addr(0);
    let used = guest.rings[0].used_addr();
    assert!(logged(status) && logged(used));
    let untouched = [DATA + 2 * PAGE, DATA + 5 * PAGE, DATA + 9 * PAGE, BASE + REGION + PAGE];
    assert!(!untouched.into_iter().any(logged));
}

#[test]
fn stopped_queue_resumes_at_its_position() {
    let daemon = Daemon::start(100, &[]);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    for _ in 0..3 {
        assert_eq!(guest.request(0, T_IN, 1, DATA, 512), (OK, 513));
    }
    let base = guest.frontend.get_vring_base(0).unwrap();
    assert_eq!(base, 3);
    // The request is not served while the queue is stopped, and not lost.
    let head = guest.rings[0].submit(&guest.mem, T_IN, 2, &[(DATA, 512)]);
    thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.rings[0].used_index(&guest.mem), 3);
    guest.rings[0].start(&mut guest.frontend, &guest.mem, base as u16);
    assert_eq!(guest.rings[0].wait(&guest.mem), (u32::from(head), 513));
    assert_eq!(guest.bytes(DATA, 512), [2; 512]);
}

#[test]
fn a_disabled_queue_waits() {
    let daemon = Daemon::start(100, &[]);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    guest.frontend.set_vring_enable(0, false).unwrap();
    let head = guest.rings[0].submit(&guest.mem, T_IN, 2, &[(DATA, 512)]);
    thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.rings[0].used_index(&guest.mem), 0);
    guest.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(guest.rings[0].wait(&guest.mem), (u32::from(head), 513));
}
