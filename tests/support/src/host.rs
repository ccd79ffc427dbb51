// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The capabilities of the machine on which a test runs.

use std::fs;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use demand_memory::{BackingKind, HugePagePool};

/// Returns whether this is the lab, where no test may be skipped.
pub fn is_lab() -> bool {
    std::env::var_os("LAB").is_some()
}

/// Prints the reason why a test, or a part of it, does not run here. Counted by `rust-vmm-ci/test`.
///
/// # Panics
///
/// In the lab.
pub fn skip(reason: &str) {
    assert!(!is_lab(), "nothing is skipped in the lab: {reason}");
    println!("SKIPPED: {reason}");
}

/// Returns whether the lab's kernel is declared to be without the lab's patches
/// (`cargo lab --stock`).
pub fn is_stock() -> bool {
    std::env::var_os("LAB_STOCK").is_some_and(|stock| !stock.is_empty())
}

/// Prints that a test does not run because the kernel lacks a feature of the lab's patches.
///
/// # Panics
///
/// In the lab, unless its kernel is declared to be without the patches.
pub fn skip_without_patch(feature: &str) {
    assert!(
        !is_lab() || is_stock(),
        "nothing is skipped in the lab: its kernel has no {feature}; cargo lab --stock declares that"
    );
    // Written directly to stderr, because libtest captures the output of passing tests.
    let line = format!("SKIPPED: this kernel has no {feature}\n");
    let _ = io::stderr().write_all(line.as_bytes());
}

/// Returns the number of free huge pages of this kind; `u64::MAX` for ordinary memory.
pub fn free_units(backing: BackingKind) -> u64 {
    if !backing.is_hugetlb() {
        return u64::MAX;
    }
    HugePagePool::of(backing).map_or(0, |pool| pool.free)
}

/// Returns whether KVM can be opened here.
pub fn has_kvm() -> bool {
    fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

/// Returns whether shared memory that requests transparent huge pages gets them. In the lab this
/// function enables them; another machine's setting stays unchanged, and if it does not provide
/// them, the test is skipped.
///
/// # Panics
///
/// In the lab, if its kernel does not have them.
pub fn transparent_huge_pages() -> bool {
    const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    if is_lab() {
        fs::write(SETTING, "advise").expect("the lab's kernel has transparent huge pages");
        // Earlier tests leave memory fragmented. Memory that cannot be freed stays.
        for (file, all) in [("drop_caches", "3"), ("compact_memory", "1")] {
            let _ = fs::write(format!("/proc/sys/vm/{file}"), all);
        }
    }
    match demand_memory::transparent_huge_pages_of_shmem() {
        Ok(()) => true,
        Err(why) => {
            skip(&format!("transparent huge pages are needed: {why}"));
            false
        }
    }
}

/// Returns the name, the state and the place in the kernel of each thread of a process.
pub fn threads_of(id: u32) -> String {
    let Ok(tasks) = fs::read_dir(format!("/proc/{id}/task")) else { return "none".into() };
    let of = |task: fs::DirEntry| {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let stat = read("stat");
        let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).unwrap_or('?');
        format!("{} {state} in {}", read("comm").trim(), read("wchan"))
    };
    tasks.flatten().map(of).collect::<Vec<_>>().join(", ")
}

/// Returns the amount of shared memory on the machine, in KiB.
///
/// # Panics
///
/// If the kernel does not report it.
pub fn shared_memory_kib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").expect("the kernel tells of its memory");
    let line = text.lines().find_map(|line| line.strip_prefix("Shmem:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
    kib.expect("there is a line of shared memory")
}

static POOL: Mutex<()> = Mutex::new(());

/// Reserves huge pages of 2 MiB for a test, for one test of a process at a time. Outside the lab, a
/// test that finds too few is skipped, with a message.
///
/// # Panics
///
/// In the lab, if there are too few.
pub fn huge_pages(pages: u64) -> Option<MutexGuard<'static, ()>> {
    let guard = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    // The previous test may not have returned all of its pages yet.
    for _ in 0..50 {
        if free_units(BackingKind::Hugetlb2M) >= pages {
            return Some(guard);
        }
        if !is_lab() {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    skip(&format!("{pages} free huge pages of 2 MiB are needed (sysctl vm.nr_hugepages)"));
    None
}
