// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device's features beyond reading and writing, each over a real socket.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;

use common::*;
use vm_memory::{Bytes, GuestAddress};

const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const TOPOLOGY: u64 = 1 << 10;
const CONFIG_WCE: u64 = 1 << 11;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;
const UNMAP: u32 = 1;
const WCE: u32 = 32;

fn allocated(daemon: &Daemon) -> u64 {
    fs::metadata(daemon.dir.path().join("disk")).unwrap().blocks()
}

fn number(guest: &mut Guest, offset: u32, size: u32) -> u32 {
    let mut bytes = guest.config(offset, size);
    bytes.resize(4, 0);
    u32::from_le_bytes(bytes.try_into().unwrap())
}

#[test]
fn discard_and_write_zeroes() {
    let mut daemon = Daemon::start(8192, &["--once"]);
    let mut disk = daemon.disk();
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.features & (DISCARD | WRITE_ZEROES), DISCARD | WRITE_ZEROES);
    // Sectors per range, ranges per request, alignment; and the flag that write zeroes may unmap.
    assert_eq!((number(&mut guest, 36, 4), number(&mut guest, 40, 4)), (1 << 21, 32));
    assert_eq!(number(&mut guest, 44, 4), 1 << number(&mut guest, 24, 1));
    assert_eq!((number(&mut guest, 48, 4), number(&mut guest, 52, 4)), (1 << 17, 32));
    assert_eq!(number(&mut guest, 56, 1), 1);

    // Write zeroes without unmap keeps the space allocated. Not aligned to pages, and two ranges at
    // once.
    let full = allocated(&daemon);
    assert_eq!(guest.ranges(T_WRITE_ZEROES, &[(3, 17, 0), (4096, 1024, 0)]), (OK, 1));
    disk[3 * 512..20 * 512].fill(0);
    disk[4096 * 512..5120 * 512].fill(0);
    assert!(daemon.disk() == disk);
    assert_eq!(allocated(&daemon), full);

    // Write zeroes with unmap returns the space, and so does discard.
    assert_eq!(guest.ranges(T_WRITE_ZEROES, &[(4096, 1024, UNMAP)]), (OK, 1));
    assert!(daemon.disk() == disk);
    assert_eq!(full - allocated(&daemon), 1024);
    assert_eq!(guest.ranges(T_DISCARD, &[(2048, 1024, 0), (6144, 1024, 0)]), (OK, 1));
    assert_eq!(full - allocated(&daemon), 3072);
    disk[2048 * 512..3072 * 512].fill(0);
    disk[6144 * 512..7168 * 512].fill(0);
    assert!(daemon.disk() == disk);
    assert_eq!(guest.request(0, T_IN, 2100, DATA, 512), (OK, 513));
    assert_eq!(guest.bytes(DATA, 512), [0; 512]);

    // A request with one bad range is not executed at all.
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        let bad: &[&[(u64, u32, u32)]] = &[
            &[],
            &[(0, 8, 0), (8192, 1, 0)],
            &[(0, 8, 0), (u64::MAX, 8, 0)],
            &[(0, 8, 0), (8185, 8, 0)],
            &[(0, 8, 0), (0, 1 << 22, 0)],
            &[(0, 8, 0); 33],
        ];
        for ranges in bad {
            assert_eq!(guest.ranges(kind, ranges), (IOERR, 1), "{kind}: {ranges:?}");
        }
        assert_eq!(guest.ranges(kind, &[(0, 8, 0), (16, 8, 2)]), (UNSUPP, 1));
        assert_eq!(guest.ranges(kind, &[(0, 8, 1 << 31)]), (UNSUPP, 1));
        // Not a whole number of ranges, and more bytes than allowed.
        assert_eq!(guest.request(0, kind, 0, DATA, 15), (IOERR, 1));
        assert_eq!(guest.request(0, kind, 0, DATA, 24), (IOERR, 1));
        assert_eq!(guest.request(0, kind, 0, DATA, 1 << 20), (IOERR, 1));
    }
    assert_eq!(guest.ranges(T_DISCARD, &[(0, 8, UNMAP)]), (UNSUPP, 1));
    assert!(daemon.disk() == disk);

    // The ranges in pieces of any size.
    let mut bytes = vec![];
    for (sector, sectors) in [(100u64, 8u32), (200, 8)] {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
    }
    guest.mem.write_slice(&bytes, GuestAddress(DATA)).unwrap();
    let pieces = [(DATA, 3), (DATA + 3, 20), (DATA + 23, 9)];
    guest.rings[0].submit(&guest.mem, T_WRITE_ZEROES, 0, &pieces);
    assert_eq!(guest.rings[0].wait(&guest.mem).1, 1);
    disk[100 * 512..108 * 512].fill(0);
    disk[200 * 512..208 * 512].fill(0);
    assert!(daemon.disk() == disk);

    drop(guest);
    assert!(daemon.wait().success());
    let stats = daemon.stats();
    assert_eq!((&stats["discards"], &stats["write_zeroes"]), (&1.into(), &3.into()));
    assert_eq!(stats["bytes_discarded"], 2048 * 512);
    assert_eq!(stats["bytes_zeroed"], (17 + 1024 + 1024 + 16) * 512);
    assert_eq!((&stats["discard_errors"], &stats["write_zeroes_errors"]), (&9.into(), &9.into()));
    assert_eq!((&stats["io_errors"], &stats["unsupported"]), (&18.into(), &5.into()));
    assert_eq!((&stats["requests"], &stats["abandoned"]), (&28.into(), &0.into()));
}

