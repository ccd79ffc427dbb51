// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Drivers and front-ends that break the rules: nothing hangs, and nothing is written outside the
//! buffers.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use common::*;
use vhost::{VhostBackend, VringConfigData};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// The tables and data of the chains under test; no other memory may change.
const ARENA: u64 = DATA;
const ARENA_SIZE: u64 = 0x1_0000;
const END: u64 = BASE + 2 * REGION;

/// Returns all of memory, for comparison.
fn contents(mem: &GuestMemoryMmap) -> Vec<u8> {
    let mut bytes = vec![0; 2 * REGION as usize];
    mem.read_slice(&mut bytes, GuestAddress(BASE)).unwrap();
    bytes
}

/// Clears the parts that may differ: the rings and the arena.
fn forget(bytes: &mut [u8]) {
    bytes[..0x4000].fill(0);
    bytes[(ARENA - BASE) as usize..(ARENA - BASE + ARENA_SIZE) as usize].fill(0);
}

fn put(mem: &GuestMemoryMmap, table: u64, descriptors: &[Descriptor]) {
    for (i, descriptor) in descriptors.iter().enumerate() {
        mem.write_obj(*descriptor, GuestAddress(table + 16 * i as u64)).unwrap();
    }
}

#[test]
fn malformed_chains_change_no_other_memory() {
    let mut daemon = Daemon::start(100, &["--once"]);
    let before = daemon.disk();
    let mut guest = Guest::connect(&daemon.socket(), 1);
    let (ring, mem) = (&mut guest.rings[0], &guest.mem);
    let (header, status) = (ring.header_addr(0), ring.status_addr(0));
    let table = ARENA + 0x8000;
    let d = Descriptor::new;
    let head = |next| d(header, 16, NEXT, next);
    let answer = d(status, 1, WRITE, 0);
    let indirect = |entries: u32| vec![d(table, 16 * entries, INDIRECT, 0)];

    // The descriptors of the queue, the indirect table, and whether the chain has a status byte.
    let cases: &[(Vec<Descriptor>, Vec<Descriptor>, bool)] = &[
        // A table within a table (itself, another one), an empty table, part of an entry, too many
        // entries.
        (indirect(1), vec![d(table, 16, INDIRECT, 0)], false),
        (indirect(2), vec![head(1), d(table + 64, 48, INDIRECT, 0)], false),
        (indirect(0), vec![], false),
        (vec![d(table, 8, INDIRECT, 0)], vec![], false),
        (vec![d(table, u32::MAX - 15, INDIRECT, 0)], vec![], false),
        // Outside memory, reaching past the end of memory, and at an invalid address.
        (vec![d(0, 48, INDIRECT, 0)], vec![], false),
        (vec![d(END - 16, 48, INDIRECT, 0)], vec![], false),
        (vec![d(u64::MAX - 15, 48, INDIRECT, 0)], vec![], false),
        // A loop, and an index outside the table.
        (indirect(2), vec![head(1), d(ARENA, 512, NEXT | WRITE, 0)], false),
        (indirect(2), vec![head(1), d(ARENA, 512, NEXT | WRITE, 2)], false),
        (indirect(1), vec![d(header, 16, NEXT, 0)], false),
        // No status; a readable status; an empty one; one past the end; a readable buffer after a
        // writable one.
        (indirect(2), vec![head(1), d(ARENA, 512, 0, 0)], false),
        (vec![head(1), d(status, 1, 0, 0)], vec![], false),
        (vec![head(1), d(status, 0, WRITE, 0)], vec![], false),
        (vec![head(1), d(END, 1, WRITE, 0)], vec![], false),
        (vec![head(1), d(END - 1, 2, WRITE, 0)], vec![], false),
        (vec![head(1), d(ARENA, 512, NEXT | WRITE, 2), d(ARENA, 1, 0, 0)], vec![], false),
        // More than 4 GiB.
        (
            vec![
                head(1),
                d(ARENA, u32::MAX, NEXT | WRITE, 2),
                d(ARENA, 64, NEXT | WRITE, 3),
                answer,
            ],
            vec![],
            false,
        ),
        // A header that is short, missing, or outside memory; data outside memory.
        (vec![d(header, 15, NEXT, 1), answer], vec![], true),
        (vec![answer], vec![], true),
        (vec![d(END - 8, 16, NEXT, 1), answer], vec![], true),
        (vec![d(u64::MAX - 3, 16, NEXT, 1), answer], vec![], true),
        (vec![head(1), d(END - 256, 512, NEXT | WRITE, 2), answer], vec![], true),
        (vec![head(1), d(BASE - 256, 512, NEXT | WRITE, 2), answer], vec![], true),
        (vec![head(1), d(u64::MAX, 512, NEXT | WRITE, 2), answer], vec![], true),
        (indirect(3), vec![head(1), d(END - 256, 512, NEXT | WRITE, 2), answer], true),
        // A sector's worth of data less one byte: the last byte is the status.
        (vec![head(1), d(ARENA, 512, WRITE, 0)], vec![], true),
    ];
    let mut canary = contents(mem);
    forget(&mut canary);
    for (chain, entries, answered) in cases {
        for kind in [T_IN, T_OUT] {
            put(mem, ring.desc_addr(0), chain);
            put(mem, table, entries);
            ring.header(mem, 0, kind, 0);
            ring.publish(mem, 0);
            let (id, len) = ring.wait(mem);
            assert_eq!((id, len > 1), (0, false), "{kind}: {chain:?} {entries:?}");
            let elsewhere = chain.last().unwrap().len() == 512;
            let wanted = if *answered && !elsewhere { IOERR } else { UNANSWERED };
            assert_eq!(ring.status(mem, 0), wanted, "{kind}: {chain:?} {entries:?}");
            let mut now = contents(mem);
            forget(&mut now);
            assert!(now == canary, "{kind}: {chain:?} {entries:?} wrote elsewhere");
        }
    }

    // A header in sixteen pieces, and an empty descriptor before the status, are unusual but well
    // formed.
    let mut pieces: Vec<_> = (0..16u16).map(|i| d(header + u64::from(i), 1, NEXT, i + 1)).collect();
    pieces.extend([d(ARENA, 512, NEXT | WRITE, 17), d(0, 0, NEXT | WRITE, 18), answer]);
    put(mem, ring.desc_addr(0), &pieces);
    ring.header(mem, 0, T_IN, 7);
    ring.publish(mem, 0);
    assert_eq!(ring.wait(mem), (0, 513));
    assert_eq!(guest.bytes(ARENA, 512), [7; 512]);

    drop(guest);
    assert!(daemon.wait().success());
    assert!(daemon.disk() == before);
    let stats = daemon.stats();
    let broken = cases.iter().filter(|(_, _, answered)| !answered).count();
    assert_eq!(stats["dropped"], 2 * broken);
    // The last case is a valid write of no data.
    assert_eq!(stats["io_errors"], 2 * (cases.len() - broken) - 1);
    assert_eq!(daemon.stderr(), "");
}

