// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ends of a Linux guest under `uffd` while pages are missing, at random moments: the process ends,
//! whatever KVM waits for. `ENDINGS` gives the number of each kind (`rust-vmm-ci/soak --endings`)
//! and `ENDINGS_SEED` the seed of the moments; by default there is one of each.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use demand_tests::linux_vm::Guest;
use demand_vmm::api::State;
use demand_vmm::arch::layout::COMMAND_LINE;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use test_support::host::{free_units, shared_memory_kib, threads_of};
use test_support::wait::until;

use crate::pages::{all_worked_on, flip, kvm_clock};
use crate::snapshot::{Snapshot, Spoilt};

/// Time limit for a VM's end: its vCPUs, its back-ends and its console get some seconds.
const WITHIN: Duration = Duration::from_secs(20);
/// Time limit for an end that the guest itself prepares: its program first ends its work.
const GUEST_WITHIN: Duration = Duration::from_secs(60);
/// The latest moment of an end, after the start of the restore.
const LATEST_MS: u64 = 1500;

/// A huge page, in bytes.
const UNIT: u64 = 2 << 20;

const DEVICE: &str = "/dev/userfaultfd";

/// A way in which a guest ends.
#[derive(Clone, Copy, Debug)]
enum Ending {
    /// By the API, while the guest waits for a page that does not arrive.
    Shutdown,
    /// By a signal, likewise.
    Signal(libc::c_int),
    /// By the guest, once it has verified its memory.
    PowerOff,
    /// By a signal, while a reset waits for a page that does not arrive.
    InReset(libc::c_int),
}

const ENDINGS: [Ending; 7] = [
    Ending::Shutdown,
    Ending::Signal(libc::SIGTERM),
    Ending::Signal(libc::SIGKILL),
    // The effect of an uncaught panic.
    Ending::Signal(libc::SIGABRT),
    Ending::PowerOff,
    Ending::InReset(libc::SIGTERM),
    Ending::InReset(libc::SIGKILL),
];

/// Hides the device, so that the userfaultfd comes from the system call. The lab has a separate
/// `/dev`.
struct Hidden;

impl Hidden {
    fn new() -> Self {
        fs::rename(DEVICE, "/dev/userfaultfd.hidden").unwrap();
        Hidden
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        fs::rename("/dev/userfaultfd.hidden", DEVICE).unwrap();
    }
}

fn signal(guest: &Guest, signal: libc::c_int) {
    let id = libc::pid_t::try_from(guest.id()).unwrap();
    // SAFETY: the process is a child of this one and has not been reaped, so its ID has not been
    // reused.
    assert_eq!(unsafe { libc::kill(id, signal) }, 0);
}

