// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest's mapping is armed as its backing and the mechanism that traps vCPUs require.

mod common;

use common::{expect, mapping, pager, read_later, uffd};
use demand_memory::{BackingKind, PAGE_SIZE, PageRange, Path, VcpuTrap};
use demand_uffd::{ArmedMapping, DEFAULT_THREADS, FaultService, Modes};
use test_support::host::huge_pages;
use test_support::wait::until;

const SIZE: u64 = 4 << 20;

fn armed(kind: BackingKind, vcpus: VcpuTrap) -> (Modes, Path) {
    let pager = pager(kind, SIZE);
    let armed = ArmedMapping::guest(&uffd(), mapping(&pager), &pager, vcpus).unwrap();
    (armed.modes(), armed.path())
}

#[test]
fn shmem_is_armed_in_all_modes() {
    let kind = BackingKind::Shmem;
    assert_eq!(armed(kind, VcpuTrap::Mapping), (Modes::ALL, Path::Guest));
    assert_eq!(armed(kind, VcpuTrap::Hypervisor), (Modes::ALL, Path::KvmInternal));
}

#[test]
fn huge_pages_are_left_to_a_trapping_hypervisor() {
    let Some(_pool) = huge_pages(2) else { return };
    let kind = BackingKind::Hugetlb2M;
    assert_eq!(armed(kind, VcpuTrap::Mapping), (Modes::ALL, Path::Guest));
    assert_eq!(armed(kind, VcpuTrap::Hypervisor), (Modes::MISSING, Path::KvmInternal));
}

/// Each region has a mapping, in order, and pages that are fetched for other reasons are mapped
/// too.
#[test]
fn all_regions_are_served() {
    let pagers = [2, 1].map(|parts| pager(BackingKind::Shmem, parts * SIZE));
    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    let mappings = service.arm_guest(&pagers, VcpuTrap::Mapping).unwrap();
    assert_eq!(mappings.iter().map(|mapping| mapping.len()).collect::<Vec<_>>(), [2 * SIZE, SIZE]);
    for (pager, mapping) in pagers.iter().zip(&mappings) {
        pager.fetch(PageRange::page(1), Path::Fill).unwrap();
        for page in [1, 2] {
            expect(&read_later(mapping, page * PAGE_SIZE), page * PAGE_SIZE);
        }
        let faults = || pager.stats().path(Path::Guest).faults;
        until("the fault is counted", || faults() > 0);
        assert_eq!(faults(), 1, "what has arrived is mapped");
    }
}
