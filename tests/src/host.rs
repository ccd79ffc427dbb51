// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the machine that a test runs on can do.

use std::fs;

use demand_memory::BackingKind;

/// Whether this is the lab, where nothing may be skipped.
pub fn is_lab() -> bool {
    std::env::var_os("LAB").is_some()
}

/// Says why a test, or a part of it, does not run here. Counted by `rust-vmm-ci/test`.
///
/// # Panics
///
/// In the lab.
pub fn skip(reason: &str) {
    assert!(!is_lab(), "nothing is skipped in the lab: {reason}");
    println!("SKIPPED: {reason}");
}

/// Huge pages of the kind that are free now; a number without bound for ordinary memory.
pub fn free_units(backing: BackingKind) -> u64 {
    if backing == BackingKind::Shmem {
        return u64::MAX;
    }
    let folder = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", backing.unit() >> 10);
    let read = |name: &str| {
        fs::read_to_string(format!("{folder}/{name}"))
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok())
            .unwrap_or(0)
    };
    read("free_hugepages").saturating_sub(read("resv_hugepages"))
}

/// Whether KVM can be opened here.
pub fn has_kvm() -> bool {
    fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}
