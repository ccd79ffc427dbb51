// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The number of threads that a fault wakes. A program of its own, because it looks at all of its
//! threads.

mod common;

use std::fs;
use std::time::Duration;

use common::{check_page, mapping, pager, uffd};
use demand_memory::{BackingKind, FaultPath, PAGE_SIZE};
use demand_uffd::{ArmedMapping, FaultService, ServiceOptions};

const PAGES: u64 = 2048;

/// Returns how often the service's threads have gone to sleep.
fn sleeps() -> u64 {
    let mut sleeps = 0;
    for thread in fs::read_dir("/proc/self/task").unwrap() {
        let thread = thread.unwrap().path();
        if fs::read_to_string(thread.join("comm")).unwrap_or_default().starts_with("uffd-") {
            let status = fs::read_to_string(thread.join("status")).unwrap();
            let line =
                status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            sleeps += line.unwrap().trim().parse::<u64>().unwrap();
        }
    }
    sleeps
}

/// A second thread that is woken finds nothing and sleeps again, mostly within the kernel: only
/// its sleeps show it.
#[test]
fn fault_wakes_one_thread() {
    let (pager, uffd) = (pager(BackingKind::Shmem, PAGES * PAGE_SIZE), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm).unwrap();
    let service = FaultService::start(ServiceOptions { threads: 4, spin: Duration::ZERO }).unwrap();
    service.add(&[armed]).unwrap();
    check_page(&mapping, 0);
    let before = sleeps();
    (1..PAGES).for_each(|page| check_page(&mapping, page));
    let slept = sleeps() - before;
    println!("{PAGES} faults, {slept} sleeps, {:?}", service.counts());
    assert!(slept <= PAGES + PAGES / 16, "{PAGES} faults, {slept} sleeps");
}
