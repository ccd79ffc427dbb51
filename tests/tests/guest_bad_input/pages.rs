// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Altered pages of a snapshot's memory: no reader ever sees them.

use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use demand_tests::linux_vm::Guest;
use demand_tests::refusal::{FAILED, Refusals};
use demand_vmm::api::{State, Status};
use demand_vmm::arch::layout::COMMAND_LINE;
use demand_vmm::snapshot::state_file::decode;
use serde_json::Value;
use test_support::fuse::SlowFile;

use crate::snapshot::{MEMORY, Snapshot, Spoilt, restore};

const PAGE: u64 = 4096;
/// The third word of each page on which the guest's program works.
const WORKED_ON: u64 = 0x7972_6f6d_656d;
/// The number of the MSR that holds the address of kvm-clock (`MSR_KVM_SYSTEM_TIME_NEW`).
const KVM_CLOCK: u64 = 0x4b56_4d01;

const PATIENCE: Duration = Duration::from_secs(120);

/// Returns the offsets of the pages on which the guest works all the time.
pub(crate) fn all_worked_on(snapshot: &Snapshot) -> Vec<u64> {
    let memory = snapshot.read("memory");
    let found = memory.chunks_exact(PAGE as usize).enumerate().filter(|(_, page)| {
        page[16..24] == WORKED_ON.to_le_bytes() && page[32..].iter().any(|byte| *byte != 0)
    });
    found.map(|(page, _)| page as u64 * PAGE).collect()
}

/// Returns the offset of one of them.
fn worked_on(snapshot: &Snapshot) -> u64 {
    // Not the first, in case the program has barely begun.
    all_worked_on(snapshot)[100]
}

/// Returns the offset of kvm-clock's page.
pub(crate) fn kvm_clock(snapshot: &Snapshot) -> u64 {
    let state: Value = decode(&snapshot.read("state")).unwrap();
    let msrs = state["vcpus"][0]["msrs"].as_array().unwrap();
    let clock = msrs.iter().find(|msr| msr[0] == KVM_CLOCK).unwrap();
    clock[1].as_u64().unwrap() & !(PAGE - 1)
}

/// Returns the offset of the first page of the used ring of the disk's first queue.
fn used_ring(snapshot: &Snapshot) -> u64 {
    let state: Value = decode(&snapshot.read("state")).unwrap();
    let ring = &state["devices"][0]["registers"]["queues"][0]["used"];
    ring.as_u64().unwrap() & !(PAGE - 1)
}

/// Alters a byte of a copy's memory, or restores it.
pub(crate) fn flip(copy: &Spoilt, offset: u64) {
    let memory = std::fs::File::options().read(true).write(true).open(copy.path("memory")).unwrap();
    let mut byte = [0];
    memory.read_exact_at(&mut byte, offset).unwrap();
    memory.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
}

/// Polls the status until it satisfies `wanted`.
fn wait(guest: &Guest, what: &str, wanted: impl Fn(&Status) -> bool) -> Status {
    let begun = Instant::now();
    loop {
        match guest.api().status() {
            Ok(status) if wanted(&status) => return status,
            status if begun.elapsed() > PATIENCE => panic!("{what}: {status:?}; {}", guest.story()),
            _ => thread::sleep(Duration::from_millis(50)),
        }
    }
}

#[test]
fn requested_check_finds_altered_pages_before_start() {
    let Some(snapshot) = Snapshot::get() else { return };
    let page = worked_on(snapshot);
    let zeros = {
        let memory = snapshot.read("memory");
        let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
        memory.chunks_exact(PAGE as usize).rposition(is_zero).unwrap() as u64 * PAGE
    };
    let mut refusals = Refusals::new();
    for (case, page, at) in [
        ("a byte of a page", page, page + 2000),
        ("the first byte", 0, 0),
        ("the last byte", MEMORY - PAGE, MEMORY - 1),
        ("a byte of a hole", zeros, zeros + 7),
    ] {
        let copy = snapshot.copy();
        drop(copy.own("memory"));
        flip(&copy, at);
        let mut command = restore(&copy.dir());
        command.args(["--verify", "--vhost-user", "blk,socket=/nowhere"]);
        let memory = copy.path("memory");
        let words =
            [&*format!("offset {page} of"), memory.to_str().unwrap(), "restore the original"];
        refusals.check(case, &mut command, FAILED, &words);
    }
    let copy = snapshot.copy();
    let mut hashes = snapshot.read("hashes");
    hashes[4096 + (page / PAGE) as usize * 8] ^= 1;
    copy.write("hashes", &hashes);
    let mut command = restore(&copy.dir());
    command.args(["--verify", "--vhost-user", "blk,socket=/nowhere"]);
    let words = [&*format!("offset {page} of"), "restore the original"];
    refusals.check("a hash", &mut command, FAILED, &words);
    refusals.end();
    snapshot.assert_unchanged();
}

#[test]
fn guest_waits_until_altered_page_is_restored() {
    let Some(snapshot) = Snapshot::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let copy = snapshot.copy();
    drop(copy.own("memory"));
    let page = worked_on(snapshot);
    flip(&copy, page + 2000);
    let more = ["--source-limit", "1", "--fill", "off"];
    let (mut guest, _back_end) = snapshot.restore(folder.path(), &copy.dir(), &more);
    let paused = |status: &Status| status.state == State::Paused;
    let words = format!("offset {page} of {}", copy.path("memory").display());
    let status = wait(&guest, "the limit passes", paused);
    let error = status.last_error.unwrap_or_default();
    assert!(error.contains(&words) && error.contains("restore the original"), "{error}");
    guest.wait_said(&[&*words, "the VM is paused"]).unwrap();
    // Resuming it does not help.
    guest.api().resume().unwrap();
    let status = wait(&guest, "it is paused again", paused);
    assert!(status.last_error.unwrap_or_default().contains(&words));

    flip(&copy, page + 2000);
    wait(&guest, "the page arrives", |status| status.last_error.is_none());
    guest.api().resume().unwrap();
    guest.wait_beats(3).unwrap();
    let status = guest.api().status().unwrap();
    assert_eq!((status.state, status.last_error), (State::Running, None));
    guest.finish().unwrap();
    snapshot.assert_unchanged();
}

