// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The mixed run: guest, back-end and VMM on the same units, in all orders of arrival; with each
//! engine, on each backing, with 1, 2 and 4 vCPUs.

use std::sync::{Mutex, PoisonError};

use demand_kvm::Engine;
use demand_memory::BackingKind;
use demand_tests::can_run;
use demand_tests::host::transparent_huge_pages;
use demand_tests::scenario::Scenario;

/// Returns the number of rounds of each combination; one, unless `rust-vmm-ci/soak` requests more.
fn rounds() -> u64 {
    std::env::var("MIXED_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Pages of 1 GiB are few: only one test at a time has one.
static GIGANTIC: Mutex<()> = Mutex::new(());

/// The kind of the guest's memory.
#[derive(Clone, Copy, PartialEq)]
enum Memory {
    Shmem,
    ShmemWithThp,
    Hugetlb2M,
    Hugetlb1G,
}

impl Memory {
    fn backing(self) -> BackingKind {
        match self {
            Memory::Shmem | Memory::ShmemWithThp => BackingKind::Shmem,
            Memory::Hugetlb2M => BackingKind::Hugetlb2M,
            Memory::Hugetlb1G => BackingKind::Hugetlb1G,
        }
    }
}

fn mixed(engine: Engine, memory: Memory, cpus: u32) {
    let gigantic = memory == Memory::Hugetlb1G;
    let _one = gigantic.then(|| GIGANTIC.lock().unwrap_or_else(PoisonError::into_inner));
    let backing = memory.backing();
    if !can_run(engine, backing, 32 << 20) {
        return;
    }
    if memory == Memory::ShmemWithThp && !transparent_huge_pages() {
        return;
    }
    for round in 0..rounds() {
        let mut scenario = Scenario::mixed(engine.name(), backing, cpus, 100 + round);
        scenario.thp = memory == Memory::ShmemWithThp;
        if gigantic {
            // The test guest uses no more of it than of the others.
            (scenario.memory, scenario.window) = (1 << 30, Some(scenario.memory));
        }
        let report =
            scenario.run(&mut |_, _| {}).unwrap_or_else(|error| panic!("round {round}: {error:#}"));
        assert_eq!(report.engine, engine.name());
        let guest = if engine.faults_by_unit() { backing.unit() } else { 4096 };
        let back_end = backing.unit().max(2 << 20);
        // With a single unit, only the first actor to access it faults.
        if !gigantic || report.guest.faults > 0 {
            assert_eq!(report.guest.granularity_bytes, guest, "{report:?}");
        }
        if !gigantic || report.back_end.faults > 0 {
            assert_eq!(report.back_end.granularity_bytes, back_end, "{report:?}");
        }
        if !gigantic {
            assert!(report.guest.faults > if guest == 4096 { 100 } else { 3 }, "{report:?}");
            assert!(report.back_end.faults >= if guest == 4096 { 8 } else { 3 }, "{report:?}");
            assert!(report.vmm.faults > 3, "{report:?}");
        }
        println!("round {round}:\n{}", report.table());
    }
}

macro_rules! matrix {
    ($($engine:ident on $memory:ident: $one:ident, $two:ident, $four:ident;)*) => {$(
        #[test]
        fn $one() {
            mixed(Engine::$engine, Memory::$memory, 1);
        }

        #[test]
        fn $two() {
            mixed(Engine::$engine, Memory::$memory, 2);
        }

        #[test]
        fn $four() {
            mixed(Engine::$engine, Memory::$memory, 4);
        }
    )*};
}

matrix! {
    KvmUserfault on Shmem: kvm_userfault_on_shmem_with_1_vcpu,
        kvm_userfault_on_shmem_with_2_vcpus, kvm_userfault_on_shmem_with_4_vcpus;
    KvmUserfault on ShmemWithThp: kvm_userfault_on_shmem_thp_with_1_vcpu,
        kvm_userfault_on_shmem_thp_with_2_vcpus, kvm_userfault_on_shmem_thp_with_4_vcpus;
    KvmUserfault on Hugetlb2M: kvm_userfault_on_hugetlb_2m_with_1_vcpu,
        kvm_userfault_on_hugetlb_2m_with_2_vcpus, kvm_userfault_on_hugetlb_2m_with_4_vcpus;
    KvmUserfault on Hugetlb1G: kvm_userfault_on_hugetlb_1g_with_1_vcpu,
        kvm_userfault_on_hugetlb_1g_with_2_vcpus, kvm_userfault_on_hugetlb_1g_with_4_vcpus;
    Uffd on Shmem: uffd_on_shmem_with_1_vcpu,
        uffd_on_shmem_with_2_vcpus, uffd_on_shmem_with_4_vcpus;
    Uffd on ShmemWithThp: uffd_on_shmem_thp_with_1_vcpu,
        uffd_on_shmem_thp_with_2_vcpus, uffd_on_shmem_thp_with_4_vcpus;
    Uffd on Hugetlb2M: uffd_on_hugetlb_2m_with_1_vcpu,
        uffd_on_hugetlb_2m_with_2_vcpus, uffd_on_hugetlb_2m_with_4_vcpus;
    Uffd on Hugetlb1G: uffd_on_hugetlb_1g_with_1_vcpu,
        uffd_on_hugetlb_1g_with_2_vcpus, uffd_on_hugetlb_1g_with_4_vcpus;
    UffdPoison on Shmem: uffd_poison_on_shmem_with_1_vcpu,
        uffd_poison_on_shmem_with_2_vcpus, uffd_poison_on_shmem_with_4_vcpus;
    UffdPoison on ShmemWithThp: uffd_poison_on_shmem_thp_with_1_vcpu,
        uffd_poison_on_shmem_thp_with_2_vcpus, uffd_poison_on_shmem_thp_with_4_vcpus;
    UffdPoison on Hugetlb2M: uffd_poison_on_hugetlb_2m_with_1_vcpu,
        uffd_poison_on_hugetlb_2m_with_2_vcpus, uffd_poison_on_hugetlb_2m_with_4_vcpus;
    UffdPoison on Hugetlb1G: uffd_poison_on_hugetlb_1g_with_1_vcpu,
        uffd_poison_on_hugetlb_1g_with_2_vcpus, uffd_poison_on_hugetlb_1g_with_4_vcpus;
    KvmAttributes on Shmem: kvm_attributes_on_shmem_with_1_vcpu,
        kvm_attributes_on_shmem_with_2_vcpus, kvm_attributes_on_shmem_with_4_vcpus;
    KvmAttributes on ShmemWithThp: kvm_attributes_on_shmem_thp_with_1_vcpu,
        kvm_attributes_on_shmem_thp_with_2_vcpus, kvm_attributes_on_shmem_thp_with_4_vcpus;
    KvmAttributes on Hugetlb2M: kvm_attributes_on_hugetlb_2m_with_1_vcpu,
        kvm_attributes_on_hugetlb_2m_with_2_vcpus, kvm_attributes_on_hugetlb_2m_with_4_vcpus;
    KvmAttributes on Hugetlb1G: kvm_attributes_on_hugetlb_1g_with_1_vcpu,
        kvm_attributes_on_hugetlb_1g_with_2_vcpus, kvm_attributes_on_hugetlb_1g_with_4_vcpus;
}
