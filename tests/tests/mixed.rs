// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The mixed run: guest, back-end and VMM on the same units, in all orders of arrival.

use demand_kvm::Engine;
use demand_memory::BackingKind;
use demand_tests::cannot_run;
use demand_tests::host::{free_units, skip};
use demand_tests::scenario::Scenario;

/// Rounds of each combination; one, unless `rust-vmm-ci/soak` asks for more.
fn rounds() -> u64 {
    std::env::var("MIXED_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

fn mixed(engine: Engine, backing: BackingKind, cpus: u32) {
    if let Some(why) = cannot_run() {
        return skip(&why);
    }
    let probe = demand_kvm::probe();
    if !probe.engines().iter().any(|report| report.engine == engine && report.usable) {
        return skip(&format!("this KVM does not have the engine {engine}"));
    }
    let (needed, free) = ((32 << 20) / backing.unit(), free_units(backing));
    if free < needed {
        return skip(&format!("{needed} pages of {backing} are needed, {free} are free"));
    }
    for round in 0..rounds() {
        let scenario = Scenario::mixed(engine.name(), backing, cpus, 100 + round);
        let report =
            scenario.run(&mut |_, _| {}).unwrap_or_else(|error| panic!("round {round}: {error:#}"));
        assert_eq!(report.engine, engine.name());
        assert_eq!(report.guest.granularity_bytes, 4096, "{report:?}");
        assert_eq!(report.back_end.granularity_bytes, 2 << 20, "{report:?}");
        assert!(report.guest.faults > 100, "{report:?}");
        assert!(report.back_end.faults >= 8, "{report:?}");
        assert!(report.vmm.faults > 10, "{report:?}");
        println!("round {round}:\n{}", report.table());
    }
}

#[test]
fn kvm_userfault_on_hugetlb_2m_with_1_vcpu() {
    mixed(Engine::KvmUserfault, BackingKind::Hugetlb2M, 1);
}

#[test]
fn kvm_userfault_on_hugetlb_2m_with_2_vcpus() {
    mixed(Engine::KvmUserfault, BackingKind::Hugetlb2M, 2);
}

#[test]
fn kvm_userfault_on_shmem_with_1_vcpu() {
    mixed(Engine::KvmUserfault, BackingKind::Shmem, 1);
}

#[test]
fn kvm_userfault_on_shmem_with_2_vcpus() {
    mixed(Engine::KvmUserfault, BackingKind::Shmem, 2);
}

#[test]
fn uffd_on_shmem_with_1_vcpu() {
    mixed(Engine::Uffd, BackingKind::Shmem, 1);
}

#[test]
fn uffd_on_shmem_with_2_vcpus() {
    mixed(Engine::Uffd, BackingKind::Shmem, 2);
}
