// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faults in holes that another process has punched into memory that had arrived.

mod common;

use std::sync::Arc;

use common::{base, mapping, pager, read_later, uffd};
use demand_memory::{BackingKind, FaultPath, Mapping, PAGE_SIZE, PageRange, Pager, Waiter};
use demand_uffd::{ArmedMapping, DEFAULT_THREADS, FaultService, Userfaultfd};
use test_support::host::huge_pages;
use test_support::wait::PATIENCE;

const UNIT: u64 = 2 << 20;
const SIZE: u64 = 2 * UNIT;

/// A mapping to arm: the userfaultfd, the mapping, its pager.
type Arm = fn(&Arc<Userfaultfd>, Arc<Mapping>, &Arc<Pager>) -> Arc<ArmedMapping>;

/// Punches out all memory once it is present, and expects a thread that touches it to continue: it
/// reads zeros, which the process that has punched the hole could have written as well.
fn expect_end(kind: BackingKind, arm: Arm) {
    let pager = pager(kind, SIZE);
    let (uffd, mapping) = (uffd(), mapping(&pager));
    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    service.add(&[arm(&uffd, mapping.clone(), &pager)]).unwrap();
    let all = PageRange::new(0, pager.pages());
    pager.ensure(all, FaultPath::Fill, &Waiter::new()).unwrap();
    pager.backing().remove(all).unwrap();
    for offset in [PAGE_SIZE, UNIT] {
        let word = read_later(&mapping, offset).recv_timeout(PATIENCE);
        assert_eq!(word, Ok(0), "a fault at {offset:#x} of {kind}");
    }
}

#[test]
fn hypervisor_fault_in_a_hole_ends() {
    let Some(_pool) = huge_pages(SIZE / UNIT) else { return };
    expect_end(BackingKind::Hugetlb2M, |uffd, mapping, pager| {
        ArmedMapping::own_missing_units(uffd, mapping, pager, FaultPath::HypervisorInternal)
            .unwrap()
    });
}

#[test]
fn own_fault_in_a_hole_ends() {
    let own: Arm =
        |uffd, mapping, pager| ArmedMapping::own(uffd, mapping, pager, FaultPath::Guest).unwrap();
    expect_end(BackingKind::Shmem, own);
    let Some(_pool) = huge_pages(SIZE / UNIT) else { return };
    expect_end(BackingKind::Hugetlb2M, own);
}

#[test]
fn back_end_fault_in_a_hole_ends() {
    let foreign: Arm =
        |uffd, mapping, pager| ArmedMapping::foreign(uffd, base(&mapping), pager).unwrap();
    expect_end(BackingKind::Shmem, foreign);
    let Some(_pool) = huge_pages(SIZE / UNIT) else { return };
    expect_end(BackingKind::Hugetlb2M, foreign);
}
