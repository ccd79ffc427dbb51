// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VMM against malicious back-ends: whatever a back-end does, the VMM ends with one clear line,
//! or runs to its end with correct memory. It never dies of a signal, panics, spins or hangs.

#[path = "../../crates/demand-vhost/examples/malicious/deed.rs"]
mod deed;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use deed::{Base, Deed, Mischief, Sent, Step, Wrong};
use demand_memory::BackingKind;
use demand_tests::cannot_run;
use demand_tests::host::{free_units, is_lab, skip};
use demand_tests::process::{Guarded, Measured, example, program, run, run_measured};
use test_support::wait::listens;

/// Longer than the VMM's time limit for a back-end, which is 30 seconds.
const LIMIT: Duration = Duration::from_secs(100);

/// Returns the limit of processor time for a run; the lab's processor is emulated.
fn cpu_limit(deed: Deed) -> Duration {
    let floods = matches!(deed, Deed::Memory(Mischief::Flood | Mischief::FloodOutside));
    let seconds = if is_lab() { 15 } else { 2 };
    // Two threads serve each fault of a flood, for as long as it lasts.
    Duration::from_secs(seconds + if floods { 6 } else { 0 })
}

/// The expected outcome.
#[derive(Debug, PartialEq, Eq)]
enum Expected {
    /// The back-end does no harm: memory and disk were compared, and are right.
    Success,
    /// The last line contains this text.
    Line(&'static str),
}

fn expected(deed: Deed) -> Expected {
    use Expected::{Line, Success};
    match deed {
        Deed::Behave => Success,
        Deed::NoProtocolFeatures | Deed::FloodMessages => Line("does not offer"),
        Deed::Uffd(Sent::Plain | Sent::Talkative | Sent::Blocking | Sent::Closed) => Success,
        Deed::Uffd(Sent::None | Sent::Two) => Line("it sent no userfaultfd"),
        Deed::Uffd(Sent::Dead) => Line("unless the process has ended"),
        Deed::Uffd(Sent::Raw) => Line("never initialised"),
        Deed::Uffd(_) => Line("not a userfaultfd"),
        // With a single region, errors in other regions affect only the back-end's own faults.
        Deed::Base(Base::Overlap | Base::TooFew | Base::Another | Base::Moving) => Success,
        Deed::Base(Base::Echo) => Line("names our address"),
        Deed::Base(Base::Unaligned) => Line("not a multiple"),
        Deed::Base(Base::PastTheEnd) => Line("past the end"),
        Deed::Base(Base::Zero) => Line("not an address of a mapping"),
        Deed::Base(Base::Unmapped | Base::Private) => Line("trap accesses"),
        Deed::Base(Base::OtherRegions) => Line("invalid message"),
        // This VMM adds no region.
        Deed::Added(_) => Success,
        // A device may write guest memory, but a verifier detects it.
        Deed::Memory(Mischief::Punch | Mischief::Scribble) => Line(" memory "),
        Deed::Memory(_) => Success,
        // No answer is expected there, and none is read after that one.
        Deed::At(Wrong::Long | Wrong::Twice, Step::GetVringBase) => Success,
        Deed::At(Wrong::Refuse, Step::Begin | Step::GetVringBase) => Success,
        // Twenty bytes take twenty seconds, within the limit of thirty.
        Deed::At(Wrong::Trickle, Step::GetFeatures) => Success,
        Deed::At(Wrong::HangUp, _) => Line("closed the connection"),
        Deed::At(Wrong::Silent | Wrong::Half | Wrong::Trickle, _) => Line("no answer within"),
        Deed::At(Wrong::Refuse, Step::GetConfig | Step::MemTable) => Line("no answer within"),
        Deed::At(_, Step::MemAck) => {
            if matches!(deed, Deed::At(Wrong::Refuse, _)) {
                Line("invalid message")
            } else {
                Success
            }
        }
        Deed::At(Wrong::Refuse, Step::GetFeatures | Step::GetProtocolFeatures) => {
            Line("does not offer")
        }
        Deed::At(Wrong::Refuse, Step::GetQueueNum) => Line("it has 0"),
        Deed::At(_, Step::Advise)
            if deed != Deed::At(Wrong::Long, Step::Advise)
                && deed != Deed::At(Wrong::Twice, Step::Advise) =>
        {
            Line("it sent no userfaultfd")
        }
        Deed::At(Wrong::Refuse, _) => Line("backend internal error"),
        Deed::At(Wrong::Twice, Step::GetConfig) => Line("it sent no userfaultfd"),
        Deed::At(..) => Line("invalid message"),
    }
}

/// Images, and the kind of memory.
struct Setting {
    folder: tempfile::TempDir,
    engine: &'static str,
    backing: BackingKind,
}

impl Setting {
    fn new(engine: &'static str, backing: BackingKind) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut make = Command::new(program("test-vmm").unwrap());
        make.arg("make-image").arg("--memory").arg(folder.path().join("memory.img"));
        make.args(["--size", "8M", "--disk-size", "8M"]);
        make.arg("--disk").arg(folder.path().join("disk.img"));
        assert!(run(&mut make, LIMIT).unwrap().status.success());
        Setting { folder, engine, backing }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts a back-end that commits this deed.
    fn back_end(&self, deed: Deed) -> (Guarded, PathBuf) {
        let socket = self.path(&format!("{deed}.sock"));
        let mut command = Command::new(example("malicious").unwrap());
        command.arg("--socket").arg(&socket).arg("--deed").arg(deed.to_string());
        let mut process = Guarded::spawn(command.stdin(Stdio::null())).unwrap();
        let begun = Instant::now();
        while !listens(process.id()) {
            assert_eq!(process.try_wait().unwrap(), None, "it ended before it listened");
            assert!(begun.elapsed() < LIMIT, "it does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        (process, socket)
    }

    /// Returns the VMM's command, with a guest that makes `requests` requests to the disk.
    fn vmm(&self, socket: &std::path::Path, requests: u32) -> Command {
        let mut command = Command::new(program("test-vmm").unwrap());
        command.arg("run").arg("--source").arg(self.path("memory.img"));
        command.arg("--memory").arg(format!("size=8M,backing={}", self.backing));
        command.args(["--engine", self.engine, "--verify"]);
        command.arg("--vhost-user").arg(format!("blk,socket={}", socket.display()));
        command.arg("--test-guest").arg(format!(
            "requests={requests},touches=4,write-area=4M,pristine={0},disk={0}",
            self.path("disk.img").display()
        ));
        command
    }

    /// Runs the VMM against a deed; an error describes any unexpected reaction.
    fn check(&self, deed: Deed) -> Result<Measured, String> {
        let (mut back_end, socket) = self.back_end(deed);
        let measured = run_measured(&mut self.vmm(&socket, 0), LIMIT)
            .map_err(|error| format!("{deed}: {error:#}"))?;
        // After the VMM's end it ends by itself, having checked the memory beside its mappings.
        let status = back_end.wait(LIMIT).map_err(|error| format!("{deed}: {error}"))?;
        let Measured { status: ended, stderr, cpu, .. } = &measured;
        let said = stderr.trim_end();
        let wrong = |what: &str| Err(format!("{deed}: {what}: {ended}; it said: {said}"));
        if *cpu > cpu_limit(deed) {
            return wrong(&format!("it took {cpu:?} of processor time"));
        }
        if said.contains("panicked") || said.lines().count() > 16 {
            return wrong("it says too much");
        }
        let last = said.lines().last().unwrap_or_default();
        match expected(deed) {
            Expected::Success if !ended.success() => return wrong("it should succeed"),
            Expected::Success => {}
            Expected::Line(words) => {
                if ended.code() != Some(1) || !last.starts_with("test-vmm: ") {
                    return wrong("it should fail with one line");
                }
                let socket = socket.to_str().unwrap();
                let named = matches!(deed, Deed::Memory(_)) || last.contains(socket);
                if !last.contains(words) || !named {
                    return wrong(&format!("it should say '{words}' of {socket}"));
                }
            }
        }
        // A thread that touches memory that was unmapped may end the process.
        let moves = [Deed::Memory(Mischief::Unmap), Deed::Base(Base::Moving)].contains(&deed);
        if !status.success() && !moves {
            return wrong(&format!("the back-end ended with {status}"));
        }
        Ok(measured)
    }

    /// Checks all of them, `at_once` at a time.
    fn check_all(&self, deeds: impl IntoIterator<Item = Deed>, at_once: usize) {
        let deeds: Vec<_> = deeds.into_iter().collect();
        let deeds = Mutex::new(deeds.into_iter());
        let (mut wrong, mut done) = (Vec::new(), Vec::new());
        thread::scope(|scope| {
            let work = || {
                let mut results = Vec::new();
                loop {
                    let Some(deed) = deeds.lock().unwrap().next() else { return results };
                    results.push(self.check(deed));
                }
            };
            let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
            for result in workers.into_iter().flat_map(|worker| worker.join().unwrap()) {
                match result {
                    Ok(measured) => done.push(measured),
                    Err(what) => wrong.push(what),
                }
            }
        });
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        let most =
            |time: fn(&Measured) -> Duration| done.iter().map(time).max().unwrap_or_default();
        println!(
            "{} deeds; at most {:?} each, and {:?} of processor time",
            done.len(),
            most(|measured| measured.wall),
            most(|measured| measured.cpu)
        );
        assert!(!done.is_empty());
    }
}

/// Returns whether the VMM must wait for its full time limit.
fn takes_long(deed: &Deed) -> bool {
    matches!(deed, Deed::At(Wrong::Trickle, _))
        || expected(*deed) == Expected::Line("no answer within")
}

fn on_shmem() -> Option<Setting> {
    if let Some(why) = cannot_run() {
        skip(&why);
        return None;
    }
    Some(Setting::new("uffd", BackingKind::Shmem))
}

#[test]
fn no_back_end_reply_does_harm() {
    let Some(setting) = on_shmem() else { return };
    let quick = |deed: &Deed| matches!(deed, Deed::At(..)) && !takes_long(deed);
    setting.check_all(Deed::all().filter(quick), 4);
}

#[test]
fn no_back_end_memory_or_userfaultfd_does_harm() {
    let Some(setting) = on_shmem() else { return };
    setting.check_all(Deed::all().filter(|deed| !matches!(deed, Deed::At(..))), 4);
}

#[test]
fn no_back_end_on_huge_pages_does_harm() {
    let Some(_) = on_shmem() else { return };
    let backing = BackingKind::Hugetlb2M;
    // Four at a time, with four pages each.
    let free = free_units(backing);
    if free < 16 {
        return skip(&format!("16 pages of {backing} are needed, {free} are free"));
    }
    let setting = Setting::new("auto", backing);
    setting.check_all(Deed::all().filter(|deed| !matches!(deed, Deed::At(..))), 4);
}

/// Silence at each step, replies that stop in the middle, and replies that never end.
#[test]
fn patience_has_an_end() {
    let Some(setting) = on_shmem() else { return };
    let some = |deed: &Deed| match deed {
        Deed::At(Wrong::Half, step) => {
            [Step::GetFeatures, Step::Advise, Step::MemTable, Step::VringAddr, Step::End]
                .contains(step)
        }
        Deed::At(Wrong::Trickle, step) => [Step::GetFeatures, Step::MemTable].contains(step),
        _ => true,
    };
    let deeds: Vec<_> = Deed::all().filter(takes_long).filter(some).collect();
    let at_once = deeds.len();
    setting.check_all(deeds, at_once);
}

/// A disk that answers no request is a problem for the guest: the VMM keeps running, and detects
/// the end of the back-end.
#[test]
fn silent_disk_does_not_end_the_vmm() {
    let Some(setting) = on_shmem() else { return };
    let (mut back_end, socket) = setting.back_end(Deed::Behave);
    let mut vmm = Guarded::spawn(setting.vmm(&socket, 4).stderr(Stdio::piped())).unwrap();
    thread::sleep(Duration::from_secs(5));
    assert_eq!(vmm.try_wait().unwrap(), None, "the guest waits for its disk");
    back_end.child().kill().unwrap();
    let status = vmm.wait(LIMIT).unwrap();
    let mut said = String::new();
    std::io::Read::read_to_string(&mut vmm.child().stderr.take().unwrap(), &mut said).unwrap();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.trim_end().lines().last().unwrap().contains("closed the connection"), "{said}");
}