#[test]
fn hanging_page_is_reported_and_pauses_the_guest() {
    let Some(snapshot) = Snapshot::get() else { return };
    let Some(file) = SlowFile::new(&snapshot.read("memory")) else { return };
    let folder = tempfile::tempdir().unwrap();
    let copy = snapshot.copy();
    copy.write("memory", &[]);
    let _shown = file.show_at(copy.path("memory"));
    let _guard = file.answer_at_the_end();
    let page = worked_on(snapshot);
    file.hold(page..page + PAGE);
    let more = ["--source-limit", "15", "--fill", "off"];
    let (mut guest, _back_end) = snapshot.restore(folder.path(), &copy.dir(), &more);
    let words = format!("offset {page} of {}: no answer", copy.path("memory").display());
    let told =
        |status: &Status| status.last_error.as_ref().is_some_and(|error| error.contains(&words));
    let status = wait(&guest, "it is told", told);
    assert_eq!(status.state, State::Running);
    let paused = |status: &Status| status.state == State::Paused;
    assert!(told(&wait(&guest, "the limit passes", paused)));
    guest.wait_said(&[&*words, "the VM is paused"]).unwrap();
    // The source is not back.
    guest.api().resume().unwrap();
    assert!(told(&wait(&guest, "it is paused again", paused)));

    file.answer();
    wait(&guest, "the page arrives", |status| status.last_error.is_none());
    guest.api().resume().unwrap();
    guest.wait_beats(3).unwrap();
    let status = guest.api().status().unwrap();
    assert_eq!((status.state, status.last_error), (State::Running, None));
    guest.finish().unwrap();
    snapshot.assert_unchanged();
}

#[test]
fn start_waits_for_a_needed_page() {
    let Some(snapshot) = Snapshot::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let copy = snapshot.copy();
    drop(copy.own("memory"));
    let page = kvm_clock(snapshot);
    flip(&copy, page + 4000);
    let words = format!("offset {page} of");
    let fails =
        |status: &Status| status.last_error.as_ref().is_some_and(|error| error.contains(&words));
    let (guest, back_end) = snapshot.restore(folder.path(), &copy.dir(), &["--fill", "off"]);
    let status = wait(&guest, "the page is looked for", fails);
    assert_eq!(status.state, State::Starting);
    for error in [guest.api().pause().unwrap_err(), guest.api().resume().unwrap_err()] {
        assert!(error.to_string().contains("the VM is starting"), "{error}");
    }
    // The page arrives, and the guest is not affected.
    flip(&copy, page + 4000);
    let mut guest = guest;
    guest.wait_beats(2).unwrap();
    guest.finish().unwrap();
    drop(back_end);

    // It does not arrive, and the VM is shut down.
    flip(&copy, page + 4000);
    let (mut guest, _back_end) = snapshot.restore(folder.path(), &copy.dir(), &["--fill", "off"]);
    wait(&guest, "the page is looked for", fails);
    guest.api().shutdown().unwrap();
    let status = guest.wait_end().unwrap();
    assert!(status.success(), "{status}; {}", guest.story());
    snapshot.assert_unchanged();
}

/// The back-end reads it when it is told of the ring, while the VMM waits for the back-end.
#[test]
fn back_ends_missing_page_does_not_delay_shutdown() {
    let Some(snapshot) = Snapshot::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let copy = snapshot.copy();
    drop(copy.own("memory"));
    let page = used_ring(snapshot);
    flip(&copy, page + 4000);
    let words = format!("offset {page} of");
    let (mut guest, _back_end) = snapshot.restore(folder.path(), &copy.dir(), &["--fill", "off"]);
    let status = wait(&guest, "the page is looked for", |status| {
        status.last_error.as_ref().is_some_and(|error| error.contains(&words))
    });
    assert_eq!(status.state, State::Starting);
    let asked = Instant::now();
    guest.api().shutdown().unwrap();
    let status = guest.wait_end().unwrap();
    assert!(status.success(), "{status}; {}", guest.story());
    assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
    snapshot.assert_unchanged();
}

/// The VM can be shut down nevertheless, and reports what it is doing.
#[test]
fn reset_waiting_for_page_does_not_delay_shutdown() {
    let Some(snapshot) = Snapshot::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let copy = snapshot.copy();
    drop(copy.own("memory"));
    // A running kernel has read it long ago; a reset writes it.
    let page = COMMAND_LINE.0;
    flip(&copy, page + 4000);
    let words = format!("offset {page} of");
    let (mut guest, _back_end) = snapshot.restore(folder.path(), &copy.dir(), &["--fill", "off"]);
    guest.wait_beats(2).unwrap();
    guest.type_line("reset").unwrap();
    wait(&guest, "the page is looked for", |status| {
        status.last_error.as_ref().is_some_and(|error| error.contains(&words))
    });
    let error = guest.api().pause().unwrap_err().to_string();
    assert!(error.contains("a reset"), "{error}");
    guest.api().shutdown().unwrap();
    let status = guest.wait_end().unwrap();
    assert!(status.success(), "{status}; {}", guest.story());
    snapshot.assert_unchanged();
}
