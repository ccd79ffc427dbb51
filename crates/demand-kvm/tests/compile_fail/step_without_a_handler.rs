// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use demand_kvm::{DemandVcpu, Step};
use demand_memory::DemandMemory;

fn run<'a>(vcpu: &'a mut DemandVcpu, memory: &DemandMemory) -> Step<'a> {
    vcpu.step(memory).unwrap()
}

fn main() {}
