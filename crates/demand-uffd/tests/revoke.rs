// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The end of a mapping of this process: faults on present pages are resolved until the end, and
//! all others fail with an error instead of reading zeros.

mod common;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;

use common::{backing, expect, expect_blocked, mapping, pager, pager_on, read_later, uffd};
use demand_memory::{BackingKind, FaultPath, Mapping, PAGE_SIZE, PageRange, to_usize};
use demand_uffd::{ArmedMapping, FaultService};
use test_support::host::huge_pages;
use test_support::image::far;
use test_support::wait::{A_WHILE, PATIENCE, until};

const SIZE: u64 = 4 << 20;
/// Number of pages in a huge page.
const UNIT: u64 = 512;

/// Reads a page through the kernel on another thread, and sends the outcome.
fn kernel_reads(mapping: &Arc<Mapping>, page: u64) -> Receiver<io::Result<usize>> {
    let (sender, receiver) = mpsc::channel();
    let mapping = mapping.clone();
    thread::spawn(move || {
        let file = tempfile::tempfile().unwrap();
        let from = mapping.at(page * PAGE_SIZE).as_ptr().cast();
        // SAFETY: the page lies in the mapping, which this thread keeps, and the kernel only reads
        // it.
        let wrote = unsafe { libc::write(file.as_raw_fd(), from, to_usize(PAGE_SIZE)) };
        let _ = sender.send(usize::try_from(wrote).map_err(|_| io::Error::last_os_error()));
    });
    receiver
}

fn expect_refused(reader: &Receiver<io::Result<usize>>) {
    let outcome = reader.recv_timeout(PATIENCE).expect("the system call returns");
    assert_eq!(outcome.unwrap_err().raw_os_error(), Some(libc::EFAULT));
}

/// Tests it with a running and with a stopped service, while others hold the userfaultfd too.
fn revoke_ends_waits(kind: BackingKind) {
    for stopped in [false, true] {
        let (pager, uffd) = (pager(kind, SIZE), uffd());
        let mapping = mapping(&pager);
        let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Guest).unwrap();
        pager.stop();
        let service = FaultService::start(1).unwrap();
        service.add(&[armed]).unwrap();
        if stopped {
            service.stop();
        }
        let readers = [0, UNIT].map(|page| kernel_reads(&mapping, page));
        for reader in &readers {
            assert!(reader.recv_timeout(A_WHILE).is_err(), "a page that is missing");
        }
        mapping.revoke().unwrap();
        readers.iter().for_each(expect_refused);
        expect_refused(&kernel_reads(&mapping, 1));
    }
}

#[test]
fn revoke_ends_waits_on_shmem() {
    revoke_ends_waits(BackingKind::Shmem);
}

#[test]
fn revoke_ends_waits_on_hugetlb_2m() {
    let Some(_pool) = huge_pages(2) else { return };
    revoke_ends_waits(BackingKind::Hugetlb2M);
}

#[test]
fn stopped_memory_resolves_present_pages() {
    let (pager, uffd) = (pager(BackingKind::Shmem, SIZE), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm).unwrap();
    let service = FaultService::start(1).unwrap();
    service.add(std::slice::from_ref(&armed)).unwrap();
    pager.fetch(PageRange::page(1), FaultPath::Fill).unwrap();
    pager.stop();
    let missing = read_later(&mapping, 2 * PAGE_SIZE);
    expect_blocked(&missing);
    assert!(!armed.is_waited_for(), "the source is asked no more");
    expect(&read_later(&mapping, PAGE_SIZE), PAGE_SIZE);
    until("no fault is under way", || !service.has_open_faults());
    expect_blocked(&missing);
}

/// A page that was being fetched when the memory was stopped still becomes present, for new
/// readers.
#[test]
fn stopped_memory_forgets_open_faults() {
    let (source, control) = far(SIZE);
    let _end = control.release_at_the_end();
    control.hold([2]);
    let (pager, uffd) = (pager_on(backing(BackingKind::Shmem, SIZE), source), uffd());
    let mapping = mapping(&pager);
    let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm).unwrap();
    let service = FaultService::start(1).unwrap();
    service.add(&[armed]).unwrap();
    let reader = read_later(&mapping, 2 * PAGE_SIZE);
    until("the fault is under way", || service.has_open_faults());
    expect_blocked(&reader);
    pager.stop();
    until("no fault is under way", || !service.has_open_faults());
    control.release();
    until("the page arrives", || !pager.bitmap().is_missing(2));
    expect(&read_later(&mapping, 2 * PAGE_SIZE), 2 * PAGE_SIZE);
}

#[test]
fn mapping_keeps_its_userfaultfd() {
    let pager = pager(BackingKind::Shmem, SIZE);
    let mapping = mapping(&pager);
    {
        let uffd = uffd();
        let armed = ArmedMapping::own(&uffd, mapping.clone(), &pager, FaultPath::Vmm).unwrap();
        FaultService::start(1).unwrap().add(&[armed]).unwrap();
    }
    assert!(mapping.traps_all());
    expect_blocked(&read_later(&mapping, PAGE_SIZE));
}