#[test]
fn space_is_kept_if_so_wished() {
    let daemon = Daemon::start(8192, &["--discard", "off"]);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.features & (DISCARD | WRITE_ZEROES), WRITE_ZEROES);
    assert_eq!((number(&mut guest, 36, 4), number(&mut guest, 56, 1)), (0, 0));
    let full = allocated(&daemon);
    assert_eq!(guest.ranges(T_DISCARD, &[(0, 8192, 0)]), (UNSUPP, 1));
    assert_eq!(daemon.disk()[512], 1);
    assert_eq!(guest.ranges(T_WRITE_ZEROES, &[(0, 8192, UNMAP)]), (OK, 1));
    assert!(daemon.disk().iter().all(|byte| *byte == 0));
    assert_eq!(allocated(&daemon), full);
}

#[test]
fn nothing_changes_a_read_only_disk() {
    let mut daemon = Daemon::start(64, &["--read-only", "--once"]);
    let before = daemon.disk();
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.features & (DISCARD | WRITE_ZEROES), 0);
    assert_eq!(guest.request(0, T_OUT, 0, DATA, 512), (IOERR, 1));
    assert_eq!(guest.ranges(T_DISCARD, &[(0, 8, 0)]), (UNSUPP, 1));
    assert_eq!(guest.ranges(T_WRITE_ZEROES, &[(0, 8, 0)]), (UNSUPP, 1));
    drop(guest);
    assert!(daemon.wait().success());
    assert!(daemon.disk() == before);
    assert_eq!(daemon.stats()["write_errors"], 1);
    assert_eq!(daemon.stderr(), "");
}

#[test]
fn blocks_larger_than_sectors() {
    let daemon = Daemon::start(100, &["--block-size", "4096"]);
    assert!(daemon.stderr().contains("less than a block"), "{}", daemon.stderr());
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.features & (BLK_SIZE | TOPOLOGY), BLK_SIZE | TOPOLOGY);
    assert_eq!(guest.config(0, 8), 96u64.to_le_bytes());
    assert_eq!(number(&mut guest, 20, 4), 4096);
    assert_eq!(guest.request(0, T_IN, 8, DATA, 4096), (OK, 4097));
    assert_eq!(guest.bytes(DATA, 512), [8; 512]);
    for (sector, len) in [(1, 4096), (8, 512), (8, 4096 + 512), (96, 4096)] {
        assert_eq!(guest.request(0, T_IN, sector, DATA, len), (IOERR, 0), "{sector} {len}");
        assert_eq!(guest.request(0, T_OUT, sector, DATA, len), (IOERR, 1), "{sector} {len}");
    }
    assert_eq!(guest.ranges(T_DISCARD, &[(1, 8, 0)]), (IOERR, 1));
    assert_eq!(guest.ranges(T_WRITE_ZEROES, &[(8, 1, 0)]), (IOERR, 1));
    assert_eq!(guest.ranges(T_WRITE_ZEROES, &[(8, 8, 0)]), (OK, 1));
    drop(guest);

    // A driver that did not negotiate the block size uses sectors.
    let mut guest = Guest::connect_without(&daemon.socket(), 1, BLK_SIZE | TOPOLOGY);
    assert_eq!(guest.request(0, T_IN, 95, DATA, 512), (OK, 513));
    assert_eq!(guest.bytes(DATA, 512), [95; 512]);
}

