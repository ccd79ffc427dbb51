// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest's mapping is armed as its backing and the mechanism that traps vCPUs require.

mod common;

use std::sync::Arc;

use common::{backing, expect, mapping, pager, read, read_later, uffd};
use demand_memory::{
    BackingKind, DemandRegion, FaultPath, GuestMapping, GuestMappingError, GuestTrapError,
    PAGE_SIZE, PageRange, Pager, PagerConfig, VcpuTrap,
};
use demand_uffd::{ArmGuestError, ArmedMapping, DEFAULT_THREADS, FaultService, Modes};
use test_support::host::huge_pages;
use test_support::image::Near;
use test_support::wait::until;
use vm_memory::GuestAddress;

const SIZE: u64 = 4 << 20;

fn armed(kind: BackingKind, vcpus: VcpuTrap) -> (Modes, FaultPath) {
    let pager = pager(kind, SIZE);
    let (armed, guest) = ArmedMapping::guest(&uffd(), &pager, vcpus).unwrap();
    assert_eq!(guest.armed_for(), Some(vcpus));
    (armed.modes(), armed.path())
}

#[test]
fn shmem_is_armed_in_all_modes() {
    let kind = BackingKind::Shmem;
    assert_eq!(armed(kind, VcpuTrap::Mapping), (Modes::ALL, FaultPath::Guest));
    assert_eq!(armed(kind, VcpuTrap::Hypervisor), (Modes::ALL, FaultPath::HypervisorInternal));
}

#[test]
fn huge_pages_are_left_to_a_trapping_hypervisor() {
    let Some(_pool) = huge_pages(2) else { return };
    let kind = BackingKind::Hugetlb2M;
    assert_eq!(armed(kind, VcpuTrap::Mapping), (Modes::ALL, FaultPath::Guest));
    assert_eq!(armed(kind, VcpuTrap::Hypervisor), (Modes::MISSING, FaultPath::HypervisorInternal));
}

/// Each region has a mapping, in order, and pages that are fetched for other reasons are mapped
/// too.
#[test]
fn all_regions_are_served() {
    let pagers = [2, 1].map(|parts| pager(BackingKind::Shmem, parts * SIZE));
    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    let mappings = service.arm_guest(&pagers, VcpuTrap::Mapping).unwrap();
    assert_eq!(
        mappings.iter().map(|guest| guest.mapping().len()).collect::<Vec<_>>(),
        [2 * SIZE, SIZE]
    );
    for (pager, mapping) in pagers.iter().zip(&mappings) {
        pager.fetch(PageRange::page(1), FaultPath::Fill).unwrap();
        for page in [1, 2] {
            expect(&read_later(mapping.mapping(), page * PAGE_SIZE), page * PAGE_SIZE);
        }
        let faults = || pager.stats().path(FaultPath::Guest).faults;
        until("the fault is counted", || faults() > 0);
        assert_eq!(faults(), 1, "what has arrived is mapped");
    }
}

fn arming_error(pager: &Arc<Pager>) -> GuestTrapError {
    let service = FaultService::start(1).unwrap();
    match service.arm_guest([pager], VcpuTrap::Mapping).unwrap_err() {
        ArmGuestError::Mapping(GuestMappingError::Order(error)) => error,
        error => panic!("{error}"),
    }
}

#[test]
fn arming_twice_is_refused() {
    let pager = pager(BackingKind::Shmem, SIZE);
    let service = FaultService::start(1).unwrap();
    let guest = service.arm_guest([&pager], VcpuTrap::Mapping).unwrap();
    assert_eq!(arming_error(&pager), GuestTrapError::Twice);
    let error = GuestMapping::unarmed(&pager).unwrap_err();
    assert!(matches!(error, GuestMappingError::Order(GuestTrapError::Twice)), "{error}");
    drop(guest);
    assert_eq!(arming_error(&pager), GuestTrapError::Twice);
}

/// A memslot may exist over the unarmed mapping, which would show zeros.
#[test]
fn arming_after_an_unarmed_mapping_is_refused() {
    let pager = pager(BackingKind::Shmem, SIZE);
    let unarmed = GuestMapping::unarmed(&pager).unwrap();
    assert_eq!(arming_error(&pager), GuestTrapError::AfterUnarmed);
    drop(unarmed);
    let service = FaultService::start(1).unwrap();
    service.arm_guest([&pager], VcpuTrap::Mapping).map(drop).unwrap();
}

