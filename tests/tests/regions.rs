// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory of any size around the hole for devices: guest, back-end and VMM on both sides of it,
//! with rings and buffers in all windows; and no memory outside the windows ever arrives.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::os::unix::fs::FileExt;
use std::sync::{Arc, mpsc};

use demand_kvm::{Engine, EngineChoice};
use demand_memory::{BackingKind, Fill, FillRate, Retrier, RetryPolicy, Stats};
use demand_paging::{Lazy, ServiceOptions};
use demand_source::LocalFile;
use demand_tests::host::{huge_pages, skip};
use demand_tests::scenario::Scenario;
use demand_tests::{can_run, cannot_run, userfaultfds_of};
use demand_vmm::arch::placement::Placement;
use demand_vmm::config::MemoryConfig;
use demand_vmm::vm::machine::{Machine, MachineConfig};
use test_support::wait::{A_WHILE, PATIENCE, until};
use vm_memory::GuestAddress;

const M: u64 = 1 << 20;
const G: u64 = 1 << 30;
const WINDOW: u64 = 32 * M;
const PAGES: u64 = WINDOW / 4096;

/// A mixed run in a window of a VM of `size` bytes. The separate process that verifies it compares
/// every byte of the window, and checks that no other page of memory exists.
fn run(engine: Engine, backing: BackingKind, size: u64) {
    if !can_run(engine, backing, WINDOW) {
        return;
    }
    let scenario = Scenario {
        stage: format!("{} MiB of memory", size / M),
        memory: size,
        window: Some(WINDOW),
        reserve: false,
        ..Scenario::mixed(engine.name(), backing, 2, size / M)
    };
    let report = scenario.run(&mut |_, _| {}).unwrap_or_else(|error| panic!("{error:#}"));
    println!("{}", report.table());
    assert_eq!(report.memory_bytes, size);
    assert!(report.guest.faults > 100, "{report:?}");
    assert!(report.back_end.faults >= 8, "{report:?}");
    assert!(report.vmm.faults > 10, "{report:?}");
    let pages: u64 = report.paths().iter().map(|(_, path)| path.pages).sum();
    assert_eq!(pages, PAGES, "the window and nothing else: {report:?}");
    assert_eq!(report.time_to_complete_us, 0, "{report:?}");
}

#[test]
fn just_below_the_hole() {
    run(Engine::Uffd, BackingKind::Shmem, 3 * G - 2 * M);
}

#[test]
fn up_to_the_hole() {
    run(Engine::Uffd, BackingKind::Shmem, 3 * G);
}

#[test]
fn one_unit_above_the_hole() {
    run(Engine::Uffd, BackingKind::Shmem, 3 * G + 2 * M);
}

#[test]
fn on_both_sides_of_the_hole() {
    run(Engine::Uffd, BackingKind::Shmem, 5 * G);
}

#[test]
fn more_than_any_machine_here_has() {
    run(Engine::Uffd, BackingKind::Shmem, 64 * G);
}

#[test]
fn one_huge_page_above_the_hole_kvm_userfault() {
    run(Engine::KvmUserfault, BackingKind::Hugetlb2M, 3 * G + 2 * M);
}

#[test]
fn huge_pages_around_the_hole_kvm_userfault() {
    run(Engine::KvmUserfault, BackingKind::Hugetlb2M, 5 * G);
}

#[test]
fn too_many_huge_pages_kvm_userfault() {
    run(Engine::KvmUserfault, BackingKind::Hugetlb2M, 64 * G);
}

#[test]
fn shmem_around_the_hole_kvm_userfault() {
    run(Engine::KvmUserfault, BackingKind::Shmem, 5 * G);
}

/// Fills a machine with two small regions, on both sides of the hole, and checks that it is
/// complete only when both are, and that no part of demand paging remains then.
fn fill(engine: EngineChoice, backing: BackingKind) {
    const SIZE: u64 = 4 * M;
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    if let Err(error) = demand_kvm::resolve(engine, &demand_kvm::probe()) {
        return skip(&error.to_string());
    }
    let _guard = match backing {
        BackingKind::Shmem => None,
        _ => match huge_pages(2 * SIZE / backing.unit()) {
            Some(guard) => Some(guard),
            None => return,
        },
    };
    let content: Vec<u8> = (0..SIZE / 2).flat_map(|i| (i as u32).to_le_bytes()).collect();
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().write_all_at(&content, 0).unwrap();
    let regions = [(0, 0), (4 * G, SIZE)].map(|(start, image_offset)| Placement {
        start: GuestAddress(start),
        size: SIZE,
        image_offset,
    });
    let memory = MemoryConfig { size: 2 * SIZE, backing, reserve: true, thp: false };
    let machine = Machine::with_regions(
        MachineConfig {
            memory: &memory,
            engine,
            probes: None,
            lazy: Lazy::Require,
            source: Arc::new(LocalFile::open(image.path()).unwrap()),
            service: ServiceOptions::default(),
            stats: Arc::new(Stats::new()),
            retrier: Retrier::new(RetryPolicy::default(), |failure| panic!("{}", failure.error)),
        },
        &regions,
    )
    .unwrap();
    let trapping = machine.engine() == Some(Engine::KvmUserfault);
    let (sender, complete) = mpsc::channel();
    machine.on_complete(move || sender.send(()).unwrap());
    let first = machine.pagers().next().unwrap().clone();
    let fill = Fill::start(vec![first.clone()], FillRate::Unlimited).unwrap();
    until("the first region is complete", || first.bitmap().is_complete());
    drop(fill);
    assert!(complete.recv_timeout(A_WHILE).is_err(), "one region is not all of memory");
    assert!(machine.finish().is_err(), "half of the pages are missing");
    assert!(machine.slots().iter().all(|slot| slot.is_trapping() == trapping));
    // Another one creates the second region's huge pages; the first region's are all present.
    let left = userfaultfds_of(machine.engine().unwrap(), backing);
    until("one userfaultfd serves all regions", || userfaultfds() == left);

    let pagers: Vec<_> = machine.pagers().cloned().collect();
    let _fill = Fill::start(pagers, FillRate::Unlimited).unwrap();
    complete.recv_timeout(PATIENCE).expect("both regions are complete");
    machine.finish().unwrap();
    assert!(machine.slots().iter().all(|slot| !slot.is_trapping()));
    until("no userfaultfd is left", || userfaultfds() == 0);
    for (pager, expected) in machine.pagers().zip(content.chunks(SIZE as usize)) {
        let mut found = vec![0; SIZE as usize];
        pager.backing().file().unwrap().read_exact_at(&mut found, 0).unwrap();
        assert!(found == expected);
    }
}

/// Returns the number of userfaultfds that this process has open; other tests open one for a
/// moment, to probe.
fn userfaultfds() -> usize {
    let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let names = links.filter_map(|link| std::fs::read_link(link.path()).ok());
    names.filter(|name| name.to_string_lossy().contains("[userfaultfd]")).count()
}

// One after the other, because they count the process's userfaultfds.
#[test]
fn fill_completes_regions_and_removes_demand_paging() {
    fill(EngineChoice::Only(Engine::Uffd), BackingKind::Shmem);
    fill(EngineChoice::Only(Engine::KvmUserfault), BackingKind::Shmem);
    fill(EngineChoice::Only(Engine::KvmUserfault), BackingKind::Hugetlb2M);
}
