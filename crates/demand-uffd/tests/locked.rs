// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mappings that contain zeros before they are armed: memory of a process that locks it, or that
//! was touched.

mod common;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::{expect, mapping, pager, pager_on, read, read_later, uffd};
use demand_memory::{BackingKind, FaultPath, Mapping, MemfdBacking, PAGE_SIZE, Pager, VcpuTrap};
use demand_uffd::{ArmedMapping, DEFAULT_THREADS, FaultService};
use test_support::host::huge_pages;
use test_support::image::Near;

/// Small, because all of it counts against the limit for locked memory.
const SIZE: u64 = 64 * PAGE_SIZE;

static LOCK: Mutex<()> = Mutex::new(());

/// Locks every new mapping of this process, one test at a time.
struct Locked(
    #[allow(dead_code, reason = "kept for its drop, which lets the next test go on")]
    MutexGuard<'static, ()>,
);

impl Locked {
    fn new(flags: libc::c_int) -> Self {
        let guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the call changes where memory lies, not its content.
        assert_eq!(unsafe { libc::mlockall(flags) }, 0, "{}", std::io::Error::last_os_error());
        Locked(guard)
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { libc::munlockall() };
    }
}

fn expect_served(pager: &Arc<Pager>, mapping: Arc<Mapping>) {
    let armed = ArmedMapping::own(&uffd(), mapping.clone(), pager, FaultPath::Vmm).unwrap();
    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    service.add(&[armed]).unwrap();
    for page in [0, pager.pages() / 2, pager.pages() - 1] {
        expect(&read_later(&mapping, page * PAGE_SIZE + 8), page * PAGE_SIZE + 8);
    }
}

#[test]
fn locked_mapping_reads_no_zeros() {
    for flags in [libc::MCL_FUTURE, libc::MCL_FUTURE | libc::MCL_ONFAULT] {
        let _locked = Locked::new(flags);
        let pager = pager(BackingKind::Shmem, SIZE);
        expect_served(&pager, mapping(&pager));
    }
}

#[test]
fn locked_huge_pages_read_no_zeros() {
    let Some(_pool) = huge_pages(4) else { return };
    let size = BackingKind::Hugetlb2M.unit();
    let _locked = Locked::new(libc::MCL_FUTURE);
    let pager = pager(BackingKind::Hugetlb2M, size);
    expect_served(&pager, mapping(&pager));
}

/// The hypervisor's own accesses are trapped only while no unit exists.
#[test]
fn locked_units_are_removed_for_the_hypervisor() {
    let Some(_pool) = huge_pages(4) else { return };
    let _locked = Locked::new(libc::MCL_FUTURE);
    let (kind, size) = (BackingKind::Hugetlb2M, BackingKind::Hugetlb2M.unit());
    for reserve in [false, true] {
        let backing = MemfdBacking::new(kind, size).unwrap().with_reservation(reserve);
        let pager = pager_on(Arc::new(backing), Near(size));
        let service = FaultService::start(DEFAULT_THREADS).unwrap();
        let mappings = service.arm_guest([&pager], VcpuTrap::Hypervisor).unwrap();
        expect(&read_later(mappings[0].mapping(), PAGE_SIZE), PAGE_SIZE);
    }
}

#[test]
fn touched_mapping_reads_no_zeros() {
    let _unlocked = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let pager = pager(BackingKind::Shmem, SIZE);
    let mapping = mapping(&pager);
    (0..pager.pages()).for_each(|page| assert_eq!(read(&mapping, page * PAGE_SIZE + 8), 0));
    expect_served(&pager, mapping);
}
