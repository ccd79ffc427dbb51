// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The mixed run at the size of a small VM: 1 GiB of huge pages, and a disk with a real file
//! system. It is a separate test program, because it takes all huge pages of the lab's machine.

use std::path::Path;
use std::time::Duration;

use demand_kvm::Engine;
use demand_memory::BackingKind;
use demand_tests::can_run;
use demand_tests::scenario::{Disk, Scenario};

const MEMORY: u64 = 1 << 30;

/// The guest, the disk's back-end and the VMM access pages of the same 2M units at the same time;
/// at the end a separate process compares every byte of memory and disk.
#[test]
fn a_gigabyte_arrives_in_all_orders() {
    if !can_run(Engine::KvmUserfault, BackingKind::Hugetlb2M, MEMORY) {
        return;
    }
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates");
    let scenario = Scenario {
        stage: "gigabyte".into(),
        memory: MEMORY,
        disk: Disk::FileSystem { of: crates, size: 64 << 20, room: 64 << 20 },
        requests: 600,
        guest: "touches=128".into(),
        limit: Duration::from_secs(900),
        ..Scenario::mixed("kvm-userfault", BackingKind::Hugetlb2M, 2, 2)
    };
    let report = scenario.run(&mut |_, _| {}).unwrap_or_else(|error| panic!("{error:#}"));
    println!("{}", report.table());
    assert_eq!(report.guest.granularity_bytes, 4096);
    assert_eq!(report.back_end.granularity_bytes, BackingKind::Hugetlb2M.unit());
    assert!(report.guest.faults >= 10_000, "{report:?}");
    assert!(report.back_end.faults >= 200, "{report:?}");
}
