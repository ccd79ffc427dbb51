// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The markers of a guest's mapping: which pages have them, when they go, and that none is left. A
//! system call that reads a marked page fails, as KVM's own accesses do.

mod common;

use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use common::pager;
use demand_memory::{
    BackingKind, FaultPath, GuestMapping, Mapped, PAGE_SIZE, PageRange, Pager, VcpuTrap, Waiter,
};
use demand_uffd::{DEFAULT_THREADS, FaultService};
use test_support::host::huge_pages;
use test_support::image::word_of;
use test_support::wait::until;

/// Number of units that get their markers at the first fault on one of them.
const CHUNK: u64 = 512;

struct Marked {
    pager: Arc<Pager>,
    guest: GuestMapping,
    service: FaultService,
}

impl Marked {
    fn new(kind: BackingKind, units: u64) -> Self {
        let pager = pager(kind, units * kind.unit());
        let service = FaultService::start(DEFAULT_THREADS).unwrap();
        let guest = service.arm_guest([&pager], VcpuTrap::Markers).unwrap().remove(0);
        Marked { pager, guest, service }
    }

    fn offset(&self, unit: u64) -> u64 {
        unit * self.pager.unit_pages() * PAGE_SIZE
    }

    /// Reads the first word of a unit by a system call; returns the word, or the call's error.
    fn read(&self, unit: u64) -> Result<u64, Option<i32>> {
        let (mut reader, writer) = io::pipe().unwrap();
        let word = self.guest.mapping().at(self.offset(unit)).as_ptr();
        // SAFETY: the word lies in the mapping, and no reference to it exists.
        if unsafe { libc::write(writer.as_raw_fd(), word.cast(), 8) } != 8 {
            return Err(io::Error::last_os_error().raw_os_error());
        }
        let mut bytes = [0; 8];
        reader.read_exact(&mut bytes).unwrap();
        Ok(u64::from_le_bytes(bytes))
    }

    fn expect(&self, unit: u64) {
        assert_eq!(self.read(unit), Ok(word_of(self.offset(unit))), "unit {unit}");
    }

    fn is_marked(&self, unit: u64) -> bool {
        self.read(unit) == Err(Some(libc::EFAULT))
    }

    fn ensure(&self, pages: PageRange) {
        self.pager.ensure(pages, FaultPath::Fill, &Waiter::new()).unwrap();
    }
}

#[test]
fn first_fault_marks_the_rest_of_its_chunk() {
    let marked = Marked::new(BackingKind::Shmem, 3 * CHUNK - 100);
    marked.expect(CHUNK + 7);
    for unit in (CHUNK..2 * CHUNK).filter(|unit| *unit != CHUNK + 7) {
        assert!(marked.is_marked(unit), "unit {unit}");
    }
    // The chunks around have none yet; the last one ends with the memory.
    for unit in [0, 3 * CHUNK - 101] {
        marked.expect(unit);
    }
    assert!(marked.is_marked(1) && marked.is_marked(CHUNK - 1) && marked.is_marked(2 * CHUNK));
    // A page is counted after its faulter is woken.
    until("no other page has arrived", || marked.pager.stats().pages_arrived() == 3);
}

#[test]
fn arriving_page_replaces_its_marker() {
    let marked = Marked::new(BackingKind::Shmem, CHUNK);
    // Some pages have arrived before.
    marked.ensure(PageRange::new(100, 50));
    marked.expect(0);
    (100..150).for_each(|unit| marked.expect(unit));
    assert!(marked.is_marked(99) && marked.is_marked(150));
    marked.ensure(PageRange::new(150, 10));
    (150..160).for_each(|unit| marked.expect(unit));
    assert!(marked.is_marked(160));
    marked.ensure(PageRange::new(0, CHUNK));
    (0..CHUNK).for_each(|unit| marked.expect(unit));
    assert_eq!(marked.pager.map_unit(PageRange::page(9)).unwrap(), Mapped::Before);
}

#[test]
fn huge_page_keeps_its_marker_until_mapped() {
    let Some(_pool) = huge_pages(3) else { return };
    let marked = Marked::new(BackingKind::Hugetlb2M, 3);
    let unit = |number: u64| PageRange::new(number * 512, 512);
    marked.expect(0);
    assert!(marked.is_marked(1) && marked.is_marked(2));
    marked.ensure(unit(1));
    assert!(marked.is_marked(1));
    assert_eq!(marked.pager.map_unit(unit(1)).unwrap(), Mapped::Now);
    assert_eq!(marked.pager.map_unit(unit(1)).unwrap(), Mapped::Before);
    marked.expect(1);
    marked.ensure(unit(2));
    marked.service.finish().unwrap();
    marked.expect(2);
}
