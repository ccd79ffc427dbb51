// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Code shared by the whole-system tests and the demo: it runs the project's own programs as a user
//! would, as separate processes with real images, and checks the results.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

pub mod backend;
pub mod commands;
pub mod compare_memory;
pub mod distance_demo;
pub mod driver;
pub mod file_system;
pub mod linux_vm;
pub mod page_server;
pub mod process;
pub mod pseudo_terminal;
pub mod refusal;
pub mod restore_demo;
pub mod sandbox;
pub mod scenario;
pub mod snapshot_cycle;
pub mod tiny_kernel;
pub mod tiny_snapshot;

use demand_kvm::Engine;
use demand_memory::BackingKind;

pub use test_support::host;

/// Returns the reason why a guest cannot run on demand-paged memory here, if any.
pub fn cannot_run() -> Option<String> {
    if !host::has_kvm() {
        return Some("there is no usable /dev/kvm".into());
    }
    demand_uffd::probe().err().map(|error| error.to_string())
}

/// Returns the number of userfaultfds that a VM opens for its guest, as long as pages are missing.
pub fn userfaultfds_of(engine: Engine, backing: BackingKind) -> usize {
    match backing {
        // The one on which KVM says for what pages it waits.
        _ if demand_kvm::probe().traps_own_accesses(engine) => 1,
        BackingKind::Shmem => 1,
        // The guest's, and the one that creates huge pages with their content.
        _ => 2,
    }
}

/// Returns whether a guest of `size` bytes can run here with this engine and backing. If not,
/// prints the reason as [`host::skip`] does.
///
/// # Panics
///
/// In the lab, if it cannot; unless the lab's kernel is declared to be without the patches that the
/// engine needs.
pub fn can_run(engine: Engine, backing: BackingKind, size: u64) -> bool {
    let usable = |engine| {
        let engines = demand_kvm::probe().engines();
        engines.iter().any(|report| report.engine == engine && report.usable)
    };
    let (needed, free) = (size.div_ceil(backing.unit()), host::free_units(backing));
    let why_not = if let Some(why) = cannot_run() {
        why
    } else if !usable(engine) {
        if engine == Engine::KvmUserfault {
            host::skip_without_patch(&format!("engine {engine}"));
            return false;
        }
        format!("this KVM does not have the engine {engine}")
    } else if free < needed {
        format!("{needed} pages of {backing} are needed, {free} are free")
    } else {
        return true;
    };
    host::skip(&why_not);
    false
}
