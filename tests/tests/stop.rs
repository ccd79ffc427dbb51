// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ctrl-C and SIGTERM end a run cleanly at any moment, with everything that belongs to it.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use demand_kvm::Engine;
use demand_memory::BackingKind;
use demand_tests::can_run;
use demand_tests::process::Guarded;
use demand_tests::scenario::{Scenario, System};

/// Time limit for an end on a busy machine. Without load it takes milliseconds; if the kernel
/// blocks a vCPU, as long as the VMM waits for it.
const SOON: Duration = Duration::from_secs(20);

/// A run to be ended by a signal.
struct Run {
    folder: tempfile::TempDir,
    system: System,
    vmm: Guarded,
}

impl Run {
    fn start(engine: Engine, backing: BackingKind, round: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let scenario = Scenario::mixed(engine.name(), backing, 2, 500 + round);
        let system = System::set_up(&scenario, folder.path()).unwrap();
        let mut command = system.vmm_command(&scenario).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        Run { vmm: Guarded::spawn(&mut command).unwrap(), system, folder }
    }

    /// Sends a signal and waits: whatever the run was doing, it ends, gives the reason in its last
    /// line, and leaves nothing behind. Returns whether the run was over before the signal.
    #[track_caller]
    fn ends_by(mut self, signal: libc::c_int, name: &str) -> bool {
        let id = self.vmm.id();
        // SAFETY: the call takes numbers; the child has not been waited for.
        unsafe { libc::kill(id.cast_signed(), signal) };
        let status = self.vmm.wait(SOON).unwrap();
        let mut said = String::new();
        self.vmm.child().stderr.take().unwrap().read_to_string(&mut said).unwrap();
        let over = status.success();
        // Before it listens for signals, it ends as any process does.
        let not_begun = status.signal() == Some(signal) && said.is_empty();
        if !over && !not_begun {
            let last = said.lines().last().unwrap_or_default();
            assert!(
                status.code() == Some(1) && last == format!("test-vmm: ended by {name}"),
                "{status}: {said}"
            );
        }
        // The back-end's process for this front-end has ended too, and the next front-end can
        // connect.
        let mut back_end = self.system.back_end.take().unwrap();
        let parent = back_end.process().id();
        let begun = Instant::now();
        while let Some(child) = child_of(parent) {
            assert!(begun.elapsed() < SOON, "{child}, a process of the back-end's, is left");
            thread::sleep(Duration::from_millis(5));
        }
        assert!(back_end.accepts());
        back_end.terminate().unwrap();
        // Each write reached the disk as a whole or not at all; here it suffices that the disk is
        // readable.
        assert!(fs::read(&self.system.disk).is_ok());
        drop(self.folder);
        over
    }
}

/// Returns a process whose parent is `parent`, with its state.
fn child_of(parent: u32) -> Option<String> {
    fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // After the name, which is in parentheses: the state, and the parent.
        let mut words = stat.rsplit_once(')')?.1.split_whitespace();
        let (state, found) = (words.next()?, words.next()?);
        (found.parse() == Ok(parent)).then(|| format!("process {:?} ({state})", entry.file_name()))
    })
}

/// At moments throughout a run's life, both before it has a machine and after its guest is done.
fn at_any_moment(engine: Engine, backing: BackingKind) {
    if !can_run(engine, backing, 16 * backing.unit()) {
        return;
    }
    let whole = Instant::now();
    assert!(Run::start(engine, backing, 0).vmm.wait(Duration::from_secs(120)).unwrap().success());
    let whole = whole.elapsed();
    let mut ended = 0;
    for round in 1..=6 {
        let run = Run::start(engine, backing, round);
        thread::sleep(whole * (round * 5 % 7) as u32 / 7);
        let (signal, name) =
            [(libc::SIGINT, "SIGINT"), (libc::SIGTERM, "SIGTERM"), (libc::SIGHUP, "SIGHUP")]
                [round as usize % 3];
        ended += u32::from(!run.ends_by(signal, name));
    }
    assert!(ended > 0, "all runs were over before they were asked to end");
}

/// While all wait for pages that will never arrive: vCPUs, the back-end, the VMM.
fn while_the_source_is_away(engine: Engine, backing: BackingKind) {
    if !can_run(engine, backing, 16 * backing.unit()) {
        return;
    }
    for round in 20..23 {
        let mut run = Run::start(engine, backing, round);
        let image = OpenOptions::new().write(true).open(&run.system.image).unwrap();
        image.set_len(32 << 20).unwrap();
        // As soon as the VMM has checked its length, which it does before it creates a machine.
        let begun = Instant::now();
        while !has_open(run.vmm.id(), "anon_inode:kvm-vm") {
            assert!(begun.elapsed() < SOON, "the VMM makes a machine");
            assert_eq!(run.vmm.try_wait().unwrap(), None);
        }
        thread::sleep(Duration::from_millis(round % 3));
        image.set_len(4096).unwrap();
        thread::sleep(Duration::from_millis(700));
        assert_eq!(run.vmm.try_wait().unwrap(), None, "it waits for its source");
        assert!(!run.ends_by(libc::SIGTERM, "SIGTERM"));
    }
}

fn has_open(process: u32, path: &str) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{process}/fd")) else { return false };
    entries
        .flatten()
        .any(|entry| fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy() == path))
}

#[test]
fn under_uffd_on_shmem() {
    at_any_moment(Engine::Uffd, BackingKind::Shmem);
    while_the_source_is_away(Engine::Uffd, BackingKind::Shmem);
}

#[test]
fn under_uffd_poison_on_shmem() {
    at_any_moment(Engine::UffdPoison, BackingKind::Shmem);
    while_the_source_is_away(Engine::UffdPoison, BackingKind::Shmem);
}

#[test]
fn under_kvm_userfault_on_shmem() {
    at_any_moment(Engine::KvmUserfault, BackingKind::Shmem);
    while_the_source_is_away(Engine::KvmUserfault, BackingKind::Shmem);
}

#[test]
fn under_kvm_userfault_on_hugetlb_2m() {
    at_any_moment(Engine::KvmUserfault, BackingKind::Hugetlb2M);
    while_the_source_is_away(Engine::KvmUserfault, BackingKind::Hugetlb2M);
}
