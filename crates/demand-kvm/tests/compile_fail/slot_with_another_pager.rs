// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use std::sync::Arc;

use demand_kvm::{DemandSlotConfig, Engine};
use demand_memory::{GuestMapping, Pager};
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;

fn config(vm: Arc<VmFd>, mapping: GuestMapping, pager: Arc<Pager>) -> DemandSlotConfig {
    let (start, engine) = (GuestAddress(0), Engine::Uffd);
    DemandSlotConfig { vm, number: 0, start, mapping, engine, pager }
}

fn main() {}
