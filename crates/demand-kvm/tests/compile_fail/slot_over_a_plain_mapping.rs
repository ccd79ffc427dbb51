// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::sync::Arc;

use demand_kvm::{DemandSlot, DemandSlotConfig, Engine};
use demand_memory::Mapping;
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

fn slot(vm: Arc<VmFd>, mapping: Arc<Mapping>) -> DemandSlot {
    let (start, engine) = (GuestAddress(0), Engine::Uffd);
    DemandSlot::new(DemandSlotConfig { vm, number: 0, start, mapping, engine }).unwrap()
}

fn main() {}