/// Runs `work` and returns the number of times that data was put on stable storage for it.
fn syncs(args: &[&str], refuse: u64, work: impl FnOnce(&mut Guest)) -> u64 {
    let mut daemon = Daemon::start(64, &[args, &["--once"]].concat());
    let mut guest = Guest::connect_without(&daemon.socket(), 1, refuse);
    work(&mut guest);
    drop(guest);
    assert!(daemon.wait().success());
    daemon.stats()["syncs"].as_u64().unwrap()
}

fn write_thrice(guest: &mut Guest) {
    for sector in 0..2 {
        assert_eq!(guest.request(0, T_OUT, sector, DATA, 512), (OK, 1));
    }
    assert_eq!(guest.ranges(T_WRITE_ZEROES, &[(2, 1, 0)]), (OK, 1));
}

#[test]
fn cache_mode_decides_when_writes_are_stable() {
    let through = &["--cache", "writethrough"];
    let cases: &[(&[&str], u64, u64)] = &[
        // Drivers that see the cache mode, that do not, and that cannot flush.
        (&[], 0, 0),
        (&[], CONFIG_WCE, 0),
        (&[], FLUSH, 3),
        (&[], FLUSH | CONFIG_WCE, 3),
        (through, 0, 3),
        (through, CONFIG_WCE, 3),
        (through, FLUSH, 3),
    ];
    for (args, refuse, wanted) in cases {
        assert_eq!(syncs(args, *refuse, write_thrice), *wanted, "{args:?} {refuse:#x}");
    }
    let flushed = syncs(&[], 0, |guest| {
        write_thrice(guest);
        assert_eq!(guest.request(0, T_FLUSH, 0, 0, 0), (OK, 1));
    });
    assert_eq!(flushed, 1);
}

#[test]
fn the_driver_turns_the_cache_on_and_off() {
    let off = syncs(&[], 0, |guest| {
        assert_eq!(guest.config(WCE, 1), [1]);
        assert!(guest.set_config(WCE, &[0]));
        assert_eq!(guest.config(WCE, 1), [0]);
        write_thrice(guest);
    });
    assert_eq!(off, 3);
    let on = syncs(&["--cache", "writethrough"], 0, |guest| {
        assert_eq!(guest.config(WCE, 1), [0]);
        assert!(guest.set_config(WCE, &[1]));
        write_thrice(guest);
    });
    assert_eq!(on, 0);

    let without_flush = syncs(&[], FLUSH, |guest| assert_eq!(guest.config(WCE, 1), [0]));
    assert_eq!(without_flush, 0);

    let daemon = Daemon::start(64, &[]);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    let before = guest.config(0, 60);
    for (offset, bytes) in [(WCE, &[2][..]), (WCE, &[1, 0]), (0, &[0; 60]), (200, &[1])] {
        assert!(!guest.set_config(offset, bytes), "{offset} {bytes:?}");
    }
    drop(guest);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    assert_eq!(guest.config(0, 60), before);
}

#[test]
fn one_thread_keeps_the_order() {
    let daemon = Daemon::start(4096, &["--threads", "1"]);
    let mut guest = Guest::connect(&daemon.socket(), 1);
    let (ring, mem) = (&mut guest.rings[0], &guest.mem);
    let mut heads = vec![];
    for i in 0..20 {
        let len = if i % 2 == 0 { 512 << 10 } else { 512 };
        heads.push(u32::from(ring.submit(mem, T_IN, 0, &[(DATA, len)])));
    }
    let mut done = vec![];
    until("completions", || {
        done.extend(ring.poll(mem).map(|(head, _)| head));
        done.len() == heads.len()
    });
    assert_eq!(done, heads);
}