/// A region keeps the mapping that its guest had, too, without which it is no guest's.
#[test]
fn dropped_unarmed_mapping_leaves_the_region_armable() {
    let config = PagerConfig::new(backing(BackingKind::Shmem, SIZE), Arc::new(Near(SIZE)));
    let region = DemandRegion::new(GuestAddress(0), config, ()).unwrap();
    let unarmed = GuestMapping::unarmed(region.pager()).unwrap();
    assert_eq!(arming_error(region.pager()), GuestTrapError::AfterUnarmed);
    drop(unarmed);
    let service = FaultService::start(1).unwrap();
    service.arm_guest([region.pager()], VcpuTrap::Mapping).map(drop).unwrap();
}

/// The pager writes content through the mapping of an untrapped guest, and must not wait for it.
#[test]
fn untrapped_guests_mapping_is_not_armed() {
    let pager = pager(BackingKind::Shmem, SIZE);
    let guest = GuestMapping::unarmed(&pager).unwrap();
    let mapping = guest.mapping().clone();
    let error = ArmedMapping::own(&uffd(), mapping, &pager, FaultPath::Vmm).unwrap_err();
    assert!(error.to_string().contains("map the region's backing"), "{error}");
}

#[test]
fn arming_after_a_fetch_names_the_pages() {
    let pager = pager(BackingKind::Shmem, SIZE);
    pager.fetch(PageRange::new(3, 2), FaultPath::Fill).unwrap();
    let error = arming_error(&pager);
    assert_eq!(error, GuestTrapError::AfterFetch { first: 3, pages: 2 });
    assert!(error.to_string().contains("2 pages from page 3"), "{error}");
}

/// The source's content would replace the written one. Zeros, which a read leaves, cost nothing.
#[test]
fn arming_after_a_write_names_the_pages() {
    let pager = pager(BackingKind::Shmem, SIZE);
    let raw = mapping(&pager);
    assert_eq!(read(&raw, 0), 0);
    // SAFETY: the byte lies in the mapping, and nothing refers to it.
    unsafe { raw.at(7 * PAGE_SIZE + 9).as_ptr().write_volatile(1) };
    let error = arming_error(&pager);
    assert_eq!(error, GuestTrapError::AfterWrite { first: 7, pages: 1 });
    // SAFETY: as above.
    unsafe { raw.at(7 * PAGE_SIZE + 9).as_ptr().write_volatile(0) };
    let service = FaultService::start(1).unwrap();
    let guest = service.arm_guest([&pager], VcpuTrap::Mapping).unwrap().remove(0);
    for page in [0, 7] {
        expect(&read_later(guest.mapping(), page * PAGE_SIZE), page * PAGE_SIZE);
    }
}

#[test]
fn armed_mapping_is_not_armed_again() {
    let (pager, other) = (pager(BackingKind::Shmem, SIZE), pager(BackingKind::Shmem, 2 * SIZE));
    let mapping = mapping(&pager);
    let arm = |pager| ArmedMapping::own(&uffd(), mapping.clone(), pager, FaultPath::Vmm);
    let error = arm(&other).unwrap_err();
    assert!(error.to_string().contains("its region has 8388608 bytes"), "{error}");
    let _armed = arm(&pager).unwrap();
    let error = arm(&pager).unwrap_err();
    assert!(error.to_string().contains("busy"), "{error}");
}

/// The guest's mapping keeps its pager: the region may be gone, and its pages still arrive.
#[test]
fn guest_outlives_its_region() {
    let service = FaultService::start(1).unwrap();
    let config = PagerConfig::new(backing(BackingKind::Shmem, SIZE), Arc::new(Near(SIZE)));
    let region = DemandRegion::new(GuestAddress(0), config, ()).unwrap();
    let guest = service.arm_guest([region.pager()], VcpuTrap::Mapping).unwrap().remove(0);
    drop(region);
    expect(&read_later(guest.mapping(), PAGE_SIZE), PAGE_SIZE);
    let pager = guest.pager().clone();
    assert!(!pager.bitmap().is_stopped());
    drop(guest);
    assert!(pager.bitmap().is_stopped());
}
