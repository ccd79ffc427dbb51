// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Back-ends that cannot continue from a snapshot.

use std::fs::File;
use std::path::Path;

use demand_tests::backend::{BackEnd, BlkOptions};
use demand_tests::linux_vm::Guest;
use demand_tests::refusal::{FAILED, Refusals, refused};

use crate::snapshot::{Snapshot, blk, restore_with};

/// Checks that a restored guest works, and that all its data is intact.
fn proves_itself(mut guest: Guest) {
    guest.wait_beats(2).unwrap();
    guest.finish().unwrap();
}

#[test]
fn unfit_back_ends_are_refused() {
    let Some(snapshot) = Snapshot::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut refusals = Refusals::new();
    let mut not_taken = |case: &str, socket: &Path, words: &[&str]| {
        let mut command = restore_with(&snapshot.dir(), socket);
        refusals.check(case, &mut command, FAILED, &[words, &[socket.to_str().unwrap()]].concat());
    };
    let at = |name: &str| folder.path().join(name);
    not_taken("nobody listens", &at("none.sock"), &["device blk0", "start the back-end first"]);
    std::fs::write(at("file"), "x").unwrap();
    not_taken("a file for a socket", &at("file"), &["device blk0"]);
    let long = at(&"a".repeat(120));
    not_taken("a socket's path that is too long", &long, &["device blk0"]);

    let started = |name: &str, size: u64, options: BlkOptions| {
        let disk = at(&format!("{name}.disk"));
        File::create(&disk).unwrap().set_len(size).unwrap();
        BackEnd::vhost_device_blk_at(at(&format!("{name}.sock")), &disk, &options).unwrap()
    };
    let fewer = started("fewer", 8 << 20, BlkOptions { queues: 1, ..blk() });
    not_taken("fewer queues", fewer.socket(), &["it needs 2 queues", "has 1", "with more queues"]);
    let lost = started("lost", 8 << 20, BlkOptions { postcopy: false, ..blk() });
    not_taken("no post-copy", lost.socket(), &["PAGEFAULT", "lazy=fill"]);
    refusals.end();

    let mut refusals = Refusals::new();
    for (name, size) in [("smaller", 4 << 20), ("larger", 16 << 20)] {
        let other = started(name, size, blk());
        let capacity = (size / 512).to_string();
        let mut command = restore_with(&snapshot.dir(), other.socket());
        let words = ["capacity 16384", &capacity, "with the options of the old one"];
        refusals.check(&format!("a {name} disk"), &mut command, FAILED, &words);
    }
    let disk = snapshot.disk(folder.path());
    let other = BackEnd::qemu_storage_daemon_with(folder.path(), &disk, blk().queues).unwrap();
    let mut command = restore_with(&snapshot.dir(), other.socket());
    let words = ["the new back-end has", "with the options of the old one"];
    refusals.check("another program", &mut command, FAILED, &words);
    let socket = lost.socket().display();
    for (lazy, words) in [
        ("postcopy", &["lazy=postcopy", "PAGEFAULT"][..]),
        ("refuse", &["lazy=refuse", "lazy=auto or lazy=fill"]),
        ("auto", &["PAGEFAULT", "lazy=fill fills memory"]),
    ] {
        let mut command = crate::snapshot::restore(&snapshot.dir());
        command.arg("--vhost-user").arg(format!("blk,socket={socket},lazy={lazy}"));
        refusals.check(&format!("lazy={lazy}"), &mut command, FAILED, words);
    }
    refusals.end();
    snapshot.assert_unchanged();
}

#[test]
fn back_end_without_post_copy_works_after_fill() {
    let Some(snapshot) = Snapshot::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let back_end = snapshot.back_end(folder.path(), &BlkOptions { postcopy: false, ..blk() });
    let socket = back_end.socket();
    proves_itself(snapshot.restore_with(folder.path(), &snapshot.dir(), socket, ",lazy=fill", &[]));
    snapshot.assert_unchanged();
}

#[test]
fn address_echoing_back_end_works_after_fill() {
    let started = |folder: &Path, disk: &Path| {
        BackEnd::qemu_storage_daemon_with(folder, disk, blk().queues).unwrap()
    };
    let Some(snapshot) = Snapshot::take_with(started) else { return };
    let folder = tempfile::tempdir().unwrap();
    let back_end = started(folder.path(), &snapshot.disk(folder.path()));
    let socket = back_end.socket();
    let words = ["names our address", "lazy=fill", socket.to_str().unwrap()];
    refused(&mut restore_with(&snapshot.dir(), socket), FAILED, &words);
    proves_itself(snapshot.restore_with(folder.path(), &snapshot.dir(), socket, ",lazy=fill", &[]));
    snapshot.assert_unchanged();
}