/// xorshift: yields the same numbers in each run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Chains of random descriptors: each is returned, and none writes outside its own buffers.
#[test]
fn chains_at_random() {
    let mut daemon = Daemon::start(4096, &["--read-only", "--threads", "4", "--once"]);
    let before = daemon.disk();
    let mut guest = Guest::connect(&daemon.socket(), 1);
    let (ring, mem) = (&mut guest.rings[0], &guest.mem);
    mem.write_slice(&vec![0x5a; REGION as usize], GuestAddress(BASE + REGION)).unwrap();
    let mut canary = contents(mem);
    forget(&mut canary);

    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let mut published = 0u16;
    for _ in 0..1000 {
        let descriptor = |numbers: &mut Numbers, entries: u64| {
            let (addr, len) = match numbers.below(12) {
                // Never entirely in memory.
                0 => (END - 8, 16 + numbers.below(1 << 20)),
                1 => (numbers.below(BASE - (1 << 21)), numbers.below(1 << 20)),
                2 => (u64::MAX - numbers.below(1 << 16), 1 + numbers.below(1 << 32)),
                n => {
                    let offset = numbers.below(ARENA_SIZE / 64) * 64;
                    let room = ARENA_SIZE - offset;
                    (ARENA + offset, [16, 512, 1, 48][n as usize % 4].min(room))
                }
            };
            // Mostly chained to another descriptor, and mostly not a table.
            let flags = [NEXT, NEXT | WRITE, NEXT | WRITE, WRITE, WRITE, NEXT, INDIRECT, 7];
            let flags = flags[numbers.below(8) as usize];
            Descriptor::new(addr, len as u32, flags, numbers.below(entries + 2) as u16)
        };
        let queue: Vec<_> = (0..16).map(|_| descriptor(&mut numbers, 16)).collect();
        put(mem, ring.desc_addr(0), &queue);
        for _ in 0..8 {
            let at = ARENA + numbers.below(ARENA_SIZE / 64) * 64;
            put(mem, at, &[descriptor(&mut numbers, 3)]);
            let at = ARENA + numbers.below(ARENA_SIZE / 64) * 64;
            let kind = [T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES, 77, T_IN];
            let kind = u64::from(kind[numbers.below(8) as usize]);
            mem.write_obj(kind, GuestAddress(at)).unwrap();
            mem.write_obj(numbers.below(5000), GuestAddress(at + 8)).unwrap();
        }
        for _ in 0..4 {
            ring.publish(mem, numbers.below(16) as u16);
            published = published.wrapping_add(1);
        }
        until("the chains to come back", || ring.used_index(mem) == published);
    }
    let mut now = contents(mem);
    forget(&mut now);
    assert!(now == canary, "something was written outside of the chains");
    while ring.poll(mem).is_some() {}

    drop(guest);
    assert!(daemon.wait().success());
    assert!(daemon.disk() == before);
    let stats = daemon.stats();
    assert_eq!((&stats["requests"], &stats["abandoned"]), (&4000.into(), &0.into()));
    // The run produced several of each outcome.
    for outcome in ["reads", "io_errors", "unsupported", "dropped"] {
        assert!(stats[outcome].as_u64().unwrap() > 4, "{outcome}: {stats}");
    }
    assert_eq!(daemon.stderr(), "");
}

