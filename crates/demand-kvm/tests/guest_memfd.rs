// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory in a guest_memfd: its pages arrive as the guest touches them, and what cannot trap the
//! guest there is refused. On a kernel without such files, their refusal is what is tested.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

mod common;

use std::sync::Arc;

use common::*;
use demand_kvm::{
    DemandSlot, Engine, FaultHandler, GUEST_MEMFD_LIMITS, SlotError, Trial, guest_memfd,
};
use demand_memory::{
    BackingError, BackingKind, FaultPath, GuestMapping, PAGE_SIZE, PageRange, Pager, PagerConfig,
    VcpuTrap,
};
use demand_uffd::{ArmGuestError, DEFAULT_THREADS, FaultService};
use test_support::host::skip_without_patch;

const PAGES: u64 = 512;
/// `MMAP` and `INIT_SHARED`.
const MAPPED: u32 = 0b11;

/// Returns a machine, and a pager of its memory, of which all pages are missing. On a kernel that
/// has no such memory, checks that it is refused, and how.
fn machine() -> Option<(Machine, Arc<Pager>)> {
    let kvm = kvm()?;
    let machine = Machine::new(&kvm, Engine::KvmUserfault);
    let pager = pager_of(&machine)?;
    Some((machine, pager))
}

fn pager_of(machine: &Machine) -> Option<Arc<Pager>> {
    let backing = match guest_memfd(&machine.vm, PAGES * PAGE_SIZE) {
        Ok(backing) => backing,
        Err(error) => {
            assert_ne!(features().guest_memfd_flags & MAPPED, MAPPED, "{error}");
            assert!(matches!(error, BackingError::Create { .. }), "{error:?}");
            assert!(error.to_string().contains("Linux 6.18"), "{error}");
            assert!(!features().guest_memfd_userfault.works());
            return None;
        }
    };
    let image = image_file(PAGES);
    let source = Arc::new(demand_source::LocalFile::open(image.path()).unwrap());
    Some(Pager::new(PagerConfig::new(Arc::new(backing), source)).unwrap())
}

/// Creates a slot over missing memory. On a kernel without the patch, checks that it is refused.
fn lazy_slot(machine: &Machine, pager: &Arc<Pager>) -> Option<DemandSlot> {
    let mapping = GuestMapping::unarmed(pager).unwrap();
    match DemandSlot::new(machine.slot_config(2, mapping, Engine::KvmUserfault)) {
        Ok(slot) => {
            assert_eq!(features().guest_memfd_userfault, Trial::Works);
            Some(slot)
        }
        Err(error) => {
            assert!(!features().guest_memfd_userfault.works(), "{error}");
            skip_without_patch("KVM Userfault for guest_memfd");
            None
        }
    }
}

#[test]
fn guest_sees_image_and_fetches_only_touched_pages() {
    let Some((machine, pager)) = machine() else { return };
    let Some(slot) = lazy_slot(&machine, &pager) else { return };
    let handler = handler(&slot);
    let mut cpu = machine.vcpu(0);
    let touched = Pages { first: 1, count: 100, stride: 3 };
    machine.copy_and_compare(&mut cpu, &handler, touched, 0, page);
    let guest = pager.stats().path(FaultPath::Guest);
    assert_eq!((guest.faults, guest.pages), (100, 100));
    assert_eq!(guest.granularity_histogram.into_iter().collect::<Vec<_>>(), [(4096, 100)]);
    // No page exists that was not touched.
    let holes = pager.backing().next_existing(PageRange::new(302, PAGES - 302)).unwrap();
    assert_eq!(holes, None);
    // The guest's writes stay, and the rest arrives.
    machine.load(&mut cpu, Program::Write { value: 7 }, Pages::run(400, 1));
    cpu.run(&handler).unwrap();
    assert!(matches!(slot.finish(), Err(SlotError::PagesMissing { .. })));
    fill(&pager);
    slot.finish().unwrap();
    assert!(!slot.is_trapping());
    let rest = Pages::run(0, 400);
    machine.copy_and_compare(&mut cpu, &no_faults(), rest, 0, page);
    assert_eq!(look_at_word(slot.mapping(), 400 * PAGE_SIZE + 16), 7);
}

#[test]
fn present_memory_needs_no_engine() {
    let Some((machine, pager)) = machine() else { return };
    fill(&pager);
    let mapping = GuestMapping::unarmed(&pager).unwrap();
    let slot = machine.slot_over(mapping, Engine::Uffd);
    let mut cpu = machine.vcpu(0);
    machine.copy_and_compare(&mut cpu, &no_faults(), Pages::run(0, 400), 0, page);
    slot.finish().unwrap();
}

#[test]
fn untrapped_memory_is_refused() {
    let Some((machine, pager)) = machine() else { return };
    for engine in [Engine::Uffd, Engine::UffdPoison, Engine::KvmAttributes] {
        let mapping = GuestMapping::unarmed(&pager).unwrap();
        let error = DemandSlot::new(machine.slot_config(2, mapping, engine)).unwrap_err();
        assert!(matches!(error, SlotError::Untrappable { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("guest-memfd") && text.contains(engine.name()), "{text}");
    }
    let service = FaultService::start(DEFAULT_THREADS).unwrap();
    for trap in [VcpuTrap::Mapping, VcpuTrap::Hypervisor] {
        match service.arm_guest([&pager], trap) {
            Err(ArmGuestError::Untrappable { kind: BackingKind::GuestMemfd }) => {}
            outcome => panic!("{outcome:?}"),
        }
    }
    assert_eq!(GUEST_MEMFD_LIMITS.len(), 3);
}

#[test]
fn memory_of_another_vm_is_refused() {
    let Some((machine, _)) = machine() else { return };
    let other = Machine::new(&kvm().unwrap(), Engine::KvmUserfault);
    let Some(pager) = pager_of(&other) else { return };
    fill(&pager);
    let mapping = GuestMapping::unarmed(&pager).unwrap();
    let error = DemandSlot::new(machine.slot_config(2, mapping, Engine::Uffd)).unwrap_err();
    assert!(matches!(error, SlotError::Create { .. }), "{error:?}");
}

#[test]
fn slot_ends_before_its_file() {
    let Some((machine, pager)) = machine() else { return };
    let Some(slot) = lazy_slot(&machine, &pager) else { return };
    let handler = FaultHandler::new([&slot]).unwrap();
    let mut cpu = machine.vcpu(0);
    machine.copy_and_compare(&mut cpu, &handler, Pages::run(0, 3), 0, page);
    drop(slot);
    // The guest finds no memory there, and the file still has it.
    machine.load(&mut cpu, Program::Copy { out: 0 }, Pages::run(0, 1));
    assert_eq!(cpu.run(&no_faults()), Err(Stopped::Mmio(REGION)));
    assert_eq!(
        pager.backing().next_existing(PageRange::new(0, 9)).unwrap(),
        Some(PageRange::new(0, 3))
    );
}
