// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image whose every word encodes its own address, and a small guest that reads and writes it.
#![allow(dead_code, unused_imports, reason = "each test binary uses a part of it")]
#![allow(unreachable_pub, reason = "a module of each test binary")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use bare_guest::{Mode, start_at};
use demand_kvm::{
    DemandSlot, DemandSlotConfig, Engine, FaultError, FaultHandler, FaultRegion, MarkerFaults,
    PlainSlot, VcpuKick, open_kvm,
};
use demand_memory::{
    BackingKind, Mapping, MemfdBacking, PAGE_SIZE, PageRange, Pager, PagerConfig, Retrier,
    RetryPolicy, Stats,
};
use demand_source::{
    BlockingSource, Completion, Destination, Extent, LocalFile, PageSource, Request, SourceError,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use test_support::host::skip;
use vm_memory::GuestAddress;

mod checks;
mod guest;
mod image;
mod programs;
mod rig;

pub use checks::*;
pub use guest::*;
pub use image::*;
pub use programs::*;
pub use rig::*;

/// Opens KVM if this host has a usable one.
pub fn kvm() -> Option<Kvm> {
    open_kvm().map_err(|error| skip(&error.to_string())).ok()
}

/// Opens KVM if it supports the engine.
pub fn kvm_with(engine: Engine) -> Option<Kvm> {
    let probe = demand_kvm::probe();
    match demand_kvm::resolve(demand_kvm::EngineChoice::Only(engine), &probe) {
        Ok(_) => kvm(),
        Err(error) => {
            skip(&error.to_string());
            None
        }
    }
}

/// Returns the backings that this host has memory for.
pub fn backings(size: u64) -> Vec<BackingKind> {
    let there = |kind: &BackingKind| match MemfdBacking::new(*kind, size)
        .and_then(|backing| demand_memory::Backing::map(&backing))
    {
        Ok(_) => true,
        Err(error) => {
            skip(&error.to_string());
            false
        }
    };
    [BackingKind::Shmem, BackingKind::Hugetlb2M].into_iter().filter(there).collect()
}
