// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A fault that nothing answers is a line in the log after 5 seconds. A guest's mapping keeps the
//! threads that serve it.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use common::{base, expect, expect_blocked, mapping, pager, read_later, uffd};
use demand_memory::{BackingKind, FaultPath, PAGE_SIZE, VcpuTrap};
use demand_uffd::{ArmedMapping, FaultService, LazyMap, LazyMapOptions};
use log::{LevelFilter, Log, Metadata, Record};
use test_support::image::{far, page_of};
use test_support::wait::until;

const SIZE: u64 = 1 << 20;

/// The lines of the log; one test at a time reads them.
static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());
static ONE: LazyLock<Mutex<()>> = LazyLock::new(|| {
    log::set_logger(&Lines).unwrap();
    log::set_max_level(LevelFilter::Warn);
    Mutex::default()
});

struct Lines;

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let mut lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
        lines.push(record.args().to_string());
    }

    fn flush(&self) {}
}

/// Waits for a line, of which there must be one.
fn expect_line(text: &str) {
    let count = || {
        let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().filter(|line| line.contains(text)).count()
    };
    until("the fault is reported", || count() > 0);
    assert_eq!(count(), 1);
    LINES.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

#[test]
fn fault_of_a_mapping_never_added_is_reported() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let pager = pager(BackingKind::Shmem, SIZE);
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd(), mapping.clone(), &pager, FaultPath::Vmm).unwrap();
    let reader = read_later(&mapping, PAGE_SIZE);
    expect_line("pass the armed mapping to FaultService::add");
    // It still waits, and never reads zeros.
    let service = FaultService::start(1).unwrap();
    service.add(&[armed]).unwrap();
    expect(&reader, PAGE_SIZE);
}

#[test]
fn fault_after_the_service_is_reported() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let pager = pager(BackingKind::Shmem, SIZE);
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd(), mapping.clone(), &pager, FaultPath::Vmm).unwrap();
    // The service is a temporary.
    FaultService::start(1).unwrap().add(&[armed]).unwrap();
    let reader = read_later(&mapping, PAGE_SIZE);
    expect_line("no thread serves its fault");
    expect_blocked(&reader);
}

#[test]
fn fault_in_stopped_memory_is_reported() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let pager = pager(BackingKind::Shmem, SIZE);
    let service = FaultService::start(1).unwrap();
    let guest = service.arm_guest([&pager], VcpuTrap::Mapping).unwrap().remove(0);
    pager.stop();
    let reader = read_later(guest.mapping(), PAGE_SIZE);
    expect_line("revoke the mapping");
    expect_blocked(&reader);
}

/// As of a back-end, whose mapping cannot be revoked.
#[test]
fn foreign_fault_in_stopped_memory_is_reported() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let pager = pager(BackingKind::Shmem, SIZE);
    let mapping = mapping(&pager);
    let armed = ArmedMapping::foreign(&uffd(), base(&mapping), &pager).unwrap();
    let service = FaultService::start(1).unwrap();
    service.add(&[armed]).unwrap();
    pager.stop();
    let reader = read_later(&mapping, PAGE_SIZE);
    expect_line("a thread of another process has waited");
    expect_blocked(&reader);
}

/// The time for which the process is stopped counts for no fault.
#[test]
fn stopped_process_reports_no_fault() {
    const NAME: &str = "stopped_process_reports_no_fault";
    const CHILD: &str = "UNSERVED_CHILD";
    if std::env::var_os(CHILD).is_some() {
        return be_stopped();
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture"])
        .env(CHILD, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut seen = String::new();
    while !seen.contains("a fault is seen") {
        assert!(output.read_line(&mut seen).unwrap() > 0, "{seen}");
    }
    let pid = libc::pid_t::try_from(child.id()).unwrap();
    let signal = |number| {
        // SAFETY: the call touches no memory, and the child is not reaped yet.
        assert_eq!(unsafe { libc::kill(pid, number) }, 0);
    };
    signal(libc::SIGSTOP);
    thread::sleep(Duration::from_secs(7));
    signal(libc::SIGCONT);
    output.read_to_string(&mut seen).unwrap();
    assert!(child.wait().unwrap().success(), "{seen}");
}

/// Runs the child: leaves a fault unread while the process is stopped, and soon serves it.
fn be_stopped() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let pager = pager(BackingKind::Shmem, SIZE);
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd(), mapping.clone(), &pager, FaultPath::Vmm).unwrap();
    let reader = read_later(&mapping, PAGE_SIZE);
    // Long enough for a look.
    thread::sleep(Duration::from_secs(2));
    // Before the words, at which the process is stopped.
    let mut last = Instant::now();
    println!("a fault is seen");
    until("the process is stopped", || {
        let before = std::mem::replace(&mut last, Instant::now());
        before.elapsed() > Duration::from_secs(3)
    });
    // Another look.
    thread::sleep(Duration::from_millis(1500));
    let service = FaultService::start(1).unwrap();
    service.add(&[armed]).unwrap();
    expect(&reader, PAGE_SIZE);
    assert_eq!(*LINES.lock().unwrap_or_else(PoisonError::into_inner), [""; 0]);
}

#[test]
fn hanging_page_of_a_map_is_reported() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (source, control) = far(SIZE);
    control.hold([9]);
    let _guard = control.release_at_the_end();
    let map = LazyMap::new(Arc::new(source), LazyMapOptions::default()).unwrap();
    let at = 9 * 4096;
    let reader = thread::spawn(move || map[at..at + 4096].to_vec());
    expect_line("no answer for 1");
    control.release();
    assert_eq!(reader.join().unwrap(), page_of(9));
}

#[test]
fn guests_mapping_keeps_the_service() {
    let pager = pager(BackingKind::Shmem, SIZE);
    let guest = FaultService::start(1).unwrap().arm_guest([&pager], VcpuTrap::Mapping);
    let guest = guest.unwrap().remove(0);
    expect(&read_later(guest.mapping(), PAGE_SIZE), PAGE_SIZE);
}