/// Requests the shutdown as soon as the API listens.
fn shut_down(guest: &Guest) {
    let begun = Instant::now();
    while let Err(error) = guest.api().shutdown() {
        assert!(begun.elapsed() < WITHIN, "{error}; {}", guest.story());
        thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for the process's end: it is a zombie without another thread.
fn wait_gone(guest: &mut Guest, within: Duration, case: &str) {
    let begun = Instant::now();
    let gone = |threads: &str| threads.contains(" Z ") && !threads.contains(',');
    loop {
        let threads = threads_of(guest.id());
        if gone(&threads) {
            break;
        }
        let late = begun.elapsed() > within;
        assert!(!late, "{case}: it does not end: {threads}; {}", guest.story());
        thread::sleep(Duration::from_millis(5));
    }
    guest.wait_end().unwrap();
}

fn spoil(snapshot: &Snapshot, ending: Ending) -> Spoilt {
    let copy = snapshot.copy();
    let pages = match ending {
        Ending::PowerOff => return copy,
        Ending::InReset(_) => vec![COMMAND_LINE.0],
        Ending::Shutdown | Ending::Signal(_) => all_worked_on(snapshot),
    };
    drop(copy.own("memory"));
    pages.iter().for_each(|page| flip(&copy, page + 4000));
    copy
}

fn end(snapshot: &Snapshot, ending: Ending, backing: &str, moment: Duration, case: &str) {
    let folder = tempfile::tempdir().unwrap();
    let copy = spoil(snapshot, ending);
    let memory = format!("backing={backing}");
    let more = ["--engine", "uffd", "--fill", "off", "--memory", &memory];
    let (mut guest, _back_end) = snapshot.restore(folder.path(), &copy.dir(), &more);
    match ending {
        Ending::Shutdown => {
            thread::sleep(moment);
            shut_down(&guest);
        }
        Ending::Signal(number) => {
            thread::sleep(moment);
            signal(&guest, number);
        }
        Ending::PowerOff => {
            guest.wait_beats(1).unwrap();
            guest.type_line("stop").unwrap();
        }
        Ending::InReset(number) => {
            guest.wait_beats(1).unwrap();
            guest.type_line("reset").unwrap();
            thread::sleep(moment);
            signal(&guest, number);
        }
    }
    let by_guest = matches!(ending, Ending::PowerOff);
    wait_gone(&mut guest, if by_guest { GUEST_WITHIN } else { WITHIN }, case);
}

/// KVM waits for a whole unit, of which it touches one page, when a vCPU gets its state.
#[test]
fn shutdown_ends_kvms_wait_at_start() {
    let Some(snapshot) = Snapshot::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    let copy = snapshot.copy();
    drop(copy.own("memory"));
    let clock = kvm_clock(snapshot);
    let within = clock % UNIT;
    // A page of the same unit that KVM does not touch.
    flip(&copy, clock - within + (within + UNIT / 2) % UNIT + 4000);
    let more = ["--engine", "uffd", "--fill", "off", "--memory", "backing=hugetlb-2m"];
    let (mut guest, _back_end) = snapshot.restore(folder.path(), &copy.dir(), &more);
    until("a vCPU's thread waits inside KVM", || {
        threads_of(guest.id())
            .split(", ")
            .any(|thread| thread.starts_with("vcpu-") && thread.ends_with("in handle_userfault"))
    });
    assert_eq!(guest.api().status().unwrap().state, State::Starting);
    shut_down(&guest);
    wait_gone(&mut guest, WITHIN, "shutdown while KVM waits");
    snapshot.assert_unchanged();
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap())
}

#[test]
fn every_ending_under_uffd_ends_the_process() {
    let Some(snapshot) = Snapshot::get() else { return };
    let (count, seed) = (number("ENDINGS"), number("ENDINGS_SEED").unwrap_or(1));
    let alone = count.is_some();
    let mut random = StdRng::seed_from_u64(seed);
    for round in 0..count.unwrap_or(1) {
        for (index, ending) in ENDINGS.into_iter().enumerate() {
            let by_call = (round as usize + index).is_multiple_of(2);
            // In a reset, the altered page would withhold its whole unit from a guest that must
            // still run.
            let huge = alone && round % 4 > 1 && !matches!(ending, Ending::InReset(_));
            let backing = if huge { "hugetlb-2m" } else { "shmem" };
            let moment = Duration::from_millis(random.random_range(0..LATEST_MS));
            let case = format!("{ending:?} after {moment:?} on {backing}, call {by_call}");
            let kind = backing.parse().unwrap();
            let before = (shared_memory_kib(), free_units(kind));
            let hidden = by_call.then(Hidden::new);
            end(snapshot, ending, backing, moment, &case);
            drop(hidden);
            // A test can check the machine's memory only if it runs alone there.
            let begun = Instant::now();
            while alone && (shared_memory_kib() > before.0 + 512 || free_units(kind) < before.1) {
                let late = begun.elapsed() > WITHIN;
                let left = (shared_memory_kib(), free_units(kind));
                assert!(!late, "{case}: of {before:?} KiB and units {left:?} are left");
                thread::sleep(Duration::from_millis(5));
            }
            if alone {
                println!("ended: {case}");
            }
        }
    }
    snapshot.assert_unchanged();
}