/// Rings at or beyond the end of memory are refused or unusable, and reported once, not at each
/// kick.
#[test]
fn rings_outside_memory_are_reported_once() {
    let daemon = Daemon::start(100, &["--num-queues", "2"]);
    let mut guest = Guest::connect(&daemon.socket(), 2);
    guest.frontend.get_vring_base(0).unwrap();
    let (ring, mem) = (&mut guest.rings[0], &guest.mem);
    let host = |addr| mem.get_host_address(GuestAddress(addr)).unwrap() as u64;
    let config = VringConfigData {
        queue_max_size: QUEUE_SIZE,
        queue_size: QUEUE_SIZE,
        flags: 0,
        desc_table_addr: host(ring.desc_addr(0)),
        // The index is in memory, the entries are not.
        used_ring_addr: host(END - 8),
        avail_ring_addr: host(ring.desc_addr(0)) + 0x1000,
        log_addr: None,
    };
    guest.frontend.set_vring_base(0, 0).unwrap();
    guest.frontend.set_vring_addr(0, &config).unwrap();
    guest.frontend.set_vring_call(0, &ring.call).unwrap();
    guest.frontend.set_vring_kick(0, &ring.kick).unwrap();
    for _ in 0..5 {
        ring.submit(mem, T_IN, 0, &[(DATA, 512)]);
    }
    until("the message", || daemon.stderr().contains("queue 0"));
    assert_eq!(guest.request(1, T_IN, 3, DATA, 512), (OK, 513));
    assert_eq!(daemon.stderr().lines().count(), 1, "{}", daemon.stderr());

    // An address outside the front-end's memory ends this connection only.
    let nowhere = VringConfigData { used_ring_addr: 4096, ..config };
    assert!(guest.frontend.set_vring_addr(1, &nowhere).is_err());
    drop(guest);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.request(0, T_IN, 3, DATA, 512), (OK, 513));
}

/// A front-end that truncates its shared memory kills only the process that serves it.
#[test]
fn truncated_memory_kills_only_its_process() {
    let daemon = Daemon::start(100, &[]);
    let guest = Guest::connect(&daemon.socket(), 1);
    for region in guest.mem.iter() {
        region.file_offset().unwrap().file().set_len(0).unwrap();
    }
    guest.rings[0].kick.write(1).unwrap();
    until("the message", || daemon.stderr().contains("signal"));
    assert_eq!(daemon.stderr().lines().count(), 1, "{}", daemon.stderr());
    drop(guest);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.request(0, T_IN, 3, DATA, 512), (OK, 513));
}
